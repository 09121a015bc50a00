//! Decides which events are liked.

use super::ImportOptions;
use super::Liked;

/// The rule for the values of the label column.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rule {
    /// Liked if the rating is above the threshold.
    Above(f64),
    /// A flag: 1 is liked, 0 is skipped.
    Flag,
    /// Every event is liked; there is no label column.
    Every,
    /// Liked and skipped events by name.
    Named { liked: Vec<String>, skipped: Vec<String> },
}

/// The judgement of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Liked,
    Skipped,
    /// The name of the event is in neither list.
    Other,
}

impl From<bool> for Verdict {
    fn from(liked: bool) -> Verdict {
        if liked { Verdict::Liked } else { Verdict::Skipped }
    }
}

impl Rule {
    /// The rule from the options, or else that of the format: `usual` is its threshold, `None` if
    /// its labels are flags.
    pub(super) fn new(options: &ImportOptions, usual: Option<f64>) -> Rule {
        match &options.liked {
            Liked::ByFormat => usual.map_or(Rule::Flag, Rule::Above),
            Liked::Above(threshold) => Rule::Above(*threshold),
            Liked::Every => Rule::Every,
            Liked::Named { liked, skipped, .. } => {
                // As the labels of the log are.
                let trimmed =
                    |names: &[String]| names.iter().map(|name| name.trim_ascii().to_owned()).collect();
                Rule::Named { liked: trimmed(liked), skipped: trimmed(skipped) }
            }
        }
    }

    /// The rule in the words of the protocol.
    pub(super) fn words(&self, column: &str) -> String {
        match self {
            Rule::Above(threshold) => format!("{column} > {threshold}"),
            Rule::Flag => format!("{column} = 1"),
            Rule::Every => "every event".to_owned(),
            Rule::Named { liked, .. } => format!("{column} in {}", liked.join(", ")),
        }
    }

    pub(super) fn judge(&self, label: &[u8]) -> Result<Verdict, &'static str> {
        match self {
            Rule::Every => Ok(Verdict::Liked),
            _ if label.is_empty() => Err("empty"),
            Rule::Flag => match label {
                b"0" | b"false" | b"False" | b"FALSE" => Ok(Verdict::Skipped),
                b"1" | b"true" | b"True" | b"TRUE" => Ok(Verdict::Liked),
                _ => self.judge_number(number(label).ok_or("not a number")?),
            },
            Rule::Above(_) => self.judge_number(number(label).ok_or("not a number")?),
            Rule::Named { liked, skipped } => {
                let is = |name: &String| name.as_bytes() == label;
                Ok(match () {
                    () if liked.iter().any(is) => Verdict::Liked,
                    () if skipped.iter().any(is) => Verdict::Skipped,
                    () => Verdict::Other,
                })
            }
        }
    }

    pub(super) fn judge_number(&self, label: f64) -> Result<Verdict, &'static str> {
        match self {
            _ if !label.is_finite() => Err("not a number"),
            Rule::Every => Ok(Verdict::Liked),
            Rule::Above(threshold) => Ok(Verdict::from(label > *threshold)),
            Rule::Flag if label == 0.0 => Ok(Verdict::Skipped),
            Rule::Flag if label == 1.0 => Ok(Verdict::Liked),
            Rule::Flag => Err("a flag is 0 or 1 (for ratings give --positive-above)"),
            Rule::Named { .. } => self.judge(label.to_string().as_bytes()),
        }
    }

    /// The names of a flag are `true` and `false`, or its numbers.
    pub(super) fn judge_flag(&self, flag: bool) -> Result<Verdict, &'static str> {
        match self {
            Rule::Named { .. } => match self.judge(if flag { b"true" } else { b"false" })? {
                Verdict::Other => self.judge_number(flag.into()),
                verdict => Ok(verdict),
            },
            _ => self.judge_number(flag.into()),
        }
    }

    /// Whether labels are numbers. A word in a label column of numbers must be the column's name.
    pub(super) fn numeric(&self) -> bool {
        matches!(self, Rule::Above(_) | Rule::Flag)
    }
}

/// A finite number.
fn number(field: &[u8]) -> Option<f64> {
    // The common cases first: one digit, or one digit with ".0" or ".5".
    match field {
        [digit @ b'0'..=b'9'] => return Some(f64::from(digit - b'0')),
        [digit @ b'0'..=b'9', b'.', half @ (b'0' | b'5')] => {
            return Some(f64::from(digit - b'0') + if *half == b'5' { 0.5 } else { 0.0 });
        }
        _ => {}
    }
    let number: f64 = std::str::from_utf8(field).ok()?.parse().ok()?;
    number.is_finite().then_some(number)
}
