//! How work is cut for the kernels of `attention.cu`. Pure functions of shapes and of the device's limits.

use super::shared_memory::Variant;
use crate::attention::{FhaOptions, Pairing};
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Block, Element};

/// Head widths the kernels are compiled for.
pub const HEAD_DIMS: [usize; 5] = [8, 16, 32, 64, 128];

/// Warps of a block at most: `MAX_WARPS` of `attention.cu`.
pub const MAX_WARPS: usize = 4;

/// Query rows (or keys) a warp owns: the M of `mma.m16n8k16`.
pub const WARP_ROWS: usize = 16;

impl Block {
    /// Rows of the block.
    pub fn rows(&self) -> usize {
        self.warps * WARP_ROWS
    }
}

/// Sequences of at most this many query rows may be taken whole: five tiles for each of a block's warps. Longer ones
/// have more to do than a block should have alone.
pub const WHOLE_ROWS: usize = 5 * MAX_WARPS * WARP_ROWS;

/// Shared memory a block of whole sequences may use: three fit a multiprocessor of sm_90, so that one loads while others compute. A sequence that needs more by itself, its heads being wide or many, is streamed.
pub const WHOLE_BYTES: usize = 72 << 10;

/// The same in backward in one pass: two fit, as two passes take half as many instructions again, and streaming three times as many.
pub const WHOLE_BACKWARD_BYTES: usize = 112 << 10;

/// Shared memory that blocks may have, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Any block: what the device gives.
    pub block: usize,
    /// One of whole sequences.
    pub whole: usize,
    /// The same in backward in one pass.
    pub whole_backward: usize,
}

const fn least(a: usize, b: usize) -> usize {
    if a < b { a } else { b }
}

impl Room {
    /// On a device that gives a block so much.
    pub const fn of(shared_per_block: usize) -> Room {
        Room {
            block: shared_per_block,
            whole: least(WHOLE_BYTES, shared_per_block),
            whole_backward: least(WHOLE_BACKWARD_BYTES, shared_per_block),
        }
    }

    /// The same, with no sequence taken whole: to compare.
    pub const fn streamed(shared_per_block: usize) -> Room {
        Room { block: shared_per_block, whole: 0, whole_backward: 0 }
    }
}

/// How many warps share a whole sequence. Each number has a launch of its own, so that no sequence has a block that is made
/// for much longer ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Up to 32 query rows: a warp has a sequence to itself, and waits for nobody.
    One,
    /// Up to 64.
    Two,
    /// Up to [`WHOLE_ROWS`].
    Four,
}

impl Sharing {
    /// Every one.
    pub const ALL: [Sharing; 3] = [Sharing::One, Sharing::Two, Sharing::Four];

    /// Warps of a sequence.
    pub const fn warps(self) -> usize {
        match self {
            Sharing::One => 1,
            Sharing::Two => 2,
            Sharing::Four => 4,
        }
    }

    /// That of a sequence of so many query rows; `None` if it is streamed.
    pub fn of(rows: usize) -> Option<Sharing> {
        match rows {
            1..=32 => Some(Sharing::One),
            33..=64 => Some(Sharing::Two),
            65..=WHOLE_ROWS => Some(Sharing::Four),
            _ => None,
        }
    }
}

/// A direction's block of whole sequences, several in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    /// The block.
    pub block: Block,
    /// Warps that share a sequence.
    pub sharing: Sharing,
    /// Rows that one head's keys have in shared memory.
    pub capacity: usize,
    /// Tokens of the longest sequence taken so.
    pub longest: usize,
}

impl Whole {
    /// Sequences of a block.
    pub fn items(&self) -> usize {
        self.block.warps / self.sharing.warps()
    }
}

/// The blocks of all passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Forward over sequences whose scores fit registers, where there are such.
    pub forward_short: Option<Whole>,
    /// Forward over whole sequences, by [`Sharing`], where there are such. Shorter ones of these are taken as short.
    pub forward_whole: [Option<Whole>; 3],
    /// Forward over the others: query rows.
    pub forward: Block,
    /// Backward over whole sequences in one pass, by [`Sharing`], where there are such.
    pub backward_whole: [Option<Whole>; 3],
    /// dq and then dk and dv over longer whole sequences, of which one side at a time fits, where there are such.
    pub sides_whole: Option<[Whole; 2]>,
    /// dq of the others: query rows.
    pub dq: Block,
    /// dk and dv of the others: keys.
    pub dk_dv: Block,
}

/// Warps for `rows` rows: as many as are busy in the longest sequence, at most `MAX_WARPS`, and as few as
/// it takes to stay within `limit` bytes of shared memory.
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

/// The blocks of whole sequences for a batch of these lengths, by [`Sharing`]. `bytes` is the shared memory of a number of
/// sequences of so many warps and rows of keys each.
///
/// Whether a sequence is taken whole, and by how many warps, is decided by itself alone, so that its results do not depend on
/// its batch.
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

/// Rows of keys a head has in `attention_forward_short`, for a sequence of so many tokens; `None` if its scores do not fit a warp's
/// registers, or its heads are too wide to have many at a time. These are the numbers that are compiled in.
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

/// The block of such sequences: a warp has one to itself.
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

/// Query rows of a token in one problem: heads are separate ones with [`Pairing::PerHead`].
pub(crate) fn slots_of(options: &FhaOptions) -> usize {
    match options.pairing {
        Pairing::Factorized => options.query_slots(),
        Pairing::PerHead => 1,
    }
}

/// Chooses the blocks for a batch of sequences of these lengths.
///
/// # Errors
/// [`CudaError::HeadDim`] for a width that is not in [`HEAD_DIMS`]; [`CudaError::SharedMemory`] when even the
/// smallest block is too large for the device.
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
    // Wider heads have no registers left for it.
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

    /// Shared memory a block may have on sm_80, sm_86 and sm_90.
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
        // Tokens; sequences of a block; rows of keys a head.
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

    /// What is taken whole depends on the sequence alone.
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
