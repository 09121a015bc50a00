//! Real logs from `../shared/data`. Without them, every test prints that it is skipped.

use crate::skip::skip;
use dfar::data::import::{ImportOptions, LogFormat, import};
use dfar::data::statistics::statistics;
use dfar::data::{Dataset, Part};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

fn log(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data").join(name);
    if !path.exists() {
        skip(format_args!("{} is not there", path.display()));
        return None;
    }
    Some(path)
}

fn made(options: &ImportOptions) -> Dataset {
    import(options, &()).unwrap();
    Dataset::open(&options.output).unwrap()
}

#[test]
fn movielens_100k() {
    let Some(path) = log("ml-100k.u.data") else { return };
    let text = std::fs::read_to_string(&path).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    let distinct = |column: usize| rows.iter().map(|row| row[column]).collect::<HashSet<_>>().len();
    let liked = rows.iter().filter(|row| row[2] > "3").count() as u64;

    let folder = tempfile::tempdir().unwrap();
    let mut options = ImportOptions::new(LogFormat::MovieLens, vec![path], folder.path().join("ml.dfar"));
    options.k_core = None;
    let whole = statistics(&made(&options));
    assert_eq!((whole.users, whole.items), (distinct(0), distinct(1)));
    assert_eq!((whole.positive, whole.negative), (liked, rows.len() as u64 - liked));
    // From the description of the data set: 943 users, 1,682 items, 100,000 ratings. (Copies differ
    // by a few rows.)
    assert_eq!(whole.items, 1682);
    assert!(whole.users.abs_diff(943) <= 1 && rows.len().abs_diff(100_000) <= 10);

    let filtered = ImportOptions::new(LogFormat::MovieLens, options.inputs, options.output);
    let data = made(&filtered);
    let mut items: HashMap<&str, u32> = HashMap::new();
    for row in &rows {
        *items.entry(row[1]).or_default() += 1;
    }
    let mut users: HashMap<&str, Vec<(i64, &str)>> = HashMap::new();
    for row in rows.iter().filter(|row| items[row[1]] >= 10) {
        users.entry(row[0]).or_default().push((row[3].parse().unwrap(), row[1]));
    }
    users.retain(|_, events| events.len() >= 10);
    assert_eq!((data.users(), data.users()), (943, users.len()));
    for (name, mut events) in users {
        events.sort_by_key(|event| event.0);
        let own = data.user(data.find_user(name).unwrap());
        let names: Vec<&str> = own.items.iter().map(|&item| data.item_name(item)).collect();
        assert_eq!(names, events.iter().map(|event| event.1).collect::<Vec<_>>(), "user {name}");
        assert_eq!((own.train_end, own.valid_end), (names.len() - 2, names.len() - 1));
    }
    assert_eq!(data.groups(Part::Test).len(), 943);
}

#[test]
fn kuairand_likes_and_hates() {
    let Some(path) = log("kuairand-likes-hates.tsv.gz") else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut options = ImportOptions::new(LogFormat::KuaiRand, vec![path], folder.path().join("k.dfar"));
    options.k_core = None;
    options.repeats = dfar::data::Repeats::Keep;
    // 33,745 likes and 8,083 hates by `label`, 19,320 effective views by `long_view`.
    for (label, positive) in [("label", 33_745), ("long_view", 19_320)] {
        options.columns.label = Some(label.to_owned());
        let data = made(&options);
        let all = statistics(&data);
        assert_eq!((all.users, all.items), (664, 9359));
        assert_eq!((all.positive, all.negative), (positive, 41_828 - positive));
        let last_train = (0..data.users() as u32).filter_map(|user| {
            let own = data.user(user);
            own.times[..own.train_end].last().copied()
        });
        let first_test = (0..data.users() as u32).filter_map(|user| {
            let own = data.user(user);
            own.times[own.valid_end..].first().copied()
        });
        assert!(last_train.max() < first_test.min(), "the split is in time");
        let test = (all.test.liked + all.test.skipped) as f64;
        assert!((test / 41_828.0 - 0.1).abs() < 0.001, "{test} test events");
    }
}
