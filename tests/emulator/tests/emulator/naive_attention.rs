//! Naive attention and the kernels of peak rates give correct results under the emulator's checks.

use dfar::attention::{FhaOptions, LabelMask, Normalization, reference};
use dfar::device::cuda::Precision;
use dfar_emulator::gpu;
use dfar_tools::attention::batch::Batch;
use dfar_tools::attention::gpu::Plan;
use dfar_tools::limits::gpu::{Effort, measure};
use dfar_tools::verify::{compare, compare_gradients};

#[test]
fn the_naive_form_is_the_operation() {
    let base = FhaOptions::new(2, 8);
    for options in [
        base,
        FhaOptions { normalization: Normalization::Masked, causal: false, ..FhaOptions::new(4, 4) },
        FhaOptions { normalization: Normalization::Masked, ..base },
        FhaOptions { label_mask: LabelMask::None, ..base },
    ] {
        let (length, host) = (9, Batch::new(options, 9, 36));
        let gpu = gpu(Precision::F32);
        let sequences = host.cu_seqlens().len() - 1;
        let mut naive = gpu.naive(&options, sequences, length, host.label()).expect("there is memory");
        let [q, k, v] = host.qkv().map(|x| gpu.copy_of(x).expect("there is memory"));
        let d_o = gpu.copy_of(host.d_o()).expect("there is memory");
        let mut o = gpu.array(d_o.len()).expect("there is memory");
        let mut lse = gpu.array(options.lse_len(host.tokens())).expect("there is memory");
        gpu.naive_forward(&mut naive, [&q, &k, &v], &mut o, &mut lse).expect("sound");
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| gpu.array(q.len()).expect("there is memory"));
        gpu.naive_backward(&mut naive, [&q, &k, &v], &lse, &d_o, [&mut dq, &mut dk, &mut dv]).expect("sound");

        let inputs = host.inputs();
        let exact = reference::forward(&options, inputs).expect("valid inputs");
        let gradients = reference::backward(&options, inputs, host.d_o()).expect("valid inputs");
        let host_of = |x: &_| dfar::device::cuda::array::Array::to_vec(x).expect("written");
        let mut errors =
            vec![compare("o", &host_of(&o), &exact.o), compare("lse", &host_of(&lse), &exact.lse)];
        errors.extend(compare_gradients(&[
            ("dq", &host_of(&dq), &gradients.dq),
            ("dk", &host_of(&dk), &gradients.dk),
            ("dv", &host_of(&dv), &gradients.dv),
        ]));
        assert!(errors.iter().all(|error| error.passes), "{options:?}: {errors:?}");
    }
}

#[test]
fn the_benchmark_runs() {
    let gpu = gpu(Precision::Bf16);
    let limits = measure(&gpu, Effort { copied: 1000, rounds: 2, repeats: 1 }).expect("sound");
    assert!(limits.copy > 0.0 && limits.exponentials > 0.0 && limits.products > 0.0, "{limits}");
    let options = FhaOptions::new(2, 16);
    let plan = Plan {
        options,
        batch_tokens: 40,
        forward: true,
        backward: true,
        naive: true,
        polynomial: 0,
        repeats: 1,
    };
    let rows = plan.measure(&gpu, &limits, 20, half::bf16::from_f32).expect("sound");
    assert_eq!(rows.len(), 2);
    for row in rows {
        // Emulated times mean nothing; the test checks only that predictions and their ratios are
        // reported.
        let json = serde_json::to_value(row).expect("numbers and strings");
        let number = |name: &str| json[name].as_f64().expect("a number");
        let ratio = number("predicted_ms") / number("fused_ms");
        assert!(
            number("predicted_ms") > 0.0 && (number("share_of_prediction") / ratio - 1.0).abs() < 1e-9,
            "{json}"
        );
        assert!(row.to_string().contains(json["predicted_by"].as_str().expect("a word")), "{row}");
    }
}
