//! Tests that cannot run on this machine say so.

use std::fmt::Display;
use std::io::Write;

/// Prints why the test of this thread is skipped, all of it or the rest.
pub fn skip(reason: impl Display) {
    let thread = std::thread::current();
    // Not `eprintln!`: the test harness hides its output if the test passes.
    let _ = writeln!(std::io::stderr(), "{}: skipped: {reason}", thread.name().unwrap_or("a test"));
}
