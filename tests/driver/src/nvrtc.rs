//! NVRTC: its "machine code" is the source, headers and macros that it was given, with a header.
//! `cuModuleLoadData` compiles that for the emulator. [`VERSION`] is none that NVIDIA has, so that
//! the disk cache of the library never mixes it with real code.

use crate::handles::{Handles, Kind};
use crate::machine::Source;
use std::ffi::{CStr, c_char, c_int};
use std::sync::{Mutex, MutexGuard, PoisonError};

const VERSION: (c_int, c_int) = (12, 900);
const MAGIC: &[u8; 16] = b"dfar-test-code-1";
/// Architectures that are accepted. The kernels need sm_80.
const ARCHS: &[&str] = &[
    "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103", "sm_120",
    "sm_121",
];

const SUCCESS: c_int = 0;
const INVALID_PROGRAM: c_int = 4;
const INVALID_OPTION: c_int = 5;

#[derive(Debug, Default)]
struct Program {
    source: Source,
    log: String,
    code: Vec<u8>,
}

static PROGRAMS: Mutex<Option<Handles<Program>>> = Mutex::new(None);

fn programs() -> MutexGuard<'static, Option<Handles<Program>>> {
    let mut programs = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
    programs.get_or_insert_with(|| Handles::new(Kind::Program));
    programs
}

fn with(program: u64, act: impl FnOnce(&mut Program) -> c_int) -> c_int {
    let mut programs = programs();
    match programs.as_mut().expect("just made").get(program) {
        Ok(program) => act(program),
        Err(error) => {
            eprintln!("dfar test driver: NVRTC: {error}");
            INVALID_PROGRAM
        }
    }
}

fn strings(source: &Source, arch: &str) -> Vec<u8> {
    let mut all: Vec<&str> = vec![arch, &source.name, &source.text];
    all.extend(source.headers.iter().flat_map(|(name, text)| [name.as_str(), text.as_str()]));
    let headers = source.headers.len();
    all.extend(source.defines.iter().map(String::as_str));
    let mut code = vec![];
    code.extend_from_slice(&(headers as u64).to_le_bytes());
    code.extend_from_slice(&(source.defines.len() as u64).to_le_bytes());
    for text in all {
        code.extend_from_slice(&(text.len() as u64).to_le_bytes());
        code.extend_from_slice(text.as_bytes());
    }
    let mut whole = MAGIC.to_vec();
    whole.extend_from_slice(&(code.len() as u64).to_le_bytes());
    whole.extend_from_slice(&code);
    whole
}

/// The architecture and source of an image; `None` if it is not one of ours.
///
/// # Safety
/// `image` is at least 16 bytes, or one of ours.
pub unsafe fn read(image: *const u8) -> Option<(String, Source)> {
    // SAFETY: guaranteed by the caller: the rest is read only behind our header.
    let whole = unsafe {
        if image.is_null() || std::slice::from_raw_parts(image, MAGIC.len()) != MAGIC {
            return None;
        }
        let length = image.add(MAGIC.len()).cast::<[u8; 8]>().read_unaligned();
        std::slice::from_raw_parts(image.add(MAGIC.len() + 8), u64::from_le_bytes(length) as usize)
    };
    let mut rest = whole;
    let number = |rest: &mut &[u8]| -> Option<usize> {
        let (bytes, after) = rest.split_first_chunk::<8>()?;
        *rest = after;
        Some(u64::from_le_bytes(*bytes) as usize)
    };
    let (headers, defines) = (number(&mut rest)?, number(&mut rest)?);
    let mut text = || -> Option<String> {
        let length = number(&mut rest)?;
        let (text, after) = rest.split_at_checked(length)?;
        rest = after;
        String::from_utf8(text.to_vec()).ok()
    };
    let (arch, name, source) = (text()?, text()?, text()?);
    let headers = (0..headers).map(|_| Some((text()?, text()?))).collect::<Option<_>>()?;
    let defines = (0..defines).map(|_| text()).collect::<Option<_>>()?;
    Some((arch, Source { name, text: source, headers, defines }))
}

/// # Safety
/// A zero-terminated string.
unsafe fn owned(text: *const c_char) -> String {
    // SAFETY: guaranteed by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: the caller's pointers.
    unsafe {
        major.write(VERSION.0);
        minor.write(VERSION.1);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut u64,
    text: *const c_char,
    name: *const c_char,
    headers: c_int,
    header_texts: *const *const c_char,
    header_names: *const *const c_char,
) -> c_int {
    // SAFETY: the caller's strings and arrays of the given length.
    unsafe {
        let header = |i: usize| (owned(*header_names.add(i)), owned(*header_texts.add(i)));
        let source = Source {
            name: owned(name),
            text: owned(text),
            headers: (0..headers as usize).map(header).collect(),
            defines: vec![],
        };
        let made = programs().as_mut().expect("just made").add(Program { source, ..Program::default() });
        program.write(made);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: u64,
    count: c_int,
    options: *const *const c_char,
) -> c_int {
    // SAFETY: the caller's array of strings.
    let options: Vec<String> = (0..count as usize).map(|i| unsafe { owned(*options.add(i)) }).collect();
    with(program, |program| {
        let mut arch = "sm_75".to_owned();
        program.source.defines.clear();
        for option in options {
            if let Some(given) = option.strip_prefix("--gpu-architecture=") {
                if !ARCHS.contains(&given) {
                    program.log = format!("error: invalid value for --gpu-architecture ({given})");
                    return INVALID_OPTION;
                }
                arch = given.to_owned();
            } else if let Some(define) = option.strip_prefix("-D") {
                program.source.defines.push(define.to_owned());
            } else if !matches!(option.as_str(), "--std=c++17" | "--fdevice-syntax-only") {
                program.log = format!("error: unrecognized option {option}");
                return INVALID_OPTION;
            }
        }
        program.code = strings(&program.source, &arch);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut u64) -> c_int {
    // SAFETY: the caller's pointer.
    let removed = programs().as_mut().expect("just made").remove(unsafe { *program });
    // SAFETY: as above.
    unsafe { program.write(0) };
    removed.map_or(INVALID_PROGRAM, |_| SUCCESS)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(code: c_int) -> *const c_char {
    let text = match code {
        SUCCESS => c"NVRTC_SUCCESS",
        INVALID_PROGRAM => c"NVRTC_ERROR_INVALID_PROGRAM",
        INVALID_OPTION => c"NVRTC_ERROR_INVALID_OPTION",
        _ => c"NVRTC_ERROR unknown",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(program: u64, bytes: *mut usize) -> c_int {
    with(program, |program| {
        // SAFETY: the caller's pointer.
        unsafe { bytes.write(program.log.len() + 1) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(program: u64, log: *mut u8) -> c_int {
    with(program, |program| {
        // SAFETY: the caller's buffer, of the size that was reported.
        unsafe {
            std::ptr::copy_nonoverlapping(program.log.as_ptr(), log, program.log.len());
            log.add(program.log.len()).write(0);
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(program: u64, bytes: *mut usize) -> c_int {
    with(program, |program| {
        // SAFETY: the caller's pointer.
        unsafe { bytes.write(program.code.len()) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(program: u64, code: *mut u8) -> c_int {
    with(program, |program| {
        // SAFETY: the caller's buffer, of the size that was reported.
        unsafe { std::ptr::copy_nonoverlapping(program.code.as_ptr(), code, program.code.len()) };
        SUCCESS
    })
}
