//! Training steps by degree of sharing: `cargo bench --bench training`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::device::cpu::Cpu;
use dfar::train::config::Config;
use dfar_tools::train::sharing::{Sharing, Steps};
use std::sync::Arc;
use std::time::Duration;

fn training(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("synthetic.dfar");
    let options = SyntheticOptions { users: 200, events_per_user: 120.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).expect("a synthetic log can be written");
    let data = Dataset::open(&path).expect("what was written can be opened");
    let config = Config::default();
    let mut group = c.benchmark_group("training step");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3)).sample_size(10);
    for sharing in Sharing::ALL {
        let mut steps =
            Steps::new(Arc::new(Cpu::new()), &data, &config, sharing).expect("the default model can be made");
        let instances = steps.run(0).expect("a step succeeds").instances;
        group.throughput(Throughput::Elements(instances as u64));
        group.bench_function(sharing.name(), |b| b.iter(|| steps.run(0)));
    }
}

criterion_group!(benches, training);
criterion_main!(benches);
