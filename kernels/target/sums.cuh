// Before the MLP: combines the blocks of the first layer's weight. After it: adds the
// partial sums of backward by item, unit and block.
#pragma once
#include "target/softmax.cuh"

constexpr int SUM_THREADS = 256;

struct CombineParams {
    const float* w0;   // [4 width, hidden0]: blocks A, R, S, P
    const float* b0;   // [hidden0]
    float* token;      // [width, H0] A + S
    float* candidate;  // [width, H0] R - S
    float* bias;       // [H0] b0
    unsigned width, hidden0;
};
static_assert(sizeof(CombineParams) == 48, "mirrored by src/device/cuda/plan/target_params.rs");

// One thread per column of a row. The row behind the last is the bias.
__device__ __forceinline__ void combine(const CombineParams& p) {
    const unsigned i = blockIdx.x * SUM_THREADS + threadIdx.x, row = i / H0, column = i % H0;
    if (row > p.width) return;
    const bool inside = column < p.hidden0;
    if (row == p.width) {
        p.bias[column] = inside ? p.b0[column] : 0.0f;
        return;
    }
    float x[3] = {0.0f, 0.0f, 0.0f};
    if (inside) {
#pragma unroll
        for (int block = 0; block < 3; ++block) x[block] = p.w0[(size_t(block) * p.width + row) * p.hidden0 + column];
    }
    p.token[i] = x[0] + x[2];
    p.candidate[i] = x[1] - x[2];
}

struct SumParams {
    const void* list;    // sum_tokens: [gridDim.x] Tile; sum_pairs: [count] Pair
    const float* sums;   // token_sums or pair_sums
    float* hidden;       // [N, H0] dZ, or [C, H0] dc
    float* input;        // [N, width] da, or [C, width] dr
    unsigned count, width;
};
static_assert(sizeof(SumParams) == 40, "mirrored by src/device/cuda/plan/target_params.rs");

constexpr int SUM_QUADS = (H0 + D) / 4;

// Sums four columns of `count` rows, `apart` rows apart, into row `to`.
__device__ __forceinline__ void sum_quad(const SumParams& p, size_t first, unsigned count, unsigned apart, size_t to, int q) {
    const float4* const from = reinterpret_cast<const float4*>(p.sums) + first * SUM_QUADS + q;
    float4 sum = zero4();
#pragma unroll 4
    for (unsigned i = 0; i < count; ++i) sum = add4(sum, from[size_t(i) * apart * SUM_QUADS]);
    if (q < H0 / 4) reinterpret_cast<float4*>(p.hidden)[to * (H0 / 4) + q] = sum;
    else store4(p.input + to * p.width, q * 4 - H0, p.width, sum);
}

// Sums of each token over the items of its tile; 0 without items. One block per tile.
__device__ __forceinline__ void sum_tokens(const SumParams& p) {
    const Tile tile = load_tile(p.list, blockIdx.x);
    for (unsigned i = threadIdx.x; i < tile.tokens * SUM_QUADS; i += SUM_THREADS) {
        const unsigned row = i / SUM_QUADS;
        sum_quad(p, size_t(tile.first_item) * 16 + row, tile.items, 16, tile.token + row, i % SUM_QUADS);
    }
}

// Sums of each pair over its units.
__device__ __forceinline__ void sum_pairs(const SumParams& p) {
    const size_t i = size_t(blockIdx.x) * SUM_THREADS + threadIdx.x;
    if (i / SUM_QUADS >= p.count) return;
    const Pair pair = load_pair(p.list, i / SUM_QUADS);
    sum_quad(p, pair.unit, (pair.length + 15) / 16, 1, pair.index, i % SUM_QUADS);
}

struct GradientParams {
    const float* token;      // [width, H0] a^T dZ
    const float* candidate;  // [width, H0] r^T dc
    const float* bias;       // [H0] sum of dc
    const float* sums;       // [D H0 + H0 H1 + 2 H1] sums of weight_sums, by position
    float* w0;               // [4 width, hidden0]
    float* b0;               // [hidden0]
    float* w1;               // [hidden0, hidden1]
    float* b1;               // [hidden1]
    float* w2;               // [hidden1]
    float* b2;               // [1]
    unsigned width, hidden0, hidden1, unused;
};
static_assert(sizeof(GradientParams) == 96, "mirrored by src/device/cuda/plan/target_params.rs");

// Writes the weight gradients in the layout of the weights. block_y: 0 for w0, 1 for w1, 2 for
// the vectors.
__device__ __forceinline__ void gradients(const GradientParams& p, unsigned block_y) {
    const unsigned i = blockIdx.x * SUM_THREADS + threadIdx.x;
    const float* const second = p.sums + D * H0;
    const float* const vectors = second + H0 * H1;
    if (block_y == 0) {
        const unsigned row = i / p.hidden0, column = i % p.hidden0;
        if (row >= 4 * p.width) return;
        const unsigned of_block = row % p.width, at = of_block * H0 + column;
        switch (row / p.width) {
            case 0: p.w0[i] = p.token[at]; break;
            case 1: p.w0[i] = p.candidate[at]; break;
            case 2: p.w0[i] = p.token[at] - p.candidate[at]; break;
            default: p.w0[i] = p.sums[position<D>(of_block) * H0 + position<H0>(column)];
        }
    } else if (block_y == 1) {
        const unsigned row = i / p.hidden1, column = i % p.hidden1;
        if (row < p.hidden0) p.w1[i] = second[position<H0>(row) * H1 + position<H1>(column)];
    } else {
        if (i < p.hidden0) p.b0[i] = p.bias[i];
        if (i < p.hidden1) p.b1[i] = vectors[position<H1>(i)], p.w2[i] = vectors[H1 + position<H1>(i)];
        if (i == 0) *p.b2 = 0.0f;  // softmax is invariant to a constant
    }
}
