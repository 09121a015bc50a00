//! Imports a CSV log into a `.dfar` file and reads it: users, events, the split, the evaluation
//! groups.
//!
//!     cargo run --release --example read_dfar

use dfar::data::import::{ImportOptions, LogFormat, import};
use dfar::data::{Dataset, Part, Split};
use std::error::Error;

const LOG: &str = "\
user,item,liked,time
ann,tea,1,100
ann,milk,0,200
ann,cake,1,300
bob,milk,1,150
bob,tea,0,250
bob,rum,1,350
";

/// Imports, opens, prints.
pub fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let (log, path) = (folder.path().join("log.csv"), folder.path().join("log.dfar"));
    std::fs::write(&log, LOG)?;

    // The same as `dfar-data import`.
    let mut options = ImportOptions::new(LogFormat::Csv, vec![log], path.clone());
    options.columns.user = Some("user".to_owned());
    options.columns.item = Some("item".to_owned());
    options.columns.label = Some("liked".to_owned());
    options.columns.time = Some("time".to_owned());
    options.k_core = None; // keep rare items and users
    options.split = Split::LeaveLast; // each user's last event is tested, the one before validates
    options.candidates.negatives = 1;
    import(&options, &())?; // () shows no progress

    // The file is memory-mapped and checked once; users and items are numbered from 0.
    let data = Dataset::open(&path)?;
    println!("{} users, {} items, {} events", data.users(), data.items(), data.events());
    for user in 0..data.users() as u32 {
        let events = data.user(user); // oldest first
        for (&item, &feedback) in events.items.iter().zip(events.feedback) {
            let verb = if feedback == 1 { "liked" } else { "skipped" };
            println!("{} {verb} {}", data.user_name(user), data.item_name(item));
        }
    }
    let ann = data.find_user("ann").ok_or("ann is in the log")?;
    assert_eq!(data.user(ann).feedback, [1, 0, 1]);
    assert_eq!(data.user(ann).times, [100_000, 200_000, 300_000]); // milliseconds

    // Each test event has a group: its item and the negatives that every model is scored against.
    for group in data.groups(Part::Test).iter() {
        let events = data.user(group.user);
        let names: Vec<&str> = group.negatives.iter().map(|&item| data.item_name(item)).collect();
        let target = data.item_name(events.items[group.event as usize]);
        println!("test: {} chose {target}; negatives {names:?}", data.user_name(group.user));
    }
    assert_eq!(data.groups(Part::Test).len(), 2);
    Ok(())
}
