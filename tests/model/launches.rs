//! The number of launches of a training step on CUDA, counted without a GPU: it must not grow
//! unnoticed.

use dfar::device::cuda::Precision;
use dfar::train::Config;
use dfar_tools::train::launches::{Kind, count};
use dfar_tools::train::steps::uniform;

/// The launches of a step of the paper's size: 200 histories of 300 events, 10 candidates each.
fn at_paper_size(precision: Precision) -> Vec<Kind> {
    let config = Config { max_length: 300, ..Config::default() };
    let batch = uniform(10_000, 300, 200, 10, 1).expect("it fits the index type");
    count(&batch, 10_000, &config, precision).expect("the network is valid")
}

fn total(kinds: &[Kind]) -> usize {
    kinds.iter().map(|kind| kind.launches).sum()
}

/// If you change a number, run `dfar-bench train --uniform --predict h200 --max-length 300
/// --batch-rows 2000` and update the table of docs/kernels/step.md.
#[test]
fn a_step_has_a_known_number_of_launches() {
    for (precision, expected) in [(Precision::F32, 96), (Precision::Bf16, 120)] {
        let kinds = at_paper_size(precision);
        let list: String = kinds.iter().map(|k| format!("{:>4} {}\n", k.launches, k.name)).collect();
        assert_eq!(total(&kinds), expected, "{precision:?}:\n{list}");
    }
}
