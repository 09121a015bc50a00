//! The emulator of `tests/emulator` as a library: its runtime and the kernels' modules are compiled
//! by the C++ compiler on first use and kept in a folder.
//!
//! Nothing is compiled ahead: a module is whatever source, headers and macros NVRTC was given. The
//! emulator's memory is the device's memory, so device addresses are addresses of this process.

use libloading::Library;
use libloading::os::unix::{self, RTLD_LOCAL, RTLD_NOW};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of a page, the unit in which accesses are noted.
pub const PAGE: usize = 256;
/// Bytes of the emulator's address space.
const ARENA: usize = 4 << 30;

const SOURCES: [(&str, &str); 2] = [
    ("runtime.cpp", include_str!("../../emulator/src/runtime.cpp")),
    ("emulator.h", include_str!("../../emulator/src/emulator.h")),
];

type Raw = *mut c_void;

/// What NVRTC was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Source {
    pub name: String,
    pub text: String,
    pub headers: Vec<(String, String)>,
    /// Macros, in the order of the options: `NAME=VALUE`.
    pub defines: Vec<String>,
}

/// A kernel of a loaded module.
#[derive(Clone, Debug)]
pub struct Entry {
    raw: usize,
    pub name: String,
    pub params_bytes: usize,
    /// `__launch_bounds__`: threads per block (0: any), resident blocks.
    pub bounds: [c_int; 2],
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}

/// The functions of the emulator that the driver uses.
struct Functions {
    allocate: unsafe extern "C" fn(Raw, usize) -> *mut u8,
    release: unsafe extern "C" fn(Raw, *mut u8, usize),
    owned: unsafe extern "C" fn(Raw, *const u8, usize) -> bool,
    mark: unsafe extern "C" fn(Raw, *mut u8, usize, bool),
    unwritten: unsafe extern "C" fn(Raw, *const u8, usize) -> usize,
    find: unsafe extern "C" fn(*const c_char, *const c_char) -> *const c_void,
    entry: unsafe extern "C" fn(*const c_void, *mut usize, *mut c_int, *mut c_int),
    touched: unsafe extern "C" fn(Raw, *mut c_void, extern "C" fn(*mut c_void, u32, u8)),
    launch: unsafe extern "C" fn(Raw, *const c_void, *const c_void, u32, u32, u32, usize) -> *const c_char,
}

/// The emulated device.
pub struct Machine {
    raw: Raw,
    base: usize,
    functions: Functions,
    runtime: PathBuf,
    modules: HashMap<u64, Library>,
    // Dropped last: the function pointers refer to it.
    _library: Library,
}

// SAFETY: any thread may use the emulator, one at a time; the driver's lock ensures that.
unsafe impl Send for Machine {}

impl Machine {
    /// Compiles the emulator if necessary, and makes a device.
    pub fn new() -> Result<Machine, String> {
        let arena = format!("-DDFAR_EMULATOR_ARENA=(size_t({}) << 30)", ARENA >> 30);
        let files: Vec<_> = SOURCES
            .iter()
            .map(|&(name, text)| (name.to_owned(), text.to_owned()))
            .chain([("primitives.cuh".to_owned(), String::new())])
            .collect();
        let runtime = build("runtime", &files, "runtime.cpp", &[&arena])?;
        // SAFETY: the emulator's initializers only set up its own data. The types are those of
        // runtime.cpp. The struct owns the library.
        unsafe {
            let library: Library = open(&runtime)?.into();
            let symbol = |error| format!("{}: {error}", runtime.display());
            macro_rules! get {
                ($name:literal) => {
                    *library.get(concat!("dfar_emulator_", $name, "\0").as_bytes()).map_err(symbol)?
                };
            }
            let new: unsafe extern "C" fn() -> Raw = get!("new");
            let base: unsafe extern "C" fn(Raw) -> usize = get!("base");
            let track: unsafe extern "C" fn(Raw) = get!("track");
            let functions = Functions {
                allocate: get!("allocate"),
                release: get!("release"),
                owned: get!("owned"),
                mark: get!("mark"),
                unwritten: get!("unwritten"),
                find: get!("find"),
                entry: get!("entry"),
                touched: get!("touched"),
                launch: get!("launch"),
            };
            let raw = new();
            track(raw);
            Ok(Machine {
                raw,
                base: base(raw),
                functions,
                runtime,
                modules: HashMap::new(),
                _library: library,
            })
        }
    }

    /// Allocates uninitialized memory, 256-byte aligned.
    pub fn allocate(&self, bytes: usize) -> Option<u64> {
        // SAFETY: the device is alive and checks the size.
        let at = unsafe { (self.functions.allocate)(self.raw, bytes) };
        (!at.is_null()).then_some(at as u64)
    }

    /// Frees an allocation of this size.
    pub fn release(&self, at: u64, bytes: usize) {
        // SAFETY: the driver releases each of its allocations once, with its size.
        unsafe { (self.functions.release)(self.raw, at as *mut u8, bytes) }
    }

    /// Whether all bytes are in one allocation.
    pub fn is_owned(&self, at: u64, bytes: usize) -> bool {
        // SAFETY: compares the address with the bounds of the device's memory first.
        unsafe { (self.functions.owned)(self.raw, at as *const u8, bytes) }
    }

    /// Number of bytes that nothing has written. The range is owned.
    pub fn unwritten(&self, at: u64, bytes: usize) -> usize {
        assert!(self.is_owned(at, bytes));
        // SAFETY: owned, as just checked.
        unsafe { (self.functions.unwritten)(self.raw, at as *const u8, bytes) }
    }

    /// The bytes of an owned range.
    pub fn bytes(&self, at: u64, bytes: usize) -> &[u8] {
        assert!(self.is_owned(at, bytes));
        // SAFETY: owned; any bytes are bytes; writing takes `&mut self`.
        unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }
    }

    /// The bytes of an owned range, which then count as written.
    pub fn bytes_mut(&mut self, at: u64, bytes: usize) -> &mut [u8] {
        assert!(self.is_owned(at, bytes));
        // SAFETY: owned, and borrowed mutably with the machine.
        unsafe {
            (self.functions.mark)(self.raw, at as *mut u8, bytes, false);
            std::slice::from_raw_parts_mut(at as *mut u8, bytes)
        }
    }

    /// Loads the module of a source, which is compiled if necessary. Returns its key.
    pub fn load(&mut self, source: &Source) -> Result<u64, String> {
        let mut hasher = DefaultHasher::new();
        source.hash(&mut hasher);
        let key = hasher.finish();
        if !self.modules.contains_key(&key) {
            let path = self.build_module(source, key)?;
            // SAFETY: the module's initializers register its kernels with the runtime.
            let library = unsafe { open(&path)? };
            self.modules.insert(key, library.into());
        }
        Ok(key)
    }

    fn build_module(&self, source: &Source, key: u64) -> Result<PathBuf, String> {
        let mut text = String::new();
        for define in &source.defines {
            text += &format!("#define {}\n", define.replacen('=', " ", 1));
        }
        text += &format!("#define DFAR_MODULE \"{key:016x}\"\n#include \"primitives.cuh\"\n");
        text += &format!("namespace {{\n#include \"{}\"\n}}\n", source.name);
        let mut files = source.headers.clone();
        files.push((source.name.clone(), source.text.clone()));
        files.push(("emulator.h".to_owned(), SOURCES[1].1.to_owned()));
        files.push(("module.cpp".to_owned(), text));
        // The compiler inserts a call before each memory access; the runtime defines the calls.
        let more =
            ["-fsanitize=thread", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"];
        let runtime = self.runtime.display().to_string();
        build(&source.name.replace('/', "_"), &files, "module.cpp", &[&more[..], &[&runtime]].concat())
    }

    /// A kernel of a loaded module.
    pub fn find(&self, module: u64, name: &str) -> Option<Entry> {
        let (key, text) = (CString::new(format!("{module:016x}")).ok()?, CString::new(name).ok()?);
        // SAFETY: the lookup compares the names, which outlive the call.
        let raw = unsafe { (self.functions.find)(key.as_ptr(), text.as_ptr()) };
        if raw.is_null() {
            return None;
        }
        let (mut params_bytes, mut bounds) = (0, [0; 2]);
        let [threads, blocks] = &mut bounds;
        // SAFETY: the kernel was found, and modules are never unloaded; writes three numbers.
        unsafe { (self.functions.entry)(raw, &mut params_bytes, threads, blocks) }
        Some(Entry { raw: raw as usize, name: name.to_owned(), params_bytes, bounds })
    }

    /// Runs a kernel to completion. Returns the pages that it accessed, as (address, written), each
    /// once for reading and once for writing, and the first fault.
    pub fn launch(
        &mut self,
        entry: &Entry,
        params: &[u64],
        grid: [u32; 2],
        threads: u32,
        shared_bytes: usize,
    ) -> (Vec<(u64, bool)>, Result<(), String>) {
        // SAFETY: the entry is of a loaded module; the parameters have its size and alignment. Each
        // access of the kernel is checked against the device's memory before it happens.
        let message = unsafe {
            let (raw, params) = (entry.raw as *const c_void, params.as_ptr().cast());
            (self.functions.launch)(self.raw, raw, params, grid[0], grid[1], threads, shared_bytes)
        };
        let result = if message.is_null() {
            Ok(())
        } else {
            // SAFETY: a zero-terminated message that the device keeps until its next launch.
            Err(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned())
        };
        let mut pages: Vec<(u32, u8)> = vec![];
        extern "C" fn visit(pages: *mut c_void, page: u32, kinds: u8) {
            // SAFETY: the vector below, which nothing else uses during the call.
            unsafe { &mut *pages.cast::<Vec<(u32, u8)>>() }.push((page, kinds));
        }
        // SAFETY: the device is alive; `visit` gets the vector.
        unsafe { (self.functions.touched)(self.raw, (&raw mut pages).cast(), visit) }
        let at = |page: u32| (self.base + page as usize * PAGE) as u64;
        let touched = pages.iter().flat_map(|&(page, kinds)| {
            let kind = move |bit: u8, written| (kinds & bit != 0).then_some((at(page), written));
            kind(1, false).into_iter().chain(kind(2, true))
        });
        (touched.collect(), result)
    }
}

/// # Safety
/// As dlopen of this library.
unsafe fn open(path: &Path) -> Result<unix::Library, String> {
    // SAFETY: guaranteed by the caller.
    unsafe { unix::Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| format!("{}: {error:?}", path.display()))
}

/// Folder of compiled libraries: `$DFAR_DRIVER_CACHE`, else `target/test-driver/modules`.
fn folder() -> PathBuf {
    std::env::var_os("DFAR_DRIVER_CACHE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-driver/modules"),
        PathBuf::from,
    )
}

/// Compiles `main` of `files` to a shared library, unless an earlier process has.
fn build(stem: &str, files: &[(String, String)], main: &str, options: &[&str]) -> Result<PathBuf, String> {
    // As in tests/emulator/build.rs. Initial-exec: the one thread-local variable is read often.
    let fixed = "-std=c++20 -O2 -fPIC -ftls-model=initial-exec -ffp-contract=off -fno-exceptions -fno-rtti \
                 -Wall -Wextra -DDFAR_EMULATOR";
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut hasher = DefaultHasher::new();
    (files, main, options, fixed, &compiler).hash(&mut hasher);
    let folder = folder();
    let library = folder.join(format!("{}_{:016x}.so", stem.trim_end_matches(".cu"), hasher.finish()));
    if library.exists() {
        return Ok(library);
    }
    let failed = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let work = folder.join(format!("{:016x}.{}", hasher.finish(), std::process::id()));
    for (name, text) in files {
        let path = work.join(name);
        std::fs::create_dir_all(path.parent().expect("a file in a folder has one"))
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|error| failed("writing the sources of a module", error))?;
    }
    let (object, made) = (work.join("module.o"), work.join("module.so"));
    let run = |arguments: &mut Command| -> Result<(), String> {
        let output = arguments.output().map_err(|error| failed(&format!("running {compiler}"), error))?;
        let log = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("{compiler} rejects {stem}:\n{log}")) }
    };
    // Two steps: -fsanitize=thread inserts the calls, but its own library is not linked.
    let (flags, libraries): (Vec<&str>, Vec<&str>) = options.iter().partition(|o| o.starts_with('-'));
    let mut compile = Command::new(&compiler);
    compile.args(fixed.split_whitespace()).args(flags).arg("-c").arg(work.join(main));
    run(compile.arg("-I").arg(&work).arg("-o").arg(&object))?;
    run(Command::new(&compiler).arg("-shared").arg(&object).args(libraries).arg("-o").arg(&made))?;
    // Another process may have done the same: both renames leave a complete file.
    std::fs::rename(&made, &library).map_err(|error| failed("keeping a module", error))?;
    let _ = std::fs::remove_dir_all(&work);
    Ok(library)
}
