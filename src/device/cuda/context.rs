//! A GPU in use: its context and stream, its limits, the modules compiled for it, its memory.

use super::compile::{Arch, Cache, Variant};
use super::plan::Pass;
use super::{CudaError, launch};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, sys::CUdevice_attribute};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels of one variant, in the order of [`Pass::ALL`].
type Kernels = Arc<[CudaFunction; Pass::ALL.len()]>;

/// One GPU. All work goes to one stream, so it happens in the order it was asked for.
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    arch: Arch,
    shared_limit: usize,
    cache: Cache,
    modules: Mutex<HashMap<Variant, Kernels>>,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Cuda").field("name", &self.name).field("arch", &self.arch).finish_non_exhaustive()
    }
}

/// How many GPUs the driver shows.
///
/// # Errors
/// [`CudaError::NoDriver`] where there is none, and what the driver reports.
pub fn device_count() -> Result<usize, CudaError> {
    if !launch::driver_is_present() {
        return Err(CudaError::NoDriver);
    }
    let count =
        CudaContext::device_count().map_err(|e| CudaError::driver("initialising the driver", e, 0))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl Cuda {
    /// Opens GPU `ordinal`, compiling into the cache that the environment names (see [`Cache::from_environment`]).
    ///
    /// # Errors
    /// No driver, no such GPU, or one older than [`Arch::OLDEST`].
    pub fn new(ordinal: usize) -> Result<Cuda, CudaError> {
        Self::with_cache(ordinal, Cache::from_environment())
    }

    /// Opens GPU `ordinal` with a cache of the caller's choice.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_cache(ordinal: usize, cache: Cache) -> Result<Cuda, CudaError> {
        let found = device_count()?;
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let failed = |action| move |error| CudaError::driver(action, error, 0);
        let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("asking for the device's name"))?;
        let attribute =
            |attribute| context.attribute(attribute).map_err(failed("asking for the device's limits"));
        let (major, minor) =
            context.compute_capability().map_err(failed("asking for the device's version"))?;
        let arch = Arch { major: major as u32, minor: minor as u32 };
        if arch < Arch::OLDEST {
            return Err(CudaError::OldDevice { name, arch });
        }
        let shared_limit =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        launch::keep_freed_memory(&context).map_err(failed("setting up the memory pool"))?;
        let stream = context.default_stream();
        Ok(Cuda { context, stream, name, arch, shared_limit, cache, modules: Mutex::default() })
    }

    /// Its name, as the driver has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Bytes of shared memory it gives a block.
    pub fn shared_limit(&self) -> usize {
        self.shared_limit
    }

    /// The stream everything runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// What went wrong on the device since the last call.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().map_err(|error| CudaError::driver("finishing the work given", error, 0))
    }

    /// A copy of `host` on the device.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn upload<T: DeviceRepr>(&self, host: &[T]) -> Result<CudaSlice<T>, CudaError> {
        let mut buffer = self.unwritten(host.len())?;
        if !host.is_empty() {
            let failed = |error| CudaError::driver("copying to the device", error, 0);
            self.stream.memcpy_htod(host, &mut buffer).map_err(failed)?;
        }
        Ok(buffer)
    }

    /// Copies a buffer into as many values of `host`.
    ///
    /// # Errors
    /// What the driver reports, including failures of kernels launched before.
    ///
    /// # Panics
    /// If the buffer holds fewer values.
    pub fn download<T: DeviceRepr>(&self, buffer: &CudaSlice<T>, host: &mut [T]) -> Result<(), CudaError> {
        if host.is_empty() {
            return Ok(());
        }
        let failed = |error| CudaError::driver("copying from the device", error, 0);
        self.stream.memcpy_dtoh(&buffer.slice(..host.len()), host).map_err(failed)?;
        self.synchronize()
    }

    /// Room for `len` values (one, if 0), content unspecified.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn unwritten<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>, CudaError> {
        launch::unwritten(&self.stream, len)
    }

    /// The kernels of a variant: loaded, from the disk's cache or compiled.
    pub(super) fn kernels(&self, variant: Variant) -> Result<Kernels, CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = modules.get(&variant) {
            return Ok(kernels.clone());
        }
        let code = self.cache.load(variant, self.arch)?;
        let failed = |error| CudaError::driver("loading the kernels", error, 0);
        let kernels = launch::load(&self.context, code, Pass::ALL.map(Pass::entry)).map_err(failed)?;
        for kernel in &kernels {
            launch::allow_shared_memory(kernel, self.shared_limit).map_err(failed)?;
        }
        let kernels = Arc::new(kernels);
        modules.insert(variant, kernels.clone());
        Ok(kernels)
    }
}
