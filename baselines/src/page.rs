//! The comparison as one HTML page without external files, for light and dark screens.

use crate::markdown::{p_value, range};
use crate::statistics::Cell;
use crate::svg::{Bar, Series, bars, escape, heat, panel};
use crate::table::{Line, METRICS, Section, Table, places};
use std::fmt::Write;

const STYLE: &str = include_str!("page.css");

/// The page. `title` names the data set, `about` describes it.
pub fn page(table: &Table, title: &str, about: &str) -> String {
    let mut text = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{0}: comparison</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>{0}</h1>\n<p>{1} {2} liked {3} events, each against sampled items.</p>\n",
        escape(title),
        escape(about),
        table.groups,
        table.part
    );
    systems(&mut text, table);
    ablations(&mut text, table);
    blind(&mut text, table);
    curves(&mut text, table);
    lengths(&mut text, table);
    head_pairs(&mut text, table);
    settings(&mut text, table);
    origins(&mut text, table);
    text.push_str("</main>\n</body>\n</html>\n");
    text
}

fn systems(text: &mut String, table: &Table) {
    let lines = table.section(Section::Systems);
    text.push_str(
        "<h2>Systems (Table 2)</h2>\n<p>Mean ± standard deviation over seeds; best bold, second underlined.",
    );
    if lines.iter().any(|line| line.against.is_some()) {
        text.push_str(
            " <em>DFAR minus row</em>: mean over users of the difference in AUC. <em>p</em>: two-sided Wilcoxon \
             signed-rank test over users, Holm's correction.",
        );
    }
    text.push_str("</p>\n");
    let references = [("popularity", table.popularity), ("ceiling", table.ceiling)];
    rows(text, &lines, &references, "DFAR minus row");
    let words = METRICS.iter().zip(&table.improvement).filter_map(|(metric, improvement)| {
        let improvement = improvement.as_ref()?;
        Some(format!("{metric} {:+.2} % ({})", improvement.percent, escape(&improvement.over)))
    });
    let words: Vec<String> = words.collect();
    if !words.is_empty() {
        let _ = writeln!(text, "<p>DFAR over the best other system: {}.</p>", words.join(", "));
    }
    chart(text, &lines);
}

fn ablations(text: &mut String, table: &Table) {
    let without = table.section(Section::Ablations);
    if without.is_empty() {
        return;
    }
    let lines: Vec<&Line> = table.dfar().into_iter().chain(without).collect();
    text.push_str("<h2>Ablations (Table 3)</h2>\n");
    rows(text, &lines, &[], "DFAR minus row");
    chart(text, &lines);
}

fn blind(text: &mut String, table: &Table) {
    let lines = table.section(Section::Blind);
    if lines.is_empty() {
        return;
    }
    text.push_str(
        "<h2>All events, feedback ignored</h2>\n<p>Compared with the row of the same system above.</p>\n",
    );
    rows(text, &lines, &[], "with feedback minus row");
}

fn rows(text: &mut String, lines: &[&Line], references: &[(&str, Option<[Option<f64>; 4]>)], less: &str) {
    text.push_str("<div class=\"scroll\"><table>\n<tr><th></th><th>setting</th>");
    METRICS.iter().for_each(|metric| {
        let _ = write!(text, "<th>{metric}</th>");
    });
    let _ = writeln!(text, "<th>seeds</th><th>{less}</th><th>p</th></tr>");
    for (name, values) in references {
        let Some(values) = values else { continue };
        let cells = values.map(|value| value.map_or("-".to_owned(), |value| format!("{value:.4}")));
        let _ = writeln!(
            text,
            "<tr class=\"reference\"><th>{name}</th><td></td><td>{}</td><td></td><td></td><td></td></tr>",
            cells.join("</td><td>")
        );
    }
    let places: [Vec<Option<usize>>; 4] = std::array::from_fn(|metric| places(lines, metric));
    for (i, line) in lines.iter().enumerate() {
        let cells: [String; 4] = std::array::from_fn(|metric| {
            line.cells[metric].map_or("-".to_owned(), |cell| marked(cell, places[metric][i]))
        });
        let against = line.against.as_ref();
        let _ = writeln!(
            text,
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&line.title),
            escape(&line.setting),
            cells.join("</td><td>"),
            line.seeds.len(),
            against.map_or(String::new(), |against| format!("{:+.4}", against.difference)),
            against.map_or(String::new(), p_value)
        );
    }
    text.push_str("</table></div>\n");
}

fn marked(Cell { mean, deviation }: Cell, place: Option<usize>) -> String {
    let mean = match place {
        Some(0) => format!("<b>{mean:.4}</b>"),
        Some(1) => format!("<u>{mean:.4}</u>"),
        _ => format!("{mean:.4}"),
    };
    deviation.map_or(mean.clone(), |deviation| format!("{mean} <small>± {deviation:.4}</small>"))
}

/// AUC as bars.
fn chart(text: &mut String, lines: &[&Line]) {
    let drawn: Vec<Bar> = lines
        .iter()
        .filter_map(|line| {
            let Cell { mean, deviation } = line.cells[0]?;
            Some(Bar { label: &line.title, mean, deviation, strong: line.reference })
        })
        .collect();
    let floor = if drawn.iter().all(|bar| bar.mean > 0.5) { 0.5 } else { 0.0 };
    let begin = if floor > 0.0 { "bars begin at 0.5, chance" } else { "bars begin at 0" };
    let chart = bars(&drawn, floor);
    let _ = writeln!(
        text,
        "<figure>{chart}<figcaption>AUC, standard deviation over seeds; {begin}.</figcaption></figure>"
    );
}

/// Validation AUC by epoch, of the first seed.
fn curves(text: &mut String, table: &Table) {
    let lines = table.section(Section::Systems);
    let longest = lines.iter().map(|line| line.curve.len()).max().unwrap_or(0);
    let series: Vec<Series> = lines
        .iter()
        .map(|line| {
            let place = |i: usize| i as f64 / (longest.max(2) - 1) as f64;
            let points = line.curve.iter().enumerate();
            points.filter_map(|(i, point)| Some((place(i), point.valid_auc?))).collect()
        })
        .collect();
    if series.iter().all(Vec::is_empty) {
        return;
    }
    let last = format!("epoch {longest}");
    text.push_str("<h2>Training</h2>\n<figure><div class=\"panels\">");
    for (i, line) in lines.iter().enumerate() {
        text.push_str(&panel(&line.title, &series, i, ["1", &last], line.reference));
    }
    text.push_str(
        "</div><figcaption>Validation AUC by epoch, first seed; the other systems in grey.</figcaption></figure>\n",
    );
}

/// Figure 5.
fn lengths(text: &mut String, table: &Table) {
    let lines = table.section(Section::Systems);
    let Some(first) = lines.iter().find(|line| line.by_length.len() > 1) else { return };
    let buckets = first.by_length.len();
    let series: Vec<Series> = lines
        .iter()
        .map(|line| {
            let points = line.by_length.iter().enumerate();
            points.filter_map(|(i, b)| Some((i as f64 / (buckets - 1) as f64, b.auc?.mean))).collect()
        })
        .collect();
    let name = |bucket: &crate::table::LengthCell| range(bucket.from, bucket.to);
    let ends = [name(&first.by_length[0]), name(&first.by_length[buckets - 1])];
    text.push_str("<h2>AUC by history length (Figure 5)</h2>\n<figure><div class=\"panels\">");
    for (i, line) in lines.iter().enumerate() {
        text.push_str(&panel(&line.title, &series, i, [&ends[0], &ends[1]], line.reference));
    }
    let groups: Vec<String> =
        first.by_length.iter().map(|bucket| format!("{} ({} groups)", name(bucket), bucket.groups)).collect();
    let _ = writeln!(
        text,
        "</div><figcaption>Test AUC by the number of events before the target: {}. Mean over seeds; the other \
         systems in grey.</figcaption></figure>",
        groups.join(", ")
    );
}

/// Figure 4.
fn head_pairs(text: &mut String, table: &Table) {
    if table.head_pairs.is_empty() {
        return;
    }
    let values = table.head_pairs.iter().flat_map(|pairs| pairs.mean.iter().flatten());
    let largest = values.copied().fold(0.0, f64::max);
    text.push_str("<h2>Attention weight by feedback (Figure 4)</h2>\n<figure><div class=\"panels\">");
    for pairs in &table.head_pairs {
        text.push_str(&heat(&pairs.title, pairs.mean, largest));
    }
    text.push_str(
        "</div><figcaption>Mean weight of a pair of events in the history encoder, all heads together, over the \
         test histories and the seeds. Under the label mask, weights that the mask drops count as 0, so that \
         the rows of a head do not add up to 1.</figcaption></figure>\n",
    );
}

fn settings(text: &mut String, table: &Table) {
    if table.searches.is_empty() {
        return;
    }
    text.push_str(
        "<h2>Settings</h2>\n<p>Chosen by validation AUC with the first seed; setting 0 is the given one.</p>\n\
         <div class=\"scroll\"><table>\n<tr><th></th><th>tried</th><th>chosen</th><th>values</th>\
         <th>validation AUC</th></tr>\n",
    );
    for search in &table.searches {
        let best = &search.settings[search.chosen];
        let values: Vec<String> = best.values.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let auc = best.valid_auc.map_or("-".to_owned(), |auc| format!("{auc:.4}"));
        let _ = writeln!(
            text,
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td><td>{auc}</td></tr>",
            search.system.title(),
            search.settings.len(),
            search.chosen,
            escape(&values.join(", "))
        );
    }
    text.push_str("</table></div>\n");
}

fn origins(text: &mut String, table: &Table) {
    text.push_str("<h2>Runs</h2>\n<ul>\n");
    for origin in &table.origins {
        let hours = origin.seconds / 3600.0;
        let _ = writeln!(text, "<li>{} runs, {hours:.2} h: {}</li>", origin.runs, escape(&origin.words));
    }
    text.push_str("</ul>\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Row;
    use crate::system::Kind;
    use crate::table::tests::{line, table};

    #[test]
    fn the_page_has_every_part_and_no_external_file() {
        let table = table(vec![
            line(Row::Baseline(Kind::Din), "positive-only", [0.6, 0.7]),
            line(Row::Dfar, "mixed", [0.8, 0.8]),
            line(Row::Dfar, "mixed no-fha", [0.7, 0.8]),
            line(Row::Dfar, "ignored", [0.7, 0.7]),
        ]);
        let text = page(&table, "a & b", "3 users.");
        for part in [
            "<h1>a &amp; b</h1>",
            "Table 2",
            "Table 3",
            "feedback ignored",
            "Training",
            "Figure 5",
            "Figure 4",
        ] {
            assert!(text.contains(part), "no {part}");
        }
        assert!(!text.contains("http") && !text.contains("src=") && !text.contains("<script"), "{text}");
        for (open, close) in
            [("<svg", "</svg>"), ("<tr", "</tr>"), ("<figure", "</figure>"), ("<div", "</div>")]
        {
            assert_eq!(text.matches(open).count(), text.matches(close).count(), "{open}");
        }
    }
}
