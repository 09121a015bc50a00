//! Packing: each index against its definition, and each error.

use dfar::batch::{Batch, BatchError, Group, History};
use proptest::prelude::*;

fn history() -> impl Strategy<Value = History> {
    (0usize..12).prop_flat_map(|length| {
        let group = (0..=length as u32, prop::collection::vec(0u32..9, 0..5));
        let events = prop::collection::vec((0u32..9, 0u8..2), length);
        (events, prop::collection::vec(group, 0..5)).prop_map(|(events, mut groups)| {
            groups.sort_by_key(|g| g.0);
            let (items, labels) = events.into_iter().unzip();
            let group = |(length, candidates): (u32, Vec<u32>)| Group {
                length,
                targets: (0..candidates.len()).map(|i| (i == 0) as u8 as f32).collect(),
                candidates,
            };
            History { items, labels, groups: groups.into_iter().map(group).collect() }
        })
    })
}

proptest! {
    #[test]
    fn packed_indices_match_their_definitions(histories in prop::collection::vec(history(), 0..6)) {
        let b = Batch::pack(&histories).unwrap();
        prop_assert_eq!(b.histories(), histories.len());
        let mut row = 0;
        let mut group = 0;
        for (h, history) in histories.iter().enumerate() {
            let tokens = b.cu_seqlens[h] as usize..b.cu_seqlens[h + 1] as usize;
            prop_assert_eq!(&b.item[tokens.clone()], &history.items[..]);
            prop_assert_eq!(&b.label[tokens.clone()], &history.labels[..]);
            prop_assert!(b.position[tokens.clone()].iter().copied().eq(0..history.items.len() as u32));
            for (f, split) in b.split.iter().enumerate() {
                let own = &split.token[split.cu_seqlens[h] as usize..split.cu_seqlens[h + 1] as usize];
                let expected: Vec<u32> = tokens.clone().filter(|&t| b.label[t] as usize == f).map(|t| t as u32).collect();
                prop_assert_eq!(own, &expected[..]);
            }
            prop_assert_eq!(b.group_offsets[h] as usize, group);
            for g in &history.groups {
                prop_assert_eq!(b.group_length[group], g.length);
                for (f, split) in b.split.iter().enumerate() {
                    let count = history.labels[..g.length as usize].iter().filter(|&&l| l as usize == f).count();
                    prop_assert_eq!(split.count[group] as usize, count);
                }
                prop_assert_eq!(b.row_offsets[group] as usize, row);
                for (&candidate, &target) in g.candidates.iter().zip(&g.targets) {
                    let pair = b.row_pair[row];
                    prop_assert!((b.pair_offsets[h]..b.pair_offsets[h + 1]).contains(&pair));
                    prop_assert_eq!(b.pair_item[pair as usize], candidate);
                    prop_assert_eq!((b.row_group[row] as usize, b.row_length[row], b.target[row]), (group, g.length, target));
                    row += 1;
                }
                group += 1;
            }
        }
        prop_assert_eq!((b.rows(), b.groups()), (row, group));
        for pair in 0..b.pairs() {
            let rows = &b.pair_rows.members[b.pair_rows.offsets[pair] as usize..b.pair_rows.offsets[pair + 1] as usize];
            prop_assert!(!rows.is_empty() && rows.iter().all(|&r| b.row_pair[r as usize] as usize == pair));
            let longest = rows.iter().map(|&r| b.row_length[r as usize]).max().unwrap();
            prop_assert_eq!(b.score_offsets[pair + 1] - b.score_offsets[pair], longest);
        }
        prop_assert_eq!(b.pair_rows.members.len(), b.rows());
        // Each distinct item occurs once, with all its tokens and pairs.
        let holders: Vec<u32> = b.item.iter().chain(&b.pair_item).copied().collect();
        prop_assert!(b.touched_item.row.is_sorted_by(|a, b| a < b));
        for (i, &item) in b.touched_item.row.iter().enumerate() {
            let source = &b.touched_item.source;
            let members = &source.members[source.offsets[i] as usize..source.offsets[i + 1] as usize];
            let expected: Vec<u32> = (0..holders.len() as u32).filter(|&m| holders[m as usize] == item).collect();
            prop_assert_eq!(members, &expected[..]);
        }
        prop_assert_eq!(b.touched_item.source.members.len(), holders.len());
        prop_assert_eq!(&b.touched_label.row, &[0, 1]);
    }
}

#[test]
fn errors_name_the_invalid_history() {
    let group = |length| Group { length, candidates: vec![1], targets: vec![1.0] };
    let good = History { items: vec![4, 5], labels: vec![0, 1], groups: vec![group(1), group(2)] };
    let pack = |change: &dyn Fn(&mut History)| {
        let mut bad = good.clone();
        change(&mut bad);
        Batch::pack(&[good.clone(), bad]).unwrap_err()
    };
    assert_eq!(pack(&|h| h.labels.truncate(1)), BatchError::Labels { history: 1, items: 2, labels: 1 });
    assert_eq!(pack(&|h| h.labels[1] = 2), BatchError::Label { history: 1, event: 1, label: 2 });
    assert_eq!(
        pack(&|h| h.groups[1].length = 3),
        BatchError::GroupLength { history: 1, group: 1, length: 3, events: 2 }
    );
    assert_eq!(
        pack(&|h| h.groups.swap(0, 1)),
        BatchError::GroupLength { history: 1, group: 1, length: 1, events: 2 }
    );
    assert_eq!(
        pack(&|h| h.groups[0].targets.clear()),
        BatchError::Targets { history: 1, group: 0, candidates: 1, targets: 0 }
    );
}
