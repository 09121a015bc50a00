//! The times of a log: numbers in one unit, or dates.
//!
//! The unit is decided once for the whole log, after all rows are read, when all times are known.
//! Events are sorted by the numbers as they are, so their order does not depend on the unit.

use super::TimeUnit;
use super::layout::Role;
use crate::data::{DataError, TimeSighting};
use jiff::civil;

/// A time whose unit is not yet known: whole units, and billionths of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RawTime {
    pub whole: i64,
    pub billionths: u32,
}

/// The value of a time field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stamp {
    /// A number in the log's unit.
    Number(RawTime),
    /// A date and time of day, in seconds since 1970.
    Instant(RawTime),
}

const BILLION: u32 = 1_000_000_000;
/// Error for a field that is neither a number nor a date.
const NO_TIME: &str = "not a number or an ISO 8601 date";
pub(super) const TOO_LARGE: &str = "not a time: too large";
/// Seconds from 1990 to 2100. A number in this range, or in this range converted to another unit,
/// reveals the unit.
const MODERN: std::ops::RangeInclusive<u64> = 631_152_000..=4_102_444_800;

impl RawTime {
    fn new(whole: i64, billionths: u32) -> RawTime {
        RawTime { whole, billionths }
    }

    pub(super) fn from_f64(number: f64) -> Result<RawTime, &'static str> {
        if !number.is_finite() {
            return Err(NO_TIME);
        }
        let whole = number.floor();
        if whole.abs() >= 9.2e18 {
            return Err(TOO_LARGE);
        }
        let billionths = ((number - whole) * f64::from(BILLION)).round() as u32;
        Ok(RawTime::new(whole as i64, billionths.min(BILLION - 1)))
    }

    /// `number / 10^scale`, to billionths; `None` if it does not fit.
    pub(super) fn decimal(number: i128, scale: i8) -> Option<RawTime> {
        let factor = 10i128.checked_pow(scale.unsigned_abs().into())?;
        if scale < 0 {
            return Some(RawTime::new(i64::try_from(number.checked_mul(factor)?).ok()?, 0));
        }
        let (whole, rest) = (number.div_euclid(factor), number.rem_euclid(factor));
        let billionths = match scale {
            0..=9 => rest * 10i128.pow(9 - scale as u32),
            _ => rest / 10i128.pow(scale as u32 - 9),
        };
        Some(RawTime::new(i64::try_from(whole).ok()?, billionths as u32))
    }

    /// A number of `1 / per_second` seconds, in seconds.
    pub(super) fn seconds(number: i64, per_second: i64) -> RawTime {
        let rest = number.rem_euclid(per_second) * (i64::from(BILLION) / per_second);
        RawTime::new(number.div_euclid(per_second), rest as u32)
    }

    /// Rounds a time in `unit` to milliseconds; `None` if they do not fit.
    pub(super) fn milliseconds(self, unit: Unit) -> Option<i64> {
        let RawTime { whole, billionths } = self;
        let (whole, rest) = match unit {
            Unit::Seconds => (whole.checked_mul(1000)?, i64::from((billionths + 500_000) / 1_000_000)),
            Unit::Milliseconds => (whole, i64::from(billionths >= BILLION / 2)),
            Unit::Microseconds => (whole.div_euclid(1000), i64::from(whole.rem_euclid(1000) >= 500)),
            Unit::Nanoseconds => {
                (whole.div_euclid(1_000_000), i64::from(whole.rem_euclid(1_000_000) >= 500_000))
            }
        };
        whole.checked_add(rest)
    }
}

/// A known unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Unit {
    Seconds,
    Milliseconds,
    Microseconds,
    Nanoseconds,
}

impl Unit {
    const ALL: [Unit; 4] = [Unit::Seconds, Unit::Milliseconds, Unit::Microseconds, Unit::Nanoseconds];

    pub(super) fn name(self) -> &'static str {
        match self {
            Unit::Seconds => "seconds",
            Unit::Milliseconds => "milliseconds",
            Unit::Microseconds => "microseconds",
            Unit::Nanoseconds => "nanoseconds",
        }
    }

    fn per_second(self) -> i64 {
        1000i64.pow(self as u32)
    }

    /// The unit by which the number is a time between 1990 and 2100.
    fn of_modern(magnitude: u64) -> Option<Unit> {
        Unit::ALL.into_iter().find(|unit| MODERN.contains(&(magnitude / unit.per_second() as u64)))
    }

    /// The unit of a log with this largest time.
    fn of_largest(magnitude: u64) -> Unit {
        match magnitude {
            0..100_000_000_000 => Unit::Seconds,
            100_000_000_000..100_000_000_000_000 => Unit::Milliseconds,
            100_000_000_000_000..100_000_000_000_000_000 => Unit::Microseconds,
            _ => Unit::Nanoseconds,
        }
    }
}

/// The time, if it has milliseconds.
fn in_range(time: RawTime, unit: Unit) -> Result<RawTime, &'static str> {
    time.milliseconds(unit).map(|_| time).ok_or(TOO_LARGE)
}

/// Decides the unit of a log from its times, one by one.
#[derive(Debug)]
pub(super) struct Clock {
    given: Option<Unit>,
    largest: u64,
    count: u64,
    numbers: Option<TimeSighting>,
    dates: Option<TimeSighting>,
    /// The times between 1990 and 2100 by each unit.
    modern: [Modern; 4],
}

/// The times of a log that lie between 1990 and 2100 by one unit.
#[derive(Debug, Default)]
struct Modern {
    count: u64,
    first: Option<TimeSighting>,
}

impl Clock {
    pub(super) fn new(unit: TimeUnit) -> Clock {
        let given = match unit {
            TimeUnit::Auto => None,
            TimeUnit::Seconds => Some(Unit::Seconds),
            TimeUnit::Milliseconds => Some(Unit::Milliseconds),
            TimeUnit::Microseconds => Some(Unit::Microseconds),
            TimeUnit::Nanoseconds => Some(Unit::Nanoseconds),
        };
        Clock { given, largest: 0, count: 0, numbers: None, dates: None, modern: Default::default() }
    }

    /// Takes a time, which has milliseconds in the unit that will be decided. `seen` returns its
    /// place, and is called only if an error may need it.
    pub(super) fn take(
        &mut self,
        stamp: Stamp,
        seen: impl Fn() -> TimeSighting,
    ) -> Result<RawTime, &'static str> {
        match (stamp, self.given) {
            (Stamp::Number(time), Some(unit)) => in_range(time, unit),
            (Stamp::Instant(time), Some(unit)) => {
                let per_second = unit.per_second();
                let parts = i64::from(time.billionths) * per_second;
                let billion = i64::from(BILLION);
                let whole =
                    time.whole.checked_mul(per_second).and_then(|whole| whole.checked_add(parts / billion));
                in_range(RawTime::new(whole.ok_or(TOO_LARGE)?, (parts % billion) as u32), unit)
            }
            (Stamp::Number(time), None) => {
                let magnitude = time.whole.unsigned_abs();
                self.largest = self.largest.max(magnitude);
                self.count += 1;
                if self.numbers.is_none() {
                    self.numbers = Some(seen());
                }
                if let Some(unit) = Unit::of_modern(magnitude) {
                    let modern = &mut self.modern[unit as usize];
                    modern.count += 1;
                    modern.first.get_or_insert_with(seen);
                }
                Ok(time)
            }
            (Stamp::Instant(time), None) => {
                self.dates.get_or_insert_with(seen);
                in_range(time, Unit::Seconds)
            }
        }
    }

    /// The unit of all times; an error if the log mixes units, or dates and numbers.
    pub(super) fn decide(&self) -> Result<Unit, DataError> {
        if let Some(unit) = self.given {
            return Ok(unit);
        }
        let mixed = |first: &TimeSighting, a, second: &TimeSighting, b| DataError::MixedTimes {
            sightings: Box::new([first.clone(), second.clone()]),
            kinds: [a, b],
        };
        if let (Some(date), Some(number)) = (&self.dates, &self.numbers) {
            return Err(mixed(date, "a date", number, "a number"));
        }
        let unit = Unit::of_largest(self.largest);
        let own = self.modern[unit as usize].first.as_ref();
        let coarser = Unit::ALL[..unit as usize]
            .iter()
            .find_map(|&unit| Some((unit, self.modern[unit as usize].first.as_ref()?)));
        match (own, coarser) {
            (Some(own), Some((coarser, other))) => Err(mixed(other, coarser.name(), own, unit.name())),
            // A time far in the future, such as 253402300799 for "never", is not another unit.
            (None, Some((coarser, _))) if self.mostly(coarser) => Ok(coarser),
            _ => Ok(unit),
        }
    }

    /// Whether most times lie between 1990 and 2100 by `unit`, and the largest fits in any unit.
    fn mostly(&self, unit: Unit) -> bool {
        let fits = self.largest < i64::MAX as u64 / 1000;
        fits && self.modern[unit as usize].count > self.count / 2
    }

    /// The decision in words.
    pub(super) fn words(&self, unit: Unit) -> String {
        match self.given {
            Some(_) => format!("{}, as given", unit.name()),
            None if self.dates.is_some() => "dates; those without a zone are UTC".to_owned(),
            None if self.modern[unit as usize].count > 0 => format!("{} since 1970", unit.name()),
            None => {
                format!("a counter (read as {} since 1970, no time is between 1990 and 2100)", unit.name())
            }
        }
    }
}

/// Parses a field.
pub(super) fn parse(text: &[u8]) -> Result<Stamp, &'static str> {
    let text = std::str::from_utf8(text).map_err(|_| NO_TIME)?;
    if text.is_empty() {
        return Err("empty");
    }
    if let Ok(whole) = text.parse::<i64>() {
        return Ok(Stamp::Number(RawTime::new(whole, 0)));
    }
    if let Some(time) = decimal(text) {
        return Ok(Stamp::Number(time));
    }
    match text.parse::<f64>() {
        Ok(number) => RawTime::from_f64(number).map(Stamp::Number),
        Err(_) => instant(text).map(Stamp::Instant).ok_or(NO_TIME),
    }
}

/// `881250949.25`, exactly to billionths; `None` for other forms.
fn decimal(text: &str) -> Option<RawTime> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(text) => (true, text),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    let fraction = &fraction[..fraction.len().min(9)];
    let whole: i64 = whole.parse().ok()?;
    let number = i128::from(whole) * 10i128.pow(fraction.len() as u32) + fraction.parse::<i128>().ok()?;
    RawTime::decimal(if negative { -number } else { number }, fraction.len() as i8)
}

/// `2019-10-01`, `2019-10-01 00:00:00`, `2019-10-01T00:00:00.25+02:00`, `... UTC`. Without a zone,
/// the time is UTC.
fn instant(text: &str) -> Option<RawTime> {
    // Numbers are never dates; jiff would accept some.
    if !text.get(4..)?.starts_with(['-', '/']) && !text.contains(['T', 't']) {
        return None;
    }
    let text = text.replace('/', "-");
    let utc = ["UTC", "GMT", "utc", "Z", "z"]
        .iter()
        .find_map(|zone| text.strip_suffix(zone))
        .map(str::trim_ascii_end);
    if utc.is_none()
        && let Ok(timestamp) = text.parse::<jiff::Timestamp>()
    {
        return Some(of_timestamp(timestamp));
    }
    // "2019-10-01 00:00:00 +0000", as Ruby and git print it.
    if utc.is_none()
        && let Some((moment, zone)) = text.rsplit_once(' ')
        && zone.starts_with(['+', '-'])
        && let Ok(timestamp) = format!("{moment}{zone}").parse::<jiff::Timestamp>()
    {
        return Some(of_timestamp(timestamp));
    }
    let moment: civil::DateTime = without_zone(utc.unwrap_or(&text))?.parse().ok()?;
    Some(of_civil(moment))
}

/// A day and a time of day in separate fields. The error names the field at fault.
pub(super) fn day_and_time(day: &[u8], time: &[u8]) -> Result<Stamp, (Role, &'static str)> {
    const NO_DATE: (Role, &str) = (Role::Date, "not a date (ISO 8601, such as 2019-10-01 or 20191001)");
    const NO_TIME_OF_DAY: (Role, &str) =
        (Role::Time, "not a time of day (13:45, 13:45:10.5, 13:45+02:00 or 1345)");
    let day = std::str::from_utf8(day).ok().and_then(parse_day).ok_or(NO_DATE)?;
    let time = std::str::from_utf8(time).map_err(|_| NO_TIME_OF_DAY)?;
    let (clock, zone) = time.split_at(time.find(['+', '-', 'Z', 'z', 'U', 'G']).unwrap_or(time.len()));
    let clock = parse_time_of_day(clock.trim_ascii_end()).ok_or(NO_TIME_OF_DAY)?;
    let moment = day.to_datetime(clock);
    let found = match zone {
        "" | "UTC" | "GMT" => Ok(of_civil(moment)),
        zone => format!("{moment}{zone}").parse().map(of_timestamp).map_err(|_| NO_TIME_OF_DAY),
    };
    found.map(Stamp::Instant)
}

fn parse_day(text: &str) -> Option<civil::Date> {
    let digits = text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits {
        let number: i32 = text.parse().ok()?;
        return civil::Date::new((number / 10_000) as i16, (number / 100 % 100) as i8, (number % 100) as i8)
            .ok();
    }
    without_zone(&text.replace('/', "-"))?.parse().ok()
}

/// A date, or a date and time; `None` if an offset or a name of a zone follows, which jiff would
/// ignore.
fn without_zone(text: &str) -> Option<&str> {
    const DATE: usize = "2019-10-01".len();
    let after = text.get(DATE..).unwrap_or("");
    (!text.contains('[') && !after.contains(['+', '-'])).then_some(text)
}

fn parse_time_of_day(text: &str) -> Option<civil::Time> {
    if text.contains('[') {
        return None; // a zone, which jiff would ignore
    }
    if text.contains(':') {
        // jiff requires two digits for the hour.
        let padded = if text.find(':') == Some(1) { format!("0{text}") } else { text.to_owned() };
        return padded.parse().ok();
    }
    // KuaiRand's hourmin: 400 is 04:00.
    let number: i32 = text.parse().ok()?;
    match text.len() {
        1..=4 => civil::Time::new((number / 100) as i8, (number % 100) as i8, 0, 0).ok(),
        5..=6 => {
            civil::Time::new((number / 10_000) as i8, (number / 100 % 100) as i8, (number % 100) as i8, 0)
                .ok()
        }
        _ => None,
    }
}

/// A time of UTC. Unlike jiff's timestamps, it may be on the last day of the year 9999.
fn of_civil(moment: civil::DateTime) -> RawTime {
    const EPOCH: civil::DateTime = civil::datetime(1970, 1, 1, 0, 0, 0, 0);
    let since = EPOCH.duration_until(moment);
    // The fraction of a duration has the sign of its seconds.
    let borrow = i64::from(since.subsec_nanos() < 0);
    let billionths = since.subsec_nanos().rem_euclid(BILLION as i32);
    RawTime::new(since.as_secs() - borrow, billionths as u32)
}

fn of_timestamp(timestamp: jiff::Timestamp) -> RawTime {
    let nanoseconds = timestamp.as_nanosecond();
    let billion = i128::from(BILLION);
    RawTime::new(nanoseconds.div_euclid(billion) as i64, nanoseconds.rem_euclid(billion) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(text: &str, unit: Unit) -> i64 {
        match parse(text.as_bytes()) {
            Ok(Stamp::Number(time)) => time.milliseconds(unit).unwrap(),
            Ok(Stamp::Instant(time)) => time.milliseconds(Unit::Seconds).unwrap(),
            Err(reason) => panic!("{text}: {reason}"),
        }
    }

    #[test]
    fn numbers_keep_their_digits() {
        assert_eq!(ms("9223372036854775807", Unit::Milliseconds), i64::MAX);
        assert_eq!(ms("881250949.25", Unit::Seconds), 881_250_949_250);
        assert_eq!(ms("8.91717742e8", Unit::Seconds), 891_717_742_000);
        assert_eq!(ms("0.0004", Unit::Seconds), 0);
        assert_eq!(ms("0.0005", Unit::Seconds), 1);
        assert_eq!(ms("-1.5", Unit::Seconds), -1500);
        assert_eq!(ms("-0.25", Unit::Seconds), -250);
        let whole = |text: &str| match parse(text.as_bytes()) {
            Ok(Stamp::Number(time)) => (time.whole, time.billionths),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(whole("1600000000000000003.0000000000"), (1_600_000_000_000_000_003, 0));
        assert_eq!(whole("-1600000000000000003.2500000009"), (-1_600_000_000_000_000_004, 750_000_000));
        for (number, scale, expected) in [
            (1_600_000_000_000_000_003, 0, Some((1_600_000_000_000_000_003, 0))),
            (-1_5, 1, Some((-2, 500_000_000))),
            (12_345_678_901, 10, Some((1, 234_567_890))),
            (16, -8, Some((1_600_000_000, 0))),
            (i128::MAX, 0, None),
            (1, -38, None),
        ] {
            let found = RawTime::decimal(number, scale).map(|time| (time.whole, time.billionths));
            assert_eq!(found, expected, "{number} {scale}");
        }
        assert_eq!(ms("1600000000000499", Unit::Microseconds), 1_600_000_000_000);
        assert_eq!(ms("1600000000000500", Unit::Microseconds), 1_600_000_000_001);
        assert_eq!(ms("1600000000000499999", Unit::Nanoseconds), 1_600_000_000_000);
        for bad in [
            "",
            "noon",
            "inf",
            "NaN",
            "1e300",
            "12/31/2019",
            "2019-13-01",
            "2019-02-30",
            "20191001x",
            // Zones that would be ignored.
            "2019-10-01T00:00:00[Europe/Berlin]",
            "2019-10-01[Europe/Berlin]",
            "2019-10-01 00:00[-05:00]",
            "2019-10-01 00:00:00+02:00 UTC",
            "2019-10-01T00:00:00+02:00Z",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn dates_of_iso_8601() {
        let midnight = 1_569_888_000_000;
        for (text, offset) in [
            ("2019-10-01", 0),
            ("2019/10/01", 0),
            ("2019-10-01 00:00:00", 0),
            ("2019-10-01 00:00:00 UTC", 0),
            ("2019-10-01T00:00:00Z", 0),
            ("2019-10-01T02:00:00+02:00", 0),
            ("2019-10-01 02:00:00 +0200", 0),
            ("2019-10-01T00:00:00.250Z", 250),
            ("2019-10-01 00:00:01.5", 1500),
            ("20191001T000000Z", 0),
        ] {
            assert_eq!(ms(text, Unit::Seconds), midnight + offset, "{text}");
        }
        for (text, expected) in [
            ("1969-12-31T23:59:59.25Z", -750),
            ("1969-12-31 23:59:59.25", -750),
            ("0001-01-01", -62_135_596_800_000),
            ("9999-12-31", 253_402_214_400_000),
            ("9999-12-31T23:59:59.999Z", 253_402_300_799_999),
        ] {
            assert_eq!(ms(text, Unit::Seconds), expected, "{text}");
        }
        for (day, time) in [
            ("2019-10-01", "04:05"),
            ("20191001", "405"),
            ("2019/10/01", "4:05:00"),
            ("20191001", "040500"),
            ("2019-10-01", "06:05+02:00"),
            ("2019-10-01", "6:05:00 +0200"),
            ("20190930", "2305-0500"),
            ("2019-10-01", "04:05Z"),
            ("2019-10-01", "04:05 UTC"),
        ] {
            let Ok(Stamp::Instant(time)) = day_and_time(day.as_bytes(), time.as_bytes()) else {
                panic!("{day} {time}")
            };
            assert_eq!(time.milliseconds(Unit::Seconds), Some(midnight + (4 * 60 + 5) * 60_000));
        }
        for (day, time, at_fault) in [
            ("01.10.2019", "04:05", Role::Date),
            ("20191001", "2460", Role::Time),
            ("20191301", "0", Role::Date),
            ("2019-10-01", "noon", Role::Time),
            ("2019-10-01", "04:05 EST", Role::Time),
            ("2019-10-01", "04:05+", Role::Time),
            ("2019-10-01", "Z", Role::Time),
            ("2019-10-01", "13:45[Europe/Berlin]", Role::Time),
            ("2019-10-01[Asia/Tokyo]", "13:45", Role::Date),
            ("2019-10-01T05:00:00+05:00", "13:45", Role::Date),
        ] {
            let Err((role, _)) = day_and_time(day.as_bytes(), time.as_bytes()) else {
                panic!("{day} {time} is a time")
            };
            assert!(role == at_fault, "{day} {time}");
        }
    }

    fn decided(times: &[&str]) -> Result<Unit, DataError> {
        let mut clock = Clock::new(TimeUnit::Auto);
        for (line, text) in (1..).zip(times) {
            let seen = || TimeSighting { path: "log".into(), line, value: (*text).to_owned() };
            clock.take(parse(text.as_bytes()).unwrap(), seen).unwrap();
        }
        clock.decide()
    }

    #[test]
    fn the_unit_is_that_of_the_whole_column() {
        for (times, unit) in [
            (&["86400000", "99999999999", "100000000000", "1600000000000"][..], Unit::Milliseconds),
            (&["99999999998", "99999999999", "100000000000", "100000000001"], Unit::Milliseconds),
            (&["1", "2", "3"], Unit::Seconds),
            (&["1600000000", "0"], Unit::Seconds),
            (&["1600000000000000"], Unit::Microseconds),
            (&["1600000000000000000", "-5"], Unit::Nanoseconds),
            (&["2019-10-01"], Unit::Seconds),
            // The last second of the year 9999 as a mark for "never".
            (&["1600000000", "1600000001", "253402300799"], Unit::Seconds),
            (&["1600000000000", "1600000000001", "253402300799000"], Unit::Milliseconds),
            (&["1600000000", "253402300799"], Unit::Milliseconds),
            (&["1600000000", "1600000001", "9223372036854775807"], Unit::Nanoseconds),
        ] {
            assert_eq!(decided(times).unwrap(), unit, "{times:?}");
        }
        for times in [
            &["1600000000", "1600000000000"][..],
            &["1600000000000000", "1600000000"],
            &["1600000000000000000", "1600000000000"],
            &["2019-10-01", "1600000000"],
        ] {
            match decided(times) {
                Err(DataError::MixedTimes { sightings, .. }) => {
                    let mut lines = sightings.map(|sighting| sighting.line);
                    lines.sort_unstable();
                    assert_eq!(lines, [1, 2]);
                }
                other => panic!("{times:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_given_unit_holds_for_numbers_and_dates() {
        let mut clock = Clock::new(TimeUnit::Milliseconds);
        let nowhere = || TimeSighting { path: "log".into(), line: 1, value: String::new() };
        for text in ["1569888000250", "2019-10-01T00:00:00.25Z"] {
            let time = clock.take(parse(text.as_bytes()).unwrap(), nowhere).unwrap();
            assert_eq!(time.milliseconds(clock.decide().unwrap()), Some(1_569_888_000_250), "{text}");
        }
    }

    #[test]
    fn a_time_without_milliseconds_is_refused() {
        let nowhere = || TimeSighting { path: "log".into(), line: 1, value: String::new() };
        let largest = i64::MAX / 1000;
        for (unit, stamp) in [
            (TimeUnit::Auto, Stamp::Instant(RawTime::new(largest + 1, 0))),
            (TimeUnit::Auto, Stamp::Instant(RawTime::new(-largest - 2, 0))),
            (TimeUnit::Auto, Stamp::Instant(RawTime::new(largest, 900_000_000))),
            (TimeUnit::Seconds, Stamp::Number(RawTime::new(largest, 900_000_000))),
            (TimeUnit::Milliseconds, Stamp::Number(RawTime::new(i64::MAX, 500_000_000))),
            (TimeUnit::Nanoseconds, Stamp::Instant(RawTime::new(largest, 0))),
        ] {
            assert_eq!(Clock::new(unit).take(stamp, nowhere), Err(TOO_LARGE), "{unit:?} {stamp:?}");
        }
        let last = Stamp::Number(RawTime::new(i64::MAX, 0));
        assert!(Clock::new(TimeUnit::Milliseconds).take(last, nowhere).is_ok());
        assert!(Clock::new(TimeUnit::Auto).take(last, nowhere).is_ok());
    }
}
