// The matrix products of attention, forward and backward. A warp owns 16 rows.
//
//     scores                 c[16 x 16]   = rows[16 x D] tile[16 x D]^T   A: shared or held
//     accumulate             acc[16 x D]  += c[16 x 16] tile[16 x D]      A: c
//     accumulate_transposed  sums[16 x D] += c[16 x 16]^T tile[16 x D]    A: c^T; sums: shared
//
// 16-bit elements use the tensor cores with f32 accumulation. Accumulator fragments of `scores`
// are, pair by pair, the A fragments of `accumulate`; each 8 x 8 matrix transposed, they are those
// of `accumulate_transposed`. f32 uses fused multiply-adds in the same accumulator layout, with
// operands from shared memory; lanes exchange c through a scratch buffer per warp.
#pragma once
#include "primitives.cuh"

// Layout of a tile in shared memory. STRIDE, in elements, is padded so that eight rows, read 16
// bytes each, cover all banks without a bank conflict.
template <class E, int D> struct Tile {
    static constexpr int STRIDE = D * sizeof(E) == 16 ? D : D + 16 / int(sizeof(E));
    static constexpr int CHUNKS = D * sizeof(E) / 16;   // 16-byte pieces of a row
    static constexpr int PER_CHUNK = 16 / sizeof(E);    // elements of a piece
};

// For the one or two elements in 32 bits: their exponent bits, and the lowest exponent bit of each.
// Adding that bit to an exponent of all ones (a non-finite value) carries into the sign.
template <class E> struct Exponent { static constexpr unsigned BITS = 0x7f800000, STEP = 0x00800000, SIGN = 0x80000000; };
template <> struct Exponent<bf16> { static constexpr unsigned BITS = 0x7f807f80, STEP = 0x00800080, SIGN = 0x80008000; };
template <> struct Exponent<f16> { static constexpr unsigned BITS = 0x7c007c00, STEP = 0x04000400, SIGN = 0x80008000; };

// Whether any element in these 16 bytes is non-finite.
template <class E> __device__ __forceinline__ bool has_non_finite(const uint4& x) {
    using X = Exponent<E>;
    const unsigned all = ((x.x & X::BITS) + X::STEP) | ((x.y & X::BITS) + X::STEP) | ((x.z & X::BITS) + X::STEP) |
                         ((x.w & X::BITS) + X::STEP);
    return all & X::SIGN;
}

// Bit mask of those of 16 rows that hold a non-finite element.
template <class E, int D> __device__ __forceinline__ unsigned non_finite_rows(const E* tile) {
    using T = Tile<E, D>;
    const E* const row = tile + (lane_index() & 15) * T::STRIDE;
    bool non_finite = false;
    for (int chunk = lane_index() >> 4; chunk < T::CHUNKS; chunk += 2) {
        non_finite |= has_non_finite<E>(*reinterpret_cast<const uint4*>(row + chunk * T::PER_CHUNK));
    }
    const unsigned rows = ballot(non_finite);
    return (rows | rows >> 16) & 0xffff;
}

constexpr int SCRATCH_STRIDE = 20;
// Floats of scratch memory per warp.
template <class E> constexpr int SCRATCH = 0;
template <> constexpr int SCRATCH<float> = 16 * SCRATCH_STRIDE;

// The A operand of `scores`: 16 rows in shared memory. HELD keeps the fragments in registers.
template <class E, int D, bool HELD> struct Rows {
    static constexpr int K = D >= 16 ? 16 : 8;  // depth of one product
    static constexpr int STEPS = D / K;

    const E* at = nullptr;
    unsigned held[HELD ? STEPS : 1][K / 4];

    __device__ __forceinline__ void load(unsigned (&a)[K / 4], int step) const {
        const int lane = lane_index();
        load_matrices(a, at + (lane & 15) * Tile<E, D>::STRIDE + step * K + (K == 16 ? (lane >> 4) * 8 : 0));
    }
    // This warp wrote `tile` and has synchronised since.
    __device__ __forceinline__ void set(const E* tile) {
        at = tile;
        if constexpr (HELD) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) load(held[step], step);
        }
    }
    __device__ __forceinline__ void get(unsigned (&a)[K / 4], int step) const {
        if constexpr (HELD) {
#pragma unroll
            for (int i = 0; i < K / 4; ++i) a[i] = held[step][i];
        } else {
            load(a, step);
        }
    }
};

template <int D, bool HELD> struct Rows<float, D, HELD> {
    const float* at = nullptr;
    __device__ __forceinline__ void set(const float* tile) { at = tile; }
};

template <class E, int D, bool HELD>
__device__ __forceinline__ void scores(float (&c)[2][4], const Rows<E, D, HELD>& rows, const E* tile) {
    constexpr int STRIDE = Tile<E, D>::STRIDE;
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = 0.0f;
    if constexpr (sizeof(E) == 4) {
        const float* a = rows.at + (lane >> 2) * STRIDE;
        const float* b = tile + (lane & 3) * 2 * STRIDE;
#pragma unroll 2
        for (int k = 0; k < D; k += 4) {
            const float4 x[2] = {*reinterpret_cast<const float4*>(a + k),
                                 *reinterpret_cast<const float4*>(a + 8 * STRIDE + k)};
            const float4 y[4] = {*reinterpret_cast<const float4*>(b + k),
                                 *reinterpret_cast<const float4*>(b + STRIDE + k),
                                 *reinterpret_cast<const float4*>(b + 8 * STRIDE + k),
                                 *reinterpret_cast<const float4*>(b + 9 * STRIDE + k)};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4& u = x[i / 2 % 2];
                const float4& w = y[i / 4 * 2 + i % 2];
                float& s = c[i / 4][i % 4];
                s = multiply_add(u.x, w.x, s);
                s = multiply_add(u.y, w.y, s);
                s = multiply_add(u.z, w.z, s);
                s = multiply_add(u.w, w.w, s);
            }
        }
    } else if constexpr (D == 8) {
        unsigned a[2], b[2];
        rows.get(a, 0);
        load_matrices(b, tile + (lane & 15) * STRIDE);
        multiply<E>(c[0], a, b[0]);
        multiply<E>(c[1], a, b[1]);
    } else {
        const E* at = tile + ((lane & 7) + (lane >> 4) * 8) * STRIDE + (lane >> 3 & 1) * 8;
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            unsigned a[4], b[4];
            rows.get(a, step);
            load_matrices(b, at + step * 16);
            multiply<E>(c[0], a, b[0], b[1]);
            multiply<E>(c[1], a, b[2], b[3]);
        }
    }
}

// An f32 score above this magnitude (in base 2) is rounded by more than 2^-18, too coarse for the
// f32 path: its low half is computed as well.
constexpr float LARGE_SCORE = 64.0f;

// Recomputes large scores of the f32 path: c + low is the compensated product. Scores of -inf,
// including hidden pairs, stay -inf.
template <class E, int D, bool HELD>
__device__ __forceinline__ void refine(float (&c)[2][4], float (&low)[2][4], float scale, const Rows<E, D, HELD>& rows,
                                       const E* tile) {
    if constexpr (sizeof(E) == 4) {
        bool large = false;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float size = magnitude(c[i / 4][i % 4] * scale);
            large |= size > LARGE_SCORE && size < INF;
            low[i / 4][i % 4] = 0.0f;
        }
        if (!any_lane(large)) return;
        constexpr int STRIDE = Tile<E, D>::STRIDE;
        const int lane = lane_index();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float* const a = rows.at + ((lane >> 2) + i / 2 % 2 * 8) * STRIDE;
            const float* const b = tile + ((lane & 3) * 2 + i / 4 * 8 + i % 2) * STRIDE;
            float sum = 0.0f, rest = 0.0f;
#pragma unroll 4
            for (int k = 0; k < D; ++k) {
                const float product = multiply_exactly(a[k], b[k]), next = add_exactly(sum, product);
                const float took = add_exactly(next, -sum);
                rest += multiply_add(a[k], b[k], -product) +
                        add_exactly(add_exactly(sum, -add_exactly(next, -took)), add_exactly(product, -took));
                sum = next;
            }
            const float size = magnitude(c[i / 4][i % 4] * scale);
            if (!(size > LARGE_SCORE && size < INF)) continue;  // not large itself
            c[i / 4][i % 4] = sum;
            low[i / 4][i % 4] = rest;
        }
    }
}

// scale * score - shift, for a refined score.
template <class E> __device__ __forceinline__ float exponent(float score, float low, float scale, float shift) {
    const float x = multiply_add(score, scale, -shift);
    return sizeof(E) == 4 ? multiply_add(low, scale, x) : x;
}

// Exchanges c, or its transpose, between lanes through `scratch`: row-major, SCRATCH<E> floats per
// warp.
template <bool TRANSPOSED> __device__ __forceinline__ void exchange(float* scratch, const float (&c)[2][4]) {
    const int lane = lane_index(), row = lane >> 2, column = (lane & 3) * 2;
    __syncwarp();  // all lanes have read the previous content
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 x = make_float2(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
        const int r = row + i % 2 * 8, k = i / 2 * 8 + column;
        if constexpr (TRANSPOSED) {
            scratch[k * SCRATCH_STRIDE + r] = x.x;
            scratch[(k + 1) * SCRATCH_STRIDE + r] = x.y;
        } else {
            *reinterpret_cast<float2*>(scratch + r * SCRATCH_STRIDE + k) = x;
        }
    }
    __syncwarp();
}

// acc += exchanged c times COUNT * 8 columns of the tile. CAREFUL: `non_finite` rows of the tile
// count as zeros.
template <int COUNT, bool CAREFUL>
__device__ __forceinline__ void accumulate_exchanged(float (&acc)[COUNT][4], const float* scratch, const float* tile, int stride,
                                                     unsigned non_finite) {
    const int lane = lane_index(), row = lane >> 2, column = (lane & 3) * 2;
#pragma unroll 4
    for (int k = 0; k < 16; ++k) {
        const float low = scratch[row * SCRATCH_STRIDE + k];
        const float high = scratch[(row + 8) * SCRATCH_STRIDE + k];
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            float2 b = *reinterpret_cast<const float2*>(tile + k * stride + n * 8 + column);
            if (CAREFUL && non_finite >> k & 1) b = make_float2(0.0f, 0.0f);
            acc[n][0] = multiply_add(low, b.x, acc[n][0]);
            acc[n][1] = multiply_add(low, b.y, acc[n][1]);
            acc[n][2] = multiply_add(high, b.x, acc[n][2]);
            acc[n][3] = multiply_add(high, b.y, acc[n][3]);
        }
    }
}

// c as the A operand of a product: pairs rounded to the element type.
template <class E> __device__ __forceinline__ void round_pairs(unsigned (&a)[4], const float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<E>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// `load_matrices_transposed`. CAREFUL: `non_finite` rows of the tile count as zeros.
template <bool CAREFUL, int COUNT>
__device__ __forceinline__ void load_rows(unsigned (&b)[COUNT], const void* row, unsigned non_finite) {
    load_matrices_transposed(b, row);
    if constexpr (CAREFUL) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const unsigned two = non_finite >> ((lane_index() & 3) * 2 + i % 2 * 8);
            b[i] &= (two & 1 ? 0 : 0x0000ffffu) | (two & 2 ? 0 : 0xffff0000u);
        }
    }
}

// acc += a tile, where `a` comes from `round_pairs`.
template <class E, int D, bool CAREFUL = false>
__device__ __forceinline__ void accumulate_pairs(float (&acc)[D / 8][4], const unsigned (&a)[4], const E* tile, unsigned non_finite = 0) {
    const int lane = lane_index();
    const E* at = tile + (lane & 15) * Tile<E, D>::STRIDE;
    if constexpr (D == 8) {
        unsigned b[2];
        load_rows<CAREFUL>(b, at, non_finite);
        multiply<E>(acc[0], a, b[0], b[1]);
    } else {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned b[4];
            load_rows<CAREFUL>(b, at + n * 16 + (lane >> 4) * 8, non_finite);
            multiply<E>(acc[2 * n], a, b[0], b[1]);
            multiply<E>(acc[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// `scratch`: SCRATCH<E> floats of this warp.
template <class E, int D, bool CAREFUL = false>
__device__ __forceinline__ void accumulate(float (&acc)[D / 8][4], const float (&c)[2][4], const E* tile, float* scratch,
                                           unsigned non_finite = 0) {
    if constexpr (sizeof(E) == 4) {
        exchange<false>(scratch, c);
        accumulate_exchanged<D / 8, CAREFUL>(acc, scratch, tile, Tile<E, D>::STRIDE, non_finite);
    } else {
        unsigned a[4];
        round_pairs<E>(a, c);
        accumulate_pairs<E, D, CAREFUL>(acc, a, tile, non_finite);
    }
}

// `accumulate` for a tile that may hold non-finite rows: such a row gives NaN to the rows of c that
// see it and does not change the others. `sees`(i): whether element i of c, in flat order, is
// visible.
template <class E, int D, class Sees>
__device__ __forceinline__ void accumulate_carefully(float (&acc)[D / 8][4], float (&c)[2][4], const E* tile, float* scratch, Sees sees) {
    const unsigned non_finite = non_finite_rows<E, D>(tile);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int column = i / 4 * 8 + (lane_index() & 3) * 2 + i % 2;
        if (non_finite >> column & 1) c[i / 4][i % 4] = sees(i) ? NOT_A_NUMBER : 0.0f;
    }
    accumulate<E, D, true>(acc, c, tile, scratch, non_finite);
}

// sums[16 x D] += c[16 x 16]^T tile[16 x D], with sums in shared memory. A fixed lane owns each
// element of sums. The sums are loaded and stored a few columns at a time, so that wide heads need
// no more registers.
template <class E, int D, bool CAREFUL = false>
__device__ __forceinline__ void accumulate_transposed(float* sums, int stride, const float (&c)[2][4], const E* tile,
                                                      float* scratch, unsigned non_finite = 0) {
    constexpr int STRIDE = Tile<E, D>::STRIDE, MOST = sizeof(E) == 4 ? 4 : 2, COUNT = D / 8 < MOST ? D / 8 : MOST;
    const int lane = lane_index(), column = (lane & 3) * 2;
    unsigned a[4];
    if constexpr (sizeof(E) == 4) {
        exchange<true>(scratch, c);
    } else {
        unsigned x[4];
        round_pairs<E>(x, c);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = transpose_matrix(x[i % 2 * 2 + i / 2]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += COUNT) {
        float acc[COUNT][4];
        float* const at = sums + (lane >> 2) * stride + n * 8 + column;
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            const float2 low = *reinterpret_cast<const float2*>(at + m * 8);
            const float2 high = *reinterpret_cast<const float2*>(at + 8 * stride + m * 8);
            acc[m][0] = low.x, acc[m][1] = low.y, acc[m][2] = high.x, acc[m][3] = high.y;
        }
        if constexpr (sizeof(E) == 4) {
            accumulate_exchanged<COUNT, CAREFUL>(acc, scratch, tile + n * 8, STRIDE, non_finite);
        } else if constexpr (COUNT == 1) {
            unsigned b[2];
            load_rows<CAREFUL>(b, tile + (lane & 15) * STRIDE, non_finite);
            multiply<E>(acc[0], a, b[0], b[1]);
        } else {
            unsigned b[4];
            load_rows<CAREFUL>(b, tile + (lane & 15) * STRIDE + n * 8 + (lane >> 4) * 8, non_finite);
            multiply<E>(acc[0], a, b[0], b[1]);
            multiply<E>(acc[1], a, b[2], b[3]);
        }
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            *reinterpret_cast<float2*>(at + m * 8) = make_float2(acc[m][0], acc[m][1]);
            *reinterpret_cast<float2*>(at + 8 * stride + m * 8) = make_float2(acc[m][2], acc[m][3]);
        }
    }
}

// `accumulate_transposed` for a tile that may hold non-finite rows; see `accumulate_carefully`.
template <class E, int D, class Sees>
__device__ __forceinline__ void accumulate_transposed_carefully(float* sums, int stride, float (&c)[2][4], const E* tile, float* scratch,
                                                                Sees sees) {
    const unsigned non_finite = non_finite_rows<E, D>(tile);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (non_finite >> ((lane_index() >> 2) + i / 2 % 2 * 8) & 1) c[i / 4][i % 4] = sees(i) ? NOT_A_NUMBER : 0.0f;
    }
    accumulate_transposed<E, D, true>(sums, stride, c, tile, scratch, non_finite);
}

// Adds 0 times the first accumulator row of this thread to `zero`, which becomes NaN if an element
// of the row is non-finite.
template <int D> __device__ __forceinline__ void add_zeros(float& zero, const float (&acc)[D / 8][4]) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        zero = multiply_add(acc[n][0], 0.0f, zero);
        zero = multiply_add(acc[n][1], 0.0f, zero);
    }
}

// Writes an accumulator, times `factor`, to 16 rows of floats.
template <int D>
__device__ __forceinline__ void store_accumulator(float* to, int stride, const float (&acc)[D / 8][4], float factor) {
    const int lane = lane_index(), row = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        float* at = to + row * stride + n * 8 + column;
        *reinterpret_cast<float2*>(at) = make_float2(acc[n][0] * factor, acc[n][1] * factor);
        *reinterpret_cast<float2*>(at + 8 * stride) = make_float2(acc[n][2] * factor, acc[n][3] * factor);
    }
}

// Writes an accumulator, times `factor`, to a tile in the element type.
template <class E, int D>
__device__ __forceinline__ void store_elements(E* tile, const float (&acc)[D / 8][4], float factor) {
    constexpr int STRIDE = Tile<E, D>::STRIDE;
    if constexpr (sizeof(E) == 4) {
        store_accumulator<D>(tile, STRIDE, acc, factor);
    } else {
        E* const at = tile + (lane_index() >> 2) * STRIDE + (lane_index() & 3) * 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<unsigned*>(at + n * 8) = pack<E>(acc[n][0] * factor, acc[n][1] * factor);
            *reinterpret_cast<unsigned*>(at + 8 * STRIDE + n * 8) = pack<E>(acc[n][2] * factor, acc[n][3] * factor);
        }
    }
}

// Converts floats, times `factor`, to 16 bytes of elements.
template <class E> __device__ __forceinline__ uint4 narrow(const float* from, float factor) {
    const float4 a = *reinterpret_cast<const float4*>(from);
    if constexpr (sizeof(E) == 4) {
        return make_uint4(__float_as_uint(a.x * factor), __float_as_uint(a.y * factor), __float_as_uint(a.z * factor),
                          __float_as_uint(a.w * factor));
    } else {
        const float4 b = *reinterpret_cast<const float4*>(from + 4);
        return make_uint4(pack<E>(a.x * factor, a.y * factor), pack<E>(a.z * factor, a.w * factor),
                          pack<E>(b.x * factor, b.y * factor), pack<E>(b.z * factor, b.w * factor));
    }
}
