//! CUDA graph capture: captured work gives the same bits as direct execution; work that cannot be
//! captured is executed directly.

use crate::curves_bodies as bodies;

use dfar::device::cuda::array::Staging;
use dfar::device::cuda::runtime::Runtime;
use dfar::device::cuda::{Captures, CudaError, Gpu, Precision};
use dfar::device::{
    Activation, Dense, DeviceError, Embedding, Execution, LayerNorm, Linear, Lookup, Memory, Norm, Output,
    Rows, SegmentSum, Segments, Slot,
};
use dfar::model::{AdamOptions, Initialization, LossOptions, Model, ModelConfig, Optimizer};
use dfar::model::{PartTimer, StepObserver, StepPart, StepTimer};
use dfar_emulator::{Emulated, gpu};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const WIDTH: usize = 8;

fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// Runs launches, products, fills and reused memory on `rows` rows. Returns the bits of all
/// results.
fn work(gpu: &Gpu<Emulated>, rows: usize) -> Vec<u32> {
    let (x, w) = (gpu.upload(&ramp(rows * WIDTH)).unwrap(), gpu.upload(&ramp(WIDTH * WIDTH)).unwrap());
    let (gamma, beta) = (gpu.upload(&ramp(WIDTH)).unwrap(), gpu.upload(&ramp(WIDTH)).unwrap());
    let index = gpu.upload(&(0..rows as u32).rev().collect::<Vec<_>>()).unwrap();
    let offsets = gpu.upload(&[0, 1, rows as u32]).unwrap();
    let row = gpu.upload(&[0u32, 1]).unwrap();
    let results = gpu
        .captured(|| {
            let (mut y, mut norm) = (gpu.alloc(rows * WIDTH)?, gpu.alloc(rows * WIDTH)?);
            let (ln, lookup) =
                (LayerNorm { width: WIDTH, gamma: &gamma, beta: &beta }, Lookup { table: &x, index: &index });
            gpu.gather_layer_norm(ln, &[lookup], &mut y, &mut norm)?;
            let mut hidden = gpu.alloc(rows * WIDTH)?;
            let layer = Linear {
                w: &w,
                bias: Some(&beta),
                activation: Activation::Relu,
                inputs: WIDTH,
                outputs: WIDTH,
            };
            gpu.linear(layer, &norm, Output::overwrite(&mut hidden))?;
            drop(norm);
            // Reuses the memory of `norm`, which the product above still has to read.
            let mut sum = gpu.zeros(rows * WIDTH)?;
            gpu.add(&hidden, &mut sum)?;
            gpu.add(&y, &mut sum)?;
            let mut segments = gpu.alloc(2 * WIDTH)?;
            let segment_sum = SegmentSum {
                sources: &[&sum],
                segments: Segments { offsets: &offsets, members: &index },
                l2: 0.5,
                rows: Lookup { table: &x, index: &row },
            };
            gpu.segment_sum(WIDTH, segment_sum, &mut segments)?;
            let mut squares = gpu.zeros(1)?;
            let slot = Slot { values: &mut squares, index: 0 };
            gpu.half_square_sum(WIDTH, Lookup { table: &sum, index: &index }, slot)?;
            Ok((sum, segments, squares))
        })
        .unwrap();
    let (sum, segments, squares) = results;
    let square = squares.to_vec().unwrap()[0] as f32;
    sum.to_vec()
        .unwrap()
        .into_iter()
        .chain(segments.to_vec().unwrap())
        .chain([square])
        .map(f32::to_bits)
        .collect()
}

fn with_graphs() -> Gpu<Emulated> {
    gpu(Precision::F32).with_graphs()
}

#[test]
fn a_captured_sequence_gives_the_same_bits() {
    let (plain, captured) = (gpu(Precision::F32), with_graphs());
    for rows in [40, 7, 65, 40, 128] {
        assert_eq!(work(&captured, rows), work(&plain, rows), "{rows} rows");
    }
    // The node sequence is the same for all numbers of rows, until a segment needs a second launch.
    let expected = Captures { updated: 3, instantiated: 2, refused: 0, reason: None };
    assert_eq!(
        expected.to_string(),
        "CUDA graphs: 3 steps started by a cached executable, 2 by a new one, 0 without a graph"
    );
    assert_eq!((captured.captures(), plain.captures()), (Some(expected), None));
}

#[test]
fn what_cannot_be_captured_is_refused_and_done_plainly() {
    type Attempt = fn(&Gpu<Emulated>) -> Result<(), CudaError>;
    let attempts: [(Attempt, &str); 3] = [
        (|gpu| gpu.copy_of(&[1.0f32]).map(|_| ()), "copying to the device"),
        (|gpu| gpu.runtime().mark().map(|_| ()), "recording an event"),
        (
            |gpu| {
                let mut staging = Staging::new(gpu.runtime())?;
                staging.add(&[1u32])?;
                staging.send()
            },
            "copying to the device",
        ),
    ];
    for (attempt, action) in attempts {
        let gpu = with_graphs();
        let mut runs = 0;
        let result = gpu.captured(|| {
            runs += 1;
            Ok(attempt(&gpu)?)
        });
        assert!(result.is_ok() && runs == 2, "{action}: {result:?} in {runs}");
        let Captures { refused, reason, .. } = gpu.captures().unwrap();
        assert_eq!((refused, reason), (1, Some(format!("cuda: {action} cannot be part of a CUDA graph"))));
    }
}

#[test]
fn a_value_read_too_early_is_caught() {
    let (plain, captured) = (gpu(Precision::F32), with_graphs());
    // The host branches on a value that the device computes.
    let chosen = |gpu: &Gpu<Emulated>| {
        let x = gpu.upload(&ramp(5)).unwrap();
        let work = || {
            let mut y = gpu.zeros(5)?;
            gpu.add(&x, &mut y)?;
            let factor = if gpu.download(&y)?[1] > 0.0 { 2 } else { 1 };
            (1..factor).try_for_each(|_| gpu.add(&x, &mut y))?;
            gpu.download(&y)
        };
        gpu.captured(work).unwrap()
    };
    assert_eq!(chosen(&captured), chosen(&plain));
    assert_eq!(chosen(&captured), ramp(5).iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    let Captures { updated, instantiated, refused, reason } = captured.captures().unwrap();
    assert_eq!((updated, instantiated, refused), (0, 0, 2));
    assert_eq!(reason.as_deref(), Some("cuda: copying from the device cannot be part of a CUDA graph"));
    // Neither failed capture has left any state.
    assert_eq!(work(&captured, 7), work(&plain, 7));
}

/// Launches keep their recorded arguments. A fault inside the recording shows when the graph is
/// started.
#[test]
fn a_fault_inside_shows_when_it_runs() {
    let gpu = with_graphs();
    let x = gpu.upload(&ramp(5)).unwrap();
    let result = gpu.captured(|| {
        let mut y = gpu.alloc(5)?;
        gpu.add(&x, &mut y)
    });
    let error = result.expect_err("y is uninitialized").to_string();
    assert!(error.contains("uninitialized global memory"), "{error}");
    assert_eq!(gpu.captures().unwrap().reason, Some(error));
}

#[test]
fn an_error_or_a_panic_ends_the_capture() {
    let (plain, captured) = (gpu(Precision::F32), with_graphs());
    let error =
        captured.captured(|| -> Result<(), DeviceError> { Err(CudaError::HeadDim { head_dim: 3 }.into()) });
    let error = error.expect_err("the closure failed");
    assert!(matches!(CudaError::of(&error), Some(CudaError::HeadDim { head_dim: 3 })));
    let panic = catch_unwind(AssertUnwindSafe(|| {
        captured.captured(|| -> Result<(), DeviceError> {
            let _unfinished = captured.zeros::<f32>(100)?;
            panic!("in the middle")
        })
    }));
    assert!(panic.is_err());
    assert_eq!(work(&captured, 7), work(&plain, 7));
}

/// A timer of whole steps records events outside the capture; a timer of parts would record them
/// inside.
#[test]
fn steps_are_captured_unless_they_are_timed_by_part() {
    let batch = &bodies::batches()[0];
    let device = Arc::new(with_graphs());
    let config = ModelConfig { width: 16, attention: [12, 7], tower: [6, 5], ..ModelConfig::new(40, 10) };
    let mut model = Model::initialized(device.clone(), config, 1, Initialization::Small).unwrap();
    let mut optimizer = Optimizer::new(&model).unwrap();
    let loss = LossOptions { bpr: 0.1, idl: 1e-3, embed_l2: 1e-6 };
    let adam = AdamOptions { lr: 1e-3, clip: None, dense_embeddings: false };
    let mut step = |observer: &mut dyn StepObserver| {
        let staged = model.stager().stage(batch).unwrap();
        model.train_staged(staged, &loss, &adam, &mut optimizer, observer).unwrap();
    };
    let mut whole = StepTimer::new(device.clone());
    step(&mut whole);
    assert!(whole.take().unwrap() > 0.0);
    assert_eq!(device.captures().unwrap().refused, 0);
    let mut parts = PartTimer::new(device.clone());
    step(&mut parts);
    let seconds = parts.take().unwrap();
    assert!(StepPart::ALL.iter().all(|&part| seconds.of(part) > 0.0), "{seconds:?}");
    let reason = device.captures().unwrap().reason;
    assert_eq!(reason.as_deref(), Some("cuda: recording an event cannot be part of a CUDA graph"));
}

#[test]
fn captured_steps_are_plain_steps() {
    let batches = &bodies::batches()[..12];
    let sizes: HashSet<_> = batches.iter().map(|b| (b.tokens(), b.rows())).collect();
    assert!(sizes.len() > 10, "batches of many sizes: {sizes:?}");
    let device = Arc::new(with_graphs());
    assert_eq!(bodies::curve(device.clone(), batches), bodies::curve(Arc::new(gpu(Precision::F32)), batches));
    let captures = device.captures().unwrap();
    assert_eq!(captures.updated + captures.instantiated, batches.len(), "{captures}");
    assert!(captures.updated > 2 * captures.instantiated, "{captures}");
}
