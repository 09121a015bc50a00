//! Dynamic shared memory in bytes, as the kernels of `attention/attention.cu` carve it.

/// Adds up shared memory as `Carve` of `carve.cuh` does: every array is padded to 16 bytes.
#[derive(Default)]
pub(crate) struct Carve(usize);

impl Carve {
    pub(crate) fn take(&mut self, count: usize, size: usize) -> &mut Self {
        self.0 += (count * size).next_multiple_of(16);
        self
    }
    /// Total bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.0
    }
}

/// A compiled variant, with the sizes of `attention/warp_product.cuh` and `attention/attention.cu`.
pub(crate) struct Variant {
    pub(crate) size: usize,
    pub(crate) head_dim: usize,
}

impl Variant {
    /// `Tile<E, D>::STRIDE`: 16 bytes of padding per row avoid bank conflicts, because eight rows
    /// then cover all banks once. Rows of 16 bytes need no padding.
    fn stride(&self) -> usize {
        if self.head_dim * self.size == 16 { self.head_dim } else { self.head_dim + 16 / self.size }
    }
    /// `TILE_ROWS<E, D>`: 64 rows keep more loads in flight; 32 let wide heads fit shared memory.
    fn tile(&self) -> usize {
        if self.size == 2 && self.head_dim <= 32 { 64 } else { 32 }
    }
    /// `SCRATCH<E>`, in floats.
    fn scratch(&self) -> usize {
        if self.size == 4 { 16 * 20 } else { 0 }
    }

    pub(crate) fn forward(&self, warps: usize, key_heads: usize) -> usize {
        let mut carve = Carve::default();
        carve
            .take(2 * self.tile() * self.stride(), self.size)
            .take(2 * self.tile() * self.stride(), self.size);
        carve.take(warps * 16 * self.stride(), self.size);
        carve.take(warps * 16 * (key_heads * self.head_dim + 4), 4);
        carve.take(warps * 16 * (key_heads + 2), 4);
        carve.take(warps * self.scratch(), 4);
        carve.bytes()
    }

    pub(crate) fn forward_whole(
        &self,
        items: usize,
        item_warps: usize,
        capacity: usize,
        key_heads: usize,
    ) -> usize {
        let (keys, warps) = (items * key_heads * capacity * self.stride(), items * item_warps);
        let mut carve = Carve::default();
        carve.take(keys, self.size).take(keys, self.size);
        carve.take(warps * 16 * self.stride(), self.size);
        carve.take(warps * 16 * (key_heads * self.head_dim + 4), 4);
        carve.take(warps * 16 * (key_heads + 2), 4);
        carve.take(warps * self.scratch(), 4);
        carve.bytes()
    }

    pub(crate) fn forward_short(&self, items: usize, capacity: usize, key_heads: usize) -> usize {
        let keys = items * key_heads * capacity * self.stride();
        let mut carve = Carve::default();
        carve.take(keys, self.size).take(keys, self.size);
        carve.take(items * 16 * self.stride(), self.size);
        carve.take(items * 16 * (key_heads * self.head_dim + 16 / self.size), self.size);
        carve.bytes()
    }

    pub(crate) fn backward_whole(
        &self,
        items: usize,
        item_warps: usize,
        capacity: usize,
        slots: usize,
        key_heads: usize,
    ) -> usize {
        let (keys, rows) = (items * key_heads * capacity * self.stride(), items * capacity * slots);
        // `DQ_STRIDE<D>`
        let dq_stride = if self.head_dim == 8 { 8 } else { self.head_dim + 8 };
        let corrected = if self.size == 4 { rows } else { 0 };
        let mut carve = Carve::default();
        carve.take(keys, self.size).take(keys, self.size);
        carve.take(rows * self.stride(), self.size).take(key_heads * rows * self.stride(), self.size);
        carve.take(rows, 4).take(rows, 4).take(corrected, 4);
        carve.take(item_warps * rows * dq_stride, 4);
        carve.take(items * item_warps * self.scratch(), 4);
        carve.bytes()
    }

    pub(crate) fn dq_whole(&self, warps: usize, capacity: usize, key_heads: usize) -> usize {
        let keys = key_heads * capacity * self.stride();
        let mut carve = Carve::default();
        carve.take(keys, self.size).take(keys, self.size);
        carve.take(warps * 16 * self.stride(), self.size).take(warps * 16 * self.stride(), self.size);
        carve.take(warps * 16 * (self.head_dim + 4), 4).take(warps * self.scratch(), 4);
        carve.bytes()
    }

    pub(crate) fn dk_dv_whole(&self, warps: usize, capacity: usize, slots: usize, key_heads: usize) -> usize {
        let rows = capacity * slots;
        let corrected = if self.size == 4 { rows } else { 0 };
        let mut carve = Carve::default();
        carve.take(warps * 16 * self.stride(), self.size).take(warps * 16 * self.stride(), self.size);
        carve.take(rows * self.stride(), self.size).take(key_heads * rows * self.stride(), self.size);
        carve.take(rows, 4).take(rows, 4).take(corrected, 4).take(warps * self.scratch(), 4);
        carve.bytes()
    }

    pub(crate) fn dq(&self, warps: usize) -> usize {
        let mut carve = Carve::default();
        carve
            .take(2 * self.tile() * self.stride(), self.size)
            .take(2 * self.tile() * self.stride(), self.size);
        carve.take(warps * 16 * self.stride(), self.size).take(warps * 16 * self.stride(), self.size);
        carve.take(warps * 16 * (self.head_dim + 4), 4).take(warps * self.scratch(), 4);
        carve.bytes()
    }

    pub(crate) fn dk_dv(&self, warps: usize) -> usize {
        let mut carve = Carve::default();
        let corrected = if self.size == 4 { 2 * self.tile() } else { 0 };
        carve.take(2 * self.tile(), 4).take(2 * self.tile(), 4).take(corrected, 4);
        carve.bytes() + self.dq(warps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by hand from the declarations in `attention/attention.cu`.
    #[test]
    fn shared_memory_adds_up() {
        let paper = Variant { size: 2, head_dim: 16 };
        let tiles = 2 * (2 * 64 * 24 * 2);
        assert_eq!(paper.forward(4, 2), tiles + 4 * 16 * 24 * 2 + 4 * 16 * 36 * 4 + 4 * 16 * 4 * 4);
        assert_eq!(paper.dq(4), tiles + 2 * (4 * 16 * 24 * 2) + 4 * 16 * 20 * 4);
        assert_eq!(paper.dk_dv(4), paper.dq(4) + 2 * (2 * 64 * 4));
        let keys = 2 * (2 * 64 * 24 * 2);
        assert_eq!(
            paper.forward_whole(1, 2, 64, 2),
            keys + 32 * 24 * 2 + 32 * 36 * 4 + 32 * 4 * 4,
            "k and v, and of two warps q, o of both heads, references"
        );
        assert_eq!(
            paper.forward_short(4, 64, 2),
            4 * (keys + 16 * 24 * 2 + 16 * 40 * 2),
            "k and v, q, o of both heads"
        );
        assert_eq!(
            paper.backward_whole(1, 2, 64, 1, 2),
            keys + 64 * 24 * 2 + 2 * (64 * 24 * 2) + 2 * (64 * 4) + 2 * (64 * 24 * 4),
            "k and v, q, d_o of both heads, lse and delta, dq of two warps"
        );
    }
}
