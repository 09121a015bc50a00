//! A system: what differs between the compared models, and the systems by name.

use crate::inputs::Inputs;
use crate::systems::sasrec::Pool;
use crate::{Floats, Indices, Result, Tensors};
use dfar::batch::Feedback;
use dfar::device::cpu::Cpu;
use dfar::device::{Device, Lookup};
use dfar::model::parameters::Id;
use dfar::model::{LARGEST_SIZE, MOST_BLOCKS, ModelError, check_sizes};

/// What a system computes from.
pub struct Context<'a, D: Device = Cpu> {
    /// The device.
    pub device: &'a D,
    /// Values of the parameters.
    pub p: &'a Tensors<D>,
    /// The embedding tables among them.
    pub tables: &'a Tables,
    /// The batch.
    pub x: &'a Inputs<D>,
    /// Model width `D`.
    pub width: usize,
    /// Weight of the auxiliary loss.
    pub auxiliary: f32,
    /// Whether the backward pass follows. Without it, a system need not keep what only that reads.
    pub gradients: bool,
}

// Derived, it would ask for a device that can be copied.
impl<D: Device> Clone for Context<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Context<'_, D> {}

/// The embedding tables of a system.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// `[items, D]`
    pub item: Id,
    /// `[max_length, D]`
    pub position: Option<Id>,
    /// `[2, D]`
    pub label: Option<Id>,
}

/// The granularity of a [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// One row for each prefix: all its candidates share it.
    Group,
    /// One row for each prefix and candidate.
    Row,
}

/// A part of the tower's input, behind the candidate `e`.
pub struct Part<D: Device = Cpu> {
    /// `[G, width]` or `[R, width]`
    pub values: Floats<D>,
    /// Width of a row.
    pub width: usize,
    /// Granularity.
    pub per: Per,
}

/// Gradients of a batch. A backward pass writes the parameters of its system to `dense`, and adds
/// to the others.
pub struct Gradients<D: Device = Cpu> {
    /// One buffer per parameter; those of embedding tables are empty.
    pub dense: Tensors<D>,
    /// `[N, D]` of the embedded events: of the rows of `item`, and of `position` and `label` where
    /// the system has them.
    pub tokens: Floats<D>,
    /// `[C, D]` of the rows of `item` as candidates.
    pub candidates: Floats<D>,
    /// `[N, D]` of the rows of `item` as the events' sampled negatives; empty without such.
    pub negatives: Floats<D>,
}

/// The backward pass of a batch: from the parts and their gradients to [`Gradients`]. Returns the
/// auxiliary loss without its weight, whose gradient it adds.
pub type Backward<'a, D = Cpu> =
    Box<dyn FnOnce(&[Part<D>], Vec<Floats<D>>, &mut Gradients<D>) -> Result<f64> + 'a>;

/// The result of a forward pass.
pub struct Encoded<'a, D: Device = Cpu> {
    /// Input of the tower, behind the candidate.
    pub parts: Vec<Part<D>>,
    /// Dropped where only scores are asked for.
    pub backward: Backward<'a, D>,
}

/// A history encoder, the way in which the candidate enters, and an auxiliary loss. A system that
/// needs no more than the operations of [`Device`] computes on every device, the others on the CPU.
pub trait System<D: Device = Cpu>: Send + Sync {
    /// The forward pass.
    ///
    /// # Errors
    /// Failures of the device.
    fn encode<'a>(&'a self, cx: Context<'a, D>) -> Result<Encoded<'a, D>>;
}

/// The systems, in the order of Table 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Kind {
    /// Attention of the candidate over the liked events.
    Din,
    /// Convolutions over the latest events and over the whole history.
    Caser,
    /// A GRU.
    Gru4rec,
    /// A GRU, and a second one gated by the attention of the candidate.
    Dien,
    /// Self-attention over the liked events.
    Sasrec,
    /// SASRec with talking heads.
    Tha4rec,
    /// Liked and skipped events in two transformers with the candidate.
    Dfn,
    /// All events in one transformer, then liked and skipped ones in their own.
    Feedrec,
}

/// Sizes of a system. Fields that a system does not have are ignored.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Rows of the item table.
    pub items: usize,
    /// Longest history; rows of the position table.
    pub max_length: usize,
    /// Model width `D`.
    pub width: usize,
    /// Attention heads `H`, a divisor of `D`.
    pub heads: usize,
    /// Blocks of each encoder.
    pub blocks: usize,
    /// Hidden widths of the attention MLP.
    pub attention: [usize; 2],
    /// Hidden widths of the tower.
    pub tower: [usize; 2],
    /// Caser: filters of each height.
    pub horizontal: usize,
    /// Caser: heights of the horizontal filters, from 1.
    pub heights: usize,
    /// Caser: vertical filters.
    pub vertical: usize,
    /// Caser: events that a vertical filter sees; 0 stands for `max_length`.
    pub vertical_length: usize,
    /// SASRec, THA4Rec: how a prefix becomes one vector.
    pub pool: Pool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            items: 1,
            max_length: 100,
            width: 32,
            heads: 2,
            blocks: 1,
            attention: [80, 40],
            tower: [100, 64],
            horizontal: 128,
            heights: 3,
            vertical: 4,
            vertical_length: 0,
            pool: Pool::Mean,
        }
    }
}

impl Settings {
    /// Events that a vertical filter of Caser sees.
    pub fn vertical_length(&self) -> usize {
        if self.vertical_length == 0 { self.max_length } else { self.vertical_length }
    }

    /// Validates the sizes.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the invalid field.
    pub fn check(&self) -> Result<()> {
        let ([attention0, attention1], [tower0, tower1]) = (self.attention, self.tower);
        check_sizes(&[
            ("items", self.items, u32::MAX as usize),
            ("max_length", self.max_length, LARGEST_SIZE),
            ("width", self.width, LARGEST_SIZE),
            ("heads", self.heads, LARGEST_SIZE),
            ("blocks", self.blocks, MOST_BLOCKS),
            ("attention", attention0, LARGEST_SIZE),
            ("attention", attention1, LARGEST_SIZE),
            ("tower", tower0, LARGEST_SIZE),
            ("tower", tower1, LARGEST_SIZE),
            ("horizontal", self.horizontal, LARGEST_SIZE),
            ("heights", self.heights, MOST_BLOCKS),
            ("vertical", self.vertical, LARGEST_SIZE),
            ("vertical_length", self.vertical_length(), LARGEST_SIZE),
        ])?;
        if !self.width.is_multiple_of(self.heads) {
            let (value, reason) = (self.width.to_string(), "must be a multiple of the number of heads");
            return Err(ModelError::Config { field: "width", value, reason });
        }
        Ok(())
    }
}

/// A system with the parameters it named.
pub struct Built<D: Device = Cpu> {
    /// The system.
    pub system: Box<dyn System<D>>,
    /// Width of its parts together, without the candidate.
    pub parts: usize,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Din,
        Self::Caser,
        Self::Gru4rec,
        Self::Dien,
        Self::Sasrec,
        Self::Tha4rec,
        Self::Dfn,
        Self::Feedrec,
    ];

    /// Name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Din => "din",
            Self::Caser => "caser",
            Self::Gru4rec => "gru4rec",
            Self::Dien => "dien",
            Self::Sasrec => "sasrec",
            Self::Tha4rec => "tha4rec",
            Self::Dfn => "dfn",
            Self::Feedrec => "feedrec",
        }
    }

    /// Name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::Din => "DIN",
            Self::Caser => "Caser",
            Self::Gru4rec => "GRU4REC",
            Self::Dien => "DIEN",
            Self::Sasrec => "SASRec",
            Self::Tha4rec => "THA4Rec",
            Self::Dfn => "DFN",
            Self::Feedrec => "FeedRec",
        }
    }

    /// The feedback that its paper uses.
    pub fn feedback(self) -> Feedback {
        match self {
            Self::Dfn | Self::Feedrec => Feedback::Mixed,
            _ => Feedback::PositiveOnly,
        }
    }

    /// Name and default weight of the auxiliary loss.
    pub fn auxiliary(self) -> Option<(&'static str, f64)> {
        match self {
            Self::Dien => Some(("aux", 1.0)),
            Self::Feedrec => Some(("idl", 1e-3)),
            _ => None,
        }
    }

    /// Whether its auxiliary loss samples an item for each event.
    pub fn samples_items(self) -> bool {
        self == Self::Dien
    }

    /// Whether it encodes each (prefix, candidate) on its own.
    pub fn shares_nothing(self) -> bool {
        self == Self::Dfn
    }

    /// Whether it has a table of positions.
    pub fn has_positions(self) -> bool {
        matches!(self, Self::Sasrec | Self::Tha4rec | Self::Dfn | Self::Feedrec)
    }

    /// Whether it has a table of labels.
    pub fn has_labels(self) -> bool {
        self == Self::Feedrec
    }
}

impl<D: Device> Built<D> {
    /// With the width of its parts.
    pub fn new(parts: usize, system: impl System<D> + 'static) -> Self {
        Self { system: Box::new(system), parts }
    }
}

impl<'a, D: Device> Context<'a, D> {
    /// Indices or a plan that `stage` puts into a staging buffer, uploaded.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn staged<T>(self, stage: impl FnOnce(&mut D::Staging) -> Result<T>) -> Result<T> {
        let mut staging = self.device.staging()?;
        let staged = stage(&mut staging)?;
        self.device.send(staging)?;
        Ok(staged)
    }

    /// The tables whose rows add up to the embedded events `[N, D]`.
    pub fn event_tables(self) -> Vec<Lookup<&'a Floats<D>, &'a Indices<D>>> {
        let Tables { item, position, label } = *self.tables;
        let tables = [
            Some((item, &self.x.item)),
            position.map(|id| (id, &self.x.position)),
            label.map(|id| (id, &self.x.label_row)),
        ];
        tables.into_iter().flatten().map(|(id, index)| Lookup { table: &self.p[id], index }).collect()
    }

    /// The embedded events.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn events(self) -> Result<Floats<D>> {
        let mut events = self.device.alloc(self.x.batch.tokens() * self.width)?;
        self.device.gather_sum(self.width, &self.event_tables(), &mut events)?;
        Ok(events)
    }

    /// The embedded candidates `e`, one for each pair: `[C, D]`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn candidates(self) -> Result<Floats<D>> {
        let mut e = self.device.alloc(self.x.batch.pairs() * self.width)?;
        let rows = Lookup { table: &self.p[self.tables.item], index: &self.x.pair_item };
        self.device.gather_sum(self.width, &[rows], &mut e)?;
        Ok(e)
    }
}
