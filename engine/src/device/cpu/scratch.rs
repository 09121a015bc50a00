//! Scratch memory: each thread keeps its buffers and reuses them in later calls.

use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;

/// Values per cache line and per widest vector. Padded rows start at a multiple.
pub const LINE: usize = 16;

/// One cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// `len` rounded up to whole cache lines.
pub const fn padded(len: usize) -> usize {
    len.next_multiple_of(LINE)
}

/// Runs `f` on `len` values of unspecified content, aligned to a cache line. Calls may nest.
pub fn with_scratch<T>(len: usize, f: impl FnOnce(&mut [f32]) -> T) -> T {
    let lines = len.div_ceil(LINE);
    let mut buffer = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < lines {
        buffer.resize(lines, Zeroable::zeroed());
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut buffer[..lines])[..len]);
    FREE.with_borrow_mut(|free| free.push(buffer));
    result
}

/// Splits `N` parts, each padded to whole cache lines, off the front of `memory`. See
/// [`carved_len`].
pub fn carve<'a, const N: usize>(memory: &mut &'a mut [f32], lens: [usize; N]) -> [&'a mut [f32]; N] {
    lens.map(|len| {
        let (part, rest) = std::mem::take(memory).split_at_mut(padded(len));
        *memory = rest;
        &mut part[..len]
    })
}

/// Values needed to [`carve`] parts of these lengths.
pub fn carved_len(lens: &[usize]) -> usize {
    lens.iter().copied().map(padded).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_memory_is_reused() {
        let address = with_scratch(carved_len(&[3, 17, 0]), |memory| {
            let mut rest = &mut memory[..];
            let parts = carve(&mut rest, [3, 17, 0]);
            assert_eq!(parts.each_ref().map(|p| p.len()), [3, 17, 0]);
            assert!(parts.iter().all(|p| (p.as_ptr() as usize).is_multiple_of(64)));
            assert!(rest.is_empty());
            parts[0].as_ptr() as usize
        });
        with_scratch(5, |outer| {
            assert_eq!(outer.as_ptr() as usize, address);
            with_scratch(5, |inner| assert_ne!(inner.as_ptr() as usize, address));
        });
    }
}
