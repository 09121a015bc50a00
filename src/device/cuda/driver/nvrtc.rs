//! NVRTC, loaded on first use, with typed errors.
//!
//! `library.rs` says where it is looked for, and which versions fit the driver.

use super::{launch, library};
use crate::device::cuda::error::CudaError;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;

/// File name of a major version.
fn file_name(major: Option<i32>) -> String {
    match major {
        Some(major) if cfg!(windows) => format!("nvrtc64_{major}0_0.dll"),
        None if cfg!(windows) => "nvrtc64.dll".to_owned(),
        Some(major) => format!("libnvrtc.so.{major}"),
        None => "libnvrtc.so".to_owned(),
    }
}

/// File names to try with this driver.
fn names() -> Vec<String> {
    library::names(file_name, launch::driver_version())
}

/// Oldest version that compiles the kernels with their options.
const OLDEST: (i32, i32) = (12, 4);

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The loaded library and its functions.
pub struct Nvrtc {
    version: (i32, i32),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    log_size: Size,
    log: Get,
    cubin_size: Size,
    cubin: Get,
    // Dropped last: the function pointers refer to it.
    _library: Library,
}

/// A compilation error.
pub struct Refused {
    /// NVRTC's error message.
    pub error: String,
    /// The compiler's log; may be empty.
    pub log: String,
}

impl Nvrtc {
    /// The library, loaded once per process: the first that is new enough.
    ///
    /// # Errors
    /// [`CudaError::NoNvrtc`] and [`CudaError::OldNvrtc`].
    pub fn get() -> Result<&'static Nvrtc, CudaError> {
        static NVRTC: OnceLock<Option<Nvrtc>> = OnceLock::new();
        let found = NVRTC.get_or_init(|| {
            let mut old = None;
            for path in library::candidates(&names()) {
                match Nvrtc::load(&path) {
                    Ok(nvrtc) if nvrtc.version >= OLDEST => return Some(nvrtc),
                    Ok(nvrtc) => _ = old.get_or_insert(nvrtc),
                    Err(_) => {}
                }
            }
            old
        });
        let nvrtc = found.as_ref().ok_or_else(|| CudaError::NoNvrtc { tried: names() })?;
        if nvrtc.version < OLDEST {
            return Err(CudaError::OldNvrtc { found: nvrtc.version, oldest: OLDEST });
        }
        Ok(nvrtc)
    }

    fn load(path: &Path) -> Result<Nvrtc, libloading::Error> {
        // SAFETY: NVRTC's initializers only set up the library. The function types are those of
        // nvrtc.h, unchanged since CUDA 11. `version` writes two ints. The struct owns the library.
        unsafe {
            let library = Library::new(path)?;
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
                *library.get(b"nvrtcVersion\0")?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            Ok(Nvrtc {
                version: (major, minor),
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                error_string: *library.get(b"nvrtcGetErrorString\0")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0")?,
                log: *library.get(b"nvrtcGetProgramLog\0")?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0")?,
                cubin: *library.get(b"nvrtcGetCUBIN\0")?,
                _library: library,
            })
        }
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles `text` to machine code.
    ///
    /// # Errors
    /// NVRTC's error and log.
    pub fn compile(
        &self,
        name: &str,
        text: &str,
        headers: &[(&str, &str)],
        options: &[String],
    ) -> Result<Vec<u8>, Refused> {
        let c = |s: &str| CString::new(s).expect("kernels and options should hold no zero byte");
        let (name, text) = (c(name), c(text));
        let header_names: Vec<CString> = headers.iter().map(|(name, _)| c(name)).collect();
        let header_texts: Vec<CString> = headers.iter().map(|(_, text)| c(text)).collect();
        let options: Vec<CString> = options.iter().map(|option| c(option)).collect();
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (header_names, header_texts, options) =
            (pointers(&header_names), pointers(&header_texts), pointers(&options));

        let mut program = Handle { nvrtc: self, program: std::ptr::null_mut() };
        // SAFETY: all strings are zero-terminated and outlive the call; the counts match the
        // arrays.
        let code = unsafe {
            (self.create)(
                &mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            )
        };
        self.check(code, &program)?;
        // SAFETY: the program exists; the options outlive the call, and their count matches.
        let code = unsafe { (self.compile)(program.program, options.len() as c_int, options.as_ptr()) };
        self.check(code, &program)?;
        self.take(&program, self.cubin_size, self.cubin).map_err(|code| self.refused(code, &program))
    }

    fn take(&self, program: &Handle, size: Size, get: Get) -> Result<Vec<u8>, c_int> {
        let mut bytes = 0;
        // SAFETY: the program exists, and `bytes` is a size_t.
        let code = unsafe { size(program.program, &mut bytes) };
        if code != 0 {
            return Err(code);
        }
        let mut data = vec![0u8; bytes];
        // SAFETY: the buffer has the size that NVRTC reported.
        let code = unsafe { get(program.program, data.as_mut_ptr().cast()) };
        if code == 0 { Ok(data) } else { Err(code) }
    }

    fn check(&self, code: c_int, program: &Handle) -> Result<(), Refused> {
        if code == 0 { Ok(()) } else { Err(self.refused(code, program)) }
    }

    fn refused(&self, code: c_int, program: &Handle) -> Refused {
        let log = if program.program.is_null() {
            vec![]
        } else {
            self.take(program, self.log_size, self.log).unwrap_or_default()
        };
        // SAFETY: NVRTC returns a static, zero-terminated string for every code.
        let error = unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned();
        Refused { error, log: String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned() }
    }
}

struct Handle<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: nvrtcCreateProgram made it, and this drop alone destroys it.
            unsafe { (self.nvrtc.destroy)(&mut self.program) };
        }
    }
}
