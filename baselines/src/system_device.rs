//! The systems that a device computes: all on the CPU, those without operations of their own on
//! CUDA.

use crate::Result;
use crate::system::{Built, Kind, Settings};
use crate::systems::caser::Caser;
use crate::systems::dfn::Dfn;
use crate::systems::dien::Dien;
use crate::systems::din::Din;
use crate::systems::feedrec::Feedrec;
use crate::systems::gru4rec::Gru4rec;
use crate::systems::sasrec::Sasrec;
use crate::systems::tha4rec::tha4rec;
use crate::tower::{Concatenated, FirstLayer, Split};
use dfar::device::Device;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::Gpu;
use dfar::device::cuda::runtime::Runtime;
use dfar::model::ModelError;
use dfar::model::parameters::Names;

/// A device with its systems.
pub trait SystemDevice: Device + Sized {
    /// How it computes the first layer of the tower.
    type FirstLayer: FirstLayer<Self>;

    /// Whether the device computes a system.
    fn computes(kind: Kind) -> bool;

    /// Names the parameters of a system behind those of its tables.
    ///
    /// # Errors
    /// [`ModelError::Config`] for a system that the device does not compute.
    fn build(kind: Kind, names: &mut Names, settings: &Settings) -> Result<Built<Self>>;
}

impl SystemDevice for Cpu {
    type FirstLayer = Split;

    fn computes(_: Kind) -> bool {
        true
    }

    fn build(kind: Kind, names: &mut Names, settings: &Settings) -> Result<Built> {
        let width = settings.width;
        Ok(match kind {
            Kind::Din => Built::new(2 * width, Din::new(names, settings)),
            Kind::Caser => Built::new(Caser::parts(settings), Caser::new(names, settings)),
            Kind::Gru4rec => Built::new(width, Gru4rec::new(names, settings)),
            Kind::Dien => Built::new(3 * width, Dien::new(names, settings)),
            Kind::Sasrec => Built::new(width, Sasrec::new(names, settings)),
            Kind::Tha4rec => Built::new(width, tha4rec(names, settings)),
            Kind::Dfn => Built::new(3 * width, Dfn::new(names, settings)),
            Kind::Feedrec => Built::new(3 * width, Feedrec::new(names, settings)),
        })
    }
}

impl<R: Runtime> SystemDevice for Gpu<R> {
    type FirstLayer = Concatenated;

    fn computes(kind: Kind) -> bool {
        matches!(kind, Kind::Din | Kind::Sasrec)
    }

    fn build(kind: Kind, names: &mut Names, settings: &Settings) -> Result<Built<Self>> {
        let width = settings.width;
        match kind {
            Kind::Din => Ok(Built::new(2 * width, Din::new(names, settings))),
            Kind::Sasrec => Ok(Built::new(width, Sasrec::new(names, settings))),
            other => Err(ModelError::Config {
                field: "system",
                value: other.title().to_owned(),
                reason: "there are no CUDA kernels for it; it runs on the CPU",
            }),
        }
    }
}
