//! The entry points of cuBLASLt that the library uses, with the types of cublasLt.h. Products are
//! plain loops: any supported shape, f32 in memory.

use crate::code::Code;
use crate::code::{Done, Failure, fault, handle};
use crate::handles::{Handles, Kind};
use crate::product::{Matrix, Product};
use crate::state::{State, Work};
use crate::{Needs, enter, lock};
use std::ffi::{c_int, c_void};

// cublasStatus_t
const NOT_INITIALIZED: c_int = 1;
const INVALID_VALUE: c_int = 7;
const NOT_SUPPORTED: c_int = 15;

const R_32F: c_int = 0;
const COMPUTE_32F: c_int = 68;
const COMPUTE_32F_FAST_16BF: c_int = 75;
const MAGIC: u64 = 0xdfa2_0000_0000_0001;

#[derive(Clone, Copy, Debug, Default)]
struct Desc {
    compute: c_int,
    transposed: [i32; 2],
    epilogue: u32,
    bias: u64,
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    rows: u64,
    columns: u64,
    leading: i64,
    count: i32,
    stride: i64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Preference {
    workspace: usize,
    alignment: [u32; 4],
}

/// Live objects of cuBLASLt.
#[derive(Debug)]
pub struct Tables {
    libraries: Handles<()>,
    descs: Handles<Desc>,
    layouts: Handles<Layout>,
    preferences: Handles<Preference>,
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            libraries: Handles::new(Kind::Blas),
            descs: Handles::new(Kind::Product),
            layouts: Handles::new(Kind::Layout),
            preferences: Handles::new(Kind::Preference),
        }
    }
}

impl Tables {
    /// Number of live objects.
    pub fn live(&self) -> usize {
        self.libraries.len() + self.descs.len() + self.layouts.len() + self.preferences.len()
    }
}

/// Carries out a call: its result is a `cublasStatus_t`.
fn call(name: &str, needs: Needs, act: impl FnOnce(&mut State) -> Done) -> c_int {
    match enter(name, needs, act) {
        code if lock().is_none() && code == Code::NOT_INITIALIZED.0 => NOT_INITIALIZED,
        1 | 400 => INVALID_VALUE,
        code => code,
    }
}

/// Answers with a status.
fn answer<T>(status: c_int) -> Done<T> {
    Err(Failure::Answer(Code(status)))
}

/// # Safety
/// `to` is valid for writing.
unsafe fn put<T>(to: *mut T, value: T) -> Done {
    // SAFETY: guaranteed by the caller.
    unsafe { to.write(value) };
    Ok(())
}

/// Reads an attribute's value.
///
/// # Safety
/// `bytes` bytes at `from` are readable.
unsafe fn get<T: Copy>(from: *const c_void, bytes: usize) -> Done<T> {
    if bytes != size_of::<T>() {
        return fault(
            Code::INVALID_VALUE,
            format!("an attribute of {bytes} bytes; it has {}", size_of::<T>()),
        );
    }
    // SAFETY: guaranteed by the caller, and of this size.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(library: *mut u64) -> c_int {
    // SAFETY: the caller's pointer.
    call("cublasLtCreate", Needs::Context, |state| unsafe { put(library, state.blas.libraries.add(())) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtDestroy(library: u64) -> c_int {
    call("cublasLtDestroy", Needs::Driver, |state| state.blas.libraries.remove(library).map_err(handle))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(desc: *mut u64, compute: c_int, scale: c_int) -> c_int {
    call("cublasLtMatmulDescCreate", Needs::Driver, |state| {
        if !matches!(compute, COMPUTE_32F | COMPUTE_32F_FAST_16BF) || scale != R_32F {
            return answer(NOT_SUPPORTED);
        }
        let made = state.blas.descs.add(Desc { compute, epilogue: 1, ..Desc::default() });
        // SAFETY: the caller's pointer.
        unsafe { put(desc, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    desc: u64,
    attribute: c_int,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    call("cublasLtMatmulDescSetAttribute", Needs::Driver, |state| {
        let desc = state.blas.descs.get(desc).map_err(handle)?;
        // SAFETY: the caller's value of this size.
        unsafe {
            match attribute {
                3 => desc.transposed[0] = get(value, bytes)?,
                4 => desc.transposed[1] = get(value, bytes)?,
                7 => desc.epilogue = get(value, bytes)?,
                8 => desc.bias = get(value, bytes)?,
                _ => {
                    return fault(
                        Code::INVALID_VALUE,
                        format!("product attribute {attribute} is not implemented"),
                    );
                }
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulDescDestroy(desc: u64) -> c_int {
    call("cublasLtMatmulDescDestroy", Needs::Driver, |state| {
        state.blas.descs.remove(desc).map(|_| ()).map_err(handle)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    layout: *mut u64,
    element: c_int,
    rows: u64,
    columns: u64,
    leading: i64,
) -> c_int {
    call("cublasLtMatrixLayoutCreate", Needs::Driver, |state| {
        if element != R_32F {
            return answer(NOT_SUPPORTED);
        }
        if rows == 0 || columns == 0 || leading < rows as i64 {
            return fault(
                Code::INVALID_VALUE,
                format!("a layout of {rows} x {columns}, leading dimension {leading}"),
            );
        }
        let made = state.blas.layouts.add(Layout { rows, columns, leading, count: 1, stride: 0 });
        // SAFETY: the caller's pointer.
        unsafe { put(layout, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutSetAttribute(
    layout: u64,
    attribute: c_int,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    call("cublasLtMatrixLayoutSetAttribute", Needs::Driver, |state| {
        let layout = state.blas.layouts.get(layout).map_err(handle)?;
        // SAFETY: the caller's value of this size.
        unsafe {
            match attribute {
                5 => layout.count = get(value, bytes)?,
                6 => layout.stride = get(value, bytes)?,
                _ => {
                    return fault(
                        Code::INVALID_VALUE,
                        format!("layout attribute {attribute} is not implemented"),
                    );
                }
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatrixLayoutDestroy(layout: u64) -> c_int {
    call("cublasLtMatrixLayoutDestroy", Needs::Driver, |state| {
        state.blas.layouts.remove(layout).map(|_| ()).map_err(handle)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(preference: *mut u64) -> c_int {
    call("cublasLtMatmulPreferenceCreate", Needs::Driver, |state| {
        let made = state.blas.preferences.add(Preference { workspace: 0, alignment: [256; 4] });
        // SAFETY: the caller's pointer.
        unsafe { put(preference, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: u64,
    attribute: c_int,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    call("cublasLtMatmulPreferenceSetAttribute", Needs::Driver, |state| {
        let preference = state.blas.preferences.get(preference).map_err(handle)?;
        // SAFETY: the caller's value of this size.
        unsafe {
            match attribute {
                1 => preference.workspace = get(value, bytes)?,
                5..=8 => preference.alignment[attribute as usize - 5] = get(value, bytes)?,
                _ => {
                    return fault(
                        Code::INVALID_VALUE,
                        format!("preference attribute {attribute} is not implemented"),
                    );
                }
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceDestroy(preference: u64) -> c_int {
    call("cublasLtMatmulPreferenceDestroy", Needs::Driver, |state| {
        state.blas.preferences.remove(preference).map(|_| ()).map_err(handle)
    })
}

/// `cublasLtMatmulAlgo_t`: what the heuristics assumed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
pub struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// The algorithm of a product: it holds for these operations, for pointers of this alignment.
fn algorithm(desc: &Desc, alignment: u32) -> Algorithm {
    let operations =
        u64::from(desc.epilogue) << 8 | (desc.transposed[0] as u64) << 1 | desc.transposed[1] as u64;
    Algorithm([MAGIC, desc.compute as u64, operations, u64::from(alignment), 0, 0, 0, 0])
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    library: u64,
    desc: u64,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    preference: u64,
    wanted: c_int,
    results: *mut Heuristic,
    found: *mut c_int,
) -> c_int {
    call("cublasLtMatmulAlgoGetHeuristic", Needs::Driver, |state| {
        state.blas.libraries.get(library).map_err(handle)?;
        let held = *state.blas.descs.get(desc).map_err(handle)?;
        for layout in [a, b, c, d] {
            state.blas.layouts.get(layout).map_err(handle)?;
        }
        let preference = *state.blas.preferences.get(preference).map_err(handle)?;
        if wanted < 1 {
            return fault(Code::INVALID_VALUE, "no algorithm is asked for");
        }
        let alignment = preference.alignment.into_iter().max().unwrap_or(256);
        let result = Heuristic {
            algorithm: algorithm(&held, alignment),
            workspace: preference.workspace,
            state: 0,
            waves: 1.0,
            reserved: [0; 4],
        };
        // SAFETY: the caller's pointers, with room for at least one result.
        unsafe { put(results, result).and_then(|()| put(found, 1)) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    library: u64,
    desc: u64,
    alpha: *const f32,
    a: u64,
    a_layout: u64,
    b: u64,
    b_layout: u64,
    beta: *const f32,
    c: u64,
    c_layout: u64,
    d: u64,
    d_layout: u64,
    algo: *const Algorithm,
    workspace: u64,
    workspace_bytes: usize,
    stream: u64,
) -> c_int {
    call("cublasLtMatmul", Needs::Context, |state| {
        state.blas.libraries.get(library).map_err(handle)?;
        let held = *state.blas.descs.get(desc).map_err(handle)?;
        let mut matrix = |at: u64, layout: u64| -> Done<(Matrix, usize)> {
            let Layout { rows, columns, leading, count, stride } =
                *state.blas.layouts.get(layout).map_err(handle)?;
            let [rows, columns, leading, stride] =
                [rows, columns, leading as u64, stride as u64].map(|n| n as usize);
            Ok((Matrix { at, rows, columns, leading, stride }, count as usize))
        };
        let [(a, counts), (b, b_count), (c, c_count), (d, d_count)] =
            [matrix(a, a_layout)?, matrix(b, b_layout)?, matrix(c, c_layout)?, matrix(d, d_layout)?];
        let transposed = held.transposed.map(|operation| operation == 1);
        let shape = |matrix: &Matrix, transposed: bool| {
            if transposed { (matrix.columns, matrix.rows) } else { (matrix.rows, matrix.columns) }
        };
        let ((m, k), (k_of_b, n)) = (shape(&a, transposed[0]), shape(&b, transposed[1]));
        let alike = [b_count, c_count, d_count] == [counts; 3] && k == k_of_b;
        if !alike || (d.rows, d.columns) != (m, n) || (c.rows, c.columns) != (m, n) {
            return fault(Code::INVALID_VALUE, format!("shapes that do not fit: {a:?}, {b:?}, {c:?}, {d:?}"));
        }
        if held.epilogue & !6 > 1 || (held.epilogue & 4 != 0) != (held.bias != 0) {
            return fault(
                Code::INVALID_VALUE,
                format!("epilogue {} with bias {:#x}", held.epilogue, held.bias),
            );
        }
        // SAFETY: the caller's pointers.
        let (alpha, beta, algo) = unsafe { (*alpha, *beta, algo.as_ref()) };
        let Some(Algorithm(given)) = algo else { return fault(Code::INVALID_VALUE, "no algorithm") };
        if given[0] != MAGIC || given[..3] != algorithm(&held, 0).0[..3] {
            return fault(Code::INVALID_VALUE, "an algorithm of another product");
        }
        for (name, at) in [("A", a.at), ("B", b.at), ("C", c.at), ("D", d.at)] {
            if !at.is_multiple_of(given[3].max(4)) {
                return fault(
                    Code::INVALID_VALUE,
                    format!("{name} at {at:#x} is less aligned than the {} bytes of the algorithm", given[3]),
                );
            }
        }
        let product = Product {
            a,
            b,
            c,
            d,
            transposed,
            alpha,
            beta,
            bias: held.bias,
            relu: held.epilogue & 2 != 0,
            bf16: held.compute == COMPUTE_32F_FAST_16BF,
            count: counts,
            workspace: (workspace, workspace_bytes),
        };
        state.memory.check("the workspace", workspace, workspace_bytes)?;
        for (name, at, bytes, _) in product.accesses() {
            state.memory.check(name, at, bytes)?;
        }
        state.enqueue(stream, Work::Product(Box::new(product))).map(|_| ())
    })
}
