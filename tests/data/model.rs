//! Imports random logs and compares them with a naive model in memory.

use crate::bench::Bench;
use dfar::data::import::{LogFormat, TimeUnit};
use dfar::data::{CountedRecords, DataError, Dataset, KCore, Part, Repeats, Split};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

#[derive(Debug, Clone)]
struct Case {
    rows: Vec<(u8, u8, i64, bool)>,
    repeats: Repeats,
    k_core: Option<KCore>,
    split: Split,
    exclude_seen: bool,
    sort_memory: usize,
}

fn case() -> impl Strategy<Value = Case> {
    let k_core = (1u32..4, any::<bool>(), any::<bool>()).prop_map(|(k, positive, until_stable)| KCore {
        k,
        on: if positive { CountedRecords::Positive } else { CountedRecords::All },
        until_stable,
    });
    let split = prop_oneof![
        Just(Split::LeaveLast),
        Just(Split::Temporal { train: 0.8, valid: 0.1 }),
        Just(Split::Temporal { train: 0.5, valid: 0.2 }),
        Just(Split::ByUser { train: 0.7, valid: 0.2 }),
    ];
    (
        prop::collection::vec((0u8..9, 0u8..14, -5i64..40, any::<bool>()), 1..140),
        prop_oneof![Just(Repeats::First), Just(Repeats::Keep)],
        prop::option::of(k_core),
        split,
        any::<bool>(),
        // From two events per run to all of them in one.
        prop_oneof![Just(0usize), Just(200), Just(1 << 20)],
    )
        .prop_map(|(rows, repeats, k_core, split, exclude_seen, sort_memory)| Case {
            rows,
            repeats,
            k_core,
            split,
            exclude_seen,
            sort_memory,
        })
}

type Row = (u8, u8, i64, bool);

/// The expected content: users in order of appearance, their events, `[train_end, valid_end]`.
fn model(case: &Case) -> Vec<(u8, Vec<Row>)> {
    let mut rows = case.rows.clone();
    let place = |rows: &[Row], user: u8| rows.iter().position(|row| row.0 == user);
    let order: Vec<u8> = (0..9).filter(|&user| place(&case.rows, user).is_some()).collect();
    rows.sort_by_key(|row| (row.0, row.2));
    if case.repeats == Repeats::First {
        let mut met = HashSet::new();
        rows.retain(|row| met.insert((row.0, row.1)));
    }
    if let Some(rule) = case.k_core {
        loop {
            let before = rows.len();
            for key in [|row: &Row| (0, row.1), |row: &Row| (1, row.0)] {
                let mut counts: HashMap<(u8, u8), u32> = HashMap::new();
                for row in rows.iter().filter(|row| rule.on == CountedRecords::All || row.3) {
                    *counts.entry(key(row)).or_default() += 1;
                }
                rows.retain(|row| counts.get(&key(row)).is_some_and(|&count| count >= rule.k));
            }
            if !rule.until_stable || rows.len() == before {
                break;
            }
        }
    }
    let mut order = order;
    order.sort_by_key(|&user| place(&case.rows, user));
    let history = |user: u8| rows.iter().copied().filter(|row| row.0 == user).collect::<Vec<_>>();
    order.into_iter().map(|user| (user, history(user))).filter(|(_, own)| !own.is_empty()).collect()
}

fn check(case: &Case) -> Result<(), TestCaseError> {
    let mut text = String::from("user\titem\ttime\tlabel\n");
    for (user, item, time, liked) in &case.rows {
        text += &format!("u{user}\ti{item}\t{time}\t{}\n", u8::from(*liked));
    }
    // Two files, divided at any line, are one log.
    let cut = text.match_indices('\n').nth(case.rows.len() / 2).map_or(text.len(), |(place, _)| place + 1);
    let header = &text[..text.find('\n').unwrap() + 1];
    let second = format!("{header}{}", &text[cut..]);
    let mut bench = Bench::new(LogFormat::Csv, &[&text[..cut], &second]);
    let options = &mut bench.options;
    options.columns.user = Some("user".into());
    options.columns.item = Some("item".into());
    options.columns.time = Some("time".into());
    options.columns.label = Some("label".into());
    options.time_unit = TimeUnit::Milliseconds;
    options.repeats = case.repeats;
    options.k_core = case.k_core;
    options.split = case.split;
    options.candidates.exclude_seen = case.exclude_seen;
    options.sort_memory = case.sort_memory;
    let expected = model(case);

    let data = match bench.run() {
        Ok(data) => data,
        Err(DataError::NothingLeft { .. }) => {
            // Leaving the last two events out always leaves training events.
            prop_assert!(expected.is_empty() || case.split != Split::LeaveLast);
            return Ok(());
        }
        Err(DataError::NotEnoughItems { available: 0, .. }) => return Ok(()),
        Err(other) => return Err(TestCaseError::fail(other.to_string())),
    };

    prop_assert_eq!(data.users(), expected.len());
    for (user, (name, own)) in expected.iter().enumerate() {
        let found = data.user(user as u32);
        prop_assert_eq!(data.user_name(user as u32), format!("u{name}"));
        let items: Vec<String> = own.iter().map(|row| format!("i{}", row.1)).collect();
        let names: Vec<&str> = found.items.iter().map(|&item| data.item_name(item)).collect();
        prop_assert_eq!(names, items);
        prop_assert_eq!(found.times, own.iter().map(|row| row.2).collect::<Vec<_>>());
        prop_assert_eq!(found.feedback, own.iter().map(|row| u8::from(row.3)).collect::<Vec<_>>());
    }
    check_items(case, &data, &expected)?;
    check_split(case, &data)?;
    check_groups(case, &data)
}

/// Items are numbered by first appearance in the input, without gaps.
fn check_items(case: &Case, data: &Dataset, expected: &[(u8, Vec<Row>)]) -> Result<(), TestCaseError> {
    let left: HashSet<u8> = expected.iter().flat_map(|(_, own)| own.iter().map(|row| row.1)).collect();
    let mut order = Vec::new();
    for row in &case.rows {
        if left.contains(&row.1) && !order.contains(&row.1) {
            order.push(row.1);
        }
    }
    let names: Vec<String> = (0..data.items() as u32).map(|item| data.item_name(item).to_owned()).collect();
    prop_assert_eq!(names, order.iter().map(|item| format!("i{item}")).collect::<Vec<_>>());
    Ok(())
}

fn check_split(case: &Case, data: &Dataset) -> Result<(), TestCaseError> {
    let mut times: Vec<i64> = Vec::new();
    let mut parts = [0, 0, 0];
    for user in 0..data.users() as u32 {
        let own = data.user(user);
        let length = own.items.len();
        times.extend(own.times);
        match case.split {
            Split::LeaveLast if length < 3 => {
                prop_assert_eq!((own.train_end, own.valid_end), (length, length))
            }
            Split::LeaveLast => prop_assert_eq!((own.train_end, own.valid_end), (length - 2, length - 1)),
            Split::Temporal { .. } => {}
            Split::ByUser { .. } => match (own.train_end, own.valid_end) {
                (train, valid) if train == length && valid == length => parts[0] += 1,
                (0, valid) if valid == length => parts[1] += 1,
                (0, 0) => parts[2] += 1,
                other => prop_assert!(false, "a user is cut at {other:?}"),
            },
        }
    }
    times.sort_unstable();
    match case.split {
        Split::LeaveLast => {}
        Split::Temporal { train, valid } => {
            let cut = |share: f64| times.get((share * times.len() as f64 + 1e-6) as usize).copied();
            let [valid_from, test_from] = [cut(train), cut(train + valid)].map(|cut| cut.unwrap_or(i64::MAX));
            for user in 0..data.users() as u32 {
                let own = data.user(user);
                let before = |from: i64| own.times.iter().filter(|&&time| time < from).count();
                prop_assert_eq!((own.train_end, own.valid_end), (before(valid_from), before(test_from)));
            }
        }
        Split::ByUser { train, valid } => {
            let until = |share: f64| (share * data.users() as f64 + 1e-6) as usize;
            let (first, second) = (until(train), until(train + valid));
            prop_assert_eq!(parts, [first, second - first, data.users() - second]);
        }
    }
    Ok(())
}

fn check_groups(case: &Case, data: &Dataset) -> Result<(), TestCaseError> {
    let popularity = data.train_popularity();
    for part in [Part::Valid, Part::Test] {
        let mut groups = data.groups(part).iter();
        for user in 0..data.users() as u32 {
            let own = data.user(user);
            let events = match part {
                Part::Valid => own.train_end..own.valid_end,
                Part::Test => own.valid_end..own.items.len(),
            };
            for place in events {
                let group = groups.next().expect("every event of the part has a group");
                prop_assert_eq!((group.user, group.event as usize), (user, place));
                for negative in group.negatives {
                    prop_assert!(*negative != own.items[place] && popularity[*negative as usize] > 0);
                    prop_assert!(!case.exclude_seen || !own.items.contains(negative));
                }
            }
        }
        prop_assert!(groups.next().is_none());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn import_equals_the_naive_model(case in case()) {
        check(&case)?;
    }
}
