//! The first layer by the operations of a device: one product over the concatenated parts.

use super::{FirstLayer, FirstPass};
use crate::system::{Context, Gradients, Part, Per};
use crate::{Floats, Result};
use dfar::batch::Lists;
use dfar::device::{Activation, Columns, ConcatPart, Device, Output};
use dfar::model::indices::DeviceLists;
use dfar::model::parameters::Linear;

/// One product, for parts as wide as the candidate. A GPU concatenates at most 4, with it.
pub struct Concatenated;

/// What the backward pass reads.
pub struct ConcatenatedState<D: Device> {
    /// `[R, inputs]` the concatenated parts.
    input: Floats<D>,
    pair_rows: DeviceLists<D>,
    group_rows: DeviceLists<D>,
}

impl<D: Device> FirstLayer<D> for Concatenated {
    type State = ConcatenatedState<D>;

    fn forward(
        cx: Context<D>,
        layer: &Linear,
        e: &Floats<D>,
        parts: &[Part<D>],
    ) -> Result<(Floats<D>, ConcatenatedState<D>)> {
        assert!(parts.iter().all(|part| part.width == cx.width), "the parts should be as wide as the model");
        let (device, batch) = (cx.device, &cx.x.batch);
        let rows = batch.rows();
        let (row_pair, row_group, pair_rows, group_rows) = cx.staged(|staging| {
            let of_group = Lists { offsets: batch.row_offsets.clone(), members: (0..rows as u32).collect() };
            Ok((
                device.stage(staging, &batch.row_pair)?,
                device.stage(staging, &batch.row_group)?,
                DeviceLists::stage(device, staging, &batch.pair_rows)?,
                DeviceLists::stage(device, staging, &of_group)?,
            ))
        })?;
        let candidate = ConcatPart { values: e, index: Some(&row_pair) };
        let others = parts.iter().map(|part| match part.per {
            Per::Group => ConcatPart { values: &part.values, index: Some(&row_group) },
            Per::Row => ConcatPart { values: &part.values, index: None },
        });
        let mut input = device.alloc(rows * layer.inputs)?;
        device.concat(cx.width, &std::iter::once(candidate).chain(others).collect::<Vec<_>>(), &mut input)?;
        let mut h = device.alloc(rows * layer.outputs)?;
        device.linear(cx.p.linear(layer, Activation::Relu), &input, Output::overwrite(&mut h))?;
        Ok((h, ConcatenatedState { input, pair_rows, group_rows }))
    }

    fn backward(
        cx: Context<D>,
        layer: &Linear,
        FirstPass { parts, h, state, .. }: FirstPass<D, ConcatenatedState<D>>,
        mut d_h: Floats<D>,
        grads: &mut Gradients<D>,
    ) -> Result<Vec<Floats<D>>> {
        let (device, batch) = (cx.device, &cx.x.batch);
        let ConcatenatedState { input, pair_rows, group_rows } = state;
        let mut d_input = device.alloc(batch.rows() * layer.inputs)?;
        let gradients = grads.dense.linear_gradients(layer, Output::overwrite(&mut d_input));
        device.linear_backward(cx.p.linear(layer, Activation::Relu), &input, h, &mut d_h, gradients)?;
        let of_part = |part, lists: Option<&DeviceLists<D>>, dx: Output<&mut Floats<D>>| {
            let columns = Columns { width: cx.width, part, parts: parts.len() + 1 };
            device.concat_backward(columns, &d_input, lists.map(DeviceLists::segments), dx)
        };
        of_part(0, Some(&pair_rows), Output::add(&mut grads.candidates))?;
        let gradient = |(i, part): (usize, &Part<D>)| {
            let (n, lists) = match part.per {
                Per::Group => (batch.groups(), Some(&group_rows)),
                Per::Row => (batch.rows(), None),
            };
            let mut dx = device.alloc(n * part.width)?;
            of_part(i + 1, lists, Output::overwrite(&mut dx))?;
            Ok(dx)
        };
        parts.iter().enumerate().map(gradient).collect()
    }
}
