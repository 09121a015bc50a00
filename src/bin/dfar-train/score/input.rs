//! Users and histories from files.

use dfar::Error;
use dfar::train::TrainError;
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// A history by original ids.
#[derive(Debug, Default)]
pub struct Named {
    pub user: String,
    pub events: Vec<(String, u8)>,
    pub candidates: Option<Vec<String>>,
    /// Number of the line where it begins, from 1.
    pub line: usize,
}

/// Opens a file, or standard input for `-`, after its byte order mark.
fn open(path: &Path) -> dfar::Result<(String, Box<dyn BufRead>)> {
    let (name, mut input): (_, Box<dyn BufRead>) = if path == Path::new("-") {
        ("<stdin>".to_owned(), Box::new(BufReader::new(std::io::stdin())))
    } else {
        let file = File::open(path).map_err(Error::read(path))?;
        (path.display().to_string(), Box::new(BufReader::new(file)))
    };
    if input.fill_buf().map_err(Error::read(path))?.starts_with(b"\xef\xbb\xbf") {
        input.consume(3);
    }
    Ok((name, input))
}

/// Ids of users with their places, one per line; a line that begins with `"` is a JSON string.
pub fn users(path: &Path) -> dfar::Result<Vec<(String, String)>> {
    let (name, input) = open(path)?;
    let mut users = Vec::new();
    for (line, number) in input.lines().zip(1..) {
        let line = line.map_err(Error::read(path))?;
        let line = line.strip_suffix('\r').unwrap_or(&line);
        let user = match line {
            "" => continue,
            json if json.starts_with('"') => {
                serde_json::from_str(json).map_err(|error| bad(&name, number, json_reason(&error)))?
            }
            id => id.to_owned(),
        };
        users.push((user, format!("{name}:{number}")));
    }
    Ok(users)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonLine {
    #[serde(default)]
    user: Option<JsonId>,
    history: Vec<(JsonId, serde_json::Value)>,
    #[serde(default)]
    candidates: Option<Vec<JsonId>>,
}

/// A string, or an integer in digits.
#[derive(Deserialize)]
#[serde(untagged, expecting = "ids are strings or integers")]
enum JsonId {
    Text(String),
    Unsigned(u64),
    Signed(i64),
}

impl From<JsonId> for String {
    fn from(id: JsonId) -> String {
        match id {
            JsonId::Text(text) => text,
            JsonId::Unsigned(number) => number.to_string(),
            JsonId::Signed(number) => number.to_string(),
        }
    }
}

/// Calls `each` with the histories of a file: JSON lines, or CSV with a header, where consecutive
/// rows of one user are one history. The first character decides between the two.
pub fn histories(path: &Path, each: &mut dyn FnMut(&str, Named) -> dfar::Result<()>) -> dfar::Result<()> {
    let (name, mut input) = open(path)?;
    let first = input.fill_buf().map_err(Error::read(path))?.trim_ascii_start().first().copied();
    match first {
        Some(b'{') => json_lines(&name, path, input, each),
        _ => csv_rows(&name, input, each),
    }
}

fn json_lines(
    name: &str,
    path: &Path,
    input: impl BufRead,
    each: &mut dyn FnMut(&str, Named) -> dfar::Result<()>,
) -> dfar::Result<()> {
    for (line, number) in input.lines().zip(1..) {
        let line = line.map_err(Error::read(path))?;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let line: JsonLine =
            serde_json::from_str(&line).map_err(|error| bad(name, number, json_reason(&error)))?;
        let event = |(item, label): (JsonId, serde_json::Value)| match label.as_u64() {
            Some(label @ 0..=1) => Ok((item.into(), label as u8)),
            _ => Err(bad(name, number, format!("label {label}; labels are 1 (liked) and 0 (skipped)"))),
        };
        let named = Named {
            user: line.user.map(String::from).unwrap_or_default(),
            events: line.history.into_iter().map(event).collect::<Result<_, _>>()?,
            candidates: line.candidates.map(|items| items.into_iter().map(String::from).collect()),
            line: number,
        };
        each(name, named)?;
    }
    Ok(())
}

/// The message of an error in a line, without the number of the line, which is 1 for serde_json.
fn json_reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let reason = message.rsplit_once(" at line ").map_or(message.as_str(), |(reason, _)| reason);
    format!("{reason} (column {})", error.column())
}

fn csv_rows(
    name: &str,
    input: impl BufRead,
    each: &mut dyn FnMut(&str, Named) -> dfar::Result<()>,
) -> dfar::Result<()> {
    let mut reader = csv::Reader::from_reader(input);
    let header = reader.headers().map_err(|error| bad(name, 1, error.to_string()))?.clone();
    let column = |wanted: &str| {
        let mut found = header.iter().enumerate().filter(|(_, column)| *column == wanted);
        match (found.next(), found.next()) {
            (Some((at, _)), None) => Ok(at),
            (Some(_), Some(_)) => Err(bad(name, 1, format!("two columns are called `{wanted}`"))),
            (None, _) => {
                let usual = "the header is `user,item,label`, or lines are JSON objects";
                Err(bad(name, 1, format!("no column `{wanted}`; {usual}")))
            }
        }
    };
    let [user, item, label] = [column("user")?, column("item")?, column("label")?];
    let mut current: Option<Named> = None;
    for row in reader.records() {
        let row = row.map_err(|error| {
            let line = error.position().map_or(0, |position| position.line() as usize);
            bad(name, line, error.to_string())
        })?;
        let line = row.position().map_or(0, |position| position.line() as usize);
        let label = match &row[label] {
            "0" => 0,
            "1" => 1,
            other => {
                return Err(bad(
                    name,
                    line,
                    format!("label `{other}`; labels are 1 (liked) and 0 (skipped)"),
                )
                .into());
            }
        };
        if current.as_ref().is_some_and(|named| named.user != row[user]) {
            each(name, current.take().expect("it is some"))?;
        }
        let named =
            current.get_or_insert_with(|| Named { user: row[user].to_owned(), line, ..Named::default() });
        named.events.push((row[item].to_owned(), label));
    }
    current.map_or(Ok(()), |named| each(name, named))
}

fn bad(file: &str, line: usize, reason: String) -> TrainError {
    TrainError::Line { file: file.to_owned(), line, reason }
}
