//! Names shared by all modules here: element types, kernels and their modules, launches.

use std::fmt;

/// Address in device memory; 0 is null.
pub type Pointer = u64;

/// Element type of `q`, `k`, `v`, `o` and their gradients. Accumulation is always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Exact path, on the FMA pipes.
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

    /// The name used by `--precision`.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }

    /// The type name in the kernels.
    pub const fn cuda_name(self) -> &'static str {
        match self {
            Element::F32 => "float",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }
}

/// An element type of tensors.
pub trait Value: bytemuck::Pod {
    /// Its [`Element`].
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

/// A `.cu` of `kernels/` with its included headers.
#[derive(Debug)]
pub struct Source {
    /// Path below `kernels/`.
    pub name: &'static str,
    /// FNV-1a of names and texts.
    pub hash: u64,
    /// Source text.
    pub text: &'static str,
    /// Names and texts of all included headers, transitively.
    pub headers: &'static [(&'static str, &'static str)],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Target architecture of a module: a compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

impl Arch {
    /// Oldest supported architecture: the first with `cp.async` and bf16 `mma`.
    pub const OLDEST: Arch = Arch { major: 8, minor: 0 };

    /// NVRTC name. 9.0 is `sm_90a`, which allows Hopper-only instructions.
    pub fn name(self) -> String {
        let suffix = if self == (Arch { major: 9, minor: 0 }) { "a" } else { "" };
        format!("sm_{}{}{suffix}", self.major, self.minor)
    }
}

/// Value of a macro of a module.
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

/// A compilation unit: a `.cu` of `kernels/` with its macros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    source: &'static str,
    defines: [Option<(&'static str, Define)>; 4],
}

impl Module {
    /// A `.cu` without macros.
    pub const fn new(source: &'static str) -> Module {
        Module { source, defines: [None; 4] }
    }

    /// Adds a macro; at most four.
    pub const fn with(mut self, name: &'static str, value: Define) -> Module {
        let mut i = 0;
        while self.defines[i].is_some() {
            i += 1;
        }
        self.defines[i] = Some((name, value));
        self
    }

    /// The value of a macro, if defined.
    pub fn define(&self, name: &str) -> Option<Define> {
        self.defines.iter().flatten().find(|(given, _)| *given == name).map(|(_, value)| *value)
    }

    /// Its source.
    ///
    /// # Panics
    /// If `kernels/` has no such file.
    pub fn source(&self) -> &'static Source {
        SOURCES.iter().find(|source| source.name == self.source).expect("build.rs embeds every kernel")
    }

    /// File and macros in one line, e.g. `attention/attention.cu DFAR_ELEMENT=bf16 DFAR_HEAD_DIM=16`.
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
    /// Module.
    pub module: Module,
    /// Entry point.
    pub entry: &'static str,
}

/// Grid and block of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x and y. If one is 0, nothing is launched.
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
