//! cuBLASLt, loaded on first use: matrix products with bias and activation.
//!
//! cuBLASLt is column-major, so it computes the transposed product, `c^T = b^T a^T`, which needs no
//! copies. Its heuristics choose an algorithm once per rounded shape: batches of nearly equal size
//! use the same algorithm and give the same bits. If a product fails with it, an algorithm for the
//! exact shape takes its place; the last resort of a bf16 product is one in f32.

use super::{launch, library};
use crate::device::Precision;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::Pointer;
use crate::device::cuda::runtime::Gemm;
use crate::device::{Activation, Store};
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::path::Path;

/// File name of a major version.
fn file_name(major: Option<i32>) -> String {
    match major {
        Some(major) if cfg!(windows) => format!("cublasLt64_{major}.dll"),
        None if cfg!(windows) => "cublasLt64.dll".to_owned(),
        Some(major) => format!("libcublasLt.so.{major}"),
        None => "libcublasLt.so".to_owned(),
    }
}

/// `cublasStatus_t`
type Status = c_int;
/// A library handle or a descriptor.
type Opaque = *mut c_void;
/// `cudaStream_t`
type Stream = *mut c_void;

/// `cublasLtMatmulAlgo_t`
#[repr(C)]
#[derive(Clone, Copy)]
struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

// Values of cublasLt.h and library_types.h, unchanged since CUDA 11.
const R_32F: c_int = 0;
const COMPUTE_32F: c_int = 68;
const COMPUTE_32F_FAST_16BF: c_int = 75;
const DESC_TRANSA: c_int = 3;
const DESC_TRANSB: c_int = 4;
const DESC_EPILOGUE: c_int = 7;
const DESC_BIAS_POINTER: c_int = 8;
const EPILOGUE_DEFAULT: u32 = 1;
const EPILOGUE_RELU: u32 = 2;
const EPILOGUE_BIAS: u32 = 4;
const LAYOUT_BATCH_COUNT: c_int = 5;
const LAYOUT_BATCH_STRIDE: c_int = 6;
const PREF_MAX_WORKSPACE: c_int = 1;
const PREF_MIN_ALIGNMENT: [c_int; 4] = [5, 6, 7, 8];
const NOT_SUPPORTED: Status = 15;

type Set = unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status;
type Destroy = unsafe extern "C" fn(Opaque) -> Status;

struct Functions {
    create: unsafe extern "C" fn(*mut Opaque) -> Status,
    destroy: Destroy,
    desc_create: unsafe extern "C" fn(*mut Opaque, c_int, c_int) -> Status,
    desc_set: Set,
    desc_destroy: Destroy,
    layout_create: unsafe extern "C" fn(*mut Opaque, c_int, u64, u64, i64) -> Status,
    layout_set: Set,
    layout_destroy: Destroy,
    pref_create: unsafe extern "C" fn(*mut Opaque) -> Status,
    pref_set: Set,
    pref_destroy: Destroy,
    heuristic: unsafe extern "C" fn(
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> Status,
    matmul: unsafe extern "C" fn(
        Opaque,
        Opaque,
        *const c_void,
        *const c_void,
        Opaque,
        *const c_void,
        Opaque,
        *const c_void,
        *const c_void,
        Opaque,
        *mut c_void,
        Opaque,
        *const Algorithm,
        *mut c_void,
        usize,
        Stream,
    ) -> Status,
    // Dropped last: the function pointers refer to it.
    _library: Library,
}

impl Functions {
    fn load(path: &Path) -> Result<Functions, libloading::Error> {
        // SAFETY: the library's initializers only set up the library. The function types are those
        // of cublasLt.h, unchanged since CUDA 11. The struct owns the library.
        unsafe {
            let library = Library::new(path)?;
            Ok(Functions {
                create: *library.get(b"cublasLtCreate\0")?,
                destroy: *library.get(b"cublasLtDestroy\0")?,
                desc_create: *library.get(b"cublasLtMatmulDescCreate\0")?,
                desc_set: *library.get(b"cublasLtMatmulDescSetAttribute\0")?,
                desc_destroy: *library.get(b"cublasLtMatmulDescDestroy\0")?,
                layout_create: *library.get(b"cublasLtMatrixLayoutCreate\0")?,
                layout_set: *library.get(b"cublasLtMatrixLayoutSetAttribute\0")?,
                layout_destroy: *library.get(b"cublasLtMatrixLayoutDestroy\0")?,
                pref_create: *library.get(b"cublasLtMatmulPreferenceCreate\0")?,
                pref_set: *library.get(b"cublasLtMatmulPreferenceSetAttribute\0")?,
                pref_destroy: *library.get(b"cublasLtMatmulPreferenceDestroy\0")?,
                heuristic: *library.get(b"cublasLtMatmulAlgoGetHeuristic\0")?,
                matmul: *library.get(b"cublasLtMatmul\0")?,
                _library: library,
            })
        }
    }
}

/// A cuBLASLt handle with its workspace and chosen algorithms.
pub struct Blas {
    functions: Functions,
    handle: Opaque,
    workspace: Pointer,
    algorithms: HashMap<Key, Chosen>,
}

// SAFETY: any thread may use a cuBLASLt handle, one at a time; `&mut` ensures that.
unsafe impl Send for Blas {}

/// Key of an algorithm: shape, number of products, transposes, precision, epilogue, whether it adds
/// to `c`, and the common alignment in bytes.
type Key = (Shape, usize, [bool; 2], Precision, u32, bool, u32);

/// The shape that an algorithm was chosen for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Shape {
    /// All shapes that round to this one.
    Rounded([u64; 3]),
    /// One shape, for which the algorithm of the rounded shape has failed. It is not used for other
    /// shapes, whose results would then depend on the products before them.
    Exact([u64; 3]),
}

impl Shape {
    fn sizes(self) -> [u64; 3] {
        match self {
            Shape::Rounded(sizes) | Shape::Exact(sizes) => sizes,
        }
    }
}

/// An algorithm that has worked, and its compute type.
#[derive(Clone, Copy)]
struct Chosen {
    algorithm: Algorithm,
    compute: c_int,
}

/// A cuBLASLt descriptor and the function that destroys it on drop.
struct Descriptor(Opaque, Destroy);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the matching create function made it, and this drop alone destroys it.
        unsafe { (self.1)(self.0) };
    }
}

/// Descriptors of a product: column-major, with packed leading dimensions.
struct Call {
    desc: Descriptor,
    a: Descriptor,
    b: Descriptor,
    c: Descriptor,
}

impl Blas {
    /// Size of the workspace in bytes, as NVIDIA recommends for Hopper.
    pub const WORKSPACE: usize = 32 << 20;

    /// Opens the library. `workspace` is [`Blas::WORKSPACE`] bytes of device memory that only this
    /// handle uses.
    ///
    /// # Errors
    /// [`CudaError::NoBlas`] or [`CudaError::Blas`].
    pub fn new(workspace: Pointer) -> Result<Blas, CudaError> {
        let names = library::names(file_name, launch::driver_version());
        let paths = library::candidates(&names);
        let mut refused = CudaError::NoBlas { tried: names };
        for path in paths {
            let Ok(functions) = Functions::load(&path) else { continue };
            let mut handle = std::ptr::null_mut();
            // SAFETY: writes a handle.
            match unsafe { (functions.create)(&mut handle) } {
                0 => return Ok(Blas { functions, handle, workspace, algorithms: HashMap::new() }),
                // An earlier version may work with this driver.
                status => refused = CudaError::Blas { action: format!("opening {}", path.display()), status },
            }
        }
        Err(refused)
    }

    /// Address of the workspace.
    pub fn workspace(&self) -> Pointer {
        self.workspace
    }

    /// Enqueues `count` products of one shape.
    ///
    /// # Errors
    /// [`CudaError::Blas`].
    ///
    /// # Safety
    /// As [`Runtime::gemm_batch`](crate::device::cuda::runtime::Runtime::gemm_batch). No other
    /// stream uses the workspace.
    pub unsafe fn gemm<T>(&mut self, gemm: &Gemm, count: usize, stream: *mut T) -> Result<(), CudaError> {
        let sizes = gemm.shape.map(|n| n as u64);
        let (rounded, exact) = (Shape::Rounded(sizes.map(rounded)), Shape::Exact(sizes));
        let compute = match gemm.precision {
            Precision::F32 => COMPUTE_32F,
            Precision::Bf16 => COMPUTE_32F_FAST_16BF,
        };
        let attempts = [
            (rounded, compute),
            // The algorithm of the rounded shape may not support the exact shape.
            (exact, compute),
            (exact, COMPUTE_32F),
        ];
        let attempts = &attempts[..if compute == COMPUTE_32F { 2 } else { 3 }];
        let mut first = None;
        for &(shape, compute) in attempts {
            // SAFETY: guaranteed by the caller.
            match unsafe { self.run(gemm, count, shape, compute, stream.cast()) } {
                Ok(()) => return Ok(()),
                Err(status) => first = first.or(Some(status)),
            }
        }
        Err(CudaError::Blas { action: format!("{gemm:?}"), status: first.unwrap_or(NOT_SUPPORTED) })
    }

    /// Enqueues the products. For a rounded shape, with the algorithm kept for the exact shape or
    /// for the rounded one; for an exact shape, with one chosen now. One that succeeds is kept.
    ///
    /// # Safety
    /// As [`Blas::gemm`].
    unsafe fn run(
        &mut self,
        gemm: &Gemm,
        count: usize,
        shape: Shape,
        compute: c_int,
        stream: Stream,
    ) -> Result<(), Status> {
        let epilogue = match (gemm.bias != 0, gemm.activation) {
            (false, Activation::None) => EPILOGUE_DEFAULT,
            (false, Activation::Relu) => EPILOGUE_RELU,
            (true, Activation::None) => EPILOGUE_BIAS,
            (true, Activation::Relu) => EPILOGUE_BIAS | EPILOGUE_RELU,
        };
        let bits = gemm.a | gemm.b | gemm.c;
        let alignment = 1u32 << bits.trailing_zeros().min(8);
        let adds = gemm.store == Store::Add;
        let transposed = [gemm.a_transposed, gemm.b_transposed];
        let sizes = gemm.shape.map(|n| n as u64);
        let key = |shape| (shape, count, transposed, gemm.precision, epilogue, adds, alignment);
        let kept = match shape {
            Shape::Rounded(_) => [Shape::Exact(sizes), shape]
                .into_iter()
                .find_map(|shape| self.algorithms.get(&key(shape)).copied()),
            Shape::Exact(_) => None,
        };
        let Chosen { algorithm, compute } = match kept {
            Some(chosen) => chosen,
            None => {
                let call = self.describe(gemm, count, shape.sizes(), compute, epilogue)?;
                Chosen { algorithm: self.choose(&call, alignment)?, compute }
            }
        };
        let call = self.describe(gemm, count, sizes, compute, epilogue)?;
        let (alpha, beta) = (1.0f32, if adds { 1.0f32 } else { 0.0 });
        let c = gemm.c as *mut c_void;
        // SAFETY: the caller guarantees the matrices; the descriptors have the same shapes; alpha
        // and beta are read before the call returns.
        let done = status(unsafe {
            (self.functions.matmul)(
                self.handle,
                call.desc.0,
                (&raw const alpha).cast(),
                gemm.b as *const c_void,
                call.a.0,
                gemm.a as *const c_void,
                call.b.0,
                (&raw const beta).cast(),
                c,
                call.c.0,
                c,
                call.c.0,
                &algorithm,
                self.workspace as *mut c_void,
                Self::WORKSPACE,
                stream,
            )
        });
        if done.is_ok() && kept.is_none() {
            self.algorithms.insert(key(shape), Chosen { algorithm, compute });
        }
        done
    }

    /// Descriptors of a product of this shape. cuBLASLt's A is `b`, and its B is `a`.
    fn describe(
        &self,
        gemm: &Gemm,
        count: usize,
        [m, n, k]: [u64; 3],
        compute: c_int,
        epilogue: u32,
    ) -> Result<Call, Status> {
        let functions = &self.functions;
        let layout = |transposed: bool, rows: u64, columns: u64| -> Result<Descriptor, Status> {
            let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
            let mut layout = std::ptr::null_mut();
            // SAFETY: writes a descriptor.
            status(unsafe { (functions.layout_create)(&mut layout, R_32F, rows, columns, rows as i64) })?;
            let layout = Descriptor(layout, functions.layout_destroy);
            if count != 1 {
                set(functions.layout_set, &layout, LAYOUT_BATCH_COUNT, &(count as i32))?;
                set(functions.layout_set, &layout, LAYOUT_BATCH_STRIDE, &((rows * columns) as i64))?;
            }
            Ok(layout)
        };
        let mut desc = std::ptr::null_mut();
        // SAFETY: writes a descriptor.
        status(unsafe { (functions.desc_create)(&mut desc, compute, R_32F) })?;
        let desc = Descriptor(desc, functions.desc_destroy);
        let (a, b) = (i32::from(gemm.b_transposed), i32::from(gemm.a_transposed));
        set(functions.desc_set, &desc, DESC_TRANSA, &a)?;
        set(functions.desc_set, &desc, DESC_TRANSB, &b)?;
        set(functions.desc_set, &desc, DESC_EPILOGUE, &epilogue)?;
        if gemm.bias != 0 {
            set(functions.desc_set, &desc, DESC_BIAS_POINTER, &gemm.bias)?;
        }
        Ok(Call {
            desc,
            a: layout(gemm.b_transposed, n, k)?,
            b: layout(gemm.a_transposed, k, m)?,
            c: layout(false, n, m)?,
        })
    }

    fn choose(&self, call: &Call, alignment: u32) -> Result<Algorithm, Status> {
        let functions = &self.functions;
        let mut preference = std::ptr::null_mut();
        // SAFETY: writes a descriptor.
        status(unsafe { (functions.pref_create)(&mut preference) })?;
        let preference = Descriptor(preference, functions.pref_destroy);
        set(functions.pref_set, &preference, PREF_MAX_WORKSPACE, &Self::WORKSPACE)?;
        for attribute in PREF_MIN_ALIGNMENT {
            set(functions.pref_set, &preference, attribute, &alignment)?;
        }
        let mut found = Heuristic {
            algorithm: Algorithm([0; 8]),
            workspace: 0,
            state: NOT_SUPPORTED,
            waves: 0.0,
            reserved: [0; 4],
        };
        let mut count = 0;
        // SAFETY: all descriptors are alive; `found` has room for the one requested result.
        status(unsafe {
            (functions.heuristic)(
                self.handle,
                call.desc.0,
                call.a.0,
                call.b.0,
                call.c.0,
                call.c.0,
                preference.0,
                1,
                &mut found,
                &mut count,
            )
        })?;
        if count == 0 {
            return Err(NOT_SUPPORTED);
        }
        status(found.state)?;
        Ok(found.algorithm)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: `new` created the handle, and this drop alone destroys it.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

/// Rounds a matrix dimension up to an eighth of a power of two; a dimension may be a token count.
fn rounded(n: u64) -> u64 {
    if n <= 256 { n } else { n.next_multiple_of(n.next_power_of_two() / 8) }
}

fn set<T>(set: Set, descriptor: &Descriptor, attribute: c_int, value: &T) -> Result<(), Status> {
    // SAFETY: the descriptor is alive; the value has the given size and is read before the call
    // returns.
    status(unsafe { set(descriptor.0, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) })
}

fn status(status: Status) -> Result<(), Status> {
    if status == 0 { Ok(()) } else { Err(status) }
}
