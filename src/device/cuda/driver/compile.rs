//! Compiles kernels with NVRTC, and caches the machine code on disk.
//!
//! The key of a cache entry consists of source, options, architecture and NVRTC version; its hash
//! names the file. The file holds the full key, a checksum, the code length and the code. It is
//! written under a temporary name and renamed, so concurrent processes find a complete entry or
//! none. A corrupt entry counts as missing and is replaced.

use super::nvrtc::Nvrtc;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Arch, Module};
use std::path::{Path, PathBuf};

/// Compiles a module, bypassing the cache.
///
/// # Errors
/// [`CudaError::NoNvrtc`], [`CudaError::OldNvrtc`], [`CudaError::Compile`].
pub fn compile(module: Module, arch: Arch) -> Result<Vec<u8>, CudaError> {
    compile_with(module, arch, &[])
}

/// Checks a module with NVRTC's front end only: syntax, types, constants, instantiated templates.
/// Fifty times faster than [`compile`], but generates no machine code.
///
/// # Errors
/// As [`compile`].
pub fn check_syntax(module: Module, arch: Arch) -> Result<(), CudaError> {
    compile_with(module, arch, &["--fdevice-syntax-only"]).map(|_| ())
}

fn compile_with(module: Module, arch: Arch, more: &[&str]) -> Result<Vec<u8>, CudaError> {
    let nvrtc = Nvrtc::get()?;
    let (source, mut options) = (module.source(), module.options(arch));
    options.extend(more.iter().map(|&option| option.to_owned()));
    nvrtc.compile(source.name, source.text, source.headers, &options).map_err(|refused| CudaError::Compile {
        kernel: source.name,
        arch: arch.name(),
        options,
        error: refused.error,
        log: refused.log,
    })
}

/// The disk cache of compiled modules.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

const MAGIC: &[u8; 8] = b"DFARCUB1";

impl Cache {
    /// The cache in `$DFAR_CACHE_DIR`, else `$XDG_CACHE_HOME/dfar`, else `~/.cache/dfar`. An empty
    /// `$DFAR_CACHE_DIR`, or no variable, turns caching off.
    pub fn from_environment() -> Cache {
        let variable = |name| std::env::var_os(name);
        let folder = match variable("DFAR_CACHE_DIR") {
            Some(folder) if folder.is_empty() => None,
            Some(folder) => Some(PathBuf::from(folder)),
            None => variable("XDG_CACHE_HOME")
                .filter(|folder| !folder.is_empty())
                .map(PathBuf::from)
                .or_else(|| {
                    variable("HOME")
                        .or_else(|| variable("LOCALAPPDATA"))
                        .map(|home| Path::new(&home).join(".cache"))
                })
                .map(|folder| folder.join("dfar")),
        };
        Cache { folder }
    }

    /// A cache in `folder`.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Cache {
        Cache { folder: Some(folder.into()) }
    }

    /// Key of an entry: everything that determines the machine code.
    fn key(module: Module, arch: Arch, nvrtc: (i32, i32)) -> String {
        let source = module.source();
        let options = module.options(arch).join(" ");
        format!("{} {:016x}; {options}; nvrtc {}.{}", source.name, source.hash, nvrtc.0, nvrtc.1)
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Some(self.folder.as_ref()?.join(format!("{hash:016x}.cubin")))
    }

    /// Machine code of a module: cached, or compiled and added to the cache. Failing to write the
    /// cache is no error: the next process compiles again.
    ///
    /// # Errors
    /// As [`compile`].
    pub fn load(&self, module: Module, arch: Arch) -> Result<Vec<u8>, CudaError> {
        let key = Self::key(module, arch, Nvrtc::get()?.version());
        if let Some(code) = self.read(&key) {
            return Ok(code);
        }
        let code = compile(module, arch)?;
        let _ = self.write(&key, &code);
        Ok(code)
    }

    fn read(&self, key: &str) -> Option<Vec<u8>> {
        let entry = std::fs::read(self.path(key)?).ok()?;
        let rest = entry.strip_prefix(MAGIC)?;
        let (key_bytes, rest) = rest.split_first_chunk::<4>()?;
        let (stored_key, rest) = rest.split_at_checked(u32::from_le_bytes(*key_bytes) as usize)?;
        let (checksum, rest) = rest.split_first_chunk::<4>()?;
        let (length, code) = rest.split_first_chunk::<8>()?;
        let whole = stored_key == key.as_bytes()
            && code.len() as u64 == u64::from_le_bytes(*length)
            && crc32fast::hash(code) == u32::from_le_bytes(*checksum);
        whole.then(|| code.to_vec())
    }

    fn write(&self, key: &str, code: &[u8]) -> std::io::Result<()> {
        use std::io::Write;
        let Some(path) = self.path(key) else { return Ok(()) };
        let folder = path.parent().expect("a file in a folder has one");
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(MAGIC)?;
        file.write_all(&(key.len() as u32).to_le_bytes())?;
        file.write_all(key.as_bytes())?;
        file.write_all(&crc32fast::hash(code).to_le_bytes())?;
        file.write_all(&(code.len() as u64).to_le_bytes())?;
        file.write_all(code)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::kernel::Define;

    const MODULE: Module = Module::new("attention/attention.cu")
        .with("DFAR_ELEMENT", Define::Word("bf16"))
        .with("DFAR_HEAD_DIM", Define::Number(16));

    fn key() -> String {
        Cache::key(MODULE, Arch { major: 9, minor: 0 }, (12, 4))
    }

    #[test]
    fn sources_carry_their_includes() {
        let source = MODULE.source();
        let headers: Vec<&str> = source.headers.iter().map(|(name, _)| *name).collect();
        assert_eq!(
            headers,
            [
                "attention/backward.cuh",
                "attention/backward_whole.cuh",
                "attention/forward.cuh",
                "attention/forward_short.cuh",
                "attention/forward_tile.cuh",
                "attention/forward_whole.cuh",
                "attention/params.cuh",
                "attention/rows.cuh",
                "attention/seqlen.cuh",
                "attention/warp_product.cuh",
                "attention/whole.cuh",
                "carve.cuh",
                "online_softmax.cuh",
                "primitives.cuh"
            ]
        );
        assert!(source.text.contains("KERNEL(attention_forward,") && source.hash != 0);
    }

    #[test]
    fn keys_differ_with_everything_that_determines_the_code() {
        let (hopper, ampere) = (Arch { major: 9, minor: 0 }, Arch::OLDEST);
        let keys = [
            key(),
            Cache::key(MODULE, ampere, (12, 4)),
            Cache::key(MODULE, hopper, (13, 0)),
            Cache::key(MODULE.with("DFAR_MORE", Define::Number(1)), hopper, (12, 4)),
            Cache::key(MODULE.with("DFAR_MORE", Define::Number(2)), hopper, (12, 4)),
            Cache::key(Module::new("step/rows.cu"), hopper, (12, 4)),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b), "{a}");
        }
        assert_eq!([hopper.name(), ampere.name()], ["sm_90a", "sm_80"]);
        assert_eq!(MODULE.name(), "attention/attention.cu DFAR_ELEMENT=bf16 DFAR_HEAD_DIM=16");
    }

    #[test]
    fn an_entry_reads_back_as_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::in_folder(folder.path().join("new"));
        assert_eq!(cache.read(&key()), None);
        for code in [&b"code"[..], b"", &[7; 100_000]] {
            cache.write(&key(), code).expect("it should be writable");
            assert_eq!(cache.read(&key()).as_deref(), Some(code));
        }
        let files = std::fs::read_dir(folder.path().join("new")).expect("it was made").count();
        assert_eq!(files, 1, "no temporary file should be left");
    }

    #[test]
    fn a_corrupt_entry_counts_as_missing() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::in_folder(folder.path());
        cache.write(&key(), b"machine code").expect("it should be writable");
        let path = cache.path(&key()).expect("it has a folder");
        let whole = std::fs::read(&path).expect("it was written");
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).expect("writable");
            assert_eq!(cache.read(&key()), None, "cut to {length} bytes");
        }
        for index in 0..whole.len() {
            let mut bad = whole.clone();
            bad[index] ^= 0x10;
            std::fs::write(&path, &bad).expect("writable");
            assert_eq!(cache.read(&key()), None, "byte {index} changed");
        }
        std::fs::write(&path, [&whole[..], b"more"].concat()).expect("writable");
        assert_eq!(cache.read(&key()), None);
    }

    #[test]
    fn concurrent_writers_leave_a_complete_entry() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::in_folder(folder.path());
        let code = |i: u8| vec![i; 50_000];
        std::thread::scope(|scope| {
            for i in 0..4 {
                let cache = &cache;
                scope.spawn(move || (0..20).for_each(|_| cache.write(&key(), &code(i)).expect("writable")));
            }
            for _ in 0..200 {
                if let Some(found) = cache.read(&key()) {
                    assert!((0..4).any(|i| found == code(i)));
                }
            }
        });
    }

    #[test]
    fn an_unwritable_cache_reads_as_empty() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let cache = Cache::in_folder(file.path().join("below a file"));
        assert!(cache.write(&key(), b"code").is_err());
        assert_eq!(cache.read(&key()), None);
        assert_eq!((Cache { folder: None }).read(&key()), None);
    }
}
