//! Runs of a comparison, and their results in files: one for each (system, setting, seed). A
//! finished run is not repeated.

use crate::fit::{Epoch, Fitted, fit};
use crate::learner::{Baseline, Dfar, Learner};
use crate::loss::Ranking;
use crate::system::{Kind, Settings};
use crate::system_device::SystemDevice;
use crate::systems::sasrec::Pool;
use crate::users::UserFigures;
use crate::{LossOptions, Model};
use dfar::batch::Feedback;
use dfar::data::Dataset;
use dfar::model::{self, HostTensor};
use dfar::train::checkpoint::{DataInfo, ModelFile, ModelInfo};
use dfar::train::file::{FileError, replace_bytes};
use dfar::train::{Config, TrainError, score_options};
use serde::Serialize;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// A row of Table 2. Its name stands for it in files and on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(into = "String")]
pub enum Row {
    /// A compared system.
    Baseline(Kind),
    /// DFAR.
    Dfar,
}

impl From<Row> for String {
    fn from(row: Row) -> Self {
        row.name().to_owned()
    }
}

impl Row {
    /// All of them, in the order of Table 2.
    pub fn all() -> Vec<Self> {
        Kind::ALL.into_iter().map(Self::Baseline).chain([Self::Dfar]).collect()
    }

    /// Name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline(kind) => kind.name(),
            Self::Dfar => "dfar",
        }
    }

    /// Name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::Baseline(kind) => kind.title(),
            Self::Dfar => "DFAR",
        }
    }

    /// From [`Row::name`].
    ///
    /// # Errors
    /// The names that there are.
    pub fn parse(name: &str) -> Result<Self, String> {
        let all = Self::all();
        let names: Vec<&str> = all.iter().map(|row| row.name()).collect();
        let found = all.iter().find(|row| row.name() == name.to_lowercase());
        found.copied().ok_or_else(|| format!("there are {}", names.join(", ")))
    }
}

/// Options of a comparison beside [`Config`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Feedback that all systems read; `None` for that of each system's paper.
    pub feedback: Option<Feedback>,
    /// Ranking loss of the compared systems.
    pub ranking: Ranking,
    /// Pooling of SASRec and THA4Rec.
    pub pool: Pool,
    /// Weight of the auxiliary loss of DIEN. That of FeedRec is [`Config::idl`].
    pub aux: f64,
}

impl Options {
    /// The feedback that a system reads.
    pub fn feedback_of(&self, system: Row) -> Feedback {
        self.feedback.unwrap_or(match system {
            Row::Baseline(kind) => kind.feedback(),
            Row::Dfar => Feedback::Mixed,
        })
    }
}

/// What determines a result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Identity {
    /// The system.
    pub system: Row,
    /// Configuration, without what does not change a result.
    pub config: Config,
    /// Sizes of a compared system.
    pub settings: Option<Settings>,
    /// Ranking loss.
    pub ranking: Ranking,
    /// Weight of the auxiliary loss.
    pub auxiliary: f64,
    /// Number of the setting in the search of [`crate::tune`]; 0 for the given configuration.
    pub tuned: usize,
    /// The data set.
    pub data: DataInfo,
}

impl Identity {
    /// One run of a comparison.
    pub fn new(system: Row, config: &Config, options: &Options, data: &DataInfo) -> Self {
        let defaults = Config::default();
        let mut config = Config {
            data: None,
            threads: defaults.threads,
            workers: defaults.workers,
            checkpoint_seconds: defaults.checkpoint_seconds,
            tensorboard: defaults.tensorboard,
            // All systems compute in f32, whatever a file of `dfar-train` says.
            precision: defaults.precision,
            cuda_graphs: defaults.cuda_graphs,
            ..config.clone()
        };
        config.feedback = options.feedback_of(system);
        let Row::Baseline(kind) = system else {
            let ranking = Ranking::Bce;
            let data = data.clone();
            return Self { system, config, settings: None, ranking, auxiliary: 0.0, tuned: 0, data };
        };
        let settings = Settings {
            items: data.items,
            max_length: config.max_length,
            width: config.width,
            heads: config.heads,
            blocks: config.blocks,
            pool: options.pool,
            ..Settings::default()
        };
        let auxiliary = match kind {
            Kind::Dien => options.aux,
            Kind::Feedrec => config.idl,
            _ => 0.0,
        };
        Self {
            system,
            config,
            settings: Some(settings),
            ranking: options.ranking,
            auxiliary,
            tuned: 0,
            data: data.clone(),
        }
    }

    /// What distinguishes it from the default run of the system, in words for file names and
    /// tables: the feedback, then what was changed.
    pub fn setting(&self) -> String {
        let config = &self.config;
        let feedback = match config.feedback {
            Feedback::Mixed => "mixed",
            Feedback::PositiveOnly => "positive-only",
            Feedback::Ignored => "ignored",
        };
        let pools = matches!(self.system, Row::Baseline(Kind::Sasrec | Kind::Tha4rec));
        let last = self.settings.as_ref().is_some_and(|settings| settings.pool == Pool::Last);
        let is_dfar = self.settings.is_none();
        let words = [
            (true, feedback),
            (self.ranking == Ranking::Softmax, "softmax"),
            (pools && last, "last"),
            (is_dfar && !config.fha, "no-fha"),
            (is_dfar && config.fha && !config.label_mask, "no-label-mask"),
            (is_dfar && config.idl == 0.0, "no-idl"),
            (is_dfar && config.bpr == 0.0, "no-ibl"),
        ];
        let half_life =
            (is_dfar && config.half_life > 0.0).then(|| format!("half-life-{}", config.half_life));
        let words = words.into_iter().filter(|(holds, _)| *holds).map(|(_, word)| word.to_owned());
        let tuned = (self.tuned > 0).then(|| format!("tuned-{}", self.tuned));
        words.chain(half_life).chain(tuned).collect::<Vec<_>>().join(" ")
    }

    fn name(&self) -> String {
        run_name(self.system, &self.setting(), self.config.seed)
    }

    /// Its file in the directory of a comparison.
    pub fn path(&self, out: &Path) -> PathBuf {
        result_path(out, &self.name())
    }

    /// The file of its model in the directory of a comparison. DFAR only.
    pub fn model_path(&self, out: &Path) -> PathBuf {
        model_path(out, &self.name())
    }

    /// Trains and tests on a device, that of the configuration.
    ///
    /// # Errors
    /// As [`fit`], invalid settings, and a system that the device does not compute.
    pub fn run<D: SystemDevice>(
        &self,
        device: Arc<D>,
        data: &Dataset,
        workers: usize,
        observe: &mut dyn FnMut(&Epoch),
    ) -> Result<Trained, TrainError> {
        let config = &self.config;
        let mut scoring = score_options(config, &*device);
        if workers > 0 {
            scoring.workers = workers;
        }
        match (self.system, &self.settings) {
            (Row::Baseline(kind), Some(settings)) => {
                if kind.shares_nothing() {
                    // Memory grows with the rows, not with the histories.
                    scoring.batch_tokens = config.batch_tokens;
                }
                let loss = LossOptions {
                    ranking: self.ranking,
                    embed_l2: config.embed_l2 as f32,
                    auxiliary: self.auxiliary as f32,
                };
                let model = Model::initialized(device, kind, settings.clone(), config.seed, config.init)?;
                let mut learner = Baseline::new(model, loss, config.adam())?;
                let fitted = fit(&mut learner, data, config, &scoring, observe)?;
                Ok(Trained { fitted, model: None })
            }
            _ => {
                let network = config.model(data.items());
                let model = model::Model::initialized(device, network, config.seed, config.init)?;
                let mut learner = Dfar::new(model, config.loss(), config.adam())?;
                let fitted = fit(&mut learner, data, config, &scoring, observe)?;
                Ok(Trained { fitted, model: Some(learner.tensors()?) })
            }
        }
    }

    /// Writes the model of a run of DFAR, as `dfar-train` does.
    ///
    /// # Errors
    /// As for any file.
    pub fn save_model(&self, out: &Path, data: &Dataset, trained: &Trained) -> Result<(), ResultError> {
        let Some(tensors) = &trained.model else { return Ok(()) };
        let best = trained.fitted.best_epoch;
        let info = ModelInfo {
            model: self.config.model(data.items()),
            feedback: self.config.feedback,
            data: self.data.clone(),
            epoch: best,
            valid_auc: trained.fitted.epochs[best - 1].valid_auc,
        };
        let path = self.model_path(out);
        make_folder_of(&path)?;
        ModelFile::save(&path, &info, tensors.clone(), data)?;
        Ok(())
    }
}

/// A trained model.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// Its figures.
    pub fitted: Fitted,
    /// The parameters of the best epoch; for DFAR.
    pub model: Option<Vec<HostTensor>>,
}

/// Where and how long a run was computed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Provenance {
    /// [`dfar::device::Execution::name`] of the device.
    pub device: String,
    /// Threads of the run.
    pub threads: usize,
    /// Runs at the same time.
    pub jobs: usize,
    /// Seconds of the run.
    pub seconds: f64,
    /// The machine.
    pub machine: crate::machine::Machine,
    /// Commit of the program, if it knows it.
    pub commit: Option<String>,
    /// Version of the program.
    pub version: &'static str,
}

/// A finished run: the content of a result file.
#[derive(Clone, Debug, PartialEq)]
pub struct RunResult {
    /// The system.
    pub system: Row,
    /// [`Identity::setting`].
    pub setting: String,
    /// The seed.
    pub seed: u64,
    /// [`Identity::tuned`].
    pub tuned: usize,
    /// Seconds of the run.
    pub seconds: f64,
    /// Loss and validation AUC of each epoch.
    pub curve: Vec<CurvePoint>,
    /// Liked test events by the number of events before them.
    pub by_length: Vec<Bucket>,
    /// Liked test events by user; none without any.
    pub users: Option<UserFigures>,
    /// The data set, as JSON.
    pub data: Value,
    /// Liked test events; none without any.
    pub test: Option<Figures>,
    /// Liked validation events; none without any.
    pub valid: Option<Figures>,
    /// All of the file.
    file: Value,
}

/// An epoch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CurvePoint {
    /// Mean training loss.
    pub loss: f64,
    /// Validation AUC; none without liked validation events.
    pub valid_auc: Option<f64>,
}

/// The test AUC of events with `from..=to` events before them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// Shortest history.
    pub from: u64,
    /// Longest history; none for the last bucket.
    pub to: Option<u64>,
    /// Groups.
    pub groups: u64,
    /// AUC over all their rows.
    pub auc: f64,
}

/// Metrics of a part of the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// Groups scored.
    pub groups: u64,
    /// In the order of [`crate::table::METRICS`]; none where no user has both classes.
    pub values: [Option<f64>; 4],
}

/// A result file that cannot be used.
#[derive(Debug, Error)]
pub enum ResultError {
    /// It cannot be read, or the folder cannot be listed or made.
    #[error("cannot read or make {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] FileError),
    /// Not a result.
    #[error("{} is not a result of dfar-compare: {reason}; remove it", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Of another run.
    #[error("{} has another {what}; choose another --out, or remove it", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
}

impl ResultError {
    /// Exit code of `dfar-compare`: 2 for an `--out` of other runs, as in `dfar-train`.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Other { .. }) { 2 } else { 1 }
    }
}

impl RunResult {
    /// The content of the file of a finished run.
    ///
    /// # Panics
    /// Never: what is written can be read.
    pub fn new(run: &Identity, fitted: &Fitted, provenance: &Provenance) -> Self {
        let file = json!({
            "run": to_json(run),
            "setting": run.setting(),
            "provenance": to_json(provenance),
            "fitted": to_json(fitted),
        });
        Self::parse(file).expect("what is written can be read")
    }

    /// Takes apart the content of a file. JSON by hand: deriving it for every type that a result
    /// holds costs more compile time than all systems together.
    fn parse(file: Value) -> Result<Self, String> {
        let field = |pointer: &str| file.pointer(pointer).ok_or_else(|| format!("it has no {pointer}"));
        let text = |pointer: &str| {
            let found = field(pointer)?.as_str();
            found.map(str::to_owned).ok_or_else(|| format!("{pointer} is not a text"))
        };
        let number =
            |pointer: &str| field(pointer)?.as_f64().ok_or_else(|| format!("{pointer} is not a number"));
        let list =
            |pointer: &str| field(pointer)?.as_array().ok_or_else(|| format!("{pointer} is not a list"));
        let seed = field("/run/config/seed")?;
        // A seed beyond 63 bits is a text, see `dfar::train::config::seed`.
        let seed = seed.as_u64().or_else(|| seed.as_str()?.parse().ok());
        let figures = |pointer: &str| match field(pointer)? {
            Value::Null => Ok(None),
            part => Figures::parse(part).map(Some).ok_or_else(|| format!("{pointer} has no metrics")),
        };
        Ok(Self {
            system: Row::parse(&text("/run/system")?)?,
            setting: text("/setting")?,
            seed: seed.ok_or("the seed is not a number")?,
            tuned: number("/run/tuned")? as usize,
            seconds: number("/provenance/seconds")?,
            curve: list("/fitted/epochs")?
                .iter()
                .map(CurvePoint::parse)
                .collect::<Option<_>>()
                .ok_or("an epoch has no loss")?,
            by_length: match field("/fitted/test")? {
                Value::Null => Vec::new(),
                _ => list("/fitted/test/by_length")?
                    .iter()
                    .map(Bucket::parse)
                    .collect::<Option<_>>()
                    .ok_or("a history length has no metrics")?,
            },
            users: match field("/fitted/test_users")? {
                Value::Null => None,
                users => Some(UserFigures::parse(users).ok_or("/fitted/test_users has no metrics")?),
            },
            data: field("/run/data")?.clone(),
            test: figures("/fitted/test")?,
            valid: figures("/fitted/valid")?,
            file,
        })
    }

    /// The result of `run` in `out`, if it is finished.
    ///
    /// # Errors
    /// A file that cannot be read, or that is of another run.
    pub fn load(run: &Identity, out: &Path) -> Result<Option<Self>, ResultError> {
        let path = run.path(out);
        if !path.exists() {
            return Ok(None);
        }
        let found = Self::read(&path)?;
        if !found.is_of(&run.data) {
            return Err(ResultError::Other { path, what: "data set".into() });
        }
        match difference("run", &found.wanted(run), &found.file["run"]) {
            None => Ok(Some(found)),
            Some(what) => Err(ResultError::Other { path, what }),
        }
    }

    /// Whether it was computed from this data set. A log under another name, with the same events
    /// and candidates, is the same data set.
    pub fn is_of(&self, data: &DataInfo) -> bool {
        let without_source = |mut data: Value| {
            data.pointer_mut("/protocol").and_then(Value::as_object_mut).map(|it| it.remove("source"));
            data
        };
        without_source(self.data.clone()) == without_source(to_json(data))
    }

    /// A run on the data set of this result, as the file has it.
    fn wanted(&self, run: &Identity) -> Value {
        let mut wanted = to_json(run);
        wanted["data"] = self.data.clone();
        wanted
    }

    /// Refuses a result that another study made: one table has one configuration. `of_study` is the
    /// full system of this result in the study, with this setting and seed; what `setting` names
    /// may differ.
    ///
    /// # Errors
    /// [`ResultError::Other`] names the first field that differs.
    pub fn check_study(&self, of_study: &Identity, out: &Path) -> Result<(), ResultError> {
        let (mut wanted, found) = (self.wanted(of_study), &self.file["run"]);
        let mut allow = |pointer: &str| {
            if let (Some(wanted), Some(found)) = (wanted.pointer_mut(pointer), found.pointer(pointer)) {
                *wanted = found.clone();
            }
        };
        for name in ["feedback", "fha", "label_mask", "half_life"] {
            allow(&format!("/config/{name}"));
        }
        allow("/ranking");
        allow("/settings/pool");
        for weight in ["/config/idl", "/config/bpr"] {
            if found.pointer(weight).and_then(Value::as_f64) == Some(0.0) {
                allow(weight);
            }
        }
        match difference("run", &wanted, found) {
            None => Ok(()),
            Some(what) => Err(ResultError::Other { path: result_path(out, &self.name()), what }),
        }
    }

    /// All results in `out`, in the order of their files.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn all(out: &Path) -> Result<Vec<Self>, ResultError> {
        let folder = results_folder(out);
        let io = |source| ResultError::Io { path: folder.clone(), source };
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if !hidden && path.extension().is_some_and(|extension| extension == "json") {
                paths.push(path);
            }
        }
        paths.sort();
        let named = |path: &PathBuf| {
            let result = Self::read(path)?;
            let own = result_path(out, &result.name());
            if *path != own {
                // A copy would count as another seed.
                let reason = format!("the file of its run is {}; rename or remove this one", own.display());
                return Err(ResultError::Format { path: path.clone(), reason });
            }
            Ok(result)
        };
        paths.iter().map(named).collect()
    }

    fn read(path: &Path) -> Result<Self, ResultError> {
        let io = |source| ResultError::Io { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(io)?;
        let bad = |reason| ResultError::Format { path: path.to_owned(), reason };
        let mut file = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        complete(&mut file);
        Self::parse(file).map_err(bad)
    }

    /// Writes the file, under a temporary name first.
    ///
    /// # Errors
    /// As for any file.
    pub fn save(&self, path: &Path) -> Result<(), ResultError> {
        make_folder_of(path)?;
        let mut text = String::new();
        write_json(&self.file, 2, 0, &mut text);
        text.push('\n');
        Ok(replace_bytes(path, text.as_bytes())?)
    }

    /// [`Identity::model_path`].
    pub fn model_path(&self, out: &Path) -> PathBuf {
        model_path(out, &self.name())
    }

    fn name(&self) -> String {
        run_name(self.system, &self.setting, self.seed)
    }

    /// Machine, GPU, threads and commit, in words.
    pub fn origin(&self) -> String {
        let field = |name: &str| self.file.pointer(&format!("/provenance/{name}"));
        let text = |name: &str| field(name).and_then(Value::as_str).map(str::to_owned);
        let number = |name: &str| field(name).map_or("?".to_owned(), Value::to_string);
        let gpu = text("device").filter(|device| !device.starts_with("cpu"));
        let processor = text("machine/processor").unwrap_or("unknown processor".to_owned());
        let words = [
            gpu.map_or(processor.clone(), |gpu| format!("{gpu}, {processor}")),
            format!("{} cores", number("machine/cores")),
            format!("{} GiB", number("machine/memory_gib")),
            format!("{} threads a run", number("threads")),
            format!("{} runs at once", number("jobs")),
            format!("commit {}", text("commit").unwrap_or("unknown".to_owned())),
        ];
        words.join(", ")
    }
}

/// Fills in values that older result files leave implicit.
fn complete(file: &mut Value) {
    // It knew the CPU in f32 only, whatever the configuration says.
    let had_device = file.pointer("/provenance/device").is_some();
    let Some(Value::Object(config)) = file.pointer_mut("/run/config") else { return };
    if !had_device {
        config.retain(|key, _| !["device", "precision"].contains(&&key[..]));
    }
    // Keys that came later have their defaults.
    if let Value::Object(defaults) = to_json(&Config::default()) {
        for (key, value) in defaults {
            config.entry(key).or_insert(value);
        }
    }
}

/// The stem of the files of a run.
fn run_name(system: Row, setting: &str, seed: u64) -> String {
    format!("{}-{}-{seed}", system.name(), setting.replace(' ', "-"))
}

fn result_path(out: &Path, name: &str) -> PathBuf {
    results_folder(out).join(format!("{name}.json"))
}

fn results_folder(out: &Path) -> PathBuf {
    out.join("results")
}

fn model_path(out: &Path, name: &str) -> PathBuf {
    out.join("models").join(format!("{name}.safetensors"))
}

fn make_folder_of(path: &Path) -> Result<(), ResultError> {
    make_folder(path.parent().expect("a file of a comparison has a folder"))
}

fn make_folder(folder: &Path) -> Result<(), ResultError> {
    std::fs::create_dir_all(folder).map_err(|source| ResultError::Io { path: folder.to_owned(), source })
}

/// Makes the folder of the results, so that an unusable `out` is reported before the first run.
///
/// # Errors
/// As for any folder.
pub fn make_results_folder(out: &Path) -> Result<(), ResultError> {
    make_folder(&results_folder(out))
}

/// Objects down to `levels`, one field a line; what is deeper on one line, which keeps lists of
/// thousands of users short.
fn write_json(value: &Value, levels: usize, indent: usize, text: &mut String) {
    let Value::Object(fields) = value else { return text.push_str(&value.to_string()) };
    if levels == 0 || fields.is_empty() {
        return text.push_str(&value.to_string());
    }
    for (i, (name, field)) in fields.iter().enumerate() {
        text.push_str(if i == 0 { "{\n" } else { ",\n" });
        text.extend(std::iter::repeat_n(' ', indent + 2));
        text.push_str(&format!("{}: ", Value::from(name.as_str())));
        write_json(field, levels - 1, indent + 2, text);
    }
    text.push('\n');
    text.extend(std::iter::repeat_n(' ', indent));
    text.push('}');
}

impl CurvePoint {
    fn parse(epoch: &Value) -> Option<Self> {
        Some(Self { loss: epoch.get("loss")?.as_f64()?, valid_auc: epoch.get("valid_auc")?.as_f64() })
    }
}

impl Bucket {
    fn parse(bucket: &Value) -> Option<Self> {
        let whole = |name| bucket.get(name)?.as_u64();
        let auc = bucket.get("auc")?.as_f64()?;
        Some(Self { from: whole("from")?, to: whole("to"), groups: whole("groups")?, auc })
    }
}

impl Figures {
    fn parse(part: &Value) -> Option<Self> {
        let groups = part.get("groups")?.as_u64()?;
        let [auc, mrr, ndcg, gauc] = ["auc", "mrr", "ndcg", "gauc"].map(|metric| part.get(metric)?.as_f64());
        Some(Self { groups, values: [Some(auc?), Some(mrr?), Some(ndcg?), gauc] })
    }
}

/// As JSON.
pub fn to_json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("plain fields are valid JSON")
}

/// The first field that differs; `name` is that of the whole.
fn difference(name: &str, a: &Value, b: &Value) -> Option<String> {
    let (Value::Object(of_a), Value::Object(of_b)) = (a, b) else {
        return (a != b).then(|| name.to_owned());
    };
    let field = |key: &String| difference(key, of_a.get(key)?, of_b.get(key)?);
    let lacks = |key: &&String| !(of_a.contains_key(*key) && of_b.contains_key(*key));
    let mut keys = of_a.keys().chain(of_b.keys());
    keys.clone().find(lacks).cloned().or_else(|| keys.find_map(field))
}
