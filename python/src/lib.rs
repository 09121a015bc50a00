//! The extension module `dfar._dfar`: what the Python package needs of the engine.
//!
//! Everything here is plumbing: it takes Python objects apart, releases the GIL, calls the engine, and
//! gives NumPy arrays back. Documentation for users, defaults and types are in `python/dfar/*.py`.
//!
//! | file | contents |
//! |---|---|
//! | `arrays` | checks of NumPy arguments, and the only views of memory that Rust does not own |
//! | `attention` | `fha`, `fha_backward` |
//! | `threads` | the thread pool of this process |
//! | `errors` | exceptions |

mod arrays;
mod attention;
mod errors;
mod threads;

use pyo3::prelude::*;

#[pymodule]
fn _dfar(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(attention::address, module)?)?;
    module.add_function(wrap_pyfunction!(attention::fha, module)?)?;
    module.add_function(wrap_pyfunction!(attention::fha_backward, module)?)?;
    module.add_function(wrap_pyfunction!(threads::set_threads, module)?)?;
    module.add_function(wrap_pyfunction!(threads::threads, module)?)?;
    Ok(())
}
