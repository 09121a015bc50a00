// The softmax of every row over the scores of its pair, and the weighted sum over its history.
//
// A row is an instance: a pair with a history length. The rows of a pair share its scores.
#pragma once
#include "online_softmax.cuh"
#include "target/scores.cuh"

// An instance. The rows of a pair are adjacent, longest first, in the order of the pairs.
struct Row {
    unsigned index;   // row of att, lse, datt
    unsigned length;  // tokens of its history, at most those of its pair
    unsigned score;   // first score of its pair
    unsigned token;   // first token of its sequence
};
static_assert(sizeof(Row) == 16, "mirrored by src/device/cuda/plan/target.rs");

// Up to 16 consecutive tokens of a sequence.
struct Tile {
    unsigned token;       // first token
    unsigned tokens;      // number of tokens, 1 to 16
    unsigned position;    // position of the first token in the sequence
    unsigned first_pair;  // first of the pairs that reach the tile
    unsigned pairs;       // number of pairs that reach the tile
    unsigned first_item;  // first item of the tile
    unsigned items;       // number of items
    unsigned unused;
};
static_assert(sizeof(Tile) == 32, "mirrored by src/device/cuda/plan/target.rs");

__device__ __forceinline__ Row load_row(const void* rows, unsigned index) {
    const uint4 raw = static_cast<const uint4*>(rows)[index];
    return Row{raw.x, raw.y, raw.z, raw.w};
}
__device__ __forceinline__ Tile load_tile(const void* tiles, unsigned index) {
    const uint4* const at = static_cast<const uint4*>(tiles) + 2 * size_t(index);
    const uint4 low = at[0], high = at[1];
    return Tile{low.x, low.y, low.z, low.w, high.x, high.y, high.z, 0};
}

struct SoftmaxParams {
    const void* rows;            // [R] Row
    const void* pairs;           // backward: [C] Pair
    const unsigned* pair_rows;   // backward: [C + 1] first row of each pair
    const void* tiles;           // backward: [gridDim.x] Tile
    const float* s;              // [N, width]
    const float* e;              // [S]
    float* lse;                  // [R], natural logarithm; forward writes it
    float* att;                  // [R, width]; forward writes it
    const float* datt;           // backward: [R, width]
    float* de;                   // backward: [S]
    float* ds;                   // backward: [N, width], adds to it
    unsigned row_count, width;
};
static_assert(sizeof(SoftmaxParams) == 96, "mirrored by src/device/cuda/plan/target_params.rs");

constexpr int ROW_THREADS = 256;

// att = sum of e^(e - lse) s, one warp per row. Adjacent lanes share a token, 4 columns each;
// groups of lanes take tokens in turn. Reads e twice and s once per row, from the caches, because
// the rows of a sequence are adjacent.
__device__ __forceinline__ void softmax(const SoftmaxParams& p) {
    const unsigned index = blockIdx.x * (ROW_THREADS / 32) + warp_index();
    if (index >= p.row_count) return;
    const Row row = load_row(p.rows, index);
    const int lane = lane_index();
    const float* const e = p.e + row.score;
    float peak = -INF;
    for (unsigned t = lane; t < row.length; t += 32) peak = largest(peak, e[t]);
    peak = warp_largest(peak);
    // reference() replaces the -inf of an empty history by 0.
    const float reference = OnlineSoftmax::reference(peak) * LOG2_E;
    constexpr int LANES = D / 4 < 32 ? D / 4 : 32, GROUPS = 32 / LANES;
    const int column = lane % LANES * 4;
    float sum = 0.0f;
    float4 att = zero4();
#pragma unroll 4
    for (unsigned t = lane / LANES; t < row.length; t += GROUPS) {
        const float weight = exp2_fast(multiply_add(e[t], LOG2_E, -reference));
        const float4 s = load4(p.s + size_t(row.token + t) * p.width, column, p.width);
        sum += weight;
        att = multiply_add4(make_float4(weight, weight, weight, weight), s, att);
    }
#pragma unroll
    for (int lanes = LANES; lanes < 32; lanes *= 2) {
        sum += shuffle_xor(sum, lanes);
        att = add4(att, make_float4(shuffle_xor(att.x, lanes), shuffle_xor(att.y, lanes), shuffle_xor(att.z, lanes),
                                    shuffle_xor(att.w, lanes)));
    }
    const float factor = row.length ? 1.0f / sum : 0.0f;
    if (lane < LANES) {
        store4(p.att + size_t(row.index) * p.width, column, p.width,
               make_float4(att.x * factor, att.y * factor, att.z * factor, att.w * factor));
    }
    if (lane == 0) p.lse[row.index] = row.length ? (reference + log2_fast(sum)) * LN_2 : -INF;
}

// de = sum of p (g . s - g . att) and ds += sum of p g, over the rows that see a token, with g =
// datt. A block takes 16 tokens; its warps take pairs in turn, in accumulator layout. The partial
// ds of the warps are added in order.
__device__ __forceinline__ void softmax_backward(const SoftmaxParams& p) {
    const Tile tile = load_tile(p.tiles, blockIdx.x);
    if (tile.pairs == 0) return;
    const LaneTile<D> s{reinterpret_cast<float*>(shared_memory())};
    const int warp = warp_index(), lane = lane_index(), warps = ROW_THREADS / 32;
    s.fill(threadIdx.x, ROW_THREADS, p.s + size_t(tile.token) * p.width, tile.tokens, p.width);
    __syncthreads();
    float ds[D / 8][4] = {};
    for (unsigned i = warp; i < tile.pairs; i += warps) {
        const unsigned sorted = tile.first_pair + i;
        const Pair pair = load_pair(p.pairs, sorted);
        const unsigned t[2] = {tile.position + (lane >> 2), tile.position + (lane >> 2) + 8};
        float e[2], de[2] = {0.0f, 0.0f};
#pragma unroll
        for (int half = 0; half < 2; ++half) e[half] = t[half] < pair.length ? p.e[pair.score + t[half]] : 0.0f;
        for (unsigned j = p.pair_rows[sorted]; j < p.pair_rows[sorted + 1]; ++j) {
            const Row row = load_row(p.rows, j);
            if (row.length <= tile.position) break;
            const float* const g_row = p.datt + size_t(row.index) * p.width;
            const float* const att_row = p.att + size_t(row.index) * p.width;
            const float shift = p.lse[row.index] * LOG2_E;
            float weight[2], dot[2] = {0.0f, 0.0f}, offset = 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                weight[half] = t[half] < row.length ? exp2_fast(multiply_add(e[half], LOG2_E, -shift)) : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                const float4 g = shared_columns(g_row, k, p.width), o = shared_columns(att_row, k, p.width);
                float c[2][4];
                s.get(c, k);
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const float of_column = part(g, n / 4, n % 2);
                    float& sum = dot[n / 2 % 2];
                    sum = multiply_add(c[n / 4][n % 4], of_column, sum);
                    float& gradient = ds[2 * k + n / 4][n % 4];
                    gradient = multiply_add(weight[n / 2 % 2], of_column, gradient);
                }
                offset = multiply_add(g.x, o.x, multiply_add(g.y, o.y, multiply_add(g.z, o.z, multiply_add(g.w, o.w, offset))));
            }
            offset = quad_sum(offset);
#pragma unroll
            for (int half = 0; half < 2; ++half) de[half] = multiply_add(weight[half], quad_sum(dot[half]) - offset, de[half]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if ((lane & 3) == 0 && t[half] < pair.length) p.de[pair.score + t[half]] = de[half];
        }
    }
    // The partial sums of the warps replace s, one warp after the other.
    for (int turn = 0; turn < warps; ++turn) {
        __syncthreads();
        if (turn != warp) continue;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float4& sum = s.quad((lane >> 2) + half * 8, k * 4 + (lane & 3));
                const float4 own = make_float4(ds[2 * k][half * 2], ds[2 * k][half * 2 + 1], ds[2 * k + 1][half * 2],
                                               ds[2 * k + 1][half * 2 + 1]);
                sum = turn ? add4(sum, own) : own;
            }
        }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < tile.tokens * (D / 4); i += ROW_THREADS) {
        const int row = i / (D / 4), q = i % (D / 4);
        float* const at = p.ds + size_t(tile.token + row) * p.width;
        store4(at, q * 4, p.width, add4(load4(at, q * 4, p.width), s.quad(row, q)));
    }
}
