//! A batch's indices on the device.

use super::ModelConfig;
use crate::attention::LabelMask;
use crate::batch::{Batch, LabelSplit, Lists, Touched};
use crate::device::{Device, DeviceError, Segments, TargetIndex};

/// [`Lists`] on the device.
pub struct DeviceLists<D: Device> {
    offsets: D::Buffer<u32>,
    members: D::Buffer<u32>,
}

impl<D: Device> DeviceLists<D> {
    fn upload(device: &D, lists: &Lists) -> Result<Self, DeviceError> {
        Ok(Self { offsets: device.upload(&lists.offsets)?, members: device.upload(&lists.members)? })
    }

    /// For an operation's argument.
    pub fn segments(&self) -> Segments<'_, D::Buffer<u32>> {
        Segments { offsets: &self.offsets, members: &self.members }
    }
}

/// [`Touched`] on the device.
pub struct DeviceTouched<D: Device> {
    pub row: D::Buffer<u32>,
    pub source: DeviceLists<D>,
}

impl<D: Device> DeviceTouched<D> {
    fn upload(device: &D, touched: &Touched) -> Result<Self, DeviceError> {
        Ok(Self { row: device.upload(&touched.row)?, source: DeviceLists::upload(device, &touched.source)? })
    }
}

/// [`LabelSplit`] on the device.
pub struct DeviceSplit<D: Device> {
    pub tokens: usize,
    pub token: D::Buffer<u32>,
    pub cu_seqlens: D::Buffer<u32>,
    pub count: D::Buffer<u32>,
    /// Of the interest's encoder.
    pub attention: D::AttentionPlan,
}

impl<D: Device> DeviceSplit<D> {
    fn upload(device: &D, config: &ModelConfig, split: &LabelSplit) -> Result<Self, DeviceError> {
        Ok(Self {
            attention: device.attention_plan(&config.interest_attention(), &split.cu_seqlens, &[])?,
            tokens: split.token.len(),
            token: device.upload(&split.token)?,
            cu_seqlens: device.upload(&split.cu_seqlens)?,
            count: device.upload(&split.count)?,
        })
    }
}

/// [`Batch`] on the device; fields as there.
pub struct Indices<D: Device> {
    pub tokens: usize,
    pub groups: usize,
    pub rows: usize,
    pub pairs: usize,
    pub scores: usize,
    pub cu_seqlens: D::Buffer<u32>,
    pub item: D::Buffer<u32>,
    pub position: D::Buffer<u32>,
    /// Of the encoder.
    pub attention: D::AttentionPlan,
    /// The labels as rows of the label table.
    pub label_row: D::Buffer<u32>,
    pub split: [DeviceSplit<D>; 2],
    pub group_offsets: D::Buffer<u32>,
    pub group_length: D::Buffer<u32>,
    /// Rows of each group.
    pub group_rows: DeviceLists<D>,
    pub row_group: D::Buffer<u32>,
    pub row_item: D::Buffer<u32>,
    pub target: D::Buffer<f32>,
    pub pair_item: D::Buffer<u32>,
    /// `[C]` zeros and ones: the label each interest adds to its candidates.
    pub interest_row: [D::Buffer<u32>; 2],
    pub target_attention: D::TargetPlan,
    pub pair_rows: DeviceLists<D>,
    pub touched_item: DeviceTouched<D>,
    pub touched_position: DeviceTouched<D>,
    pub touched_label: DeviceTouched<D>,
}

impl<D: Device> Indices<D> {
    /// Copies a batch to the device, with the plans of what `config` computes on it.
    pub fn upload(device: &D, config: &ModelConfig, batch: &Batch) -> Result<Self, DeviceError> {
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
        Ok(Self {
            tokens: batch.tokens(),
            groups: batch.groups(),
            rows: batch.rows(),
            pairs: batch.pairs(),
            scores: *batch.score_offsets.last().expect("offsets have one more entry than pairs") as usize,
            cu_seqlens: device.upload(&batch.cu_seqlens)?,
            item: device.upload(&batch.item)?,
            position: device.upload(&batch.position)?,
            attention: device.attention_plan(&encoder, &batch.cu_seqlens, label)?,
            label_row: device.upload(&label_row)?,
            split: [
                DeviceSplit::upload(device, config, negative)?,
                DeviceSplit::upload(device, config, positive)?,
            ],
            group_offsets: device.upload(&batch.group_offsets)?,
            group_length: device.upload(&batch.group_length)?,
            group_rows: DeviceLists::upload(device, &group_rows)?,
            row_group: device.upload(&batch.row_group)?,
            row_item: device.upload(&row_item)?,
            target: device.upload(&batch.target)?,
            pair_item: device.upload(&batch.pair_item)?,
            interest_row: [device.zeros(batch.pairs())?, device.upload(&vec![1; batch.pairs()])?],
            target_attention: device.target_plan(config.width, config.attention, target)?,
            pair_rows: DeviceLists::upload(device, &batch.pair_rows)?,
            touched_item: DeviceTouched::upload(device, &batch.touched_item)?,
            touched_position: DeviceTouched::upload(device, &batch.touched_position)?,
            touched_label: DeviceTouched::upload(device, &batch.touched_label)?,
        })
    }
}
