//! The extension module `dfar._dfar`: what the Python package needs of the engine.
//!
//! Everything here takes Python objects apart, releases the GIL, calls the engine, and gives NumPy
//! arrays back. Documentation for users, defaults and types are in `python/dfar/*.py`.
//!
//! | file | contents |
//! |---|---|
//! | `arrays` | checks of NumPy arguments, and the only views of memory that Rust does not own |
//! | `results` | NumPy arrays for results, whose memory is used again |
//! | `attention`, `cuda` | `fha`, `fha_backward` on arrays; on a GPU's memory that PyTorch owns |
//! | `threads` | the thread pool of this process; long calls that Ctrl-C can stop |
//! | `data`, `import_log` | data sets and their making |
//! | `train`, `run`, `table` | training, scoring, scores as Arrow |
//! | `errors`, `values` | exceptions; configuration and JSON as Python objects |

mod arrays;
mod attention;
mod cuda;
mod data;
#[path = "../../src/bin/dfar-train/device.rs"]
#[allow(dead_code, reason = "the command also counts graph captures")]
mod device;
mod errors;
mod import_log;
// The command's own report, so that `metrics.json` and `curves.svg` are the same.
#[path = "../../src/bin/dfar-train/report/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the command also prints tables")]
mod report;
mod results;
mod run;
mod table;
mod threads;
mod train;
mod values;

use pyo3::prelude::*;

#[pymodule]
fn _dfar(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DataError", module.py().get_type::<errors::DataError>())?;
    module.add_class::<data::Dataset>()?;
    module.add_class::<run::Run>()?;
    module.add_class::<table::Table>()?;
    module.add_function(wrap_pyfunction!(attention::address, module)?)?;
    module.add_function(wrap_pyfunction!(attention::fha, module)?)?;
    module.add_function(wrap_pyfunction!(attention::fha_backward, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::fha_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::fha_backward_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(data::make_synthetic, module)?)?;
    module.add_function(wrap_pyfunction!(import_log::import_log, module)?)?;
    module.add_function(wrap_pyfunction!(threads::set_threads, module)?)?;
    module.add_function(wrap_pyfunction!(threads::threads, module)?)?;
    module.add_function(wrap_pyfunction!(train::train, module)?)?;
    module.add_function(wrap_pyfunction!(train::resume, module)?)?;
    Ok(())
}
