//! The systems against the float64 cases of the oracle: logits, losses, every gradient, Adam. Then what
//! the cases cannot show: sharing, threads, equal systems.

use dfar::batch::{Group, History, without_sharing};
use dfar::device::cpu::Cpu;
use dfar::model::{HostTensor, Initialization};
use dfar_baselines::loss::Ranking;
use dfar_baselines::verify::verify;
use dfar_baselines::{Kind, LossOptions, Model, Settings, StepLoss};
use dfar_tools::verify::{Outcome, VerifyError, cases};
use rand::{RngExt, SeedableRng};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Number of cases, all of which pass.
fn check(folder: &Path) -> usize {
    let mut checked = 0;
    for path in cases(folder).expect("there should be cases") {
        let name = path.file_stem().expect("a case has a name").to_string_lossy().into_owned();
        if !Kind::ALL.iter().any(|kind| name.starts_with(kind.name())) {
            println!("skipped: {name}");
            continue;
        }
        let report = verify(&path).unwrap_or_else(|error| panic!("{error}"));
        let Outcome::Checked(errors) = &report.outcome else { panic!("{} was not compared", report.case) };
        assert!(errors.len() > 10, "{}: only {} tensors compared", report.case, errors.len());
        for error in errors {
            assert!(error.passes(), "{}: {error:?}", report.case);
        }
        checked += 1;
    }
    checked
}

#[test]
fn the_systems_agree_with_the_oracle() {
    assert!(check(&root().join("tests/golden")) >= 1);
}

#[test]
fn the_systems_agree_with_all_cases_of_the_oracle() {
    let folder = root().join("../../shared/golden/baselines");
    if !folder.exists() {
        println!("skipped: {} is not there", folder.display());
        return;
    }
    assert!(check(&folder) >= 2 * Kind::ALL.len());
}

#[test]
fn a_wrong_gradient_is_noticed_and_a_broken_file_is_named() {
    let path = root().join("tests/golden/sasrec_small.safetensors");
    let mut bytes = std::fs::read(&path).expect("the case should be there");
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
    let (start, end) = metadata.info("grad.encoder.v.w").expect("the gradient is there").data_offsets;
    let at = 8 + header;
    let values: Vec<f64> = bytes[at + start..at + end]
        .chunks_exact(8)
        .map(|value| f64::from_le_bytes(value.try_into().expect("8 bytes")))
        .collect();
    let largest = values.iter().fold(0f64, |m, v| m.max(v.abs()));
    bytes[at + start..at + start + 8].copy_from_slice(&(values[0] + 2e-4 * largest).to_le_bytes());
    let folder = tempfile::tempdir().expect("a folder");
    let altered = folder.path().join("altered.safetensors");
    std::fs::write(&altered, &bytes).expect("a file");
    let report = verify(&altered).expect("it is still a case");
    let Outcome::Checked(errors) = &report.outcome else { panic!("not compared") };
    let failed: Vec<_> = errors.iter().filter(|e| !e.passes()).map(|e| &e.tensor[..]).collect();
    assert_eq!(failed, ["grad.encoder.v.w"]);

    std::fs::write(&altered, &bytes[..bytes.len() / 2]).expect("a file");
    let error = verify(&altered).expect_err("half a file is no case");
    assert!(matches!(error, VerifyError::Format { .. }) && error.to_string().contains("altered.safetensors"));
}

const ITEMS: usize = 40;

/// Histories with several prefixes; one has no events, one no skipped ones, one no liked ones.
fn histories() -> Vec<History> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
    let lengths: [&[u32]; 6] = [&[3, 9, 40], &[0], &[0, 1], &[7, 7], &[5], &[20, 21]];
    let mut history = |(b, prefixes): (usize, &&[u32])| {
        let events = *prefixes.last().expect("a prefix") as usize;
        let mut item = |_| rng.random_range(0..ITEMS as u32);
        let items = (0..events).map(&mut item).collect();
        let groups = prefixes.iter().map(|&length| {
            let candidates: Vec<u32> = (0..4).map(&mut item).collect();
            Group { length, candidates, targets: vec![1.0, 0.0, 0.0, 0.0] }
        });
        let groups = groups.collect();
        let label = |t: usize| {
            if b == 3 {
                1
            } else if b == 4 {
                0
            } else {
                (t * 7 % 3 == 0) as u8
            }
        };
        History { items, labels: (0..events).map(label).collect(), groups }
    };
    lengths.iter().enumerate().map(&mut history).collect()
}

fn settings() -> Settings {
    Settings {
        items: ITEMS,
        max_length: 40,
        width: 12,
        attention: [9, 7],
        tower: [11, 5],
        blocks: 2,
        ..Settings::default()
    }
}

fn model(kind: Kind) -> Model {
    Model::initialized(Arc::new(Cpu::new()), kind, settings(), 3, Initialization::Scaled).expect("a model")
}

fn gradients(model: &Model, histories: &[History], auxiliary: f32) -> (StepLoss, Vec<HostTensor>) {
    let events: u32 = histories.iter().map(|h| h.items.len() as u32).sum();
    let negatives: Vec<u32> = match model.kind().auxiliary() {
        Some(("aux", _)) => (0..events).map(|t| t * 11 % ITEMS as u32).collect(),
        _ => Vec::new(),
    };
    let x = model.inputs(histories, &negatives).unwrap_or_else(|error| panic!("{error:?}"));
    let options = LossOptions { ranking: Ranking::Bce, embed_l2: 1e-2, auxiliary };
    model.gradients(&x, &options).expect("gradients")
}

/// One encoder pass for all prefixes and candidates, or one for each.
#[test]
fn sharing_changes_neither_loss_nor_gradients() {
    for kind in Kind::ALL {
        let (model, shared) = (model(kind), histories());
        // The auxiliary loss of DIEN counts each pass once.
        let auxiliary = if matches!(kind.auxiliary(), Some(("aux", _))) { 0.0 } else { 0.3 };
        let (loss, shared_gradients) = gradients(&model, &shared, auxiliary);
        let (alone, own_gradients) = gradients(&model, &without_sharing(&shared), auxiliary);
        assert!((loss.loss - alone.loss).abs() < 1e-6 * alone.loss.abs(), "{kind:?}: {loss:?}, {alone:?}");
        let largest = own_gradients.iter().flat_map(|t| &t.values).fold(0f32, |m, x| m.max(x.abs()));
        for (a, b) in shared_gradients.iter().zip(&own_gradients) {
            let error = a.values.iter().zip(&b.values).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(error <= 1e-6 * largest, "{kind:?}, {}: {error}, largest {largest}", a.name);
        }
        assert!(shared_gradients.iter().all(|t| t.name.ends_with("mlp.2.b")
            || t.name == "cross.2.b"
            || t.values.iter().any(|x| *x != 0.0)));
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    // Enough histories for several chunks of every operation.
    let many: Vec<History> = (0..40).flat_map(|_| histories()).collect();
    for kind in Kind::ALL {
        let model = model(kind);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| gradients(&model, &many, 0.3))
        };
        assert!(run(1) == run(3), "{kind:?}");
    }
}

#[test]
fn talking_heads_that_do_not_mix_are_sasrec() {
    let (sasrec, tha4rec) = (model(Kind::Sasrec), model(Kind::Tha4rec));
    let mut tensors = sasrec.tensors().expect("parameters");
    tensors.extend(tha4rec.tensors().expect("parameters").into_iter().filter(|t| t.name.contains(".mix_")));
    let tha4rec = Model::from_tensors(Arc::new(Cpu::new()), Kind::Tha4rec, settings(), &tensors)
        .expect("the same names");
    let (loss, of_sasrec) = gradients(&sasrec, &histories(), 0.0);
    let (same, of_tha4rec) = gradients(&tha4rec, &histories(), 0.0);
    assert!((loss.loss - same.loss).abs() < 1e-6 * loss.loss);
    for own in &of_sasrec {
        let other = of_tha4rec.iter().find(|t| t.name == own.name).expect("the same names");
        let largest = own.values.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        for (a, b) in own.values.iter().zip(&other.values) {
            assert!((a - b).abs() <= 2e-5 * largest, "{}: {a}, {b}", own.name);
        }
    }
    assert!(
        of_tha4rec.iter().any(|t| t.name == "encoder.1.mix_weights" && t.values.iter().any(|x| *x != 0.0))
    );
}

#[test]
fn a_batch_beyond_the_tables_is_refused() {
    let model = model(Kind::Sasrec);
    let history = |items: Vec<u32>, candidates: Vec<u32>| History {
        labels: vec![1; items.len()],
        groups: vec![Group { length: items.len() as u32, targets: vec![1.0; candidates.len()], candidates }],
        items,
    };
    let too_long = history(vec![1; 41], vec![2]);
    for bad in [history(vec![ITEMS as u32], vec![1]), history(vec![1], vec![ITEMS as u32]), too_long] {
        assert!(model.inputs(&[bad], &[]).is_err());
    }
}
