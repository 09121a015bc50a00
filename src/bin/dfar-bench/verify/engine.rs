//! Engines that compute a case: the CPU, or a CUDA runtime in any element type of its kernels.

use super::Case;
use super::results::Results;
use super::{Fha, TensorError, VerifyError, compare, compare_gradients, half_precision, verify_dfar};
use dfar::attention::{self, AttentionError, FhaOptions, Gradients, Inputs};
use dfar::device::cpu::Cpu;
use dfar::device::cuda::plan::tile::HEAD_DIMS;
use dfar::device::cuda::runtime::Runtime;
use dfar::device::cuda::{CudaError, Element, Gpu};
use dfar::device::{Attention, DeviceError, Memory, Precision, Qkv, QkvGradients, SoftmaxState};
use half::{bf16, f16};
use std::sync::Arc;

/// The reason why an engine did not compute a case.
pub enum Refusal {
    /// The engine does not support the shape of the case; not a failure.
    Unsupported(String),
    /// Invalid arguments.
    Attention(AttentionError),
    /// The device failed.
    Cuda(CudaError),
    /// The CPU failed.
    Cpu(DeviceError),
}

/// Computes cases.
pub trait Engine {
    /// Element type of its attention tensors.
    fn element(&self) -> Element;

    /// Forward and backward pass on values that [`Engine::element`] represents exactly.
    ///
    /// # Errors
    /// [`Refusal`].
    fn attention(&self, options: &FhaOptions, inputs: Inputs, d_o: &[f32]) -> Result<Results, Refusal>;

    /// Compares a `dfar` case. The inner `Err` is the reason for skipping it.
    ///
    /// # Errors
    /// As [`super::verify`].
    fn network(&self, case: &Case) -> Result<Result<Vec<TensorError>, String>, VerifyError>;
}

/// The CPU engine, in f32.
pub struct CpuEngine;

impl Engine for CpuEngine {
    fn element(&self) -> Element {
        Element::F32
    }

    fn attention(&self, options: &FhaOptions, inputs: Inputs, d_o: &[f32]) -> Result<Results, Refusal> {
        let mut results = Results::zeros(options, inputs.label.len());
        let Results { o, lse, gradients: [dq, dk, dv] } = &mut results;
        attention::forward(options, inputs, o, lse).map_err(Refusal::Attention)?;
        attention::backward(options, inputs, o, lse, d_o, Gradients { dq, dk, dv })
            .map_err(Refusal::Attention)?;
        Ok(results)
    }

    fn network(&self, case: &Case) -> Result<Result<Vec<TensorError>, String>, VerifyError> {
        verify_dfar(case, Arc::new(Cpu::new())).map(Ok)
    }
}

/// The CPU in bf16.
pub struct CpuBf16(pub Arc<Cpu>);

impl CpuBf16 {
    fn run(&self, options: &FhaOptions, inputs: Inputs, d_o: &[f32]) -> Result<Results, DeviceError> {
        let (cpu, n) = (&self.0, inputs.label.len());
        let plan = cpu.attention_plan(&mut (), options, inputs.cu_seqlens, inputs.label)?;
        let (q, k, v) = (cpu.upload(inputs.q)?, cpu.upload(inputs.k)?, cpu.upload(inputs.v)?);
        let (qkv, d_o) = (Qkv { q: &q, k: &k, v: &v }, cpu.upload(d_o)?);
        let (mut o, mut lse) = (cpu.zeros(options.output_len(n))?, cpu.zeros(options.lse_len(n))?);
        cpu.attention(&plan, qkv, SoftmaxState { o: &mut o, lse: &mut lse })?;
        let (mut dq, mut dk, mut dv) = (cpu.zeros(q.len())?, cpu.zeros(k.len())?, cpu.zeros(v.len())?);
        let gradients = QkvGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        cpu.attention_backward(&plan, qkv, SoftmaxState { o: &o, lse: &lse }, &d_o, gradients)?;
        Ok(Results { o: o.to_vec(), lse: lse.to_vec(), gradients: [dq, dk, dv].map(|x| x.to_vec()) })
    }
}

impl Engine for CpuBf16 {
    fn element(&self) -> Element {
        Element::Bf16
    }

    fn attention(&self, options: &FhaOptions, inputs: Inputs, d_o: &[f32]) -> Result<Results, Refusal> {
        self.run(options, inputs, d_o).map_err(|error| match error {
            DeviceError::Attention(error) => Refusal::Attention(error),
            error => Refusal::Cpu(error),
        })
    }

    fn network(&self, _: &Case) -> Result<Result<Vec<TensorError>, String>, VerifyError> {
        Ok(Err(IN_F32.to_owned()))
    }
}

/// Why an engine in bf16 skips networks.
const IN_F32: &str = "networks are compared in f32";

/// The CUDA kernels, on a GPU or in the emulator.
pub struct GpuEngine<R: Runtime> {
    /// The device.
    pub gpu: Arc<Gpu<R>>,
    /// Type of the attention tensors.
    pub element: Element,
}

impl<R: Runtime> GpuEngine<R> {
    fn attention_in<T: Half>(
        &self,
        options: &FhaOptions,
        inputs: Inputs,
        d_o: &[f32],
    ) -> Result<Results, CudaError> {
        let narrow = |x: &[f32]| x.iter().map(|&x| T::narrow(x)).collect::<Vec<T>>();
        let widen = |x: Vec<T>| x.into_iter().map(T::widen).collect::<Vec<f32>>();
        let [q, k, v, d_o] = [inputs.q, inputs.k, inputs.v, d_o].map(narrow);
        let inputs = Inputs { q: &q, k: &k, v: &v, cu_seqlens: inputs.cu_seqlens, label: inputs.label };
        let tokens = inputs.label.len();
        let mut o = vec![T::narrow(0.0); options.output_len(tokens)];
        let mut lse = vec![0.0; options.lse_len(tokens)];
        self.gpu.forward(options, inputs, &mut o, &mut lse)?;
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![T::narrow(0.0); q.len()]);
        self.gpu.backward(options, inputs, &o, &lse, &d_o, [&mut dq, &mut dk, &mut dv])?;
        Ok(Results { o: widen(o), lse, gradients: [dq, dk, dv].map(widen) })
    }
}

impl<R: Runtime> Engine for GpuEngine<R> {
    fn element(&self) -> Element {
        self.element
    }

    fn attention(&self, options: &FhaOptions, inputs: Inputs, d_o: &[f32]) -> Result<Results, Refusal> {
        let results = match self.element {
            Element::F32 => self.attention_in::<f32>(options, inputs, d_o),
            Element::Bf16 => self.attention_in::<bf16>(options, inputs, d_o),
            Element::F16 => self.attention_in::<f16>(options, inputs, d_o),
        };
        results.map_err(|error| match error {
            CudaError::HeadDim { head_dim } => {
                Refusal::Unsupported(format!("head_dim is {head_dim}; the kernels have {HEAD_DIMS:?}"))
            }
            CudaError::Attention(error) => Refusal::Attention(error),
            error => Refusal::Cuda(error),
        })
    }

    fn network(&self, case: &Case) -> Result<Result<Vec<TensorError>, String>, VerifyError> {
        if self.gpu.precision() != Precision::F32 {
            return Ok(Err(IN_F32.to_owned()));
        }
        verify_dfar(case, self.gpu.clone()).map(Ok)
    }
}

/// A type of attention tensors, and f32.
trait Half: dfar::device::cuda::kernel::Value {
    fn narrow(x: f32) -> Self;
    fn widen(self) -> f32;
}
impl Half for f32 {
    fn narrow(x: f32) -> Self {
        x
    }
    fn widen(self) -> f32 {
        self
    }
}
impl Half for bf16 {
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}
impl Half for f16 {
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Runs an engine on an `fha` case. The inner `Err` is the reason for skipping it.
///
/// # Errors
/// An incomplete case, inputs that the operation does not accept, or a failing device.
pub fn verify_fha<E: Engine>(
    case: &Case,
    engine: &E,
) -> Result<Result<Vec<TensorError>, String>, VerifyError> {
    let fha = Fha::new(case)?;
    let fha =
        if engine.element() == Element::F32 { fha } else { half_precision::rounded(&fha, engine.element()) };
    let results = match engine.attention(&fha.options, fha.inputs(), &fha.d_o) {
        Ok(results) => results,
        Err(Refusal::Unsupported(reason)) => return Ok(Err(reason)),
        Err(Refusal::Attention(source)) => {
            return Err(VerifyError::Attention { path: case.path.clone(), source });
        }
        Err(Refusal::Cuda(source)) => {
            return Err(VerifyError::Cuda { path: case.path.clone(), source: Box::new(source) });
        }
        Err(Refusal::Cpu(source)) => {
            return Err(VerifyError::Cpu { path: case.path.clone(), source });
        }
    };
    if engine.element() != Element::F32 {
        return Ok(Ok(half_precision::compare(&fha, engine.element(), &results)));
    }
    let mut errors = vec![compare("o", &results.o, &fha.o), compare("lse", &results.lse, &fha.lse)];
    let [dq, dk, dv] = &results.gradients;
    let [dq_reference, dk_reference, dv_reference] = &fha.gradients;
    errors.extend(compare_gradients(&[
        ("dq", dq, dq_reference),
        ("dk", dk, dk_reference),
        ("dv", dv, dv_reference),
    ]));
    Ok(Ok(errors))
}
