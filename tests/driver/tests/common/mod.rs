//! Runs a test on the driver: in a process of its own, whose loader finds the driver under the
//! names of NVIDIA's libraries.

#![allow(dead_code, reason = "each test program uses a part")]

use libloading::{Library, Symbol};
use std::ffi::CString;
use std::process::Command;

/// The names under which libraries are looked for.
const NAMES: [&str; 3] = ["libcuda.so.1", "libnvrtc.so.12", "libcublasLt.so.12"];
/// A copy is another library: its driver is not initialized, so that it opens but cannot be used.
const UNUSABLE: &str = "libcublasLt.so.13";

/// Runs the calling test's `body` on the driver, with these variables.
pub fn on_the_driver(variables: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var_os("DFAR_DRIVER_TEST").is_some() {
        return body();
    }
    let test = std::thread::current().name().expect("the test harness names its threads").to_owned();
    let program = std::env::current_exe().expect("it runs");
    let library = program.parent().expect("a folder").join("libdfar_driver.so");
    assert!(library.exists(), "{} should be built with the tests", library.display());
    let folder = tempfile::tempdir().expect("a folder");
    for name in NAMES {
        std::os::unix::fs::symlink(&library, folder.path().join(name)).expect("writable");
    }
    std::fs::copy(&library, folder.path().join(UNUSABLE)).expect("writable");
    let output = Command::new(program)
        .args([&test, "--exact", "--nocapture"])
        .env("DFAR_DRIVER_TEST", "1")
        .env("LD_LIBRARY_PATH", folder.path())
        .env("DFAR_CACHE_DIR", folder.path().join("cache"))
        .envs(variables.iter().copied())
        .output()
        .expect("it starts");
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What tests ask of the driver.
pub struct Control(pub Library);

impl Control {
    pub fn new() -> Control {
        // SAFETY: the driver, as arranged by `on_the_driver`.
        Control(unsafe { Library::new("libcuda.so.1") }.expect("the driver should be found"))
    }

    /// The `nth` call of an entry point from now on returns `result`.
    pub fn fail(&self, entry: &str, nth: u64, result: i32) {
        let name = CString::new(entry).expect("no zero byte");
        // SAFETY: the driver's function of this type; the name outlives the call.
        unsafe {
            let fail: Symbol<unsafe extern "C" fn(*const i8, u64, i32)> =
                self.0.get(b"dfar_driver_fail\0").expect("it has it");
            fail(name.as_ptr().cast(), nth, result);
        }
    }

    /// Forgets planned failures. Returns how many have not happened.
    pub fn forget(&self) -> u64 {
        // SAFETY: the driver's function of this type.
        unsafe {
            let forget: Symbol<unsafe extern "C" fn() -> u64> =
                self.0.get(b"dfar_driver_forget\0").expect("it has it");
            forget()
        }
    }

    /// Calls of an entry point so far.
    pub fn calls(&self, entry: &str) -> u64 {
        let name = CString::new(entry).expect("no zero byte");
        // SAFETY: the driver's function of this type; the name outlives the call.
        unsafe {
            let calls: Symbol<unsafe extern "C" fn(*const i8) -> u64> =
                self.0.get(b"dfar_driver_calls\0").expect("it has it");
            calls(name.as_ptr().cast())
        }
    }

    /// The oldest fault that was not taken. Needs `DFAR_DRIVER_FAULTS=return`.
    pub fn fault(&self) -> Option<String> {
        let mut buffer = vec![0u8; 4096];
        // SAFETY: the driver's function of this type; the buffer has the given size.
        let length = unsafe {
            let fault: Symbol<unsafe extern "C" fn(*mut u8, usize) -> usize> =
                self.0.get(b"dfar_driver_fault\0").expect("it has it");
            fault(buffer.as_mut_ptr(), buffer.len())
        };
        (length > 0).then(|| String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    /// Asserts that the oldest fault contains `text`.
    #[track_caller]
    pub fn assert_fault(&self, text: &str) {
        let fault = self.fault();
        assert!(fault.as_ref().is_some_and(|fault| fault.contains(text)), "{fault:?}, not {text:?}");
    }

    #[track_caller]
    pub fn assert_no_fault(&self) {
        assert_eq!(self.fault(), None);
    }
}
