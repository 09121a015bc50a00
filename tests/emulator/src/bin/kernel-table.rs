//! Compiles every kernel variant through NVRTC, as the library does, and prints what it costs. Needs no GPU.
//!
//!     kernel-table [--check FILE]
//!     kernel-table --compile          only whether everything compiles, for what this NVRTC knows
//!
//! Needs NVRTC on the loader's path and NVIDIA's `cuobjdump` and `nvdisasm` on PATH; `.ci/kernels` provides them.
//! Fails on spills, local memory, a 16-bit kernel without tensor-core instructions, or a difference from FILE.

use dfar::attention::{FhaOptions, LabelMask};
use dfar::device::cuda::CudaError;
use dfar::device::cuda::compile::{Arch, Define, compile};
use dfar::device::cuda::gpu::step_kernels;
use dfar::device::cuda::nvrtc::Nvrtc;
use dfar::device::cuda::plan::{Pass, module};
use dfar::device::cuda::runtime::Kernel;
use dfar::device::cuda::tile::{Block, Element, HEAD_DIMS, tile};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::process::{Command, ExitCode};

/// A multiprocessor: shared memory in all, and what one block may have of it, in KiB; 1 KiB of each block is the system's.
struct Machine {
    arch: Arch,
    shared: usize,
    shared_per_block: usize,
}

const MACHINES: [Machine; 3] = [
    Machine { arch: Arch { major: 8, minor: 0 }, shared: 164, shared_per_block: 163 },
    Machine { arch: Arch { major: 9, minor: 0 }, shared: 228, shared_per_block: 227 },
    Machine { arch: Arch { major: 10, minor: 0 }, shared: 228, shared_per_block: 227 },
];
/// Kernels of target attention that multiply matrices.
const MULTIPLIES: [&str; 2] = ["target_scores", "target_backward"];
const REGISTERS: usize = 65536;
const WARPS: usize = 64;
const BLOCKS: usize = 32;

/// Blocks that fit a multiprocessor at once. Registers are given to warps in units of 256.
fn resident(machine: &Machine, registers: usize, block: Block) -> usize {
    let by_registers = REGISTERS / ((registers * 32).next_multiple_of(256) * block.warps);
    let by_shared = (machine.shared << 10) / (block.shared_bytes + 1024);
    by_registers.min(by_shared).min(WARPS / block.warps).min(BLOCKS)
}

/// Output of one of NVIDIA's tools.
fn tool(name: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(name).args(arguments).output().map_err(|e| format!("cannot run {name}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{name} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What the tools say about one kernel.
#[derive(Default, Clone)]
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

fn inspect(code: &[u8], entry: &str) -> Result<Found, String> {
    let file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    std::fs::write(file.path(), code).map_err(|e| e.to_string())?;
    let path = file.path().to_str().expect("temporary files have plain names");
    let mut kernel = Found::default();
    let usage = tool("cuobjdump", &["--dump-resource-usage", path])?;
    let mut lines = usage.lines().skip_while(|line| !line.trim().ends_with(&format!("Function {entry}:")));
    let line = lines.nth(1).ok_or_else(|| format!("cuobjdump knows no {entry}"))?;
    kernel.registers = number(line, "REG:");
    kernel.stack = number(line, "STACK:");
    kernel.local = number(line, "LOCAL:");
    let assembly = tool("cuobjdump", &["-sass", "-fun", entry, path])?;
    for line in assembly.lines() {
        let has = |what: &str| line.contains(what);
        kernel.tensor += usize::from(has("HMMA"));
        kernel.exponentials += usize::from(has("MUFU.EX2"));
        kernel.local += usize::from(has(" LDL") || has(" STL"));
        if has("LDG.") || has("STG.") || has("LDGSTS") {
            *(if has(".128") { &mut kernel.wide } else { &mut kernel.narrow }) += 1;
        }
    }
    Ok(kernel)
}

fn table() -> Result<(String, Vec<String>), String> {
    let (mut text, mut faults) = (String::new(), vec![]);
    let heading = "Attention with H = 2 and labels (shared memory grows with H); blocks of long sequences, and of whole ones of 64 tokens. Target attention with hidden layers of 80 and 40. Occupancy is resident warps of 64.";
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
    let mut add = |machine: &Machine, code: &[u8], kernel: Kernel, types: (&str, String), block: Block| {
        let found = inspect(code, kernel.entry)?;
        let blocks = resident(machine, found.registers, block);
        let arch = machine.arch.name();
        let occupancy = blocks * block.warps * 100 / WARPS;
        writeln!(
            text,
            "{arch:7} {:5} {:>3}  {:25} {:>9} {:>5} {:>6} {:>7} {blocks:>7} {occupancy:>8}% {:>5} {:>4} {:>6}/{}",
            types.0,
            types.1,
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
        if types.0 != Element::F32.name() && multiplies && found.tensor == 0 {
            faults.push(format!("{name}: no tensor-core instructions"));
        }
        if blocks == 0 {
            faults.push(format!("{name}: does not fit the multiprocessor"));
        }
        Ok::<(), String>(())
    };
    for machine in &MACHINES {
        for element in Element::ALL {
            for head_dim in HEAD_DIMS {
                let code = compile(module(element, head_dim), machine.arch).map_err(|e| e.to_string())?;
                let options = FhaOptions { label_mask: LabelMask::Feedback, ..FhaOptions::new(2, head_dim) };
                // A long sequence, and the longest of each direction that is taken whole.
                let lengths: Vec<usize> = (1..=64).chain([4096]).collect();
                let tile = tile(element, &options, &lengths, machine.shared_per_block << 10)
                    .map_err(|e| e.to_string())?;
                for pass in Pass::ALL {
                    let Some(block) = tile.block(pass) else { continue }; // too wide to be loaded whole
                    let types = (element.name(), head_dim.to_string());
                    add(machine, &code, pass.kernel(element, head_dim), types, block)?;
                }
            }
        }
        let mut compiled = HashMap::new();
        for (kernel, block) in step_kernels() {
            let code = match compiled.entry(kernel.module) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    entry.insert(compile(kernel.module, machine.arch).map_err(|e| e.to_string())?)
                }
            };
            let bf16 = kernel.module.define("DFAR_ELEMENT") == Some(Define::Word(Element::Bf16.cuda_name()));
            let element = if bf16 { Element::Bf16 } else { Element::F32 };
            let width = kernel.module.define("DFAR_WIDTH").map_or("-".to_owned(), |width| width.to_string());
            add(machine, code, kernel, (element.name(), width), block)?;
        }
    }
    Ok((text, faults))
}

/// Compiles every variant for the machines that this NVRTC knows; the number of modules.
fn compile_all() -> Result<usize, CudaError> {
    // Blackwell came with CUDA 12.8.
    let known = |arch: Arch| arch.major < 10 || Nvrtc::get().is_ok_and(|nvrtc| nvrtc.version() >= (12, 8));
    let mut count = 0;
    for machine in MACHINES.iter().filter(|machine| known(machine.arch)) {
        for (element, head_dim) in Element::ALL.into_iter().flat_map(|e| HEAD_DIMS.map(|d| (e, d))) {
            compile(module(element, head_dim), machine.arch)?;
            count += 1;
        }
        for module in step_kernels().into_iter().map(|(kernel, _)| kernel.module).collect::<HashSet<_>>() {
            compile(module, machine.arch)?;
            count += 1;
        }
    }
    Ok(count)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--compile"] {
        return match compile_all() {
            Ok(count) => {
                println!("{count} modules compile");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let (text, mut faults) = match table() {
        Ok(table) => table,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::FAILURE;
        }
    };
    print!("{text}");
    if let [flag, file] = &arguments[..] {
        if flag != "--check" {
            eprintln!("usage: kernel-table [--check FILE]");
            return ExitCode::from(2);
        }
        let kept = std::fs::read_to_string(file).unwrap_or_default();
        for (kept, now) in kept.lines().zip(text.lines()).filter(|(kept, now)| kept != now) {
            faults.push(format!("differs from {file}:\n- {kept}\n+ {now}"));
        }
        if kept.lines().count() != text.lines().count() {
            faults.push(format!("{file} has another number of lines"));
        }
    }
    faults.iter().for_each(|fault| eprintln!("{fault}"));
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
