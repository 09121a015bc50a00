//! The indices of a batch on the device, uploaded in one copy.

use super::ModelConfig;
use crate::attention::LabelMask;
use crate::batch::{Batch, LabelSplit, Lists, Touched};
use crate::device::{self, Device, DeviceError, Prefixes, Recency, Segments, TargetIndex, TargetShape};

/// [`Lists`] on the device.
pub struct DeviceLists<D: Device> {
    offsets: device::Indices<D>,
    members: device::Indices<D>,
}

impl<D: Device> DeviceLists<D> {
    /// Stages the lists.
    pub fn stage(device: &D, staging: &mut D::Staging, lists: &Lists) -> Result<Self, DeviceError> {
        let (offsets, members) =
            (device.stage(staging, &lists.offsets)?, device.stage(staging, &lists.members)?);
        Ok(Self { offsets, members })
    }

    /// As an argument of an operation.
    pub fn segments(&self) -> Segments<&device::Indices<D>> {
        Segments { offsets: &self.offsets, members: &self.members }
    }
}

/// [`Touched`] on the device.
pub struct DeviceTouched<D: Device> {
    pub row: device::Indices<D>,
    pub source: DeviceLists<D>,
}

impl<D: Device> DeviceTouched<D> {
    /// Stages the rows and their contributions.
    pub fn stage(device: &D, staging: &mut D::Staging, touched: &Touched) -> Result<Self, DeviceError> {
        let row = device.stage(staging, &touched.row)?;
        Ok(Self { row, source: DeviceLists::stage(device, staging, &touched.source)? })
    }
}

/// [`LabelSplit`] on the device.
pub struct DeviceSplit<D: Device> {
    pub tokens: usize,
    pub token: device::Indices<D>,
    pub cu_seqlens: device::Indices<D>,
    pub count: device::Indices<D>,
    /// Position of each token in the history; only with a half-life.
    position: Option<device::Indices<D>>,
    /// Plan of the interest encoder.
    pub attention: D::AttentionPlan,
}

impl<D: Device> DeviceSplit<D> {
    fn stage(
        device: &D,
        staging: &mut D::Staging,
        config: &ModelConfig,
        split: &LabelSplit,
        position: &[u32],
    ) -> Result<Self, DeviceError> {
        let options = config.interest_attention();
        let of_tokens = || split.token.iter().map(|&token| position[token as usize]).collect::<Vec<_>>();
        let position = config.half_life.map(|_| device.stage(staging, &of_tokens())).transpose()?;
        Ok(Self {
            attention: device.attention_plan(staging, &options, &split.cu_seqlens, &[])?,
            tokens: split.token.len(),
            token: device.stage(staging, &split.token)?,
            cu_seqlens: device.stage(staging, &split.cu_seqlens)?,
            count: device.stage(staging, &split.count)?,
            position,
        })
    }
}

/// [`Batch`] on the device, with the same field names.
pub struct Indices<D: Device> {
    pub tokens: usize,
    pub groups: usize,
    pub rows: usize,
    pub pairs: usize,
    pub scores: usize,
    half_life: Option<f32>,
    pub cu_seqlens: device::Indices<D>,
    pub item: device::Indices<D>,
    pub position: device::Indices<D>,
    /// Plan of the encoder.
    pub attention: D::AttentionPlan,
    /// The labels as rows of the label table.
    pub label_row: device::Indices<D>,
    pub split: [DeviceSplit<D>; 2],
    pub group_offsets: device::Indices<D>,
    pub group_length: device::Indices<D>,
    /// Rows of each group.
    pub group_rows: DeviceLists<D>,
    pub row_group: device::Indices<D>,
    pub row_item: device::Indices<D>,
    pub target: device::Floats<D>,
    pub pair_item: device::Indices<D>,
    /// `[C]` zeros and ones: the label row that each interest adds to its candidates.
    pub interest_row: [device::Indices<D>; 2],
    pub target_attention: D::TargetPlan,
    pub pair_rows: DeviceLists<D>,
    pub touched_item: DeviceTouched<D>,
    pub touched_position: DeviceTouched<D>,
    pub touched_label: DeviceTouched<D>,
}

impl<D: Device> Indices<D> {
    /// Stages a batch with the attention plans of `config`.
    pub fn stage(
        device: &D,
        staging: &mut D::Staging,
        config: &ModelConfig,
        batch: &Batch,
    ) -> Result<Self, DeviceError> {
        let label_row: Vec<u32> = batch.label.iter().map(|&l| l.into()).collect();
        let row_item: Vec<u32> = batch.row_pair.iter().map(|&p| batch.pair_item[p as usize]).collect();
        let group_rows =
            Lists { offsets: batch.row_offsets.clone(), members: (0..batch.rows() as u32).collect() };
        let [negative, positive] = &batch.split;
        let encoder = config.encoder_attention();
        let label = if encoder.label_mask == LabelMask::Feedback { &batch.label[..] } else { &[] };
        let target = TargetIndex {
            cu_seqlens: &batch.cu_seqlens[..],
            pair_offsets: &batch.pair_offsets,
            score_offsets: &batch.score_offsets,
            rows: Segments { offsets: &batch.pair_rows.offsets[..], members: &batch.pair_rows.members },
            row_length: &batch.row_length,
        };
        let shape = TargetShape {
            width: config.width,
            hidden: config.attention,
            half_life: config.half_life.unwrap_or(0.0),
        };
        Ok(Self {
            tokens: batch.tokens(),
            groups: batch.groups(),
            rows: batch.rows(),
            pairs: batch.pairs(),
            scores: *batch.score_offsets.last().expect("score_offsets should have an entry more than pairs")
                as usize,
            half_life: config.half_life,
            cu_seqlens: device.stage(staging, &batch.cu_seqlens)?,
            item: device.stage(staging, &batch.item)?,
            position: device.stage(staging, &batch.position)?,
            attention: device.attention_plan(staging, &encoder, &batch.cu_seqlens, label)?,
            label_row: device.stage(staging, &label_row)?,
            split: [
                DeviceSplit::stage(device, staging, config, negative, &batch.position)?,
                DeviceSplit::stage(device, staging, config, positive, &batch.position)?,
            ],
            group_offsets: device.stage(staging, &batch.group_offsets)?,
            group_length: device.stage(staging, &batch.group_length)?,
            group_rows: DeviceLists::stage(device, staging, &group_rows)?,
            row_group: device.stage(staging, &batch.row_group)?,
            row_item: device.stage(staging, &row_item)?,
            target: device.stage(staging, &batch.target)?,
            pair_item: device.stage(staging, &batch.pair_item)?,
            interest_row: [
                device.stage(staging, &vec![0; batch.pairs()])?,
                device.stage(staging, &vec![1; batch.pairs()])?,
            ],
            target_attention: device.target_plan(staging, shape, target)?,
            pair_rows: DeviceLists::stage(device, staging, &batch.pair_rows)?,
            touched_item: DeviceTouched::stage(device, staging, &batch.touched_item)?,
            touched_position: DeviceTouched::stage(device, staging, &batch.touched_position)?,
            touched_label: DeviceTouched::stage(device, staging, &batch.touched_label)?,
        })
    }

    /// The prefixes of the encoded sequences, one per group.
    pub fn prefixes(&self) -> Prefixes<&device::Indices<D>> {
        Prefixes {
            cu_seqlens: &self.cu_seqlens,
            group_offsets: &self.group_offsets,
            count: &self.group_length,
            divisor: &self.group_length,
            recency: self.half_life.map(|half_life| Recency { half_life, position: &self.position }),
        }
    }

    /// The tokens of interest `f` within each prefix. Their sum is divided by the length of the
    /// whole prefix.
    pub fn interest_prefixes(&self, f: usize) -> Prefixes<&device::Indices<D>> {
        let DeviceSplit { cu_seqlens, count, position, .. } = &self.split[f];
        let recency = self.half_life.zip(position.as_ref());
        let recency = recency.map(|(half_life, position)| Recency { half_life, position });
        Prefixes { cu_seqlens, count, recency, ..self.prefixes() }
    }
}
