//! A trained run: its model, scores and recommendations.

use crate::data::Dataset;
use crate::device::{self, Chosen};
use crate::errors::{named, python};
use crate::table::{Ranked, Rows, Table};
use crate::threads;
use crate::values::from_json;
use dfar::batch::Feedback;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Cuda, Gpu};
use dfar::evaluate::{self, Query};
use dfar::model::Model;
use dfar::train::TrainError;
use dfar::train::checkpoint::ModelFile;
use dfar::train::config::{Config, DeviceChoice};
use dfar::train::run;
use numpy::ndarray::Array2;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, ToPyArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

/// Number of candidates scored between two looks at Ctrl-C, as in `dfar-train score`.
const ROWS_AT_A_TIME: usize = 1 << 18;
/// The item of a place in a list that is not filled.
const NO_ITEM: u32 = u32::MAX;

/// The best model of a run, loaded.
#[pyclass(frozen, module = "dfar._dfar")]
pub struct Run {
    dir: PathBuf,
    config: Config,
    file: ModelFile,
    index: HashMap<String, u32>,
    model: Loaded,
}

enum Loaded {
    Cpu(Box<Model<Cpu>>),
    Cuda(Box<Model<Gpu<Cuda>>>),
}

/// An original id: text, or an integer in digits.
#[derive(FromPyObject)]
pub enum Id {
    Text(String),
    Number(i64),
}

impl Id {
    fn text(self) -> String {
        match self {
            Id::Text(text) => text,
            Id::Number(number) => number.to_string(),
        }
    }
}

type History = Vec<(Id, i64)>;
/// A name, and values.
type Parameter<'a, 'py> = (&'a str, Bound<'py, PyArrayDyn<f32>>);

/// Whose recommendations are wanted, and of which items, by number.
struct Wanted {
    users: Vec<u32>,
    k: usize,
    candidates: Vec<u32>,
}

#[pymethods]
impl Run {
    #[staticmethod]
    fn open(py: Python<'_>, dir: PathBuf, device: Option<&str>) -> PyResult<Self> {
        let known = [("cpu", DeviceChoice::Cpu), ("cuda", DeviceChoice::Cuda), ("auto", DeviceChoice::Auto)];
        let device = device.map(|device| named("device", device, &known)).transpose()?;
        py.detach(|| threads::install(|| Self::load(dir, device)))?.map_err(python)
    }

    fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// The data set's path.
    fn data(&self) -> PathBuf {
        self.config.data.clone().unwrap_or_else(|| run::synthetic_path(&self.dir))
    }

    fn config(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        from_json(py, &serde_json::to_value(&self.config).expect("a configuration is plain values"))
    }

    /// Epoch, validation AUC, feedback and network of the model.
    fn model(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        from_json(py, &serde_json::to_value(&self.file.info).expect("plain data"))
    }

    fn items(&self) -> Vec<&str> {
        self.file.items.iter().map(String::as_str).collect()
    }

    /// Name and values of each parameter; new arrays.
    fn parameters<'py>(&self, py: Python<'py>) -> PyResult<Vec<Parameter<'_, 'py>>> {
        let array =
            |tensor: &'_ dfar::model::HostTensor| tensor.values.to_pyarray(py).reshape(tensor.shape.clone());
        self.file.parameters.iter().map(|tensor| Ok((tensor.name.as_str(), array(tensor)?))).collect()
    }

    /// Logits `[histories, candidates]` of the same candidates, or of all items.
    fn score_same<'py>(
        &self,
        py: Python<'py>,
        histories: Vec<History>,
        candidates: Option<Vec<Id>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let columns = candidates.as_ref().map_or(self.file.items.len(), Vec::len);
        let queries = self.queries_of_same(histories, candidates)?;
        let rows = queries.len();
        let mut scores = Vec::with_capacity(rows * columns);
        self.rank(py, queries, |_, logits| scores.extend_from_slice(logits))?;
        let scores = Array2::from_shape_vec((rows, columns), scores).expect("a logit for each candidate");
        Ok(scores.into_pyarray(py))
    }

    /// Logits of the candidates of each history.
    fn score_each<'py>(
        &self,
        py: Python<'py>,
        histories: Vec<History>,
        candidates: Vec<Vec<Id>>,
    ) -> PyResult<Vec<Bound<'py, PyArray1<f32>>>> {
        let queries = self.queries_of_each(histories, candidates)?;
        let mut scores = Vec::new();
        self.rank(py, queries, |_, logits| scores.push(logits.to_vec()))?;
        Ok(scores.into_iter().map(|logits| logits.into_pyarray(py)).collect())
    }

    /// All candidates of each history as rows, best first. `candidates` are shared, or of each
    /// history.
    fn score_table(
        &self,
        py: Python<'_>,
        histories: Vec<History>,
        candidates: Option<Vec<Id>>,
        each: Option<Vec<Vec<Id>>>,
    ) -> PyResult<Table> {
        let queries: Box<dyn Iterator<Item = Query> + Send> = match each {
            Some(each) => Box::new(self.queries_of_each(histories, each)?),
            None => Box::new(self.queries_of_same(histories, candidates)?),
        };
        let (mut rows, mut history) = (Rows::of_histories(), 0);
        self.rank(py, queries, |query, logits| {
            for (place, rank) in evaluate::top(logits, logits.len()).into_iter().zip(1..) {
                let item = &self.file.items[query.candidates[place] as usize];
                rows.push(history, "", Ranked { rank, item, logit: logits[place] });
            }
            history += 1;
        })?;
        Ok(rows.finish())
    }

    /// The best items of users of a data set: ids of the users, items `[users, k]` and logits
    /// `[users, k]`. Places beyond the candidates have item 2^32 - 1 and logit NaN.
    #[expect(clippy::type_complexity, reason = "three results")]
    fn recommend<'py>(
        &self,
        py: Python<'py>,
        data: &Bound<'_, Dataset>,
        users: Option<Vec<Id>>,
        k: usize,
        exclude_seen: bool,
        candidates: Option<Vec<Id>>,
    ) -> PyResult<(Vec<String>, Bound<'py, PyArray2<u32>>, Bound<'py, PyArray2<f32>>)> {
        let data = data.get().engine();
        let wanted = self.wanted(data, users, k, candidates)?;
        let (users, k) = (wanted.users.clone(), wanted.k);
        let (mut best, mut logits) = (vec![NO_ITEM; users.len() * k], vec![f32::NAN; users.len() * k]);
        self.best(py, data, wanted, exclude_seen, |row, place, item, logit| {
            best[row * k + place] = item;
            logits[row * k + place] = logit;
        })?;
        let shape = (users.len(), k);
        let names = users.iter().map(|&user| data.user_name(user).to_owned()).collect();
        let best = Array2::from_shape_vec(shape, best).expect("k places for each user");
        let logits = Array2::from_shape_vec(shape, logits).expect("k places for each user");
        Ok((names, best.into_pyarray(py), logits.into_pyarray(py)))
    }

    /// As `recommend`, as rows; users with fewer than `k` candidates have fewer rows.
    fn recommend_table(
        &self,
        py: Python<'_>,
        data: &Bound<'_, Dataset>,
        users: Option<Vec<Id>>,
        k: usize,
        exclude_seen: bool,
        candidates: Option<Vec<Id>>,
    ) -> PyResult<Table> {
        let data = data.get().engine();
        let wanted = self.wanted(data, users, k, candidates)?;
        let (users, mut rows) = (wanted.users.clone(), Rows::of_users());
        self.best(py, data, wanted, exclude_seen, |row, place, item, logit| {
            let item = &self.file.items[item as usize];
            rows.push(0, data.user_name(users[row]), Ranked { rank: place as u64 + 1, item, logit });
        })?;
        Ok(rows.finish())
    }
}

impl Run {
    fn load(dir: PathBuf, device: Option<DeviceChoice>) -> dfar::Result<Self> {
        let (config, file) = run::open(&dir)?;
        let network = file.info.model.clone();
        let model = match device::open_for(&config, device, &|_| ())? {
            Chosen::Cpu(cpu) => Loaded::Cpu(Box::new(Model::from_tensors(cpu, network, &file.parameters)?)),
            Chosen::Cuda(gpu) => Loaded::Cuda(Box::new(Model::from_tensors(gpu, network, &file.parameters)?)),
        };
        let index = file.items.iter().cloned().zip(0..).collect();
        Ok(Self { dir, config, file, index, model })
    }

    /// The numbers of the candidates; of all items for `None`.
    fn candidates(&self, ids: Option<Vec<Id>>) -> PyResult<Vec<u32>> {
        match ids {
            Some(ids) => self.find_all(ids, "candidates"),
            None => Ok((0..self.file.items.len() as u32).collect()),
        }
    }

    fn queries_of_same(
        &self,
        histories: Vec<History>,
        candidates: Option<Vec<Id>>,
    ) -> PyResult<impl ExactSizeIterator<Item = Query> + Send + use<>> {
        let candidates = self.candidates(candidates)?;
        // Copied as they are needed: together they may be large.
        let query = move |(items, labels)| Query { items, labels, candidates: candidates.clone() };
        Ok(self.histories(histories)?.into_iter().map(query))
    }

    fn queries_of_each(
        &self,
        histories: Vec<History>,
        candidates: Vec<Vec<Id>>,
    ) -> PyResult<impl ExactSizeIterator<Item = Query> + Send + use<>> {
        if histories.len() != candidates.len() {
            return Err(PyValueError::new_err(format!(
                "candidates has {} lists, but there are {} histories",
                candidates.len(),
                histories.len()
            )));
        }
        let candidates = candidates.into_iter().enumerate();
        let candidates = candidates
            .map(|(place, ids)| self.find_all(ids, &format!("candidates[{place}]")))
            .collect::<PyResult<Vec<_>>>()?;
        let queries = self.histories(histories)?.into_iter().zip(candidates);
        Ok(queries.map(|((items, labels), candidates)| Query { items, labels, candidates }))
    }

    /// Checks the arguments of `recommend`.
    fn wanted(
        &self,
        data: &dfar::data::Dataset,
        users: Option<Vec<Id>>,
        k: usize,
        candidates: Option<Vec<Id>>,
    ) -> PyResult<Wanted> {
        if k == 0 {
            return Err(PyValueError::new_err("k is 0, but must be at least 1"));
        }
        let users: Vec<u32> = match users {
            None => (0..data.users() as u32).collect(),
            Some(ids) => {
                let find = |id: Id| {
                    let user = id.text();
                    let unknown = || TrainError::UnknownUser { user: user.clone(), argument: "users".into() };
                    data.find_user(&user).ok_or_else(unknown)
                };
                ids.into_iter().map(find).collect::<Result<_, _>>().map_err(python)?
            }
        };
        // An item listed twice is ranked once, as by `dfar-train score`.
        let mut listed = HashSet::new();
        let mut candidates = self.candidates(candidates)?;
        candidates.retain(|item| listed.insert(*item));
        Ok(Wanted { users, k: k.min(candidates.len()), candidates })
    }

    /// Calls `each` with the row of the user, the place in the list, the item and its logit.
    fn best(
        &self,
        py: Python<'_>,
        data: &dfar::data::Dataset,
        wanted: Wanted,
        exclude_seen: bool,
        mut each: impl FnMut(usize, usize, u32, f32) + Send,
    ) -> PyResult<()> {
        let Wanted { users, k, candidates } = wanted;
        // The model's number of each item of the data set.
        let items: Vec<Option<u32>> =
            (0..data.items() as u32).map(|item| self.index.get(data.item_name(item)).copied()).collect();
        let mut queries = Vec::with_capacity(users.len());
        for &user in &users {
            let events = data.user(user);
            let known = |&item: &u32| {
                let unknown = || TrainError::UnknownItem {
                    item: data.item_name(item).to_owned(),
                    argument: data.path().display().to_string(),
                };
                items[item as usize].ok_or_else(unknown)
            };
            let seen = events.items.iter().map(known).collect::<Result<Vec<_>, _>>().map_err(python)?;
            queries.push((seen, events.feedback));
        }
        let queries = queries.into_iter().map(|(items, labels)| {
            let mut candidates = candidates.clone();
            if exclude_seen {
                let seen: HashSet<u32> = items.iter().copied().collect();
                candidates.retain(|item| !seen.contains(item));
            }
            Query { items, labels: labels.to_vec(), candidates }
        });
        let mut row = 0;
        self.rank(py, queries, |query, scores| {
            for (place, at) in evaluate::top(scores, k).into_iter().enumerate() {
                each(row, place, query.candidates[at], scores[at]);
            }
            row += 1;
        })
    }

    fn find(&self, id: Id, argument: &str) -> PyResult<u32> {
        let item = id.text();
        let unknown = || TrainError::UnknownItem { item: item.clone(), argument: argument.to_owned() };
        self.index.get(&item).copied().ok_or_else(|| python(unknown()))
    }

    fn find_all(&self, ids: Vec<Id>, argument: &str) -> PyResult<Vec<u32>> {
        ids.into_iter().map(|id| self.find(id, argument)).collect()
    }

    fn histories(&self, histories: Vec<History>) -> PyResult<Vec<(Vec<u32>, Vec<u8>)>> {
        let events = |(place, history): (usize, History)| {
            let event = |(id, label): (Id, i64)| {
                let label = u8::try_from(label).ok().filter(|&label| label <= 1).ok_or_else(|| {
                    PyValueError::new_err(format!(
                        "histories[{place}]: label {label}; labels are 1 (liked) and 0 (skipped)"
                    ))
                })?;
                Ok((self.find(id, &format!("histories[{place}]"))?, label))
            };
            history.into_iter().map(event).collect::<PyResult<(Vec<u32>, Vec<u8>)>>()
        };
        histories.into_iter().enumerate().map(events).collect()
    }

    /// Scores the queries in blocks; `each` receives them in order, with their logits.
    fn rank(
        &self,
        py: Python<'_>,
        mut queries: impl Iterator<Item = Query> + Send,
        mut each: impl FnMut(&Query, &[f32]) + Send,
    ) -> PyResult<()> {
        let feedback = self.file.info.feedback;
        let work = |link: threads::Link<()>| -> Result<(), TrainError> {
            loop {
                let (mut block, mut rows) = (Vec::new(), 0);
                while rows < ROWS_AT_A_TIME && block.len() < ROWS_AT_A_TIME / 64 {
                    let Some(query) = queries.next() else { break };
                    rows += query.candidates.len();
                    block.push(query);
                }
                if block.is_empty() || link.stopped() {
                    return Ok(());
                }
                let logits = self.logits(feedback, &block)?;
                block.iter().zip(&logits).for_each(|(query, logits)| each(query, logits));
            }
        };
        let (result, raised) = threads::interruptible(py, 0, work, |_, ()| Ok(true))?;
        match raised {
            Some(raised) => Err(raised),
            None => result.map_err(python),
        }
    }

    fn logits(&self, feedback: Feedback, queries: &[Query]) -> Result<Vec<Vec<f32>>, TrainError> {
        Ok(match &self.model {
            Loaded::Cpu(model) => {
                evaluate::rank(&**model, feedback, queries, self.config.workers_for(&**model.device()))?
            }
            Loaded::Cuda(model) => {
                evaluate::rank(&**model, feedback, queries, self.config.workers_for(&**model.device()))?
            }
        })
    }
}
