//! The tables as Markdown and as CSV. In each column of a table the best mean is bold and the
//! second is underlined.

use crate::statistics::Cell;
use crate::table::{Comparison, Line, METRICS, Section, Table, places};
use std::fmt::Write;

/// The tables as Markdown.
pub fn markdown(table: &Table) -> String {
    let mut text = format!(
        "{} liked {} events. Mean and standard deviation over seeds; best in bold, second underlined.\n",
        table.groups, table.part
    );
    let systems = table.section(Section::Systems);
    let references = references(table);
    text.push_str(&rows("feedback, setting", &systems, &references, "DFAR minus row"));
    improvement(&mut text, table);
    if systems.iter().any(|line| line.against.is_some()) {
        text.push_str(
            "\n`DFAR minus row`: mean over users of the difference in AUC; p: two-sided Wilcoxon signed-rank\n\
             test over users (AUC of a user, mean over seeds), corrected by Holm's method.\n",
        );
    }
    let ablations = table.section(Section::Ablations);
    if !ablations.is_empty() {
        let lines: Vec<&Line> = table.dfar().into_iter().chain(ablations).collect();
        let _ = write!(text, "\n## Ablations\n{}", rows("setting", &lines, &[], "DFAR minus row"));
    }
    let blind = table.section(Section::Blind);
    if !blind.is_empty() {
        let heading = "## All events, feedback ignored\n\nThe last columns compare with the row of Table 2.";
        let _ = write!(text, "\n{heading}\n{}", rows("setting", &blind, &[], "with feedback minus row"));
    }
    lengths(&mut text, &systems);
    head_pairs(&mut text, table);
    searches(&mut text, table);
    origins(&mut text, table);
    text
}

/// Popularity and the ceiling as rows.
fn references(table: &Table) -> Vec<(&'static str, [Option<f64>; 4])> {
    let rows = [("popularity", table.popularity), ("ceiling", table.ceiling)];
    rows.into_iter().filter_map(|(name, values)| Some((name, values?))).collect()
}

fn rows(setting: &str, lines: &[&Line], references: &[(&str, [Option<f64>; 4])], less: &str) -> String {
    let mut text = format!("\n| | {setting} | {} | seeds | {less} | p |\n", METRICS.join(" | "));
    text.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for (name, values) in references {
        let cells = values.map(|value| value.map_or("-".to_owned(), |value| format!("{value:.4}")));
        let _ = writeln!(text, "| {name} | | {} | | | |", cells.join(" | "));
    }
    let places: [Vec<Option<usize>>; 4] = std::array::from_fn(|metric| places(lines, metric));
    for (i, line) in lines.iter().enumerate() {
        let cells: [String; 4] = std::array::from_fn(|metric| {
            line.cells[metric].map_or("-".to_owned(), |cell| marked(cell, places[metric][i]))
        });
        let (system, setting, seeds) = (&line.title, &line.setting, line.seeds.len());
        let against = line.against.as_ref();
        let difference = against.map_or(String::new(), |against| format!("{:+.4}", against.difference));
        let p = against.map_or(String::new(), p_value);
        let _ =
            writeln!(text, "| {system} | {setting} | {} | {seeds} | {difference} | {p} |", cells.join(" | "));
    }
    text
}

fn marked(Cell { mean, deviation }: Cell, place: Option<usize>) -> String {
    let mean = match place {
        Some(0) => format!("**{mean:.4}**"),
        Some(1) => format!("<u>{mean:.4}</u>"),
        _ => format!("{mean:.4}"),
    };
    deviation.map_or(mean.clone(), |deviation| format!("{mean} ± {deviation:.4}"))
}

/// The corrected p-value, or why there is none.
pub fn p_value(against: &Comparison) -> String {
    match against.p_holm {
        None => "too few users".to_owned(),
        Some(p) if p < 1e-4 => format!("{p:.0e}"),
        Some(p) => format!("{p:.4}"),
    }
}

/// DFAR over the best other system, as the last row.
fn improvement(text: &mut String, table: &Table) {
    if table.improvement.iter().all(Option::is_none) {
        return;
    }
    let cells = table.improvement.each_ref().map(|improvement| match improvement {
        Some(improvement) => format!("{:+.2} % ({})", improvement.percent, improvement.over),
        None => "-".to_owned(),
    });
    let _ = writeln!(text, "| DFAR over the best other | | {} | | | |", cells.join(" | "));
}

/// Figure 5 as a table.
fn lengths(text: &mut String, lines: &[&Line]) {
    let Some(first) = lines.iter().find(|line| line.by_length.len() > 1) else { return };
    let titles: Vec<String> = (first.by_length.iter())
        .map(|bucket| format!("{} ({})", range(bucket.from, bucket.to), bucket.groups))
        .collect();
    let _ = writeln!(text, "\n## AUC by history length\n\nEvents before the target (groups).\n");
    let _ = writeln!(text, "| | setting | {} |", titles.join(" | "));
    let _ = writeln!(text, "|---|---|{}", "---|".repeat(titles.len()));
    for line in lines {
        let cells =
            line.by_length.iter().map(|bucket| bucket.auc.map_or("-".to_owned(), |auc| marked(auc, None)));
        let cells: Vec<String> = cells.collect();
        let _ = writeln!(text, "| {} | {} | {} |", line.title, line.setting, cells.join(" | "));
    }
}

/// A history length: `0-9`, `10-`.
pub fn range(from: u64, to: Option<u64>) -> String {
    to.map_or(format!("{from}-"), |to| format!("{from}-{to}"))
}

/// Figure 4 as a table.
fn head_pairs(text: &mut String, table: &Table) {
    if table.head_pairs.is_empty() {
        return;
    }
    text.push_str("\n## Attention weight by feedback\n\n");
    text.push_str(
        "Mean weight of a pair of events in the history encoder, all heads together, over the test\n",
    );
    text.push_str("histories and the seeds. Weights that the label mask drops count as 0.\n\n");
    text.push_str("| | skipped to skipped | skipped to liked | liked to skipped | liked to liked |\n");
    text.push_str("|---|---|---|---|---|\n");
    for pairs in &table.head_pairs {
        let [[a, b], [c, d]] = pairs.mean;
        let _ = writeln!(text, "| {} | {a:.5} | {b:.5} | {c:.5} | {d:.5} |", pairs.title);
    }
}

fn searches(text: &mut String, table: &Table) {
    if table.searches.is_empty() {
        return;
    }
    text.push_str(
        "\n## Settings\n\nChosen by validation AUC with the first seed. Setting 0 is the given one.\n",
    );
    text.push_str(
        "\n| | settings | chosen | values | validation AUC | of setting 0 |\n|---|---|---|---|---|---|\n",
    );
    for search in &table.searches {
        let best = &search.settings[search.chosen];
        let values = best.values.iter().map(|(name, value)| format!("{name} {value}"));
        let values: Vec<String> = values.collect();
        let auc = |auc: Option<f64>| auc.map_or("-".to_owned(), |auc| format!("{auc:.4}"));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            search.system.title(),
            search.settings.len(),
            search.chosen,
            values.join(", "),
            auc(best.valid_auc),
            auc(search.settings[0].valid_auc)
        );
    }
}

fn origins(text: &mut String, table: &Table) {
    text.push('\n');
    for origin in &table.origins {
        let hours = origin.seconds / 3600.0;
        let _ = writeln!(text, "- {} runs, {hours:.2} h together:\n  {}.", origin.runs, origin.words);
    }
}

/// As CSV, one line for each system and setting; an empty field where there is no value.
pub fn csv(table: &Table) -> String {
    let mut text = "table,system,setting,seeds".to_owned();
    METRICS.iter().for_each(|metric| {
        let _ = write!(text, ",{metric},{metric} deviation");
    });
    text.push_str(",users,difference,p,p Holm,seconds\n");
    let field = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    for line in &table.lines {
        let section = match line.section {
            Section::Systems => "systems",
            Section::Ablations => "ablations",
            Section::Blind => "blind",
        };
        // Quoted if it has a comma, as that of DFAR without two parts or with a half-life.
        let title = if line.title.contains(',') { format!("\"{}\"", line.title) } else { line.title.clone() };
        let _ = write!(text, "{section},{title},{},{}", line.setting, line.seeds.len());
        for cell in line.cells {
            let (mean, deviation) = (cell.map(|c| c.mean), cell.and_then(|c| c.deviation));
            let _ = write!(text, ",{},{}", field(mean), field(deviation));
        }
        let against = line.against;
        let users = against.map_or(String::new(), |against| against.users.to_string());
        let difference = field(against.map(|against| against.difference));
        let (p, p_holm) = (field(against.and_then(|a| a.p)), field(against.and_then(|a| a.p_holm)));
        let _ = writeln!(text, ",{users},{difference},{p},{p_holm},{}", line.seconds);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Row;
    use crate::system::Kind;
    use crate::table::tests::{line, table};

    #[test]
    fn the_best_is_bold_and_the_second_underlined() {
        let against =
            Comparison { users: 30, differing: 20, difference: 0.2, p: Some(0.01), p_holm: Some(0.02) };
        let mut din = line(Row::Baseline(Kind::Din), "positive-only", [0.5, 0.7]);
        din.against = Some(against);
        let lines = vec![
            din,
            line(Row::Dfar, "mixed", [0.8, 0.8]),
            line(Row::Baseline(Kind::Dfn), "mixed", [0.1, 0.3]),
            line(Row::Dfar, "mixed no-fha", [0.9, 0.9]),
        ];
        let table = table(lines);
        let text = markdown(&table);
        let has = |expected: &str| assert!(text.contains(expected), "no {expected} in {text}");
        has("| popularity | | 0.9000 | 0.9000 | 0.9000 | 0.9000 | | | |\n");
        let a = "<u>0.6000</u> ± 0.1414";
        has(&format!("| DIN | positive-only | {a} | {a} | {a} | - | 2 | +0.2000 | 0.0200 |\n"));
        has("| DFAR | mixed | **0.8000** ± 0.0000 |");
        has("| DFN | mixed | 0.2000 ± 0.1414 |");
        has("## Ablations\n\n");
        has("| DFAR w/o FHA | mixed no-fha | **0.9000** ± 0.0000 |");
        has("| DFAR over the best other | | +33.33 % (DIN) | +33.33 % (DIN) | +33.33 % (DIN) | - | | | |\n");
        has("| | setting | 0-9 (5) | 10- (5) |\n");
        has("| DFAR | 0.10000 | 0.20000 | 0.30000 | 0.40000 |\n");
        has("- 3 runs, 2.00 h together:\n  a machine.\n");
        let csv = csv(&table);
        assert!(csv.lines().nth(1).is_some_and(|line| line.ends_with(",30,0.2,0.01,0.02,1.5")), "{csv}");
        assert!(
            csv.lines().nth(2).is_some_and(|line| line.starts_with("systems,DFAR,mixed,2,0.8,0,")),
            "{csv}"
        );
        let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
        assert_eq!(columns, [17; 5]);
    }
}
