//! From a filtered log to a data set file: splits the events, draws the groups, writes the file.

use super::candidates::Sampler;
use super::format::Section;
use super::log::{Event, Log, each_user};
use super::split::{Cuts, Part};
use super::writer::{Counts, Writer};
use super::{DataError, Made, PreparationStep, Protocol};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// A generating process that can score candidates by its own probabilities.
pub(super) trait Scorer {
    /// Appends a score for each candidate as the next liked item of `user` after `history`. `drawn`
    /// is the number of training events of each item, the weights that negatives are drawn by.
    fn score(&self, user: u32, history: &[Event], drawn: &[u32], candidates: &[u32], out: &mut Vec<f32>);
}

/// Output file, temporary folder and memory limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workplace<'a> {
    /// The file to make.
    pub output: &'a Path,
    /// Folder of temporary files.
    pub folder: &'a Path,
    /// Bytes of records sorted in memory at a time.
    pub sort_memory: usize,
}

/// Makes the file, and sets the hash of the groups in its protocol.
pub(super) fn assemble(
    mut log: Log,
    mut protocol: Protocol,
    scorer: Option<&dyn Scorer>,
    workplace: Workplace,
) -> Result<Made, DataError> {
    let Workplace { output, folder, sort_memory } = workplace;
    let options = protocol.candidates.clone();
    if u32::try_from(options.negatives).is_err() {
        return Err(DataError::TooMany { what: "negatives", limit: u64::from(u32::MAX) });
    }
    let cuts =
        Cuts::new(protocol.split, &mut log.events, log.users.len(), options.seed, folder, sort_memory)?;
    let mut writer = Writer::new(folder);
    let popularity = write_events(&mut log, &cuts, &mut writer)?;
    let nothing = DataError::NothingLeft { step: PreparationStep::Split, before: log.events.len() };
    let mut sampler = Sampler::new(popularity).ok_or(nothing)?;
    writer.put_names([Section::UserNameOffsets, Section::UserNames, Section::UserOrder], &log.users)?;
    writer.put_names([Section::ItemNameOffsets, Section::ItemNames, Section::ItemOrder], &log.items)?;

    let mut hash = Fnv::default();
    let mut groups = [0; 2];
    for (part, groups) in [Part::Valid, Part::Test].into_iter().zip(&mut groups) {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(part as u64 + 1);
        let [users, events, negatives, ceiling] = part.sections();
        let mut drawn = Vec::new();
        let mut scores = Vec::new();
        each_user(&mut log.events, |user, history| {
            if options.exclude_seen {
                sampler.exclude(history.iter().map(|event| event.item));
            }
            for event in part.events(cuts.cut(user, history), history.len()) {
                *groups += 1;
                let target = history[event].item;
                drawn.clear();
                drawn.push(target);
                sampler.draw(options.negatives, target, &mut rng, &mut drawn).map_err(|available| {
                    let user = log.users.get(user).to_owned();
                    DataError::NotEnoughItems { user, needed: options.negatives, available }
                })?;
                for value in [user, event as u32].iter().chain(&drawn[1..]) {
                    hash.update(*value);
                }
                writer.put(users, &[user])?;
                writer.put(events, &[event as u32])?;
                writer.put(negatives, &drawn[1..])?;
                if let Some(scorer) = scorer {
                    scores.clear();
                    scorer.score(user, &history[..event], sampler.counts(), &drawn, &mut scores);
                    writer.put(ceiling, &scores)?;
                }
            }
            Ok(())
        })?;
    }
    protocol.candidates.hash = hash.hexadecimal();

    let counts = Counts {
        users: log.users.len(),
        items: log.items.len(),
        events: log.events.len(),
        negatives: options.negatives,
        ceiling: scorer.is_some(),
    };
    writer.finish(output, counts, &protocol)?;
    Ok(Made { users: counts.users, items: counts.items, events: counts.events, groups, protocol })
}

/// Writes histories and their split; returns each item's number of training events.
fn write_events(log: &mut Log, cuts: &Cuts, writer: &mut Writer) -> Result<Vec<u32>, DataError> {
    let mut popularity = vec![0u32; log.items.len()];
    let mut end = 0;
    writer.put(Section::UserOffsets, &[end])?;
    let (mut items, mut feedback, mut times) = (Vec::new(), Vec::new(), Vec::new());
    each_user(&mut log.events, |user, history| {
        if u32::try_from(history.len()).is_err() {
            return Err(DataError::TooMany { what: "events of one user", limit: u64::from(u32::MAX) });
        }
        let split = cuts.cut(user, history);
        end += history.len() as u64;
        writer.put(Section::UserOffsets, &[end])?;
        writer.put(Section::Split, &split)?;
        items.clear();
        items.extend(history.iter().map(|event| event.item));
        writer.put(Section::Items, &items)?;
        feedback.clear();
        feedback.extend(history.iter().map(|event| event.feedback as u8));
        writer.put(Section::Feedback, &feedback)?;
        times.clear();
        times.extend(history.iter().map(|event| event.time));
        writer.put(Section::Times, &times)?;
        for &item in &items[..split[0] as usize] {
            popularity[item as usize] = popularity[item as usize].saturating_add(1);
        }
        Ok(())
    })?;
    Ok(popularity)
}

/// FNV-1a, 64 bit, over little-endian words.
#[derive(Debug)]
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn update(&mut self, value: u32) {
        for byte in value.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn hexadecimal(&self) -> String {
        format!("{:016x}", self.0)
    }
}
