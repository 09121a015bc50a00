//! The metrics as text.

use super::{Evaluation, RunReport};
use dfar::evaluate::metrics::Metrics;
use dfar::evaluate::{self, PartReport};
use std::fmt::Write;

/// Aligned columns: the first to the left, the others to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            // A width in a format string is limited to 65,535, and a cell may hold a longer id.
            let padding = std::iter::repeat_n(' ', widths[c] - cell.chars().count());
            if c == 0 {
                line.push_str(cell);
                line.extend(padding);
            } else {
                line.push_str("  ");
                line.extend(padding);
                line.push_str(cell);
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Test metrics beside popularity and the ceiling, then by history length, then those of skipped
/// events. `negatives` is the number of stored negatives per group.
pub fn evaluation_text(evaluation: &Evaluation, negatives: usize) -> String {
    let mut text = String::new();
    let Evaluation { test, valid, popularity, ceiling } = evaluation;
    match (test, valid) {
        (Some(test), _) => part_text(
            &mut text,
            "test",
            test,
            popularity.test.as_ref(),
            ceiling.as_ref().and_then(|c| c.test.as_ref()),
        ),
        (None, Some(valid)) => part_text(
            &mut text,
            "validation",
            valid,
            popularity.valid.as_ref(),
            ceiling.as_ref().and_then(|c| c.valid.as_ref()),
        ),
        (None, None) => text.push_str(&format!("no metrics: {}\n", evaluate::no_metrics(negatives))),
    }
    text
}

fn part_text(
    text: &mut String,
    part: &str,
    report: &PartReport,
    popularity: Option<&Metrics>,
    ceiling: Option<&Metrics>,
) {
    let PartReport { liked, skipped, liked_above_skipped, by_length } = report;
    let negatives = liked.rows / liked.groups - 1;
    let _ = writeln!(
        text,
        "{part}: {} liked events, each against {negatives} sampled items",
        count(liked.groups)
    );
    let mut rows = vec![header("")];
    rows.extend(popularity.map(|m| line("popularity", m)));
    rows.push(line("DFAR", liked));
    rows.extend(ceiling.map(|m| line("ceiling", m)));
    text.push_str(&table(&rows));
    if liked.gauc_users_left_out > 0 {
        let _ =
            writeln!(text, "GAUC leaves out {} users with one class only", count(liked.gauc_users_left_out));
    }
    if by_length.len() > 1 {
        let mut rows = vec![header("history")];
        rows[0].push("events".into());
        for bucket in by_length {
            let range = match bucket.to {
                Some(to) => format!("{}-{to}", bucket.from),
                None => format!("{}-", bucket.from),
            };
            let mut row = line(&range, &bucket.metrics);
            row.push(count(bucket.metrics.groups));
            rows.push(row);
        }
        let _ = write!(text, "\nby history length\n{}", table(&rows));
    }
    if let Some(skipped) = skipped {
        let _ = write!(
            text,
            "\nskipped targets against their negatives ({} groups, lower is better): AUC {:.4}",
            count(skipped.groups),
            skipped.auc
        );
        if let Some(auc) = liked_above_skipped {
            let _ = write!(text, "; liked against skipped targets: AUC {auc:.4}");
        }
        text.push('\n');
    }
}

fn header(first: &str) -> Vec<String> {
    [first, "AUC", "MRR", "NDCG@10", "GAUC"].map(String::from).to_vec()
}

fn line(name: &str, m: &Metrics) -> Vec<String> {
    let gauc = m.gauc.map_or_else(|| "-".to_owned(), |g| format!("{g:.4}"));
    vec![name.to_owned(), format!("{:.4}", m.auc), format!("{:.4}", m.mrr), format!("{:.4}", m.ndcg), gauc]
}

/// A number with thousands separated.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl std::fmt::Display for RunReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&evaluation_text(&self.evaluation, self.data.protocol.candidates.negatives))?;
        writeln!(
            f,
            "\nbest epoch {} of {}; {} parameters; {} instances/s; {:.1} s in all",
            self.best_epoch,
            self.epochs,
            count(self.parameters),
            count(self.instances_per_second.round() as usize),
            self.seconds
        )?;
        let size = &self.epoch_size;
        writeln!(
            f,
            "one epoch: {} targets in {} shared passes and {} windows, {} tokens, {} instances",
            count(size.targets),
            count(size.shared_passes),
            count(size.windows),
            count(size.tokens),
            count(size.rows)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated() {
        assert_eq!([0, 999, 1000, 1234567].map(count), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn cells_may_be_longer_than_a_format_width() {
        let long = "x".repeat(70_000);
        let text = table(&[vec!["a".into(), long.clone()], vec![long.clone(), "b".into()]]);
        assert_eq!(text.lines().map(str::len).collect::<Vec<_>>(), [140_002, 140_002]);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["", "AUC"], ["long name", "0.5"]].map(|r| r.map(String::from).to_vec());
        assert_eq!(table(&rows), "           AUC\nlong name  0.5\n");
    }
}
