//! Loss and validation AUC by epoch, as SVG.

use std::fmt::Write;

/// One epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// Number of the epoch, from 1.
    pub epoch: usize,
    /// Mean training loss.
    pub loss: f64,
    /// Validation AUC, if the validation part has liked events.
    pub valid_auc: Option<f64>,
}

/// A reference level for the AUC.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// E.g. `popularity`.
    pub name: &'static str,
    /// Its validation AUC.
    pub auc: f64,
}

const PANEL: (f64, f64) = (380.0, 250.0);
const LEFT: f64 = 64.0;
const TOP: f64 = 58.0;
const GAP: f64 = 84.0;
const BOTTOM: f64 = 52.0;
const RIGHT: f64 = 24.0;
const LOSS: &str = "#3b6fb6";
const AUC: &str = "#c2571a";
const GREYS: [&str; 2] = ["#7a7a7a", "#3d8f5f"];

/// Two panels over the same epochs: loss on the left, validation AUC on the right with the best
/// epoch marked and `references` as dashed lines.
pub fn curves_svg(title: &str, points: &[CurvePoint], best_epoch: usize, references: &[Reference]) -> String {
    let (width, height) = (LEFT + PANEL.0 + GAP + PANEL.0 + RIGHT, TOP + PANEL.1 + BOTTOM);
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#222\">"
    );
    let _ = writeln!(svg, "<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>");
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>",
        escape(title)
    );
    let last = points.iter().map(|p| p.epoch).max().unwrap_or(1).max(2);

    let loss: Vec<(usize, f64)> = points.iter().map(|p| (p.epoch, p.loss)).collect();
    let panel = Panel::new(LEFT, last, loss.iter().map(|p| p.1));
    panel.frame(&mut svg, "training loss (mean per instance)");
    panel.curve(&mut svg, &loss, LOSS);
    panel.legend(&mut svg, &[("training loss", LOSS, false)]);

    let auc: Vec<(usize, f64)> = points.iter().filter_map(|p| Some((p.epoch, p.valid_auc?))).collect();
    let levels = references.iter().map(|r| r.auc);
    let panel = Panel::new(LEFT + PANEL.0 + GAP, last, auc.iter().map(|p| p.1).chain(levels));
    panel.frame(&mut svg, "validation AUC");
    let mut legend = vec![("validation AUC", AUC, false)];
    for (reference, grey) in references.iter().zip(GREYS.iter().cycle()) {
        let y = panel.y(reference.auc);
        let (x0, x1) = (panel.left, panel.left + PANEL.0);
        let _ = writeln!(
            svg,
            "<line x1=\"{x0:.1}\" y1=\"{y:.1}\" x2=\"{x1:.1}\" y2=\"{y:.1}\" stroke=\"{grey}\" stroke-width=\"1.5\" stroke-dasharray=\"6 4\"/>"
        );
        legend.push((reference.name, grey, true));
    }
    panel.curve(&mut svg, &auc, AUC);
    if let Some(&(epoch, value)) = auc.iter().find(|p| p.0 == best_epoch) {
        let (x, y) = (panel.x(epoch), panel.y(value));
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5.5\" fill=\"none\" stroke=\"{AUC}\" stroke-width=\"2\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{}\" fill=\"{AUC}\">best {value:.4}</text>",
            // Below the point if there is no room above it.
            if y < TOP + 24.0 { y + 20.0 } else { y - 11.0 },
            if x > panel.left + 0.8 * PANEL.0 { "end" } else { "middle" },
        );
    }
    panel.legend(&mut svg, &legend);
    svg.push_str("</svg>\n");
    svg
}

struct Panel {
    left: f64,
    epochs: usize,
    ticks: Vec<f64>,
}

impl Panel {
    fn new(left: f64, epochs: usize, values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|v| v.is_finite()) {
            low = low.min(value);
            high = high.max(value);
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        Self { left, epochs, ticks: ticks(low, high) }
    }

    fn x(&self, epoch: usize) -> f64 {
        self.left + PANEL.0 * (epoch as f64 - 1.0) / (self.epochs as f64 - 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        let (low, high) = (self.ticks[0], self.ticks[self.ticks.len() - 1]);
        TOP + PANEL.1 * (high - value) / (high - low)
    }

    fn frame(&self, svg: &mut String, name: &str) {
        let (right, bottom) = (self.left + PANEL.0, TOP + PANEL.1);
        let step = self.ticks[1] - self.ticks[0];
        let decimals = (-step.log10().floor()).max(0.0) as usize;
        for &tick in &self.ticks {
            let y = self.y(tick);
            let _ = writeln!(
                svg,
                "<line x1=\"{:.1}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\" stroke=\"#e4e4e4\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick:.decimals$}</text>",
                self.left,
                self.left - 8.0,
                y + 4.0
            );
        }
        for epoch in epoch_ticks(self.epochs) {
            let x = self.x(epoch);
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"{bottom:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"#444\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{epoch}</text>",
                bottom + 5.0,
                bottom + 19.0
            );
        }
        let _ = writeln!(
            svg,
            "<path d=\"M{:.1} {TOP:.1}V{bottom:.1}H{right:.1}\" fill=\"none\" stroke=\"#444\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">epoch</text>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" transform=\"rotate(-90 {3:.1} {4:.1})\">{name}</text>",
            self.left,
            self.left + PANEL.0 / 2.0,
            bottom + 40.0,
            self.left - 48.0,
            TOP + PANEL.1 / 2.0,
        );
    }

    fn curve(&self, svg: &mut String, points: &[(usize, f64)], colour: &str) {
        let at: Vec<(f64, f64)> = points.iter().map(|&(e, v)| (self.x(e), self.y(v))).collect();
        let line: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-linejoin=\"round\"/>",
            line.join(" ")
        );
        if at.len() <= 60 {
            for (x, y) in at {
                let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\" fill=\"{colour}\"/>");
            }
        }
    }

    fn legend(&self, svg: &mut String, entries: &[(&str, &str, bool)]) {
        let mut x = self.left;
        for (name, colour, dashed) in entries {
            let dash = if *dashed { " stroke-dasharray=\"6 4\"" } else { "" };
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" y1=\"43\" x2=\"{:.1}\" y2=\"43\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>\
                 <text x=\"{:.1}\" y=\"47\">{name}</text>",
                x + 24.0,
                x + 30.0
            );
            x += 30.0 + 6.6 * name.chars().count() as f64 + 18.0;
        }
    }
}

/// At least three round numbers, evenly spaced, from at most `low` to at least `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let span = (high - low).max(high.abs() * 1e-3).max(1e-6);
    let raw = span / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw * 0.999).unwrap_or(raw);
    let (first, last) = ((low / step).floor(), (high / step).ceil());
    let last = last.max(first + 2.0);
    (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect()
}

fn epoch_ticks(epochs: usize) -> impl Iterator<Item = usize> {
    let step = [1, 2, 5, 10, 20, 50, 100, 200, 500].into_iter().find(|s| epochs / s <= 10).unwrap_or(1000);
    std::iter::once(1).chain((step..=epochs).step_by(step).filter(|e| *e > 1))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover() {
        assert_eq!(ticks(0.62, 0.81).len(), 6);
        for (low, high) in [(0.62, 0.81), (0.0, 0.0), (3.0, 3.0), (-1.0, 250.0), (0.55554, 0.55555)] {
            let found = ticks(low, high);
            assert!(found[0] <= low && *found.last().unwrap() >= high - 1e-9, "{low}..{high}: {found:?}");
            assert!((3..=9).contains(&found.len()), "{low}..{high}: {found:?}");
        }
    }

    #[test]
    fn every_point_lies_inside() {
        let point = |epoch, loss, valid_auc| CurvePoint { epoch, loss, valid_auc };
        let points = [point(1, 0.7, Some(0.5)), point(2, 0.4, None), point(3, 0.3, Some(0.9))];
        let svg = curves_svg("a < b", &points, 3, &[Reference { name: "ceiling", auc: 0.95 }]);
        assert!(svg.contains("a &lt; b") && svg.contains("best 0.9000") && svg.contains("ceiling"));
        // The best epoch has a second mark.
        assert_eq!(svg.matches("<circle ").count(), 6);
        for circle in svg.split("<circle ").skip(1) {
            let value = |name: &str| -> f64 {
                circle
                    .split(&format!("{name}=\""))
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
                    .parse()
                    .unwrap()
            };
            assert!((LEFT..=LEFT + GAP + 2.0 * PANEL.0).contains(&value("cx")));
            assert!((TOP..=TOP + PANEL.1).contains(&value("cy")));
        }
    }

    #[test]
    fn one_epoch_and_none_are_drawn() {
        for points in [&[][..], &[CurvePoint { epoch: 1, loss: 0.5, valid_auc: None }]] {
            assert!(!curves_svg("x", points, 1, &[]).contains("NaN"));
        }
    }
}
