//! Compiles every kernel variant with NVRTC, as the library does, and prints registers, spills,
//! shared memory, occupancy and instruction counts. Needs no GPU.
//!
//! ```text
//! kernel-table [--arch ARCH] [--check FILE]
//!                                 compiles all variants, for one architecture (sm_90a) or all
//!                                 three, and prints the table
//! kernel-table --renew FILE KERNEL..
//!                                 prints FILE with new rows for the modules of these kernels
//! kernel-table --compile          compiles without a table: NVRTC's front end checks all
//!                                 variants for all architectures that it supports, and the
//!                                 compiler one variant per source and type for Hopper
//! ```
//!
//! Needs NVRTC on the loader's path, and NVIDIA's `cuobjdump` and `nvdisasm` on PATH; `.ci/kernels`
//! provides them. Fails if a kernel spills or uses local memory, if a 16-bit kernel has no
//! tensor-core instructions, or if the table differs from FILE.

use dfar::attention::{FhaOptions, LabelMask};
use dfar::device::cuda::device::step_kernels;
use dfar::device::cuda::driver::compile::{check_syntax, compile};
use dfar::device::cuda::driver::nvrtc::Nvrtc;
use dfar::device::cuda::kernel::{Arch, Block, Define, Kernel, Module};
use dfar::device::cuda::ops::attention::module;
use dfar::device::cuda::plan::attention::Pass;
use dfar::device::cuda::plan::tile::{HEAD_DIMS, Room, Sharing, Tile, tile};
use dfar::device::cuda::{CudaError, Element};
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::num::NonZero;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Shared memory of a multiprocessor, and its limit per block, in KiB. CUDA reserves 1 KiB per
/// block.
struct Machine {
    arch: Arch,
    shared: usize,
    shared_per_block: usize,
}

static MACHINES: [Machine; 3] = [
    Machine { arch: Arch { major: 8, minor: 0 }, shared: 164, shared_per_block: 163 },
    Machine { arch: Arch { major: 9, minor: 0 }, shared: 228, shared_per_block: 227 },
    Machine { arch: Arch { major: 10, minor: 0 }, shared: 228, shared_per_block: 227 },
];
/// Kernels of target attention with matrix products.
const MULTIPLIES: [&str; 2] = ["target_scores", "target_backward"];
const REGISTERS: usize = 65536;
const WARPS: usize = 64;
const BLOCKS: usize = 32;

/// Resident blocks per multiprocessor. Registers are allocated to warps in units of 256.
fn resident(machine: &Machine, registers: usize, block: Block) -> usize {
    let by_registers = REGISTERS / ((registers * 32).next_multiple_of(256) * block.warps);
    let by_shared = (machine.shared << 10) / (block.shared_bytes + 1024);
    by_registers.min(by_shared).min(WARPS / block.warps).min(BLOCKS)
}

/// Output of an NVIDIA tool.
fn tool(name: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(name).args(arguments).output().map_err(|e| format!("cannot run {name}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{name} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Resource usage and instruction counts of a kernel.
#[derive(Default)]
struct Found {
    registers: usize,
    stack: usize,
    local: usize,
    tensor: usize,
    exponentials: usize,
    wide: usize,
    narrow: usize,
}

fn number(line: &str, field: &str) -> usize {
    let rest = line.split(field).nth(1).unwrap_or("");
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0)
}

/// Resource usage of the kernels of a module, in the order of `entries`.
fn inspect(code: &[u8], entries: &[&str]) -> Result<Vec<Found>, String> {
    let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    std::fs::write(file.path(), code).map_err(|e| e.to_string())?;
    let path = file.path().to_str().expect("temporary files have plain names");
    let usage = tool("cuobjdump", &["--dump-resource-usage", path])?;
    let assembly = tool("cuobjdump", &["-sass", path])?;
    let found = entries.iter().map(|entry| {
        let mut kernel = Found::default();
        let mut lines =
            usage.lines().skip_while(|line| !line.trim().ends_with(&format!("Function {entry}:")));
        let line = lines.nth(1).ok_or_else(|| format!("cuobjdump knows no {entry}"))?;
        kernel.registers = number(line, "REG:");
        kernel.stack = number(line, "STACK:");
        kernel.local = number(line, "LOCAL:");
        let title = format!("Function : {entry}");
        let body = assembly.lines().skip_while(|line| line.trim() != title).skip(1);
        for line in body.take_while(|line| !line.contains("Function : ")) {
            let has = |what: &str| line.contains(what);
            kernel.tensor += usize::from(has("HMMA"));
            kernel.exponentials += usize::from(has("MUFU.EX2"));
            kernel.local += usize::from(has(" LDL") || has(" STL"));
            if has("LDG.") || has("STG.") || has("LDGSTS") {
                *(if has(".128") { &mut kernel.wide } else { &mut kernel.narrow }) += 1;
            }
        }
        Ok(kernel)
    });
    found.collect()
}

/// A module for one machine, and the table rows of its kernels: kernel, element type, width, block.
struct Job {
    machine: &'static Machine,
    module: Module,
    rows: Vec<(Kernel, &'static str, String, Block)>,
}

impl Job {
    fn run(&self) -> Result<Vec<Found>, String> {
        let code = compile(self.module, self.machine.arch).map_err(|e| e.to_string())?;
        inspect(&code, &self.rows.iter().map(|(kernel, ..)| kernel.entry).collect::<Vec<_>>())
    }
}

/// The passes in the table, one per kernel.
fn table_passes(tile: &Tile) -> [Pass; 8] {
    [
        Pass::ForwardShort,
        Pass::ForwardWhole(if tile.forward_short.is_some() { Sharing::Four } else { Sharing::One }),
        Pass::Forward,
        Pass::BackwardWhole(Sharing::One),
        Pass::DqWhole,
        Pass::DkDvWhole,
        Pass::Dq,
        Pass::DkDv,
    ]
}

/// Every module for every machine, in the order of the table.
fn jobs(of: impl Fn(&Machine) -> bool) -> Result<Vec<Job>, String> {
    let mut jobs = vec![];
    for machine in MACHINES.iter().filter(|machine| of(machine)) {
        for (element, head_dim) in Element::ALL.into_iter().flat_map(|e| HEAD_DIMS.map(|d| (e, d))) {
            let options = FhaOptions { label_mask: LabelMask::Feedback, ..FhaOptions::new(2, head_dim) };
            // One streamed sequence, and two that are whole unless the heads are too wide.
            let tile = tile(element, &options, &[20, 160, 4096], Room::of(machine.shared_per_block << 10))
                .map_err(|e| e.to_string())?;
            let rows = table_passes(&tile).into_iter().filter_map(|pass| {
                let block = tile.block(pass)?;
                Some((pass.kernel(element, head_dim), element.name(), head_dim.to_string(), block))
            });
            jobs.push(Job { machine, module: module(element, head_dim), rows: rows.collect() });
        }
        let first = jobs.len();
        for (kernel, block) in step_kernels() {
            let bf16 = kernel.module.define("DFAR_ELEMENT") == Some(Define::Word(Element::Bf16.cuda_name()));
            let element = if bf16 { Element::Bf16 } else { Element::F32 };
            let width = kernel.module.define("DFAR_WIDTH").map_or("-".to_owned(), |width| width.to_string());
            let row = (kernel, element.name(), width, block);
            match jobs[first..].iter_mut().find(|job| job.module == kernel.module) {
                Some(job) => job.rows.push(row),
                None => jobs.push(Job { machine, module: kernel.module, rows: vec![row] }),
            }
        }
    }
    Ok(jobs)
}

/// Calls `work` on each of `items`, with one thread per core. Results are in the order of the
/// items.
fn on_all_cores<T: Sync, R: Send + Sync>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, done) = (AtomicUsize::new(0), items.iter().map(|_| OnceLock::new()).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                loop {
                    let place = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(place) else { break };
                    assert!(done[place].set(work(item)).is_ok(), "each is taken once");
                }
            });
        }
    });
    done.into_iter().map(|result| result.into_inner().expect("all were taken")).collect()
}

/// The table for one architecture or all, and what is wrong with the kernels.
fn table(arch: Option<&str>, only: &[&str]) -> Result<(String, Vec<String>), String> {
    let (mut text, mut faults) = (String::new(), vec![]);
    let heading = "Attention with H = 2 and labels (shared memory grows with H); blocks of long sequences, of whole ones of 20 tokens (dq_whole, dk_dv_whole, and forward_whole beside forward_short: 160). Target attention with hidden layers of 80 and 40. Occupancy is resident warps of 64.";
    writeln!(text, "{heading}\nGlobal accesses: instructions of 16 bytes, and narrower ones (order, feedback, lse, delta).\n")
        .expect("strings can be written");
    writeln!(
        text,
        "{:7} {:5} {:>3}  {:25} {:>9} {:>5} {:>6} {:>7} {:>7} {:>9} {:>5} {:>4} {:>9}",
        "arch",
        "type",
        "d",
        "kernel",
        "registers",
        "spill",
        "shared",
        "threads",
        "blocks",
        "occupancy",
        "mma",
        "ex2",
        "16 B/less"
    )
    .expect("strings can be written");
    let mut jobs = jobs(|machine| arch.is_none_or(|arch| machine.arch.name() == arch))?;
    jobs.retain(|job| only.is_empty() || job.rows.iter().any(|(kernel, ..)| only.contains(&kernel.entry)));
    if jobs.is_empty() {
        return Err(format!("the table does not have {}{}", arch.unwrap_or_default(), only.join(", ")));
    }
    for (job, found) in jobs.iter().zip(on_all_cores(&jobs, Job::run)) {
        let arch = job.machine.arch.name();
        for ((kernel, element, width, block), found) in job.rows.iter().zip(found?) {
            let blocks = resident(job.machine, found.registers, *block);
            let occupancy = blocks * block.warps * 100 / WARPS;
            writeln!(
                text,
                "{arch:7} {element:5} {width:>3}  {:25} {:>9} {:>5} {:>6} {:>7} {blocks:>7} {occupancy:>8}% {:>5} {:>4} {:>6}/{}",
                kernel.entry,
                found.registers,
                found.stack + found.local,
                block.shared_bytes,
                block.warps * 32,
                found.tensor,
                found.exponentials,
                found.wide,
                found.narrow,
            )
            .expect("strings can be written");
            let name = format!("{arch} {} {}", kernel.module.name(), kernel.entry);
            if found.stack + found.local > 0 {
                faults.push(format!("{name}: spills or local memory"));
            }
            let multiplies = kernel.entry.starts_with("attention") || MULTIPLIES.contains(&kernel.entry);
            if *element != Element::F32.name() && multiplies && found.tensor == 0 {
                faults.push(format!("{name}: no tensor-core instructions"));
            }
            if blocks == 0 {
                faults.push(format!("{name}: does not fit the multiprocessor"));
            }
        }
    }
    Ok((text, faults))
}

/// Checks all modules with NVRTC's front end and compiles some: returns both numbers. The front
/// ends of NVRTC versions differ; the assembler gets the same few instructions for all variants of
/// a source.
fn compile_all() -> Result<[usize; 2], CudaError> {
    // CUDA supports Blackwell from 12.8 on.
    let known = |arch: Arch| arch.major < 10 || Nvrtc::get().is_ok_and(|nvrtc| nvrtc.version() >= (12, 8));
    let attention = Element::ALL.into_iter().flat_map(|e| HEAD_DIMS.map(|d| module(e, d)));
    let others: HashSet<Module> = step_kernels().into_iter().map(|(kernel, _)| kernel.module).collect();
    let modules: Vec<Module> = attention.chain(others).collect();
    let read: Vec<(Module, Arch)> = MACHINES
        .iter()
        .filter(|machine| known(machine.arch))
        .flat_map(|machine| modules.iter().map(|&module| (module, machine.arch)))
        .collect();
    let one_variant = |module: &&Module| {
        let is = |name, size| module.define(name).is_none_or(|found| found == Define::Number(size));
        is("DFAR_HEAD_DIM", 16) && is("DFAR_WIDTH", 32)
    };
    let compiled: Vec<&Module> = modules.iter().filter(one_variant).collect();
    on_all_cores(&read, |&(module, arch)| check_syntax(module, arch))
        .into_iter()
        .collect::<Result<(), _>>()?;
    let hopper = Arch { major: 9, minor: 0 };
    on_all_cores(&compiled, |&&module| compile(module, hopper).map(|_| ()))
        .into_iter()
        .collect::<Result<(), _>>()?;
    Ok([read.len(), compiled.len()])
}

/// The table `old` with the rows of `new`.
fn renew(old: &str, new: &str) -> String {
    // Architecture, type, width, kernel.
    let key = |line: &str| line.split_whitespace().take(4).map(str::to_owned).collect::<Vec<_>>();
    let rows: HashMap<_, _> =
        new.lines().filter(|line| line.starts_with("sm_")).map(|line| (key(line), line)).collect();
    old.lines().map(|line| format!("{}\n", rows.get(&key(line)).unwrap_or(&line))).collect()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--compile"] {
        return match compile_all() {
            Ok([read, compiled]) => {
                println!("NVRTC checked {read} modules and compiled {compiled} of them");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (arch, check, renewed, only) = match arguments[..] {
        [] => (None, None, None, &[][..]),
        ["--arch", arch] => (Some(arch), None, None, &[][..]),
        ["--check", file] => (None, Some(file), None, &[][..]),
        ["--arch", arch, "--check", file] => (Some(arch), Some(file), None, &[][..]),
        ["--renew", file, ref only @ ..] if !only.is_empty() => (None, None, Some(file), only),
        _ => {
            eprintln!("usage: kernel-table [--arch ARCH] [--check FILE] | --renew FILE KERNEL.. | --compile");
            return ExitCode::from(2);
        }
    };
    let (mut text, mut faults) = match table(arch, only) {
        Ok(table) => table,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(file) = renewed {
        text = renew(&std::fs::read_to_string(file).unwrap_or_default(), &text);
    }
    print!("{text}");
    if let Some(file) = check {
        let kept = std::fs::read_to_string(file).unwrap_or_default();
        let compiled =
            |line: &&str| !line.starts_with("sm_") || arch.is_none_or(|arch| line.starts_with(arch));
        let kept: Vec<&str> = kept.lines().filter(compiled).collect();
        for (kept, now) in kept.iter().zip(text.lines()).filter(|(kept, now)| *kept != now) {
            faults.push(format!("differs from {file}:\n- {kept}\n+ {now}"));
        }
        if kept.len() != text.lines().count() {
            faults.push(format!("{file} has a different number of lines"));
        }
    }
    faults.iter().for_each(|fault| eprintln!("{fault}"));
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
