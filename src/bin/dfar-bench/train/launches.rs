//! The launches of a training step on CUDA, counted without a GPU.
//!
//! [`Counting`] is a runtime that executes nothing: it hands out addresses, notes what is enqueued,
//! and answers every download with zeros. The library's own code runs on it, so the counts are
//! those of a step on a GPU, at any size of batch.

use super::steps::Batches;
use crate::limits::gpu::Limits;
use dfar::Result;
use dfar::batch::Batch;
use dfar::device::Store;
use dfar::device::cuda::kernel::{Kernel, Launch, Pointer};
use dfar::device::cuda::runtime::{self, Gemm, Held, Memory, Runtime, Start};
use dfar::device::cuda::{CudaError, Gpu, Precision};
use dfar::model::{Model, Optimizer};
use dfar::train::config::Config;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// First address: no pair of indices and no pair of finite f32 has these bits.
const BASE: Pointer = 0x7fd0_0000_0000_0000;

/// What a step enqueued, by kind: a kernel's name, `product` or `fill`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Kind {
    /// Kernel, `product` or `fill`.
    pub name: String,
    /// Launches of a step.
    pub launches: usize,
    /// Bytes of the arrays that these launches name, each array once per launch. Of a table, all
    /// rows count.
    pub bytes: usize,
}

/// The launches of one step, by kind, most first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Launches {
    /// Kinds of launches.
    pub kinds: Vec<Kind>,
    /// Assumed time of a launch, in seconds, when the device does nothing else.
    pub seconds_per_launch: f64,
    /// Bytes per second of a copy.
    pub copy: f64,
}

impl Launches {
    /// Number of launches.
    pub fn total(&self) -> usize {
        self.kinds.iter().map(|kind| kind.launches).sum()
    }

    /// Predicted seconds of a kind: of each launch on average, the longer of its assumed time and
    /// its bytes.
    fn seconds(&self, kind: &Kind) -> f64 {
        (kind.launches as f64 * self.seconds_per_launch).max(kind.bytes as f64 / self.copy)
    }
}

impl fmt::Display for Launches {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let each = self.seconds_per_launch * 1e6;
        writeln!(f, "launches of a step, {each} us each by assumption")?;
        writeln!(f, "| kind | launches | MB | predicted us |\n|---|---:|---:|---:|")?;
        for kind in &self.kinds {
            let (megabytes, microseconds) = (kind.bytes as f64 / 1e6, self.seconds(kind) * 1e6);
            let Kind { name, launches, .. } = kind;
            writeln!(f, "| `{name}` | {launches} | {megabytes:.2} | {microseconds:.1} |")?;
        }
        let bytes: usize = self.kinds.iter().map(|kind| kind.bytes).sum();
        let seconds: f64 = self.kinds.iter().map(|kind| self.seconds(kind)).sum();
        write!(f, "| all | {} | {:.2} | {:.1} |", self.total(), bytes as f64 / 1e6, seconds * 1e6)
    }
}

/// Counts the launches of a step on the first batch of `source`.
///
/// # Errors
/// A network that cannot be built, or a batch that cannot be packed.
pub fn predict(
    source: &Batches,
    config: &Config,
    precision: Precision,
    limits: &Limits,
    seconds_per_launch: f64,
) -> Result<Launches> {
    let kinds = count(&source.make(0, 1)?, source.items(), config, precision)?;
    Ok(Launches { kinds, seconds_per_launch, copy: limits.copy })
}

/// The kinds of launches of a step on a batch, most first.
///
/// # Errors
/// A network that cannot be built.
pub fn count(batch: &Batch, items: usize, config: &Config, precision: Precision) -> Result<Vec<Kind>> {
    let device = Arc::new(Gpu::new(Counting::default(), precision));
    let network = config.model(items);
    let mut model = Model::initialized(device.clone(), network, config.seed, config.init)?;
    let mut optimizer = Optimizer::new(&model)?;
    device.runtime().state().kinds.clear();
    model.train_step(batch, &config.loss(), &config.adam(), &mut optimizer)?;
    let kinds = std::mem::take(&mut device.runtime().state().kinds);
    let mut kinds: Vec<_> =
        kinds.into_iter().map(|(name, (launches, bytes))| Kind { name, launches, bytes }).collect();
    kinds.sort_by(|a, b| b.launches.cmp(&a.launches).then_with(|| a.name.cmp(&b.name)));
    Ok(kinds)
}

/// A runtime that counts and executes nothing.
#[derive(Default)]
pub struct Counting {
    state: Mutex<State>,
    held: Held,
}

#[derive(Default)]
struct State {
    /// Bytes handed out so far.
    taken: Pointer,
    /// Live arrays: bytes, and the content of those copied from the host.
    arrays: BTreeMap<Pointer, (usize, Vec<u8>)>,
    /// Launches and bytes by kind.
    kinds: BTreeMap<String, (usize, usize)>,
}

impl State {
    fn note(&mut self, name: &str, bytes: usize) {
        let (launches, all) = self.kinds.entry(name.to_owned()).or_default();
        *launches += 1;
        *all += bytes;
    }

    /// Adds the arrays whose addresses occur in `words` to `found`, and those that they point to.
    fn find(&self, words: &[u8], found: &mut BTreeSet<Pointer>) {
        for word in words.chunks_exact(8) {
            let word = Pointer::from_le_bytes(word.try_into().expect("eight bytes"));
            let Some((&at, (bytes, content))) = self.arrays.range(..=word).next_back() else { continue };
            if word < at + *bytes as Pointer && found.insert(at) {
                self.find(content, found);
            }
        }
    }
}

impl Counting {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runtime for Counting {
    type Mark = ();
    type Pinned = Vec<u8>;
    type Reading = ();

    fn mark(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn seconds_between(&self, (): &(), (): &()) -> Result<f64, CudaError> {
        Ok(0.0)
    }

    fn name(&self) -> String {
        "a count of launches".to_owned()
    }

    /// Those of an H100 or H200.
    fn limits(&self) -> runtime::Limits {
        runtime::Limits { shared_per_block: 227 << 10, multiprocessors: 132, cache_bytes: 50 << 20 }
    }

    fn memory(&self) -> Result<Memory, CudaError> {
        Ok(Memory { free: 1 << 36, total: 1 << 36 })
    }

    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError> {
        let mut state = self.state();
        let at = BASE + state.taken;
        state.taken += bytes.next_multiple_of(256) as Pointer;
        state.arrays.insert(at, (bytes, vec![]));
        Ok(at)
    }

    unsafe fn free(&self, at: Pointer, bytes: usize) {
        if !self.held.keeps(at, bytes) {
            self.state().arrays.remove(&at);
        }
    }

    fn held(&self) -> &Held {
        &self.held
    }

    fn allocate_landing(&self, bytes: usize) -> Result<Pointer, CudaError> {
        self.allocate(bytes)
    }

    unsafe fn free_landing(&self, at: Pointer, bytes: usize) {
        self.state().arrays.retain(|array, _| !(at..at + bytes as Pointer).contains(array));
    }

    unsafe fn zero(&self, _: Pointer, bytes: usize) -> Result<(), CudaError> {
        self.state().note("fill", bytes);
        Ok(())
    }

    unsafe fn write(&self, _: Pointer, _: &[u8]) -> Result<(), CudaError> {
        Ok(())
    }

    fn pinned(&self, bytes: usize) -> Result<Vec<u8>, CudaError> {
        Ok(vec![0; bytes])
    }

    unsafe fn send(&self, at: Pointer, from: Vec<u8>, parts: &[Range<usize>]) -> Result<(), CudaError> {
        let mut state = self.state();
        state.arrays.remove(&at);
        for part in parts {
            let array = (part.len(), from[part.clone()].to_vec());
            state.arrays.insert(at + part.start as Pointer, array);
        }
        Ok(())
    }

    unsafe fn begin_read(&self, _: Pointer, _: usize) -> Result<(), CudaError> {
        Ok(())
    }

    fn end_read(&self, (): (), host: &mut [u8]) -> Result<(), CudaError> {
        host.fill(0);
        Ok(())
    }

    unsafe fn launch(&self, kernel: Kernel, _: Launch, params: &[u8]) -> Result<(), CudaError> {
        let mut state = self.state();
        let mut found = BTreeSet::new();
        state.find(params, &mut found);
        let bytes = found.iter().map(|at| state.arrays[at].0).sum();
        state.note(kernel.entry, bytes);
        Ok(())
    }

    fn resident_blocks(&self, _: Kernel, _: u32, _: u32) -> Result<usize, CudaError> {
        Ok(2)
    }

    unsafe fn gemm_batch(&self, gemm: &Gemm, count: usize) -> Result<(), CudaError> {
        let [m, n, k] = gemm.shape;
        let c = if gemm.store == Store::Add { 2 * m * n } else { m * n };
        let bias = if gemm.bias == 0 { 0 } else { n };
        self.state().note("product", count * (m * k + k * n + c + bias) * size_of::<f32>());
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        Err(CudaError::NotCaptured { action: "counting launches" })
    }

    fn start_capture(&self) -> Result<Start, CudaError> {
        self.begin_capture().map(|()| Start::Updated)
    }

    fn forget_capture(&self) {}
}
