// The forward pass of the MLP; work items and arguments of both directions.
#pragma once
#include "target/layers.cuh"

// A work item: 16 consecutive tokens of a sequence and up to 32 of the pairs whose history reaches
// them.
struct Item {
    unsigned token;       // first token
    unsigned position;    // its position in the sequence, a multiple of 16
    unsigned first_pair;  // first pair of the sorted list, the longest of the item
    unsigned pairs;       // number of pairs, at least 1
};
static_assert(sizeof(Item) == 16, "mirrored by src/device/cuda/plan/target.rs");

// A (sequence, candidate) pair. The pairs of a sequence are sorted longest first, so those that
// reach a token are a prefix.
struct Pair {
    unsigned index;   // row of r, c, dr, dc
    unsigned score;   // first score
    unsigned length;  // number of scores: tokens of its history
    unsigned unit;    // first row of pair_sums; one row per sixteen tokens
};
static_assert(sizeof(Pair) == 16, "mirrored by src/device/cuda/plan/target.rs");

// Arguments of forward and backward. N tokens, C pairs, S scores; padded sizes D, H0, H1.
struct MlpParams {
    const void* items;    // [item_count] Item
    const void* pairs;    // [C] Pair
    const float* a;       // [N, width]
    const float* r;       // [C, width]
    const float* z;       // [N, H0] a (A + S)
    const float* c;       // [C, H0] r (R - S) + b0
    const float* w0;      // [4 width, hidden0]
    const float* w1;      // [hidden0, hidden1]
    const float* b1;      // [hidden1]
    const float* w2;      // [hidden1]
    const float* b2;      // [1]
    float* e;             // [S] forward
    const float* de;      // [S] backward, as all outputs below
    float* token_sums;    // [item_count, 16, H0 + D] dz and y r (part of da), summed over its pairs
    float* pair_sums;     // [units, H0 + D] dz and y a (part of dr), summed over sixteen tokens
    float* weight_sums;   // [blocks, D H0 + H0 H1 + 2 H1] gradients of P, w1, b1, w2, by position
    unsigned item_count, width, hidden0, hidden1;
    unsigned blocks;      // gridDim.x
    float slope;          // what a score loses for each later token of its pair
};
static_assert(sizeof(MlpParams) == 152, "mirrored by src/device/cuda/plan/target_params.rs");

__device__ __forceinline__ Item load_item(const void* items, unsigned index) {
    const uint4 raw = static_cast<const uint4*>(items)[index];
    return Item{raw.x, raw.y, raw.z, raw.w};
}
__device__ __forceinline__ Pair load_pair(const void* pairs, unsigned index) {
    const uint4 raw = static_cast<const uint4*>(pairs)[index];
    return Pair{raw.x, raw.y, raw.z, raw.w};
}
// Number of the 16 tokens from `position` on that lie before `length`.
__device__ __forceinline__ int rows_within(unsigned length, unsigned position) {
    return length <= position ? 0 : length - position < 16 ? int(length - position) : 16;
}

__device__ __forceinline__ float relu(float x) { return x > 0.0f ? x : 0.0f; }

// x = a * r, for sixteen columns.
__device__ __forceinline__ void product_inputs(float (&x)[2][4], const LaneTile<D>& a, int sixteen, float4 r) {
    a.get(x, sixteen);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i / 4][i % 4] *= part(r, i / 4, i % 2);
}

// Starts the first layer at z + c, for sixteen columns.
__device__ __forceinline__ void layer_inputs(float (&h)[2][4], const LaneTile<H0>& z, int sixteen, float4 c) {
    z.get(h, sixteen);
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i / 4][i % 4] += part(c, i / 4, i % 2);
}

// Starts the second layer at its bias.
__device__ __forceinline__ void start_second(float (&h1)[H1 / 8][4], const Weights& weights) {
#pragma unroll
    for (int n = 0; n < H1 / 8; ++n) {
        const float2 b = *reinterpret_cast<const float2*>(weights.b1 + n * 8 + (lane_index() & 3) * 2);
        h1[n][0] = h1[n][2] = b.x;
        h1[n][1] = h1[n][3] = b.y;
    }
}

// Pairs that a warp takes at once: one read of a weight fragment from shared memory serves all of
// them.
constexpr int AT_ONCE = 2;

// e = relu(relu(z + c + (a * r) P) W1 + b1) . w2 + b2 - slope * later, one warp per item. `later` is
// the number of later tokens of the pair.
__device__ __forceinline__ void scores(const MlpParams& p) {
    Carve carve{shared_memory()};
    const Weights weights(carve, p);
    const int warp = warp_index(), lane = lane_index();
    const LaneTile<D> a{carve.take<float>(WARPS * LaneTile<D>::FLOATS) + warp * LaneTile<D>::FLOATS};
    const LaneTile<H0> z{carve.take<float>(WARPS * LaneTile<H0>::FLOATS) + warp * LaneTile<H0>::FLOATS};
    // f32: staged rows of x, and of sixteen columns of the first layer.
    constexpr int H_STRIDE = stride_of(16), SCRATCH = EXACT ? 16 * (X_STRIDE + H_STRIDE) : 0;
    E* const scratch = carve.take<E>(WARPS * AT_ONCE * SCRATCH) + warp * AT_ONCE * SCRATCH;
    __syncthreads();
    for (unsigned index = blockIdx.x * WARPS + warp; index < p.item_count; index += p.blocks * WARPS) {
        const Item item = load_item(p.items, index);
        const int rows = rows_within(load_pair(p.pairs, item.first_pair).length, item.position);
        a.fill(lane, 32, p.a + size_t(item.token) * p.width, rows, p.width);
        z.fill(lane, 32, p.z + size_t(item.token) * H0, rows, H0);
#pragma unroll 1
        for (unsigned first = 0; first < item.pairs; first += AT_ONCE) {
            Pair pair[AT_ONCE];
            Operand<E> x[D / 16][AT_ONCE];
            float h1[AT_ONCE][H1 / 8][4];
            __syncwarp();  // f32: all lanes have read the scratch rows
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                // With an odd number of pairs, the last is scored twice and written once.
                const unsigned last = item.pairs - 1, at = first + m < last ? first + m : last;
                pair[m] = load_pair(p.pairs, item.first_pair + at);
                E* const x_rows = scratch + m * SCRATCH;
#pragma unroll
                for (int k = 0; k < D / 16; ++k) {
                    float c[2][4];
                    product_inputs(c, a, k, shared_columns(p.r + size_t(pair[m].index) * p.width, k, p.width));
                    if constexpr (EXACT) stage(x_rows + k * 16, X_STRIDE, c);
                    x[k][m] = operand<2>(c, x_rows + k * 16, X_STRIDE);
                }
                start_second(h1[m], weights);
            }
            __syncwarp();
#pragma unroll 1
            for (int n = 0; n < H0 / 16; ++n) {
                float h0[AT_ONCE][2][4];
                Operand<E> h[AT_ONCE];
#pragma unroll
                for (int m = 0; m < AT_ONCE; ++m) layer_inputs(h0[m], z, n, shared_columns(p.c + size_t(pair[m].index) * H0, n, H0));
#pragma unroll
                for (int k = 0; k < D / 16; ++k) multiply_rows<16>(h0, x[k], weights.product + k * 16 * H0_STRIDE + n * 16, H0_STRIDE);
#pragma unroll
                for (int m = 0; m < AT_ONCE; ++m) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) h0[m][i / 4][i % 4] = relu(h0[m][i / 4][i % 4]);
                    E* const h_rows = scratch + m * SCRATCH + 16 * X_STRIDE;
                    if constexpr (EXACT) stage(h_rows, H_STRIDE, h0[m]);
                    h[m] = operand<2>(h0[m], h_rows, H_STRIDE);
                }
                if constexpr (EXACT) __syncwarp();
                multiply_rows<H1>(h1, h, weights.second + n * 16 * H1_STRIDE, H1_STRIDE);
                if constexpr (EXACT) __syncwarp();
            }
#pragma unroll
            for (int m = 0; m < AT_ONCE; ++m) {
                float sum[2] = {0.0f, 0.0f};
#pragma unroll
                for (int n = 0; n < H1 / 8; ++n) {
                    const float2 w = *reinterpret_cast<const float2*>(weights.w2 + n * 8 + (lane & 3) * 2);
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[i / 2] = multiply_add(relu(h1[m][n][i]), i % 2 ? w.y : w.x, sum[i / 2]);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const unsigned t = item.position + (lane >> 2) + half * 8;
                    const float e = quad_sum(sum[half]) + weights.b2 - p.slope * float(pair[m].length - 1 - t);
                    if ((lane & 3) == 0 && t < pair[m].length && first + m < item.pairs) p.e[pair[m].score + t] = e;
                }
            }
        }
    }
}
