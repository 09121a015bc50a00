//! The parts of a training step, its observers, and batches sent ahead, on every device.

use dfar::batch::{Batch, Group, History};
use dfar::device::{Clip, Device, DeviceError};
use dfar::model::{
    AdamOptions, HostTensor, Initialization, LossOptions, Model, ModelConfig, ModelError, Optimizer,
    PartTimer, StepObserver, StepPart, StepTimer,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// All bodies as tests; `$device` is a closure that creates a device.
#[allow(unused_macros, reason = "tests on a GPU, which may be absent, are written out")]
macro_rules! test_every_body {
    ($device:expr) => {
        test_every_body! { $device;
            an_observer_does_not_change_a_step
            parts_add_up_to_the_step
            a_batch_of_another_model_is_rejected
            sending_a_batch_ahead_does_not_change_results
            a_failed_step_does_not_lose_the_next_batch
            steps_in_flight_do_not_change_results
            a_refused_step_refuses_those_behind_it
            batches_are_staged_on_any_thread
        }
    };
    ($device:expr; $($name:ident)+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&$device);
        }
    )+};
}

const LOSS: LossOptions = LossOptions { bpr: 0.3, idl: 0.2, embed_l2: 1e-3 };
const ADAM: AdamOptions = AdamOptions { lr: 1e-2, clip: Some(Clip::PerTensor(2.0)), dense_embeddings: false };

fn config() -> ModelConfig {
    ModelConfig { width: 8, attention: [7, 4], tower: [6, 5], ..ModelConfig::new(40, 12) }
}

fn batch(seed: u32) -> Batch {
    let history = |length: u32| History {
        items: (0..length).map(|t| (7 * t + seed) % 40).collect(),
        labels: (0..length).map(|t| u8::from(!(t + seed).is_multiple_of(3))).collect(),
        groups: vec![Group {
            length,
            candidates: (0..4).map(|c| (11 * c + length) % 40).collect(),
            targets: vec![1.0, 0.0, 0.0, 0.0],
        }],
    };
    Batch::pack(&[history(12), history(5), history(9)]).expect("the histories are sound")
}

/// An observer that records its calls.
#[derive(Default)]
struct Heard {
    parts: Vec<StepPart>,
    ends: usize,
}

impl StepObserver for Heard {
    fn enter(&mut self, part: StepPart) -> Result<(), DeviceError> {
        assert_eq!(self.ends, 0, "no part is entered after the end");
        self.parts.push(part);
        Ok(())
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        self.ends += 1;
        Ok(())
    }
}

/// A model in training.
struct Training<D: Device> {
    model: Model<D>,
    optimizer: Optimizer<D>,
    adam: AdamOptions,
    losses: Vec<f64>,
}

impl<D: Device> Training<D> {
    fn new(device: Arc<D>, dense_embeddings: bool) -> Self {
        let model = Model::initialized(device, config(), 3, Initialization::Scaled).unwrap();
        let optimizer = Optimizer::new(&model).unwrap();
        Self { model, optimizer, adam: AdamOptions { dense_embeddings, ..ADAM }, losses: Vec::new() }
    }

    fn step(&mut self, seed: u32, observer: &mut dyn StepObserver) {
        let staged = self.model.stager().stage(&batch(seed)).unwrap();
        let step = self.model.train_staged(staged, &LOSS, &self.adam, &mut self.optimizer, observer);
        self.losses.push(step.unwrap().loss);
    }

    fn result(self) -> (Vec<f64>, Vec<HostTensor>) {
        (self.losses, self.model.tensors().unwrap())
    }
}

pub fn an_observer_does_not_change_a_step<D: Device>(new: &dyn Fn() -> Arc<D>) {
    for dense_embeddings in [false, true] {
        let mut unseen = Training::new(new(), dense_embeddings);
        let device = new();
        let mut timer = PartTimer::new(device.clone());
        let mut timed = Training::new(device, dense_embeddings);
        let mut heard = Training::new(new(), dense_embeddings);
        for seed in 0..3 {
            unseen.step(seed, &mut ());
            timed.step(seed, &mut timer);
            timer.take().unwrap();

            let mut ear = Heard::default();
            heard.step(seed, &mut ear);
            assert_eq!(ear.ends, 1);
            let (first, last) = (ear.parts.first(), ear.parts.last());
            assert_eq!((first, last), (Some(&StepPart::Input), Some(&StepPart::Optimizer)));
            for part in StepPart::ALL {
                // Parts with a forward and a backward pass are entered at least twice, the others
                // once; the backward pass of the towers follows on their losses.
                let once = matches!(part, StepPart::Input | StepPart::Towers | StepPart::Optimizer);
                let times = ear.parts.iter().filter(|&&p| p == part).count();
                assert!(if once { times == 1 } else { times >= 2 }, "{part:?}: {times} times");
            }
        }
        let unseen = unseen.result();
        assert!(timed.result() == unseen && heard.result() == unseen);
    }
}

pub fn parts_add_up_to_the_step<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let device = new();
    let (mut parts, mut whole) = (PartTimer::new(device.clone()), StepTimer::new(device.clone()));
    assert_eq!((parts.take().unwrap().total(), whole.take().unwrap()), (0.0, 0.0), "no step, no time");
    let mut training = Training::new(device, false);
    let mut share: f64 = 0.0;
    for seed in 0..10 {
        let start = Instant::now();
        training.step(seed, &mut Both(&mut parts, &mut whole));
        let outside = start.elapsed().as_secs_f64();
        let (parts, whole) = (parts.take().unwrap(), whole.take().unwrap());
        for part in StepPart::ALL {
            assert!(parts.of(part) > 0.0, "{part:?}");
        }
        // The events of both timers are adjacent, and inside the call.
        assert!(
            parts.total() <= whole + 1e-9 && whole <= outside + 1e-9,
            "{parts:?} of {whole} of {outside}"
        );
        share = share.max(parts.total() / whole);
    }
    // The best step counts: the thread may be preempted between two events.
    assert!(share >= 0.9, "parts are {share} of the step");
}

/// Two observers. The first is entered after the second and ended before it.
struct Both<'a, A, B>(&'a mut A, &'a mut B);

impl<A: StepObserver, B: StepObserver> StepObserver for Both<'_, A, B> {
    fn enter(&mut self, part: StepPart) -> Result<(), DeviceError> {
        self.1.enter(part)?;
        self.0.enter(part)
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        self.0.end()?;
        self.1.end()
    }
}

pub fn a_batch_of_another_model_is_rejected<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let device = new();
    let mut model = Model::initialized(device.clone(), config(), 1, Initialization::Small).unwrap();
    let wider =
        Model::initialized(device, ModelConfig { width: 16, ..config() }, 1, Initialization::Small).unwrap();
    let elsewhere = Model::initialized(new(), config(), 1, Initialization::Small).unwrap();
    for other in [&wider, &elsewhere] {
        let staged = other.stager().stage(&batch(0)).unwrap();
        let error = model.score_staged(staged).unwrap_err();
        assert!(matches!(error, ModelError::OtherModel), "{error}");
        // A batch sent by the other model is rejected as well.
        assert!(matches!(model.send(other.stager().stage(&batch(0)).unwrap()), Err(ModelError::OtherModel)));
        let sent = other.send(other.stager().stage(&batch(0)).unwrap()).unwrap();
        let mut optimizer = Optimizer::new(&model).unwrap();
        let step = model.begin_step(sent, &LOSS, &ADAM, &mut optimizer, &mut ());
        assert!(matches!(step.map(|_| ()), Err(ModelError::OtherModel)));
    }
    let staged = model.stager().stage(&batch(0)).unwrap();
    assert_eq!((staged.rows(), staged.tokens()), (12, 26));
    assert_eq!(model.score_staged(staged).unwrap(), model.score(&batch(0)).unwrap());
}

/// `begin_step` and `finish`, with the next batch sent in between, equal `train_staged`. The
/// observer sees no copy in between.
pub fn sending_a_batch_ahead_does_not_change_results<D: Device>(new: &dyn Fn() -> Arc<D>) {
    for dense_embeddings in [false, true] {
        let mut plain = Training::new(new(), dense_embeddings);
        (0..4).for_each(|seed| plain.step(seed, &mut ()));

        let Training { mut model, mut optimizer, adam, mut losses } = Training::new(new(), dense_embeddings);
        let send = |model: &Model<D>, seed| model.send(model.stager().stage(&batch(seed)).unwrap()).unwrap();
        let mut sent = send(&model, 0);
        for seed in 0..4 {
            let mut ear = Heard::default();
            assert_eq!(sent.rows(), 12);
            let pending = model.begin_step(sent, &LOSS, &adam, &mut optimizer, &mut ear).unwrap();
            assert_eq!((ear.parts[0], ear.ends), (StepPart::Input, 1));
            sent = send(&model, seed + 1);
            losses.push(pending.finish(&mut optimizer).unwrap().loss);
            assert_eq!(optimizer.steps(), u64::from(seed) + 1);
        }
        // Dropping an unused batch has no effect.
        drop(sent);
        assert!(Training { model, optimizer, adam, losses }.result() == plain.result());
    }
}

/// A failed step updates nothing and is not counted. The next batch, sent before, remains usable.
pub fn a_failed_step_does_not_lose_the_next_batch<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let Training { mut model, mut optimizer, adam, .. } = Training::new(new(), false);
    let send = |model: &Model<D>, seed| model.send(model.stager().stage(&batch(seed)).unwrap()).unwrap();
    let before = model.tensors().unwrap();
    let infinite = LossOptions { bpr: f32::INFINITY, ..LOSS };
    let first = send(&model, 0);
    let pending = model.begin_step(first, &infinite, &adam, &mut optimizer, &mut ()).unwrap();
    let second = send(&model, 1);
    let error = pending.finish(&mut optimizer).unwrap_err();
    assert!(matches!(error, ModelError::NonFinite { .. }), "{error}");
    assert!(optimizer.steps() == 0 && model.tensors().unwrap() == before);

    let step = model.begin_step(second, &LOSS, &adam, &mut optimizer, &mut ()).unwrap();
    let step = step.finish(&mut optimizer).unwrap();
    let mut plain = Training::new(new(), false);
    plain.step(1, &mut ());
    assert!((vec![step.loss], model.tensors().unwrap()) == plain.result());
}

/// Steps begun before earlier ones are finished equal steps one at a time.
pub fn steps_in_flight_do_not_change_results<D: Device>(new: &dyn Fn() -> Arc<D>) {
    for (dense_embeddings, most) in [(false, 2), (true, 2), (false, 4)] {
        let mut plain = Training::new(new(), dense_embeddings);
        (0..6).for_each(|seed| plain.step(seed, &mut ()));

        let Training { mut model, mut optimizer, adam, mut losses } = Training::new(new(), dense_embeddings);
        let mut in_flight = VecDeque::new();
        for seed in 0..6 {
            let sent = model.send(model.stager().stage(&batch(seed)).unwrap()).unwrap();
            in_flight.push_back(model.begin_step(sent, &LOSS, &adam, &mut optimizer, &mut ()).unwrap());
            if in_flight.len() == most {
                losses.push(in_flight.pop_front().unwrap().finish(&mut optimizer).unwrap().loss);
            }
        }
        losses.extend(in_flight.into_iter().map(|step| step.finish(&mut optimizer).unwrap().loss));
        assert_eq!(optimizer.steps(), 6);
        assert!(Training { model, optimizer, adam, losses }.result() == plain.result());
    }
}

/// The device refuses all steps in flight behind a refused one. Begun again, they give the results
/// of a run without it.
pub fn a_refused_step_refuses_those_behind_it<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let infinite = LossOptions { bpr: f32::INFINITY, ..LOSS };
    let Training { mut model, mut optimizer, adam, mut losses } = Training::new(new(), false);
    let begin = |model: &mut Model<D>, optimizer: &mut _, seed, loss| {
        let sent = model.send(model.stager().stage(&batch(seed)).unwrap()).unwrap();
        model.begin_step(sent, loss, &adam, optimizer, &mut ()).unwrap()
    };
    let good = begin(&mut model, &mut optimizer, 0, &LOSS);
    let bad = begin(&mut model, &mut optimizer, 1, &infinite);
    let behind = [2, 3].map(|seed| begin(&mut model, &mut optimizer, seed, &LOSS));
    losses.push(good.finish(&mut optimizer).unwrap().loss);
    let error = bad.finish(&mut optimizer).unwrap_err();
    assert!(matches!(error, ModelError::NonFinite { .. }), "{error}");
    for step in behind {
        let error = step.finish(&mut optimizer).unwrap_err();
        assert!(matches!(error, ModelError::Refused), "{error}");
    }
    assert_eq!(optimizer.steps(), 1);
    for seed in [2, 3] {
        let step = begin(&mut model, &mut optimizer, seed, &LOSS);
        losses.push(step.finish(&mut optimizer).unwrap().loss);
    }
    let mut plain = Training::new(new(), false);
    [0, 2, 3].into_iter().for_each(|seed| plain.step(seed, &mut ()));
    assert!(Training { model, optimizer, adam, losses }.result() == plain.result());
}

/// Other threads stage batches while the model computes. Dropping an unused one has no effect.
pub fn batches_are_staged_on_any_thread<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let model = Model::initialized(new(), config(), 3, Initialization::Scaled).unwrap();
    let expected: Vec<_> = (0..6).map(|seed| model.score(&batch(seed)).unwrap()).collect();
    let found: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|seed| {
                let stager = model.stager();
                scope.spawn(move || {
                    drop(stager.stage(&batch(seed + 1)).unwrap());
                    stager.stage(&batch(seed)).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| model.score_staged(thread.join().unwrap()).unwrap()).collect()
    });
    assert!(found == expected);
}
