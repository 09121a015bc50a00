//! The charts of the page as inline SVG. Colours are CSS variables of the page.

use std::fmt::Write;

/// A bar with its error bar.
pub struct Bar<'a> {
    /// Name before it.
    pub label: &'a str,
    /// Its length.
    pub mean: f64,
    /// Half the length of the error bar.
    pub deviation: Option<f64>,
    /// Whether it stands out.
    pub strong: bool,
}

/// A line of a panel: places from 0 to 1 on the x axis, and values.
pub type Series = Vec<(f64, f64)>;

/// Text for HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Horizontal bars from `floor` on, with their values.
pub fn bars(bars: &[Bar], floor: f64) -> String {
    let (left, width, row) = (112.0, 190.0, 24.0);
    let end = |bar: &Bar| bar.mean + bar.deviation.unwrap_or(0.0);
    let largest = bars.iter().map(end).fold(floor + 1e-9, f64::max);
    let x = |value: f64| left + width * ((value - floor) / (largest - floor)).clamp(0.0, 1.0);
    let height = row * bars.len() as f64 + 22.0;
    let mut text = format!("<svg class=\"bars\" viewBox=\"0 0 360 {height}\" role=\"img\">");
    for tick in ticks(floor, largest) {
        let at = x(tick);
        let _ = write!(
            text,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{:.1}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            height - 20.0,
            height - 6.0,
            short(tick)
        );
    }
    for (i, bar) in bars.iter().enumerate() {
        text.push_str(&one_bar(bar, row * i as f64, [left, x(bar.mean)], &x));
    }
    text.push_str("</svg>");
    text
}

fn one_bar(bar: &Bar, top: f64, [left, right]: [f64; 2], x: &dyn Fn(f64) -> f64) -> String {
    let class = if bar.strong { "strong" } else { "plain" };
    let middle = top + 12.0;
    let mut text = format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <rect class=\"{class}\" x=\"{left}\" y=\"{:.1}\" width=\"{:.1}\" height=\"16\" rx=\"2\"/>\
         <text class=\"value\" x=\"358\" y=\"{:.1}\" text-anchor=\"end\">{:.4}</text>",
        left - 6.0,
        middle + 4.0,
        escape(bar.label),
        top + 4.0,
        right - left,
        middle + 4.0,
        bar.mean
    );
    if let Some(deviation) = bar.deviation {
        let (low, high) = (x(bar.mean - deviation), x(bar.mean + deviation));
        let (upper, lower) = (middle - 4.0, middle + 4.0);
        let _ = write!(
            text,
            "<path class=\"error\" d=\"M{low:.1} {middle}H{high:.1}M{low:.1} {upper}V{lower}M{high:.1} {upper}V{lower}\"/>"
        );
    }
    text
}

/// A small chart: the series `own` in front of all others. `names` are the ends of the x axis.
pub fn panel(title: &str, all: &[Series], own: usize, names: [&str; 2], is_strong: bool) -> String {
    let values = || all.iter().flatten().map(|(_, value)| *value);
    let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, high + 0.5) };
    let point = |(at, value): &(f64, f64)| {
        format!("{:.1},{:.1}", 30.0 + 142.0 * at, 20.0 + 80.0 * (high - value) / (high - low))
    };
    let mut text = format!(
        "<svg class=\"panel\" viewBox=\"0 0 180 122\" role=\"img\" aria-label=\"{0}\">\
         <text class=\"title\" x=\"30\" y=\"12\">{0}</text>",
        escape(title)
    );
    for tick in ticks(low, high) {
        let y = 20.0 + 80.0 * (high - tick) / (high - low);
        let _ = write!(
            text,
            "<line class=\"grid\" x1=\"30\" x2=\"172\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" x=\"26\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            y + 3.0,
            short(tick)
        );
    }
    for (_, series) in all.iter().enumerate().filter(|(i, _)| *i != own) {
        text.push_str(&line("faint", series, &point));
    }
    let class = if is_strong { "own strong-line" } else { "own" };
    text.push_str(&line(class, &all[own], &point));
    if all[own].len() < 12 {
        for place in &all[own] {
            let at = point(place);
            let (x, y) = at.split_once(',').expect("a point has two numbers");
            let _ = write!(text, "<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"2.2\"/>");
        }
    }
    let _ = write!(
        text,
        "<text class=\"tick\" x=\"30\" y=\"116\">{}</text>\
         <text class=\"tick\" x=\"172\" y=\"116\" text-anchor=\"end\">{}</text></svg>",
        escape(names[0]),
        escape(names[1])
    );
    text
}

fn line(class: &str, series: &Series, point: &dyn Fn(&(f64, f64)) -> String) -> String {
    let points: Vec<String> = series.iter().map(point).collect();
    format!("<polyline class=\"{class}\" points=\"{}\"/>", points.join(" "))
}

/// A 2x2 heat map of `[from][to]` with its numbers; `largest` has the full colour.
pub fn heat(title: &str, mean: [[f64; 2]; 2], largest: f64) -> String {
    let mut text = format!(
        "<svg class=\"heat\" viewBox=\"0 0 180 150\" role=\"img\" aria-label=\"{0}\">\
         <text class=\"title\" x=\"48\" y=\"12\">{0}</text>\
         <text class=\"tick\" x=\"80\" y=\"28\" text-anchor=\"middle\">to skipped</text>\
         <text class=\"tick\" x=\"146\" y=\"28\" text-anchor=\"middle\">to liked</text>",
        escape(title)
    );
    for (from, name) in [(0, "skipped"), (1, "liked")] {
        let top = 34.0 + 58.0 * from as f64;
        let _ = write!(
            text,
            "<text class=\"tick\" x=\"43\" y=\"{:.0}\" text-anchor=\"end\">from</text>\
             <text class=\"tick\" x=\"43\" y=\"{:.0}\" text-anchor=\"end\">{name}</text>",
            top + 25.0,
            top + 37.0
        );
        for (to, &value) in mean[from].iter().enumerate() {
            let share = if largest > 0.0 { value / largest } else { 0.0 };
            let (left, class) = (48.0 + 66.0 * to as f64, if share > 0.6 { "on" } else { "off" });
            let _ = write!(
                text,
                "<rect class=\"cell\" x=\"{left}\" y=\"{top}\" width=\"64\" height=\"56\" \
                 style=\"fill-opacity:{:.3}\"/>\
                 <text class=\"{class}\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{value:.4}</text>",
                0.06 + 0.94 * share,
                left + 32.0,
                top + 32.0
            );
        }
    }
    text.push_str("</svg>");
    text
}

/// At most six round numbers from `low` to `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let step = (-6..9)
        .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)))
        .find(|step| (high - low) / step <= 5.0)
        .unwrap_or(f64::MAX);
    let first = (low / step - 1e-9).ceil() as i64;
    (first..).map(|k| k as f64 * step).take_while(|tick| *tick <= high + 1e-9).take(6).collect()
}

/// Without zeros at the end.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(
            ticks(0.5, 0.83).iter().map(|t| short(*t)).collect::<Vec<_>>(),
            ["0.5", "0.6", "0.7", "0.8"]
        );
        assert_eq!(ticks(0.71, 0.74).len(), 4);
        assert!(ticks(-1.0, 1.0).len() <= 6);
    }

    #[test]
    fn charts_are_balanced_and_escape_their_labels() {
        let bar = |mean, deviation| Bar { label: "A<B", mean, deviation, strong: true };
        let charts = [
            bars(&[bar(0.7, Some(0.01)), bar(0.6, None), bar(0.4, None)], 0.5),
            panel("A<B", &[vec![(0.0, 0.5)], vec![(0.0, 0.6), (1.0, 0.7)]], 1, ["1", "2"], false),
            heat("A<B", [[0.1, 0.2], [0.0, 0.4]], 0.4),
        ];
        for chart in charts {
            assert!(chart.starts_with("<svg") && chart.ends_with("</svg>"), "{chart}");
            assert!(chart.contains("A&lt;B") && !chart.contains("NaN") && !chart.contains("A<B"), "{chart}");
        }
    }
}
