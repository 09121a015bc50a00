//! Reads a case from an untrusted file.

use dfar::attention::AttentionError;
use dfar::model::HostTensor;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// An unreadable or invalid case.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// I/O failed.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A folder without a case file.
    #[error("{} holds no .safetensors file", path.display())]
    NoCases {
        /// The folder.
        path: PathBuf,
    },
    /// The file is not a safetensors file.
    #[error("{} is not a safetensors file: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: safetensors::SafeTensorError,
    },
    /// A safetensors file without a `case` in its metadata.
    #[error("{} is not a case: its metadata has no `case`", path.display())]
    NotACase {
        /// The file.
        path: PathBuf,
    },
    /// A `case` without the fields its kind needs.
    #[error("{}: metadata `case`: {source}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: serde_json::Error,
    },
    /// A kind this version does not know.
    #[error("{}: unknown kind of case `{kind}`", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// Its kind.
        kind: String,
    },
    /// A tensor is missing.
    #[error("{} has no tensor `{tensor}`", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another type.
    #[error("{}: tensor `{tensor}` is {found:?}, not {expected:?}", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Type it should have.
        expected: Dtype,
        /// Type it has.
        found: Dtype,
    },
    /// A tensor has another shape than the metadata and `cu_seqlens` require.
    #[error("{}: tensor `{tensor}` has shape {found:?}, not {}", path.display(), show(expected))]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape it should have; `None` stands for any size.
        expected: Vec<Option<usize>>,
        /// Shape it has.
        found: Vec<usize>,
    },
    /// A tensor has invalid values.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: &'static str,
        /// The reason.
        reason: String,
    },
    /// The network could not be built or run.
    #[error("{}: {source}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// The error of the model.
        source: Box<dfar::model::ModelError>,
    },
    /// The CPU failed.
    #[error("{}: {source}", path.display())]
    Cpu {
        /// The file.
        path: PathBuf,
        /// The failure.
        source: dfar::device::DeviceError,
    },
    /// The device failed.
    #[error("{}: {source}", path.display())]
    Cuda {
        /// The file.
        path: PathBuf,
        /// The error of the device.
        source: Box<dfar::device::cuda::CudaError>,
    },
    /// The operation does not accept the inputs.
    #[error("{}: {source}", path.display())]
    Attention {
        /// The file.
        path: PathBuf,
        /// The error of the operation.
        source: AttentionError,
    },
}

fn show(shape: &[Option<usize>]) -> String {
    let sizes: Vec<String> =
        shape.iter().map(|size| size.map_or("any".to_owned(), |size| size.to_string())).collect();
    format!("[{}]", sizes.join(", "))
}

/// One file: metadata and tensors.
#[derive(Clone, Debug)]
pub struct Case {
    /// The file.
    pub path: PathBuf,
    /// Its name without extension.
    pub name: String,
    /// `fha` or `dfar`.
    pub kind: String,
    metadata: serde_json::Value,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Clone, Debug)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

macro_rules! reader {
    ($(#[$doc:meta])* $name:ident, $type:ty, $dtype:expr) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// A missing tensor, or another type or shape; `None` in `shape` stands for any size.
        pub fn $name(&self, tensor: &str, shape: &[Option<usize>]) -> Result<Vec<$type>, VerifyError> {
            let bytes = self.tensor(tensor, $dtype, shape)?.chunks_exact(size_of::<$type>());
            Ok(bytes.map(|b| <$type>::from_le_bytes(b.try_into().expect("a chunk is one value"))).collect())
        }
    };
}

impl Case {
    /// Reads a whole file.
    ///
    /// # Errors
    /// An unreadable file, or one that is not a case.
    pub fn read(path: &Path) -> Result<Self, VerifyError> {
        let io = |source| VerifyError::Io { path: path.to_owned(), source };
        let format = |source| VerifyError::Format { path: path.to_owned(), source };
        let json = |source| VerifyError::Metadata { path: path.to_owned(), source };
        let bytes = std::fs::read(path).map_err(io)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let text = header.metadata().as_ref().and_then(|m| m.get("case"));
        let text = text.ok_or_else(|| VerifyError::NotACase { path: path.to_owned() })?;
        let metadata: serde_json::Value = serde_json::from_str(text).map_err(json)?;
        #[derive(serde::Deserialize)]
        struct Kind {
            kind: String,
        }
        let Kind { kind } = serde::Deserialize::deserialize(&metadata).map_err(json)?;
        let file = SafeTensors::deserialize(&bytes).map_err(format)?;
        let tensors = file.iter().map(|(name, view)| {
            let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name.to_owned(), Tensor { dtype, shape, bytes })
        });
        Ok(Self {
            name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            path: path.to_owned(),
            kind,
            tensors: tensors.collect(),
            metadata,
        })
    }

    /// The metadata's fields as `T`.
    ///
    /// # Errors
    /// Fields that are missing or of another type.
    pub fn options<T: serde::de::DeserializeOwned>(&self) -> Result<T, VerifyError> {
        T::deserialize(&self.metadata)
            .map_err(|source| VerifyError::Metadata { path: self.path.clone(), source })
    }

    /// Names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// A missing tensor.
    pub fn shape(&self, tensor: &str) -> Result<Vec<usize>, VerifyError> {
        let missing = || VerifyError::Missing { path: self.path.clone(), tensor: tensor.to_owned() };
        self.tensors.get(tensor).map(|t| t.shape.clone()).ok_or_else(missing)
    }

    /// The tensors named `param.*`, without this prefix.
    ///
    /// # Errors
    /// A tensor that is not f32.
    pub fn parameters(&self) -> Result<Vec<HostTensor>, VerifyError> {
        let named = self.names().filter_map(|full| Some((full, full.strip_prefix("param.")?)));
        named
            .map(|(full, name)| {
                let shape = self.shape(full)?;
                let sizes: Vec<Option<usize>> = shape.iter().copied().map(Some).collect();
                Ok(HostTensor { name: name.to_owned(), values: self.f32s(full, &sizes)?, shape })
            })
            .collect()
    }

    /// The error for invalid values of `tensor`.
    pub fn invalid(&self, tensor: &'static str, reason: impl Into<String>) -> VerifyError {
        VerifyError::Invalid { path: self.path.clone(), tensor, reason: reason.into() }
    }

    reader!(/// Values of a float32 tensor.
        f32s, f32, Dtype::F32);
    reader!(/// Values of a float64 tensor.
        f64s, f64, Dtype::F64);
    reader!(/// Values of a tensor of 32-bit unsigned integers.
        u32s, u32, Dtype::U32);
    reader!(/// Values of a tensor of bytes.
        u8s, u8, Dtype::U8);

    fn tensor(&self, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<&[u8], VerifyError> {
        let path = || self.path.clone();
        let tensor = self.tensors.get(name);
        let tensor = tensor.ok_or_else(|| VerifyError::Missing { path: path(), tensor: name.to_owned() })?;
        if tensor.dtype != dtype {
            let (expected, found) = (dtype, tensor.dtype);
            return Err(VerifyError::Type { path: path(), tensor: name.to_owned(), expected, found });
        }
        let fits = tensor.shape.len() == shape.len()
            && tensor.shape.iter().zip(shape).all(|(&found, expected)| expected.is_none_or(|e| e == found));
        if !fits {
            let (expected, found) = (shape.to_vec(), tensor.shape.clone());
            return Err(VerifyError::Shape { path: path(), tensor: name.to_owned(), expected, found });
        }
        Ok(&tensor.bytes)
    }
}
