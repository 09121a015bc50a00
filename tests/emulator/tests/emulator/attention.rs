//! All kernels of `attention/attention.cu`, for all element types, against the golden cases and the
//! float64 reference. The emulator checks every memory access.

#[path = "../../../bodies/non_finite.rs"]
mod non_finite;

use dfar::attention::{FhaOptions, Inputs, LabelMask, Normalization, Pairing, reference};
use dfar::device::cuda::Element;
use dfar::device::cuda::kernel::{Kernel, Launch};
use dfar::device::cuda::plan::attention::{Pass, Plan};
use dfar::device::cuda::plan::params::{AttentionParams, Item};
use dfar::device::cuda::plan::tile::{HEAD_DIMS, Room};
use dfar_emulator::{Counts, Device, FUNCTIONS, head_dims};
use dfar_tools::attention::predict;
use dfar_tools::verify::{
    Case, Fha, cases, compare, compare_gradients,
    half_precision::{tolerance, unfused},
    relative_error,
};
use half::{bf16, f16};
use non_finite::Results;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;
use std::path::Path;

/// Shared memory per block on sm_80, the smallest of the data-centre GPUs.
const SHARED_LIMIT: usize = 163 << 10;

/// An element type of tensors.
trait Value: bytemuck::Pod {
    const ELEMENT: Element;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
}
impl Value for f32 {
    const ELEMENT: Element = Element::F32;
    fn from_f32(x: f32) -> f32 {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
}
impl Value for bf16 {
    const ELEMENT: Element = Element::Bf16;
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}
impl Value for f16 {
    const ELEMENT: Element = Element::F16;
    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// A batch and the gradient of its output.
#[derive(Clone)]
struct Batch {
    options: FhaOptions,
    cu_seqlens: Vec<u32>,
    label: Vec<u8>,
    qkv: [Vec<f32>; 3],
    d_o: Vec<f32>,
}

impl Batch {
    fn golden(fha: &Fha) -> Batch {
        let Fha { options, cu_seqlens, label, qkv, d_o, .. } = fha.clone();
        Batch { options, cu_seqlens, label, qkv, d_o }
    }

    fn random(options: FhaOptions, lengths: &[usize], seed: u64) -> Batch {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n = lengths.iter().sum::<usize>();
        let ends = lengths.iter().scan(0, |end, &l| {
            *end += l as u32;
            Some(*end)
        });
        let cu_seqlens = std::iter::once(0).chain(ends).collect();
        let mut values = |len| (0..len).map(|_| rng.random_range(-1.5f32..1.5)).collect::<Vec<f32>>();
        let qkv = [(); 3].map(|()| values(n * options.heads * options.head_dim));
        let d_o = values(options.output_len(n));
        let label = (0..n).map(|_| rng.random_range(0..2u8)).collect();
        Batch { options, cu_seqlens, label, qkv, d_o }
    }

    /// The batch with every value rounded to `T`.
    fn rounded<T: Value>(&self) -> Batch {
        let round = |x: &Vec<f32>| x.iter().map(|&x| T::from_f32(x).to_f32()).collect::<Vec<f32>>();
        Batch { qkv: self.qkv.each_ref().map(round), d_o: round(&self.d_o), ..self.clone() }
    }

    fn inputs(&self) -> Inputs<'_> {
        let [q, k, v] = &self.qkv;
        Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }

    /// The sequences of `range` as a batch of their own.
    fn sequences(&self, range: Range<usize>) -> Batch {
        let cu_seqlens = &self.cu_seqlens[range.start..=range.end];
        let (start, end) = (cu_seqlens[0] as usize, cu_seqlens[cu_seqlens.len() - 1] as usize);
        let (width, out) = (self.options.heads * self.options.head_dim, self.options.output_len(1));
        Batch {
            options: self.options,
            cu_seqlens: cu_seqlens.iter().map(|at| at - start as u32).collect(),
            label: self.label[start..end].to_vec(),
            qkv: self.qkv.each_ref().map(|x| x[start * width..end * width].to_vec()),
            d_o: self.d_o[start * out..end * out].to_vec(),
        }
    }
}

fn run<T: Value>(batch: &Batch) -> Results {
    run_within::<T>(batch, Room::of(SHARED_LIMIT))
}

/// Runs all passes on a new device.
fn run_within<T: Value>(batch: &Batch, room: Room) -> Results {
    run_variant::<T>(batch, room, 0, |_, _, _| {}).expect("the kernels should be sound")
}

/// As [`run_within`], with `polynomial` of 8 exponentials as polynomials. `see` gets the executed
/// operations of each pass.
fn run_variant<T: Value>(
    batch: &Batch,
    room: Room,
    polynomial: u32,
    mut see: impl FnMut(&Plan, Pass, Counts),
) -> Result<Results, String> {
    let options = &batch.options;
    let n = options.check(&batch.inputs()).map_err(|e| e.to_string())?;
    let plan =
        Plan::new(T::ELEMENT, options, &batch.cu_seqlens, &batch.label, room).map_err(|e| e.to_string())?;
    let device = Device::new();
    let input = |x: &[f32]| device.input(&x.iter().map(|&x| T::from_f32(x)).collect::<Vec<T>>());
    let [q, k, v] = batch.qkv.each_ref().map(|x| input(x));
    let d_o = input(&batch.d_o);
    let (order, feedback) = (device.input(&plan.order), device.input(&plan.feedback));
    let (o, lse) = (device.output::<T>(options.output_len(n)), device.output::<f32>(options.lse_len(n)));
    let [delta, correction] = [(); 2].map(|()| device.output::<f32>(options.lse_len(n)));
    let [dq, dk, dv] = [(); 3].map(|()| device.output::<T>(q_len(options, n)));
    let labelled = options.label_mask == LabelMask::Feedback;
    for pass in Pass::ALL {
        let items = device.input::<Item>(plan.items(pass));
        let pointers = AttentionParams {
            q: q.pointer(),
            k: k.pointer(),
            v: v.pointer(),
            o: o.pointer(),
            lse: lse.pointer(),
            d_o: d_o.pointer(),
            delta: delta.pointer(),
            correction: correction.pointer(),
            dq: dq.pointer(),
            dk: dk.pointer(),
            dv: dv.pointer(),
            order: if labelled { order.pointer() } else { 0 },
            feedback: if labelled { feedback.pointer() } else { 0 },
            items: items.pointer(),
            ..AttentionParams::default()
        };
        let params = plan.params(options, pass, pointers);
        let launch = plan.launch(options, pass);
        let before = device.counts();
        let kernel = pass.kernel(T::ELEMENT, options.head_dim).with_polynomial(polynomial);
        device.launch(kernel, launch, &params)?;
        let after = device.counts();
        let executed = Counts {
            exponentials: after.exponentials - before.exponentials,
            multiply_adds: after.multiply_adds - before.multiply_adds,
            copied: after.copied - before.copied,
        };
        see(&plan, pass, executed);
    }
    let read =
        |x| -> Result<Vec<f32>, String> { Ok(device.read::<T>(&x)?.iter().map(|x| x.to_f32()).collect()) };
    Ok(Results { o: read(o)?, lse: device.read(&lse)?, gradients: [read(dq)?, read(dk)?, read(dv)?] })
}

fn q_len(options: &FhaOptions, n: usize) -> usize {
    n * options.heads * options.head_dim
}

/// The golden cases of compiled head widths.
fn golden(element: Element) -> Vec<(String, Fha)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden");
    let all = cases(&folder).expect("golden cases should be there");
    let read = all.iter().map(|path| Case::read(path).expect("a case should be readable"));
    let fha: Vec<_> = read
        .filter(|case| case.kind == "fha")
        .map(|case| (case.name.clone(), Fha::new(&case).expect("a case should be complete")))
        .filter(|(_, fha)| head_dims(element).contains(&fha.options.head_dim))
        .collect();
    assert!(fha.len() >= if cfg!(feature = "sweep") { 16 } else { 9 }, "only {} cases", fha.len());
    fha
}

/// Descriptions of the f32 errors above tolerance.
fn f32_failures(
    name: &str,
    results: &Results,
    o: &[f64],
    lse: &[f64],
    gradients: [&[f64]; 3],
) -> Vec<String> {
    let mut errors = vec![compare("o", &results.o, o), compare("lse", &results.lse, lse)];
    let [dq, dk, dv] = &results.gradients;
    let [rq, rk, rv] = gradients;
    errors.extend(compare_gradients(&[("dq", dq, rq), ("dk", dk, rk), ("dv", dv, rv)]));
    errors.iter().filter(|e| !e.passes).map(|e| format!("{name}: {e:?}")).collect()
}

#[test]
fn golden_cases_in_f32() {
    let mut failures = vec![];
    for (name, fha) in golden(Element::F32) {
        let results = run::<f32>(&Batch::golden(&fha));
        let gradients = fha.gradients.each_ref().map(|x| &x[..]);
        failures.extend(f32_failures(&name, &results, &fha.o, &fha.lse, gradients));
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Compares the error of the kernels with that of the unfused computation, both against the
/// reference on the same inputs. bf16 runs in both rooms. f16, which differs in a few instructions,
/// runs with whole sequences.
fn judge_16_bit<T: Value>(name: &str, batch: &Batch) -> Vec<String> {
    let batch = batch.rounded::<T>();
    let judge = |room| judge_rounded::<T>(&format!("{name} {room:?}"), &batch, run_within::<T>(&batch, room));
    ROOMS.into_iter().take(if T::ELEMENT == Element::Bf16 { 2 } else { 1 }).flat_map(judge).collect()
}

/// `fused`: the kernels' results on `batch`, whose values are representable in `T`.
fn judge_rounded<T: Value>(name: &str, batch: &Batch, fused: Results) -> Vec<String> {
    let exact = reference::forward(&batch.options, batch.inputs()).expect("valid inputs");
    let exact_gradients =
        reference::backward(&batch.options, batch.inputs(), &batch.d_o).expect("valid inputs");
    let unfused = unfused(&batch.options, batch.inputs(), &batch.d_o, T::ELEMENT);
    let largest = |x: &[f64]| x.iter().filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    let gradients = [&exact_gradients.dq, &exact_gradients.dk, &exact_gradients.dv];
    // Gradients whose terms cancel to 0 are judged relative to the largest gradient; see
    // dfar_tools::verify.
    let floor = gradients.iter().map(|x| largest(x)).fold(0.0, f64::max) / 400.0;
    let mut failures = vec![];
    let mut check = |tensor: &str, x: &[f32], y: &[f32], exact: &[f64], floor: f64| {
        let scale = largest(exact).max(floor);
        let (fused, unfused) = (relative_error(x, exact, scale), relative_error(y, exact, scale));
        if fused.is_nan() || fused > tolerance(T::ELEMENT, unfused) {
            failures.push(format!("{name} {tensor}: fused {fused:.2e}, unfused {unfused:.2e}"));
        }
    };
    check("o", &fused.o, &unfused.o, &exact.o, 0.0);
    check("lse", &fused.lse, &unfused.lse, &exact.lse, 0.0);
    for (i, tensor) in ["dq", "dk", "dv"].into_iter().enumerate() {
        check(tensor, &fused.gradients[i], &unfused.gradients[i], gradients[i], floor);
    }
    failures
}

#[test]
fn golden_cases_in_bf16() {
    let failures: Vec<String> = golden(Element::Bf16)
        .iter()
        .flat_map(|(n, fha)| judge_16_bit::<bf16>(n, &Batch::golden(fha)))
        .collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn golden_cases_in_f16() {
    let failures: Vec<String> = golden(Element::F16)
        .iter()
        .flat_map(|(n, fha)| judge_16_bit::<f16>(n, &Batch::golden(fha)))
        .collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Options beyond the golden cases: every compiled width, all head counts, per-head pairing, scales
/// of 0 and below.
fn variants(element: Element) -> Vec<FhaOptions> {
    let mut all = vec![];
    for (index, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        let heads = [2, 4, 8, 2, 4][index];
        let base = FhaOptions::new(heads, head_dim);
        all.push(FhaOptions { causal: index % 2 == 0, normalization: Normalization::Masked, ..base });
        all.push(FhaOptions { causal: index % 2 == 1, ..base });
        all.push(FhaOptions { label_mask: LabelMask::None, pairing: Pairing::PerHead, ..base });
        all.push(FhaOptions { label_mask: LabelMask::None, heads: 1, ..base });
    }
    all.push(FhaOptions { scale: -0.3, ..FhaOptions::new(2, 16) });
    all.push(FhaOptions { scale: 0.0, ..FhaOptions::new(2, 16) });
    all.push(FhaOptions::new(6, 16)); // three query rows per token: a token's rows straddle warps
    all.retain(|options| head_dims(element).contains(&options.head_dim));
    all
}

/// With short and whole sequences, and with all sequences streamed.
const ROOMS: [Room; 2] = [Room::of(SHARED_LIMIT), Room::streamed(SHARED_LIMIT)];

const LENGTHS: [usize; 7] = [0, 1, 37, 2, 0, 70, 16];

#[test]
fn random_cases_in_f32() {
    let mut failures = vec![];
    for (seed, options) in variants(Element::F32).into_iter().enumerate() {
        let batch = Batch::random(options, &LENGTHS, seed as u64);
        let exact = reference::forward(&options, batch.inputs()).expect("valid inputs");
        let gradients = reference::backward(&options, batch.inputs(), &batch.d_o).expect("valid inputs");
        let gradients = [&gradients.dq[..], &gradients.dk[..], &gradients.dv[..]];
        for room in ROOMS {
            let (name, results) = (format!("{room:?} {options:?}"), run_within::<f32>(&batch, room));
            failures.extend(f32_failures(&name, &results, &exact.o, &exact.lse, gradients));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn random_cases_in_16_bits() {
    fn judge<T: Value>() -> Vec<String> {
        let judge = |(seed, options): (usize, FhaOptions)| {
            let batch = Batch::random(options, &LENGTHS, seed as u64);
            judge_16_bit::<T>(&format!("{:?} {options:?}", T::ELEMENT), &batch)
        };
        variants(T::ELEMENT).into_iter().enumerate().flat_map(judge).collect()
    }
    let failures = [judge::<bf16>(), judge::<f16>()].concat();
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Number of sequences of a pass over whole sequences.
fn whole_items(plan: &Plan, pass: Pass) -> usize {
    plan.items(pass).iter().filter(|item| item.length > 0).count()
}

/// Blocks of several whole sequences, of every number of tiles, with empty sequences; one launch
/// per group of sequences.
#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn whole_sequences_of_all_lengths() {
    fn judge<T: Value>(
        options: FhaOptions,
        groups: &[[usize; 4]; 3],
        seed: u64,
        failures: &mut Vec<String>,
    ) -> usize {
        let batch = Batch::random(options, groups.as_flattened(), seed).rounded::<T>();
        let mut whole = 0;
        let parts = (0..3).map(|group| {
            let part = batch.sequences(group * 4..group * 4 + 4);
            let see = |plan: &Plan, pass: Pass, _: Counts| {
                let takes = matches!(pass, Pass::BackwardWhole(_));
                whole += if takes { whole_items(plan, pass) } else { 0 };
            };
            run_variant::<T>(&part, Room::of(SHARED_LIMIT), 0, see).expect("the kernels should be sound")
        });
        let results = together(parts);
        let name = format!("{groups:?} {:?} {options:?}", T::ELEMENT);
        if T::ELEMENT == Element::F32 {
            let exact = reference::forward(&options, batch.inputs()).expect("valid inputs");
            let gradients = reference::backward(&options, batch.inputs(), &batch.d_o).expect("valid inputs");
            let gradients = [&gradients.dq[..], &gradients.dk[..], &gradients.dv[..]];
            failures.extend(f32_failures(&name, &results, &exact.o, &exact.lse, gradients));
        } else {
            failures.extend(judge_rounded::<T>(&name, &batch, results));
        }
        whole
    }
    let (mut failures, mut whole) = (vec![], [0; 3]);
    for (seed, options) in variants(Element::F16).into_iter().enumerate() {
        let longest = 64 / options.query_slots();
        let groups =
            [[64, 33, 1, 48], [17, 32, 0, 31], [16, 1, 2, 15]].map(|x| x.map(|l: usize| l.min(longest)));
        let seed = 100 + seed as u64;
        whole[0] += judge::<f32>(options, &groups, seed, &mut failures);
        whole[1] += judge::<bf16>(options, &groups, seed, &mut failures);
        whole[2] += judge::<f16>(options, &groups, seed, &mut failures);
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(whole[0] > 120 && whole[1] > 150 && whole[1] == whole[2], "only {whole:?} sequences were whole");
}

/// Whole sequences of which only one side fits shared memory.
#[test]
fn whole_sequences_in_two_passes() {
    let base = FhaOptions::new(2, 16);
    let mut failures = vec![];
    for (seed, (options, lengths)) in [
        (base, [150, 3, 165]),
        (FhaOptions { normalization: Normalization::Masked, ..base }, [150, 3, 165]),
        (FhaOptions { causal: false, scale: -0.3, ..base }, [150, 3, 165]),
        (
            FhaOptions { label_mask: LabelMask::None, pairing: Pairing::PerHead, ..FhaOptions::new(2, 32) },
            [150, 3, 160],
        ),
        (FhaOptions::new(4, 16), [75, 3, 82]),
    ]
    .into_iter()
    .filter(|(options, _)| head_dims(Element::Bf16).contains(&options.head_dim))
    .enumerate()
    {
        let batch = Batch::random(options, &lengths, 300 + seed as u64);
        let mut two = 0;
        let see = |plan: &Plan, pass, _: Counts| {
            two += if pass == Pass::DkDvWhole { whole_items(plan, pass) } else { 0 }
        };
        let rounded = batch.rounded::<bf16>();
        let fused = run_variant::<bf16>(&rounded, ROOMS[0], 0, see).expect("the kernels should be sound");
        assert!(two > 0, "none of {options:?}");
        failures.extend(judge_rounded::<bf16>(&format!("{options:?}"), &rounded, fused));
        let exact = reference::forward(&options, batch.inputs()).expect("valid inputs");
        let gradients = reference::backward(&options, batch.inputs(), &batch.d_o).expect("valid inputs");
        let gradients = [&gradients.dq[..], &gradients.dk[..], &gradients.dv[..]];
        let results = run::<f32>(&batch);
        failures.extend(f32_failures(&format!("{options:?}"), &results, &exact.o, &exact.lse, gradients));
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Concatenates the results of several batches.
fn together(parts: impl Iterator<Item = Results>) -> Results {
    let mut all = Results { o: vec![], lse: vec![], gradients: [vec![], vec![], vec![]] };
    for part in parts {
        all.o.extend(part.o);
        all.lse.extend(part.lse);
        all.gradients.iter_mut().zip(part.gradients).for_each(|(all, part)| all.extend(part));
    }
    all
}

#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn a_sequence_does_not_see_its_batch() {
    for options in [FhaOptions::new(2, 16), FhaOptions::new(4, 32)] {
        let batch = Batch::random(options, &LENGTHS, 20);
        let alone = (0..LENGTHS.len()).map(|index| run::<bf16>(&batch.sequences(index..index + 1)));
        assert!(run::<bf16>(&batch) == together(alone), "{options:?}");
    }
}

#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn less_shared_memory_gives_the_same_bits() {
    let batch = Batch::random(FhaOptions::new(8, 64), &[90], 21);
    let one = run_within::<bf16>(&batch, Room::of(227 << 10));
    let other = run_within::<bf16>(&batch, Room::of(80 << 10));
    assert!(one == other);
}

fn check_propagation<T: Value>(
    options: FhaOptions,
    room: Room,
    lengths: &[usize],
    sequence: usize,
    at: usize,
) {
    non_finite::check_propagation(options, lengths, sequence, at, &|&options, inputs, d_o| {
        let Inputs { q, k, v, cu_seqlens, label } = inputs;
        let qkv = [q, k, v].map(<[f32]>::to_vec);
        let (cu_seqlens, label, d_o) = (cu_seqlens.to_vec(), label.to_vec(), d_o.to_vec());
        run_within::<T>(&Batch { options, cu_seqlens, label, qkv, d_o }, room)
    });
}

#[test]
fn non_finite_input_reaches_only_dependent_results() {
    let (dims, normalizations) = if cfg!(feature = "sweep") { (&[8, 16, 64][..], 2) } else { (&[16][..], 1) };
    for &head_dim in dims {
        for normalization in [Normalization::Joint, Normalization::Masked].into_iter().take(normalizations) {
            let options = FhaOptions { normalization, ..FhaOptions::new(2, head_dim) };
            // In a row whose warp also holds earlier rows.
            for room in ROOMS {
                check_propagation::<f32>(options, room, &[20, 40, 7], 1, 25);
                check_propagation::<bf16>(options, room, &[20, 40, 7], 1, 25);
            }
            // Whole, shared by four warps; streamed, beyond the first tile.
            check_propagation::<bf16>(options, ROOMS[0], &[9, 80, 3], 1, 70);
            check_propagation::<bf16>(options, ROOMS[1], &[9, 100, 3], 1, 70);
        }
    }
    if head_dims(Element::F16).is_empty() {
        return;
    }
    check_propagation::<f16>(FhaOptions::new(4, 16), ROOMS[0], &[20, 30, 7], 1, 13);
    check_propagation::<f16>(FhaOptions::new(4, 32), ROOMS[1], &[70, 7], 0, 35);
}

/// Behind tiles that are taken without a maximum: each row of the warp keeps its own reference.
#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn non_finite_input_does_not_reach_other_tiles() {
    for scale in [0.25, 6.0] {
        let options = FhaOptions { scale, ..FhaOptions::new(2, 16) };
        check_propagation::<bf16>(options, ROOMS[0], &[150], 0, 140);
        check_propagation::<bf16>(options, ROOMS[1], &[300], 0, 292);
    }
}

/// `exp2_polynomial` stays within its documented error over its range and at its ends.
#[test]
fn the_polynomial_is_the_exponential() {
    let device = Device::new();
    let mut x: Vec<f32> = (0..1 << 18).map(|i| -126.0 + i as f32 * (253.0 / (1 << 18) as f32)).collect();
    x[..6].copy_from_slice(&[-127.0, f32::NEG_INFINITY, 128.0, f32::INFINITY, f32::NAN, 0.5]);
    let (input, output) = (device.input(&x), device.output::<f32>(x.len()));
    let launch = Launch { grid: [(x.len() / 128) as u32, 1], threads: 128, shared_bytes: 0 };
    let kernel = Kernel { module: FUNCTIONS, entry: "exp2_polynomial_of" };
    device.launch(kernel, launch, &[input.pointer(), output.pointer()]).expect("it is sound");
    let y = device.read(&output).expect("all was written");
    assert!(y.iter().all(|y| y.is_finite()));
    let nearest = |x: f32| if x.is_nan() { 127.0 } else { f64::from(x).clamp(-125.0, 127.0) };
    let error = |(&x, &y): (&f32, &f32)| (f64::from(y) / nearest(x).exp2() - 1.0).abs();
    let worst = x.iter().zip(&y).map(error).fold(0.0, f64::max);
    assert!((7.0e-5..7.6e-5).contains(&worst), "{worst:e}");
}

/// With polynomials the results stay within tolerance, and fewer exponentials are executed.
#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn polynomials_keep_the_tolerances() {
    fn judge<T: Value>(options: FhaOptions, room: Room) -> Vec<String> {
        let batch = Batch::random(options, &[300, 200], 41).rounded::<T>();
        let run = |polynomial| {
            let mut exponentials = 0;
            let see = |_: &Plan, pass, executed: Counts| {
                exponentials += if Pass::FORWARD.contains(&pass) { executed.exponentials } else { 0 };
            };
            let results = run_variant::<T>(&batch, room, polynomial, see).expect("sound");
            (results, exponentials)
        };
        let ((_, all), (fused, fewer)) = (run(0), run(3));
        assert!(fewer < all, "{fewer} of {all}");
        judge_rounded::<T>(&format!("{:?} {room:?} {options:?}", T::ELEMENT), &batch, fused)
    }
    let mut failures = vec![];
    for normalization in [Normalization::Joint, Normalization::Masked] {
        let options = FhaOptions { normalization, ..FhaOptions::new(2, 16) };
        failures.extend(judge::<bf16>(options, ROOMS[0]));
        failures.extend(judge::<f16>(options, ROOMS[1]));
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Number of times that references move in forward if all scores are 0: once per warp, when its
/// rows see their first keys. With keys in label order, once more when rows without visible
/// negatives see their first positives.
fn first_references(batch: &Batch, plan: &Plan, pass: Pass) -> u64 {
    let options = &batch.options;
    let slots = if options.pairing == Pairing::PerHead { 1 } else { options.query_slots() };
    if pass == Pass::ForwardShort {
        return 0; // the maximum is known beforehand
    }
    let whole = matches!(pass, Pass::ForwardWhole(_));
    let by_label = options.label_mask == LabelMask::Feedback
        && (!whole || options.normalization == Normalization::Masked);
    let mut count = 0;
    for item in plan.items(pass) {
        let all = item.length as usize * slots;
        let (first, end) = match whole {
            true => (0, all),
            false => (item.first as usize, all.min(item.first as usize + plan.tile.forward.rows())),
        };
        for from in (first..end).step_by(16) {
            let seen = (from..end.min(from + 16)).map(|row| {
                let visible = if options.causal { row / slots + 1 } else { item.length as usize };
                let labels = &batch.label[item.start as usize..][..visible];
                let positives = labels.iter().filter(|&&label| by_label && label == 1).count();
                (visible - positives, positives)
            });
            let seen: Vec<_> = seen.collect();
            count += u64::from(seen.iter().any(|&(negatives, _)| negatives > 0));
            count += u64::from(seen.iter().any(|&(negatives, positives)| negatives == 0 && positives > 0));
        }
    }
    count * if options.pairing == Pairing::PerHead { options.heads as u64 } else { 1 }
}

/// Masked and future tiles cost no exponentials, and the executed operations match the cost model.
#[test]
fn what_is_executed_is_what_is_predicted() {
    fn judge<T: Value>(options: FhaOptions, room: Room, lengths: &[usize], seed: u64) {
        let mut batch = Batch::random(options, lengths, seed);
        batch.qkv[0].fill(0.0);
        let run = run_variant::<T>(&batch, room, 0, |plan, pass, executed| {
            let predicted = predict::counts(T::ELEMENT, &options, plan, pass);
            let moved = match pass {
                Pass::ForwardWhole(_) | Pass::Forward => 64 * first_references(&batch, plan, pass),
                _ => 0,
            };
            let exponentials = predicted.exponentials + predicted.rescaling + moved;
            let name = format!("{pass:?} {:?} {options:?} {lengths:?}", T::ELEMENT);
            assert_eq!(executed.exponentials, exponentials, "exponentials of {name}");
            assert_eq!(executed.copied, predicted.copied, "bytes of {name}");
            if T::ELEMENT != Element::F32 {
                assert_eq!(executed.multiply_adds, predicted.multiply_adds, "multiply-adds of {name}");
            }
        });
        run.expect("the kernels should be sound");
    }
    for (seed, options) in variants(Element::Bf16).into_iter().enumerate() {
        for (room, lengths) in
            [(ROOMS[0], &LENGTHS[..]), (ROOMS[0], &[64, 33, 1, 160]), (ROOMS[1], &[200, 65])]
        {
            judge::<f32>(options, room, lengths, 200 + seed as u64);
            judge::<bf16>(options, room, lengths, 200 + seed as u64);
        }
    }
}
