//! Block sizes of `attention/attention.cu`: pure functions of shapes and device limits.

use super::shared_memory::Variant;
use crate::attention::{FhaOptions, Pairing};
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Block, Element};

/// Compiled head widths.
pub const HEAD_DIMS: [usize; 5] = [8, 16, 32, 64, 128];

/// Maximum warps per block: `MAX_WARPS` of `attention/rows.cuh`.
pub const MAX_WARPS: usize = 4;

/// Query rows (or keys) per warp: the M of `mma.m16n8k16`.
pub const WARP_ROWS: usize = 16;

impl Block {
    /// Query rows (or keys) per block.
    pub fn rows(&self) -> usize {
        self.warps * WARP_ROWS
    }
}

/// Maximum query rows of a whole sequence: five tiles for each warp of a block. A longer sequence
/// is too much work for one block.
pub const WHOLE_ROWS: usize = 5 * MAX_WARPS * WARP_ROWS;

/// Maximum shared memory of a block of whole sequences. Three such blocks fit a multiprocessor of
/// sm_90, so that one loads while others compute. A sequence that needs more, because its heads are
/// wide or many, is streamed.
pub const WHOLE_BYTES: usize = 72 << 10;

/// As [`WHOLE_BYTES`], for backward in one pass: two blocks fit a multiprocessor. Two passes issue
/// half as many instructions again, and streaming three times as many.
pub const WHOLE_BACKWARD_BYTES: usize = 112 << 10;

/// Limits of shared memory per block, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Any block: the limit of the device.
    pub block: usize,
    /// A block of whole sequences.
    pub whole: usize,
    /// A block of whole sequences in one-pass backward.
    pub whole_backward: usize,
}

const fn least(a: usize, b: usize) -> usize {
    if a < b { a } else { b }
}

impl Room {
    /// Limits on a device with `shared_per_block` bytes per block.
    pub const fn of(shared_per_block: usize) -> Room {
        Room {
            block: shared_per_block,
            whole: least(WHOLE_BYTES, shared_per_block),
            whole_backward: least(WHOLE_BACKWARD_BYTES, shared_per_block),
        }
    }

    /// The same, with all sequences streamed. For comparisons.
    pub const fn streamed(shared_per_block: usize) -> Room {
        Room { block: shared_per_block, whole: 0, whole_backward: 0 }
    }
}

/// Number of warps that share a whole sequence. Each has a launch of its own, so that short
/// sequences do not get blocks sized for long ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Up to 32 query rows: one warp, without barriers between warps.
    One,
    /// 33 to 64 query rows: two warps.
    Two,
    /// 65 to [`WHOLE_ROWS`] query rows: four warps.
    Four,
}

impl Sharing {
    /// All variants.
    pub const ALL: [Sharing; 3] = [Sharing::One, Sharing::Two, Sharing::Four];

    /// Warps per sequence.
    pub const fn warps(self) -> usize {
        match self {
            Sharing::One => 1,
            Sharing::Two => 2,
            Sharing::Four => 4,
        }
    }

    /// The variant for a sequence of `rows` query rows; `None` if the sequence is streamed.
    pub fn of(rows: usize) -> Option<Sharing> {
        match rows {
            1..=32 => Some(Sharing::One),
            33..=64 => Some(Sharing::Two),
            65..=WHOLE_ROWS => Some(Sharing::Four),
            _ => None,
        }
    }
}

/// A block that holds one or several whole sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    /// The block.
    pub block: Block,
    /// Warps that share a sequence.
    pub sharing: Sharing,
    /// Rows of a key head in shared memory.
    pub capacity: usize,
    /// Tokens of the longest sequence in this launch.
    pub longest: usize,
}

impl Whole {
    /// Sequences per block.
    pub fn items(&self) -> usize {
        self.block.warps / self.sharing.warps()
    }
}

/// Block sizes of all passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Forward over short sequences, whose scores fit registers; `None` without any.
    pub forward_short: Option<Whole>,
    /// Forward over whole sequences by [`Sharing`]; `None` without any. A sequence that is also
    /// short takes `forward_short`.
    pub forward_whole: [Option<Whole>; 3],
    /// Forward over streamed sequences, in query rows.
    pub forward: Block,
    /// One-pass backward over whole sequences by [`Sharing`]; `None` without any.
    pub backward_whole: [Option<Whole>; 3],
    /// Two-pass backward, dq then dk and dv, over whole sequences that do not fit one pass; `None`
    /// without any.
    pub sides_whole: Option<[Whole; 2]>,
    /// dq over streamed sequences, in query rows.
    pub dq: Block,
    /// dk and dv over streamed sequences, in keys.
    pub dk_dv: Block,
}

/// The block for `rows` rows: as many warps as the longest sequence keeps busy, at most
/// `MAX_WARPS`, reduced until shared memory is within `limit` bytes.
fn block(
    rows: usize,
    limit: usize,
    bytes: impl Fn(usize) -> usize,
    pass: &'static str,
) -> Result<Block, CudaError> {
    let most = rows.div_ceil(WARP_ROWS).clamp(1, MAX_WARPS);
    (1..=most)
        .rev()
        .map(|warps| Block { warps, shared_bytes: bytes(warps) })
        .find(|block| block.shared_bytes <= limit)
        .ok_or(CudaError::SharedMemory { pass, needed: bytes(1), available: limit })
}

/// Blocks of the whole sequences of a batch with these lengths, by [`Sharing`]. `bytes(items,
/// warps, capacity)` is the shared memory of `items` sequences with `warps` warps and `capacity`
/// rows of keys each.
///
/// The length of a sequence alone decides whether it is whole and how many warps share it, so its
/// results do not depend on the rest of the batch.
fn whole(
    slots: usize,
    lengths: &[usize],
    limit: usize,
    bytes: impl Fn(usize, usize, usize) -> usize,
) -> [Option<Whole>; 3] {
    Sharing::ALL.map(|sharing| {
        let warps = sharing.warps();
        let capacity = |tokens: usize| tokens.next_multiple_of(WARP_ROWS);
        let fits = |items: usize, tokens: usize| bytes(items, warps, capacity(tokens)) <= limit;
        let taken = |&tokens: &usize| Sharing::of(tokens * slots) == Some(sharing) && fits(1, tokens);
        let longest = lengths.iter().copied().filter(taken).max()?;
        let items = (1..=MAX_WARPS / warps).rev().find(|&items| fits(items, longest))?;
        let shared_bytes = bytes(items, warps, capacity(longest));
        let block = Block { warps: items * warps, shared_bytes };
        Some(Whole { block, sharing, capacity: capacity(longest), longest })
    })
}

/// Rows of a key head in `attention_forward_short`, for a sequence of `tokens` tokens. `None` if
/// the scores do not fit the registers of a warp, or if the heads are too wide. The kernel is
/// compiled for these values.
fn short_capacity(variant: &Variant, key_heads: usize, tokens: usize) -> Option<usize> {
    if variant.size != 2 || variant.head_dim > 32 {
        return None;
    }
    match (key_heads, tokens) {
        (1..=4, 1..=32) => Some(32),
        (1..=2, 33..=64) => Some(64),
        _ => None,
    }
}

/// Block of the short sequences: one warp per sequence.
fn short(variant: &Variant, key_heads: usize, lengths: &[usize], limit: usize) -> Option<Whole> {
    let bytes = |items: usize, capacity: usize| variant.forward_short(items, capacity, key_heads);
    let fits = |items: usize, tokens: usize| {
        short_capacity(variant, key_heads, tokens).is_some_and(|capacity| bytes(items, capacity) <= limit)
    };
    let longest = lengths.iter().copied().filter(|&tokens| fits(1, tokens)).max()?;
    let items = (1..=MAX_WARPS).rev().find(|&items| fits(items, longest))?;
    let capacity = short_capacity(variant, key_heads, longest)?;
    let block = Block { warps: items, shared_bytes: bytes(items, capacity) };
    Some(Whole { block, sharing: Sharing::One, capacity, longest })
}

/// Query rows per token in one problem. With [`Pairing::PerHead`], each head is a separate problem.
pub(crate) fn slots_of(options: &FhaOptions) -> usize {
    match options.pairing {
        Pairing::Factorized => options.query_slots(),
        Pairing::PerHead => 1,
    }
}

/// Chooses the blocks for a batch with sequences of these lengths.
///
/// # Errors
/// [`CudaError::HeadDim`] for a width outside [`HEAD_DIMS`]; [`CudaError::SharedMemory`] if even
/// the smallest block exceeds the device limit.
pub fn tile(
    element: Element,
    options: &FhaOptions,
    lengths: &[usize],
    room: Room,
) -> Result<Tile, CudaError> {
    if !HEAD_DIMS.contains(&options.head_dim) {
        return Err(CudaError::HeadDim { head_dim: options.head_dim });
    }
    let variant = Variant { size: element.size(), head_dim: options.head_dim };
    let slots = slots_of(options);
    let key_heads = options.key_slots();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let rows = longest * slots;
    // Backward of wider heads has no registers left for whole sequences.
    let room_backward = if variant.head_dim < 128 { room.whole_backward } else { 0 };
    let backward_whole = whole(slots, lengths, room_backward, |items, warps, capacity| {
        variant.backward_whole(items, warps, capacity, slots, key_heads)
    });
    let taken = backward_whole[Sharing::Four as usize].map_or(0, |whole| whole.longest);
    let left: Vec<usize> = lengths.iter().copied().filter(|&tokens| tokens > taken).collect();
    let side_bytes = |warps: usize, capacity: usize| {
        let dk_dv = variant.dk_dv_whole(warps, capacity, slots, key_heads);
        [variant.dq_whole(warps, capacity, key_heads), dk_dv]
    };
    let room_sides = if variant.head_dim < 128 { room.whole } else { 0 };
    let [.., sides] = whole(slots, &left, room_sides, |items, warps, capacity| {
        items * side_bytes(warps, capacity).into_iter().max().expect("there are two")
    });
    let sides_whole = sides.map(|whole| {
        side_bytes(whole.block.warps, whole.capacity)
            .map(|shared_bytes| Whole { block: Block { shared_bytes, ..whole.block }, ..whole })
    });
    Ok(Tile {
        forward_short: short(&variant, key_heads, lengths, room.whole),
        forward_whole: whole(slots, lengths, room.whole, |items, warps, capacity| {
            variant.forward_whole(items, warps, capacity, key_heads)
        }),
        forward: block(rows, room.block, |w| variant.forward(w, key_heads), "forward")?,
        backward_whole,
        sides_whole,
        dq: block(rows, room.block, |w| variant.dq(w), "dq")?,
        dk_dv: block(longest, room.block, |w| variant.dk_dv(w), "dk_dv")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::LabelMask;

    /// Shared memory per block on sm_80, sm_86 and sm_90.
    const LIMITS: [usize; 3] = [163 << 10, 99 << 10, 227 << 10];

    #[test]
    fn every_variant_fits_the_data_centre_devices() {
        for element in Element::ALL {
            for head_dim in HEAD_DIMS {
                for heads in [1, 2, 4, 8] {
                    let mut options = FhaOptions::new(heads, head_dim);
                    if heads == 1 {
                        options.label_mask = LabelMask::None;
                    }
                    for limit in [LIMITS[0], LIMITS[2]] {
                        let tile =
                            tile(element, &options, &[4096, 64], Room::of(limit)).expect("it should fit");
                        for block in [tile.forward, tile.dq, tile.dk_dv] {
                            assert!(block.warps >= 1 && block.shared_bytes <= limit, "{options:?} {tile:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_block_is_no_larger_than_the_longest_sequence() {
        let options = FhaOptions::new(2, 16);
        for (longest, warps) in [(0, 1), (1, 1), (16, 1), (17, 2), (48, 3), (64, 4), (5000, 4)] {
            let tile = tile(Element::Bf16, &options, &[longest], Room::of(LIMITS[2])).expect("it should fit");
            assert_eq!(tile.forward.warps, warps, "{longest} tokens");
        }
        let four =
            tile(Element::Bf16, &FhaOptions::new(4, 16), &[17], Room::of(LIMITS[2])).expect("it should fit");
        assert_eq!((four.forward.warps, four.dk_dv.warps), (3, 2), "two query rows a token, one key");
    }

    #[test]
    fn short_sequences_share_a_block() {
        let options = FhaOptions::new(2, 16);
        // Tokens -> (sequences per block, rows per key head).
        let short = |longest| {
            let tile =
                tile(Element::Bf16, &options, &[longest, 4096], Room::of(LIMITS[0])).expect("it should fit");
            tile.forward_short.map(|whole| (whole.items(), whole.capacity))
        };
        assert_eq!([20, 33, 65].map(short), [Some((4, 32)), Some((4, 64)), None]);
        for (longest, sharing, items, capacity) in [
            (1, Sharing::One, 4, 16),
            (20, Sharing::One, 4, 32),
            (32, Sharing::One, 4, 32),
            (33, Sharing::Two, 2, 48),
            (64, Sharing::Two, 2, 64),
            (65, Sharing::Four, 1, 80),
            (80, Sharing::Four, 1, 80),
        ] {
            let tile =
                tile(Element::Bf16, &options, &[longest, 4096], Room::of(LIMITS[0])).expect("it should fit");
            for whole in [tile.forward_whole, tile.backward_whole] {
                let [whole] = whole.into_iter().flatten().collect::<Vec<_>>()[..] else {
                    panic!("{whole:?}")
                };
                assert_eq!((whole.sharing, whole.items()), (sharing, items), "{longest} tokens");
                assert_eq!((whole.capacity, whole.longest), (capacity, longest));
            }
        }
        let unlabelled = FhaOptions { label_mask: LabelMask::None, ..FhaOptions::new(1, 16) };
        let most = WHOLE_ROWS;
        let tile =
            tile(Element::Bf16, &unlabelled, &[most, most + 1], Room::of(LIMITS[0])).expect("it should fit");
        assert_eq!(tile.forward_whole.map(|x| x.map(|x| x.longest)), [None, None, Some(most)]);
    }

    /// Whether a sequence is whole depends on its length alone.
    #[test]
    fn a_batch_does_not_change_who_is_short() {
        let lengths: Vec<usize> = (1..=320).collect();
        for options in
            [FhaOptions::new(4, 32), FhaOptions::new(2, 64), FhaOptions::new(8, 16), FhaOptions::new(2, 128)]
        {
            for element in [Element::F32, Element::Bf16] {
                let of = |lengths: &[usize]| {
                    tile(element, &options, lengths, Room::of(LIMITS[0])).expect("it should fit")
                };
                let all = of(&lengths);
                for &tokens in &lengths {
                    let alone = of(&[tokens]);
                    for (all, alone) in
                        [(all.forward_whole, alone.forward_whole), (all.backward_whole, alone.backward_whole)]
                    {
                        for (all, alone) in all.into_iter().zip(alone) {
                            let mine = all
                                .filter(|x| Sharing::of(tokens * options.query_slots()) == Some(x.sharing));
                            let taken = mine.is_some_and(|x| tokens <= x.longest);
                            assert_eq!(alone.is_some(), taken, "{tokens} tokens, {options:?}");
                            assert!(
                                alone.is_none_or(|whole| whole.block.shared_bytes <= WHOLE_BACKWARD_BYTES)
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_small_device_gets_smaller_blocks_or_a_clear_error() {
        let wide = FhaOptions::new(8, 64);
        let tile_on = |limit| tile(Element::Bf16, &wide, &[4096], Room::of(limit));
        let (large, small) = (tile_on(LIMITS[2]).expect("fits"), tile_on(LIMITS[1]).expect("fits"));
        assert!(small.forward.warps < large.forward.warps);
        let error = tile_on(16 << 10).expect_err("nothing fits in 16 KiB");
        assert!(error.to_string().contains("forward needs"), "{error}");
        let odd = tile(Element::F32, &FhaOptions::new(2, 4), &[10], Room::of(LIMITS[0]))
            .expect_err("no kernel for width 4");
        assert!(matches!(odd, CudaError::HeadDim { head_dim: 4 }));
    }
}
