//! Training steps of a compared system, as a worker of `benches/peers/cpu/run.py`;
//! `benches/peers/cpu/protocol.py` has the protocol.
//!
//! `load` reads a [`Request`], draws batches as `dfar-compare` does, and writes them for the peers
//! with the initial parameters. A call takes one step on each batch.

use dfar::data::Dataset;
use dfar::device::Clip;
use dfar::device::cpu::Cpu;
use dfar::model::HostTensor;
use dfar::train::Config;
use dfar::train::draw::Drawer;
use dfar_baselines::loss::Ranking;
use dfar_baselines::{Inputs, Kind, LossOptions, Model, Optimizer, Settings};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const NAME: &str = "dfar f32";
/// Steps on the first batch whose losses are compared.
const CHECKED_STEPS: usize = 3;

/// What is trained, on what.
#[derive(Deserialize)]
struct Request {
    data: PathBuf,
    system: Kind,
    max_length: usize,
    negatives: usize,
    negative_pool: usize,
    batch_tokens: usize,
    /// Number of batches: the first of an epoch.
    batches: usize,
    /// The file to write for the peers.
    inputs: PathBuf,
}

struct Peer {
    model: Model,
    optimizer: Optimizer,
    options: LossOptions,
    config: Config,
    batches: Vec<Inputs>,
}

/// Tensors of a file.
#[derive(Default)]
struct Tensors(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn u32s(&mut self, name: String, values: &[u32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0.push((name, Dtype::U32, vec![values.len()], bytes));
    }

    fn f32s(&mut self, name: String, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0.push((name, Dtype::F32, shape.to_vec(), bytes));
    }

    fn host(&mut self, prefix: &str, tensors: &[HostTensor]) {
        for HostTensor { name, shape, values } in tensors {
            self.f32s(format!("{prefix}{name}"), shape, values);
        }
    }

    fn save(&self, path: &Path, metadata: Option<HashMap<String, String>>) -> Result<()> {
        let mut views = Vec::with_capacity(self.0.len());
        for (name, dtype, shape, bytes) in &self.0 {
            views.push((name, TensorView::new(*dtype, shape.clone(), bytes)?));
        }
        Ok(serialize_to_file(views, metadata, path)?)
    }
}

impl Peer {
    fn load(path: &str) -> Result<Self> {
        let request: Request = serde_json::from_slice(&std::fs::read(path)?)?;
        let data = Dataset::open(&request.data)?;
        let config = Config {
            feedback: request.system.feedback(),
            max_length: request.max_length,
            negatives: request.negatives,
            negative_pool: request.negative_pool,
            batch_tokens: request.batch_tokens,
            ..Config::default()
        };
        let settings = Settings {
            items: data.items(),
            max_length: config.max_length,
            width: config.width,
            heads: config.heads,
            blocks: config.blocks,
            ..Settings::default()
        };
        let model =
            Model::initialized(Arc::new(Cpu::new()), request.system, settings, config.seed, config.init)?;
        let drawer = Drawer::new(&data, config.draw());
        let plan = drawer.training_plan(0)?;
        let batches = (0..request.batches.min(plan.size.batches))
            .map(|index| Ok(model.inputs(&drawer.draw(&plan, 0, index), &[])?))
            .collect::<Result<Vec<_>>>()?;
        let options = LossOptions { ranking: Ranking::Bce, embed_l2: config.embed_l2 as f32, auxiliary: 0.0 };
        let optimizer = Optimizer::new(&model)?;
        let peer = Self { model, optimizer, options, config, batches };
        peer.write_inputs(&request.inputs)?;
        Ok(peer)
    }

    /// The batches and parameters for the peers.
    fn write_inputs(&self, path: &Path) -> Result<()> {
        let mut file = Tensors::default();
        file.host("param.", &self.model.tensors()?);
        for (index, Inputs { batch, .. }) in self.batches.iter().enumerate() {
            let fields = [
                ("cu_seqlens", &batch.cu_seqlens),
                ("item", &batch.item),
                ("group_offsets", &batch.group_offsets),
                ("group_length", &batch.group_length),
                ("row_offsets", &batch.row_offsets),
                ("row_pair", &batch.row_pair),
                ("pair_item", &batch.pair_item),
            ];
            for (name, values) in fields {
                file.u32s(format!("{index}.{name}"), values);
            }
            file.f32s(format!("{index}.target"), &[batch.rows()], &batch.target);
        }
        let adam = self.config.adam();
        let clip = match adam.clip {
            Some(Clip::PerTensor(limit)) => limit,
            _ => return Err("the peers clip each tensor".into()),
        };
        let settings = self.model.settings();
        let options = json!({
            "system": self.model.kind(),
            "heads": settings.heads,
            "embed_l2": self.options.embed_l2,
            "lr": adam.lr,
            "clip": clip,
            "batches": self.batches.len(),
            "checked_steps": CHECKED_STEPS,
        });
        file.save(path, Some(HashMap::from([("options".to_owned(), options.to_string())])))
    }

    /// A step on one batch. Returns the loss.
    fn step(&mut self, index: usize) -> Result<f64> {
        let adam = self.config.adam();
        let x = &self.batches[index];
        Ok(self.model.train_step(x, &self.options, &adam, &mut self.optimizer)?.loss)
    }

    fn steps(&mut self) -> Result<()> {
        (0..self.batches.len()).try_for_each(|index| self.step(index).map(drop))
    }

    /// Loss and gradients of each batch with the initial parameters, then the losses of steps on
    /// the first batch.
    fn check(&mut self, path: &str) -> Result<()> {
        let mut file = Tensors::default();
        for (index, x) in self.batches.iter().enumerate() {
            let (loss, gradients) = self.model.gradients(x, &self.options)?;
            file.host(&format!("{index}.grad."), &gradients);
            for (name, value) in [("loss", loss.loss), ("loss.bce", loss.ranking), ("loss.l2", loss.l2)] {
                file.f32s(format!("{index}.{name}"), &[1], &[value as f32]);
            }
        }
        let losses = (0..CHECKED_STEPS).map(|_| Ok(self.step(0)? as f32)).collect::<Result<Vec<_>>>()?;
        file.f32s("step_losses".into(), &[losses.len()], &losses);
        file.save(Path::new(path), None)
    }
}

fn answer(peer: &mut Option<Peer>, request: &Value) -> Result<Value> {
    let text = |name: &str| request[name].as_str().unwrap_or_default();
    if text("do") == "load" {
        *peer = Some(Peer::load(text("path"))?);
        return Ok(json!({ "peers": [NAME], "skipped": {} }));
    }
    let peer = peer.as_mut().ok_or("nothing is loaded")?;
    let start = Instant::now();
    match text("do") {
        "check" => peer.check(text("path"))?,
        "warm" => peer.steps()?,
        _ => {
            let budget = request["seconds"].as_f64().unwrap_or(0.0);
            let mut times = Vec::new();
            while times.is_empty() || start.elapsed().as_secs_f64() < budget {
                let call_start = Instant::now();
                peer.steps()?;
                times.push(call_start.elapsed().as_secs_f64());
            }
            return Ok(json!({ "times": times }));
        }
    }
    Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
}

fn main() -> Result<()> {
    // As in dfar-compare, steps run on a thread of the pool.
    let pool = rayon::ThreadPoolBuilder::new().build()?;
    let mut peer = None;
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = pool
            .install(|| answer(&mut peer, &request))
            .unwrap_or_else(|error| json!({ "error": error.to_string() }));
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
