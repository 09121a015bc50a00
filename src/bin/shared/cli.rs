//! Shared by the binaries: printing results, and exit codes of errors.

use dfar::train::TrainError;
use dfar::{Error, Result};
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Ends a binary: prints the error to stderr and returns its exit code ([`Error::exit_code`]).
///
/// A closed pipe on stdout (`dfar-data info x.dfar | head -1`) is not an error: no message, exit
/// code 0.
pub fn exit(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&error, error.exit_code()),
    }
}

/// Prints the error to stderr and returns `code`.
pub fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    note(format_args!("error: {error}"));
    ExitCode::from(code)
}

/// Prints a line to stderr. Control characters, which values from a log may contain, do not reach
/// the terminal. Unlike `eprintln!`, it does not panic if stderr is closed, which cannot be reported
/// anywhere.
pub fn note(line: impl Display) {
    let mut text = String::new();
    for character in line.to_string().chars() {
        match character {
            '\n' | '\t' => text.push(character),
            _ if character.is_control() => text.extend(character.escape_default()),
            _ => text.push(character),
        }
    }
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes results to stdout. Unlike `print!`, it does not panic if the pipe is closed.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::io("write", "<stdout>"))
}

/// Most threads: more than a machine has, and few enough to start at once.
const MOST_THREADS: usize = 4096;

/// Starts the threads of the process (0: one per core). Call it before any parallel computation,
/// which would otherwise start threads with other settings, and panic if the system refuses them.
///
/// # Errors
/// Too many threads, and an instruction set in `DFAR_SIMD` that the processor does not have.
pub fn start_threads(threads: usize) -> Result<()> {
    dfar::simd::check_selected().map_err(|reason| TrainError::Usage { argument: "DFAR_SIMD", reason })?;
    if threads > MOST_THREADS {
        let reason = format!("{threads} is above {MOST_THREADS}");
        return Err(TrainError::Usage { argument: "--threads", reason }.into());
    }
    Ok(dfar::threads::global_pool(threads)?)
}
