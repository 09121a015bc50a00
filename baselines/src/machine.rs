//! The machine that a run was computed on.

use serde::Serialize;

/// A machine, as far as the system tells.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub processor: Option<String>,
    /// Logical processors that the process may use.
    pub cores: usize,
    /// Memory in GiB.
    pub memory_gib: Option<f64>,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// This machine.
    pub fn here() -> Self {
        let field = |file: &str, name: &str| {
            let text = std::fs::read_to_string(file).ok()?;
            let (_, value) = text.lines().find(|line| line.starts_with(name))?.split_once(':')?;
            Some(value.trim().to_owned())
        };
        let memory = field("/proc/meminfo", "MemTotal");
        let kib = memory.and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
        Self {
            processor: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: kib.map(|kib| (kib / (1 << 20) as f64 * 10.0).round() / 10.0),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}
