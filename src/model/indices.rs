//! A batch's indices on the device.

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
}

impl<D: Device> DeviceSplit<D> {
    fn upload(device: &D, split: &LabelSplit) -> Result<Self, DeviceError> {
        Ok(Self {
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
    pub label: D::Buffer<u8>,
    /// The labels as rows of the label table.
    pub label_row: D::Buffer<u32>,
    pub split: [DeviceSplit<D>; 2],
    pub group_offsets: D::Buffer<u32>,
    pub group_length: D::Buffer<u32>,
    /// Rows of each group.
    pub group_rows: DeviceLists<D>,
    pub row_group: D::Buffer<u32>,
    pub row_item: D::Buffer<u32>,
    pub row_length: D::Buffer<u32>,
    pub target: D::Buffer<f32>,
    pub pair_offsets: D::Buffer<u32>,
    pub pair_item: D::Buffer<u32>,
    /// `[C]` zeros and ones: the label each interest adds to its candidates.
    pub interest_row: [D::Buffer<u32>; 2],
    pub score_offsets: D::Buffer<u32>,
    pub pair_rows: DeviceLists<D>,
    pub touched_item: DeviceTouched<D>,
    pub touched_position: DeviceTouched<D>,
    pub touched_label: DeviceTouched<D>,
    /// An empty buffer, for attention without a label mask.
    pub no_label: D::Buffer<u8>,
}

impl<D: Device> Indices<D> {
    /// Copies a batch to the device.
    pub fn upload(device: &D, batch: &Batch) -> Result<Self, DeviceError> {
        let label_row: Vec<u32> = batch.label.iter().map(|&l| l.into()).collect();
        let row_item: Vec<u32> = batch.row_pair.iter().map(|&p| batch.pair_item[p as usize]).collect();
        let group_rows =
            Lists { offsets: batch.row_offsets.clone(), members: (0..batch.rows() as u32).collect() };
        let [negative, positive] = &batch.split;
        Ok(Self {
            tokens: batch.tokens(),
            groups: batch.groups(),
            rows: batch.rows(),
            pairs: batch.pairs(),
            scores: *batch.score_offsets.last().expect("offsets have one more entry than pairs") as usize,
            cu_seqlens: device.upload(&batch.cu_seqlens)?,
            item: device.upload(&batch.item)?,
            position: device.upload(&batch.position)?,
            label: device.upload(&batch.label)?,
            label_row: device.upload(&label_row)?,
            split: [DeviceSplit::upload(device, negative)?, DeviceSplit::upload(device, positive)?],
            group_offsets: device.upload(&batch.group_offsets)?,
            group_length: device.upload(&batch.group_length)?,
            group_rows: DeviceLists::upload(device, &group_rows)?,
            row_group: device.upload(&batch.row_group)?,
            row_item: device.upload(&row_item)?,
            row_length: device.upload(&batch.row_length)?,
            target: device.upload(&batch.target)?,
            pair_offsets: device.upload(&batch.pair_offsets)?,
            pair_item: device.upload(&batch.pair_item)?,
            interest_row: [device.zeros(batch.pairs())?, device.upload(&vec![1; batch.pairs()])?],
            score_offsets: device.upload(&batch.score_offsets)?,
            pair_rows: DeviceLists::upload(device, &batch.pair_rows)?,
            touched_item: DeviceTouched::upload(device, &batch.touched_item)?,
            touched_position: DeviceTouched::upload(device, &batch.touched_position)?,
            touched_label: DeviceTouched::upload(device, &batch.touched_label)?,
            no_label: device.zeros(0)?,
        })
    }

    /// For target attention.
    pub fn target(&self) -> TargetIndex<'_, D::Buffer<u32>> {
        TargetIndex {
            cu_seqlens: &self.cu_seqlens,
            pair_offsets: &self.pair_offsets,
            score_offsets: &self.score_offsets,
            rows: self.pair_rows.segments(),
            row_length: &self.row_length,
        }
    }
}
