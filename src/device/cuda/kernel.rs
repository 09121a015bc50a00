//! Kernels and their modules, element types, launches.

use crate::device::Precision;
use std::fmt;

/// Address in device memory; 0 is null.
pub type Pointer = u64;

/// Element type of `q`, `k`, `v`, `o` and their gradients. Kernels accumulate in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32, on the FMA pipes.
    F32,
    /// bfloat16, on the tensor cores.
    Bf16,
    /// IEEE half precision, on the tensor cores.
    F16,
}

impl Element {
    /// All element types.
    pub const ALL: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

    /// Size in bytes.
    pub const fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    /// Name in the `--precision` flag.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }

    /// Name of the C++ type in the kernels.
    pub const fn cuda_name(self) -> &'static str {
        match self {
            Element::F32 => "float",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }
}

impl From<Precision> for Element {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Element::F32,
            Precision::Bf16 => Element::Bf16,
        }
    }
}

/// A Rust type of tensor elements.
pub trait Value: bytemuck::Pod {
    /// The element type of the kernels.
    const ELEMENT: Element;
}
impl Value for f32 {
    const ELEMENT: Element = Element::F32;
}
impl Value for half::bf16 {
    const ELEMENT: Element = Element::Bf16;
}
impl Value for half::f16 {
    const ELEMENT: Element = Element::F16;
}

/// Source of a module: a `.cu` file of `kernels/` with its included headers.
#[derive(Debug)]
pub struct Source {
    /// Path below `kernels/`.
    pub name: &'static str,
    /// FNV-1a hash of all names and texts.
    pub hash: u64,
    /// Source text.
    pub text: &'static str,
    /// Names and texts of the included headers, transitively.
    pub headers: &'static [(&'static str, &'static str)],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Target architecture: a compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

impl Arch {
    /// Oldest supported architecture, the first with `cp.async` and bf16 `mma`.
    pub const OLDEST: Arch = Arch { major: 8, minor: 0 };

    /// Architecture name for NVRTC. 9.0 is `sm_90a`, which enables instructions of Hopper only.
    pub fn name(self) -> String {
        let suffix = if self == (Arch { major: 9, minor: 0 }) { "a" } else { "" };
        format!("sm_{}{}{suffix}", self.major, self.minor)
    }
}

/// Value of a macro.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Define {
    /// An identifier, e.g. a type name.
    Word(&'static str),
    /// A number.
    Number(u32),
}

impl fmt::Display for Define {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Define::Word(word) => f.write_str(word),
            Define::Number(number) => write!(f, "{number}"),
        }
    }
}

/// A module: a `.cu` file of `kernels/` compiled with its macros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    source: &'static str,
    defines: [Option<(&'static str, Define)>; 4],
}

impl Module {
    /// A module without macros.
    pub const fn new(source: &'static str) -> Module {
        Module { source, defines: [None; 4] }
    }

    /// Adds a macro. A module has at most four.
    pub const fn with(mut self, name: &'static str, value: Define) -> Module {
        let mut i = 0;
        while self.defines[i].is_some() {
            i += 1;
        }
        self.defines[i] = Some((name, value));
        self
    }

    /// Value of a macro, if defined.
    pub fn define(&self, name: &str) -> Option<Define> {
        self.defines.iter().flatten().find(|(given, _)| *given == name).map(|(_, value)| *value)
    }

    /// The source of the module.
    ///
    /// # Panics
    /// If `kernels/` does not contain the file.
    pub fn source(&self) -> &'static Source {
        SOURCES.iter().find(|source| source.name == self.source).expect("build.rs embeds every kernel")
    }

    /// File and macros, e.g. `attention/attention.cu DFAR_ELEMENT=bf16 DFAR_HEAD_DIM=16`.
    pub fn name(&self) -> String {
        let defines = self.defines.iter().flatten().map(|(name, value)| format!(" {name}={value}"));
        defines.fold(self.source.to_owned(), |name, define| name + &define)
    }

    /// NVRTC options.
    pub fn options(&self, arch: Arch) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={}", arch.name()), "--std=c++17".to_owned()];
        options.extend(self.defines.iter().flatten().map(|(name, value)| format!("-D{name}={value}")));
        options
    }
}

/// A kernel: its module and entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Module that contains it.
    pub module: Module,
    /// Name of the entry point.
    pub entry: &'static str,
}

/// Grid and block of one kernel launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x and y. A grid with a 0 is not launched.
    pub grid: [u32; 2],
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
}

/// Block size of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Warps; a warp owns [`WARP_ROWS`](super::plan::tile::WARP_ROWS) rows.
    pub warps: usize,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: usize,
}
