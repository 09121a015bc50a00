//! Names that every room shares: element types, a kernel and its module, a launch.

use std::fmt;

/// Address in device memory; 0 is null.
pub type Pointer = u64;

/// Type of `q`, `k`, `v`, `o` and their gradients. Accumulation is in f32 always.
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
    /// Every one.
    pub const ALL: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

    /// Bytes of one value.
    pub const fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    /// Its name, as in `--precision`.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }

    /// Its name in the kernels.
    pub const fn cuda_name(self) -> &'static str {
        match self {
            Element::F32 => "float",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }
}

/// A type tensors can have.
pub trait Value: bytemuck::Pod {
    /// Which one.
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

/// One `.cu` of `kernels/`, with all it includes.
#[derive(Debug)]
pub struct Source {
    /// File name.
    pub name: &'static str,
    /// FNV-1a of names and texts.
    pub hash: u64,
    /// Its text.
    pub text: &'static str,
    /// Names and texts of the headers, the closure of its includes.
    pub headers: &'static [(&'static str, &'static str)],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Machine a module is compiled for: a compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// Major version.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

impl Arch {
    /// The first with everything the kernels use (`cp.async`, bf16 `mma`).
    pub const OLDEST: Arch = Arch { major: 8, minor: 0 };

    /// As NVRTC wants it. Code for 9.0 may use what only Hopper has.
    pub fn name(self) -> String {
        let suffix = if self == (Arch { major: 9, minor: 0 }) { "a" } else { "" };
        format!("sm_{}{}{suffix}", self.major, self.minor)
    }
}

/// Value of a macro that a module is compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Define {
    /// E.g. the name of a type.
    Word(&'static str),
    /// A size.
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

/// What is compiled: a `.cu` of `kernels/`, with macros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    source: &'static str,
    defines: [Option<(&'static str, Define)>; 4],
}

impl Module {
    /// A file of `kernels/` without macros.
    pub const fn new(source: &'static str) -> Module {
        Module { source, defines: [None; 4] }
    }

    /// With a macro more; there is room for four.
    pub const fn with(mut self, name: &'static str, value: Define) -> Module {
        let mut i = 0;
        while self.defines[i].is_some() {
            i += 1;
        }
        self.defines[i] = Some((name, value));
        self
    }

    /// What a macro stands for, if it is given.
    pub fn define(&self, name: &str) -> Option<Define> {
        self.defines.iter().flatten().find(|(given, _)| *given == name).map(|(_, value)| *value)
    }

    /// The source it is compiled from.
    ///
    /// # Panics
    /// If `kernels/` has no such file.
    pub fn source(&self) -> &'static Source {
        SOURCES.iter().find(|source| source.name == self.source).expect("build.rs embeds every kernel")
    }

    /// File and macros in one line, e.g. `attention.cu DFAR_ELEMENT=bf16 DFAR_HEAD_DIM=16`.
    pub fn name(&self) -> String {
        let defines = self.defines.iter().flatten().map(|(name, value)| format!(" {name}={value}"));
        defines.fold(self.source.to_owned(), |name, define| name + &define)
    }

    /// Options of the compiler.
    pub fn options(&self, arch: Arch) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={}", arch.name()), "--std=c++17".to_owned()];
        options.extend(self.defines.iter().flatten().map(|(name, value)| format!("-D{name}={value}")));
        options
    }
}

/// What a kernel is called: the module it is compiled in, and its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Source and macros.
    pub module: Module,
    /// Name.
    pub entry: &'static str,
}

/// Grid and block of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x and y. Nothing is to be launched when one is 0.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// One kernel's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Warps; a warp owns [`WARP_ROWS`](super::plan::tile::WARP_ROWS) rows.
    pub warps: usize,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: usize,
}
