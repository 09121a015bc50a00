//! Logs with damaged lines: every line is read or reported, damage is limited to its line, and no
//! line is read wrong.

use crate::bench::Bench;
use dfar::data::import::{LogFormat, TimeUnit};
use dfar::data::{Repeats, Source};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// A way to write events as lines.
#[derive(Debug, Clone, Copy)]
struct Writing {
    format: LogFormat,
    header: &'static str,
    delimiter: &'static str,
    line: fn(user: usize, item: usize, label: u8, time: i64) -> String,
}

const WRITINGS: [Writing; 10] = [
    Writing {
        format: LogFormat::MovieLens,
        header: "",
        delimiter: "\t",
        line: |user, item, label, time| format!("{user}\t{item}\t{}\t{time}", 2 + 3 * label),
    },
    Writing {
        format: LogFormat::MovieLens,
        header: "",
        delimiter: "::",
        line: |user, item, label, time| format!("{user}::{item}::{}::{time}", 2 + 3 * label),
    },
    Writing {
        format: LogFormat::MovieLens,
        header: "userId,movieId,rating,timestamp",
        delimiter: ",",
        line: |user, item, label, time| format!("{user},{item},{}.5,{time}", 2 + label),
    },
    Writing {
        format: LogFormat::Amazon,
        header: "",
        delimiter: ",",
        line: |user, item, label, time| format!("AUSERUSER{user:04},B{item:09},{}.0,{time}", 3 + 2 * label),
    },
    Writing {
        format: LogFormat::Amazon,
        header: "user_id,parent_asin,rating,timestamp",
        delimiter: ",",
        line: |user, item, label, time| format!("AUSERUSER{user:04},B{item:09},{}.0,{time}", 3 + 2 * label),
    },
    Writing {
        format: LogFormat::KuaiRand,
        header: "user_id,video_id,date,hourmin,time_ms,is_click,long_view",
        delimiter: ",",
        line: |user, item, label, time| format!("{user},{item},20220408,400,{time},1,{label}"),
    },
    Writing {
        format: LogFormat::KuaiRec,
        header: "user_id,video_id,play_duration,timestamp,watch_ratio",
        delimiter: ",",
        line: |user, item, label, time| format!("{user},{item},13838,{time}.0,{}.75", 1 + label),
    },
    Writing {
        format: LogFormat::Inter,
        header: "user_id:token\titem_id:token\trating:float\ttimestamp:float",
        delimiter: "\t",
        line: |user, item, label, time| format!("u{user}\ti{item}\t{}\t{time}", 3 + label),
    },
    Writing {
        format: LogFormat::Csv,
        header: "title;who;what;liked;when",
        delimiter: ";",
        line: |user, item, label, time| format!("Lamp, \"small\";u{user};i{item};{label};{time}"),
    },
    Writing {
        format: LogFormat::Amazon,
        header: "",
        delimiter: ", ",
        line: |user, item, label, time| {
            let rating = 3 + 2 * label;
            format!(
                "{{\"user_id\": \"A{user}\", \"asin\": \"B{item}\", \"rating\": {rating}, \"timestamp\": {time}}}"
            )
        },
    },
];

/// Damage to a line.
#[derive(Debug, Clone)]
enum Damage {
    None,
    /// A quote before the field with this number.
    OpenQuote(usize),
    /// An additional field before that number.
    ExtraField(usize),
    /// Empty fields at the end.
    EmptyFields(usize),
    /// No line end after it.
    Glued,
    /// Only this percentage of its bytes.
    Cut(usize),
    /// A blank line before it.
    BlankBefore(&'static str),
    /// A byte order mark before it.
    Mark,
    /// A carriage return at its end.
    CarriageReturn,
    /// Blanks around the field with this number.
    Blanks(usize),
    /// The field with this number in quotes.
    Quoted(usize),
    /// Another header before it.
    Header,
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        6 => Just(Damage::None),
        1 => (0usize..4).prop_map(Damage::OpenQuote),
        1 => (0usize..5).prop_map(Damage::ExtraField),
        1 => (1usize..4).prop_map(Damage::EmptyFields),
        1 => Just(Damage::Glued),
        1 => (1usize..100).prop_map(Damage::Cut),
        1 => prop_oneof![Just(""), Just("\r"), Just("  \t ")].prop_map(Damage::BlankBefore),
        1 => Just(Damage::Mark),
        1 => Just(Damage::CarriageReturn),
        1 => (0usize..4).prop_map(Damage::Blanks),
        1 => (0usize..4).prop_map(Damage::Quoted),
        1 => Just(Damage::Header),
    ]
}

/// The line with its damage, including added lines before it, and whether its event must still be
/// read.
fn apply(writing: &Writing, line: &str, damage: &Damage) -> (String, bool) {
    let json = line.starts_with('{');
    let field = |number: usize, change: &dyn Fn(&str) -> String| {
        let mut fields: Vec<String> = line.split(writing.delimiter).map(str::to_owned).collect();
        let number = number.min(fields.len() - 1);
        fields[number] = change(&fields[number]);
        fields.join(writing.delimiter)
    };
    let end = |line: String| format!("{line}\n");
    match *damage {
        // Kinds of damage that do not apply to JSON.
        Damage::EmptyFields(_) | Damage::Blanks(_) | Damage::Quoted(_) | Damage::Header if json => {
            (end(line.to_owned()), true)
        }
        Damage::None => (end(line.to_owned()), true),
        Damage::OpenQuote(number) => (end(field(number, &|text| format!("\"{text}"))), false),
        Damage::ExtraField(number) => {
            (end(field(number, &|text| format!("extra{}{text}", writing.delimiter))), false)
        }
        Damage::EmptyFields(count) => (end(format!("{line}{}", writing.delimiter.repeat(count))), true),
        Damage::Glued => (line.to_owned(), false),
        // The last field may be the time; a part of it is another time.
        Damage::Cut(hundredths) => (end(line[..line.len() * hundredths / 100].to_owned()), false),
        Damage::BlankBefore(blank) => (format!("{blank}\n{line}\n"), true),
        Damage::Mark => (format!("\u{feff}{line}\n"), true),
        Damage::CarriageReturn => (format!("{line}\r\n"), true),
        Damage::Blanks(number) => (end(field(number, &|text| format!(" {text}  "))), true),
        Damage::Quoted(number) => {
            (end(field(number, &|text| format!("\"{}\"", text.replace('"', "\"\"")))), true)
        }
        Damage::Header => (format!("{}\n{line}\n", writing.header), true),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_line_is_read_or_reported(
        which in 0..WRITINGS.len(),
        damages in prop::collection::vec(damage(), 1..12),
    ) {
        let writing = &WRITINGS[which];
        // Clean lines first, from which the reader finds the columns.
        let clean = std::iter::repeat_n(&Damage::None, 4);
        let mut text = format!("\r\n{}\n", writing.header);
        let mut undamaged = text.clone();
        let mut whole = BTreeSet::new();
        let mut glued = false;
        for (row, damage) in clean.chain(&damages).enumerate() {
            let time = 1_600_000_000 + row as i64;
            let line = (writing.line)(row % 3, 10 + row, (row % 2) as u8, time);
            let (damaged, must) = apply(writing, &line, damage);
            text += &damaged;
            undamaged += &format!("{line}\n");
            if must && !glued {
                whole.insert(time * 1000);
            }
            glued = matches!(damage, Damage::Glued);
        }
        let lines = text
            .split('\n')
            .map(|line| line.trim_start_matches('\u{feff}').trim_ascii())
            .filter(|line| !line.is_empty() && *line != writing.header)
            .count() as u64;

        let (source, read) = import_all(writing, &text);
        let (_, events) = import_all(writing, &undamaged);
        prop_assert_eq!(source.rows, lines, "{}", text);
        prop_assert_eq!(read.len() as u64 + source.bad_rows, lines, "{}", text);
        let missing: Vec<_> = events.difference(&read).filter(|event| whole.contains(&event.2)).collect();
        prop_assert!(missing.is_empty(), "not read: {:?} of\n{}", missing, text);
        // A line cut within its last field looks complete.
        let cut = damages.iter().any(|damage| matches!(damage, Damage::Cut(_)));
        let invented: Vec<_> = read.difference(&events).collect();
        prop_assert!(cut || invented.is_empty(), "read: {:?} of\n{}", invented, text);
    }
}

type Events = BTreeSet<(String, String, i64, u8)>;

/// The imported events of a log, and the counts.
fn import_all(writing: &Writing, text: &str) -> (Source, Events) {
    let mut bench = Bench::new(writing.format, &[text]);
    bench.options.skip_bad_rows = u64::MAX;
    bench.options.repeats = Repeats::Keep;
    bench.options.candidates.negatives = 0;
    // A truncated time must not look like another unit.
    bench.options.time_unit = TimeUnit::Seconds;
    if writing.format == LogFormat::Csv {
        let column = |name: &str| Some(name.to_owned());
        let columns = &mut bench.options.columns;
        (columns.user, columns.item, columns.time, columns.label) =
            (column("who"), column("what"), column("when"), column("liked"));
    }
    let events = bench.events().into_iter().collect();
    (bench.run().unwrap().protocol().source.clone(), events)
}
