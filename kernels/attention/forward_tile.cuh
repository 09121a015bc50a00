// A tile of keys in forward, whole or streamed, and the outputs of key heads.
//
// The denominator is known after the last key head. Until then the unnormalized outputs of finished
// heads wait in shared memory, in f32.
#pragma once
#include "attention/rows.cuh"

// A tile whose columns are visible to all rows of the warp, when every row has a reference: no
// maximum, no column test, no branch between the products. Returns false if a reference was too
// low; then only `slack` has changed.
template <class E, int D, bool KEPT>
__device__ __forceinline__ bool take_seen_tile(float (&acc)[D / 8][4], OnlineSoftmax& softmax, const Rows<E, D, true>& q, float scale,
                                               const E* keys, const E* values, float (&slack)[2]) {
    constexpr int CHUNKS = TILE_ROWS<E, D> / 16, STRIDE = Tile<E, D>::STRIDE;
    float s[CHUNKS][2][4], sum[2] = {0.0f, 0.0f};
    unsigned pairs[CHUNKS][4];
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) scores(s[j], q, keys + j * 16 * STRIDE);
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float& x = s[j][i / 4][i % 4];
            x = exponent<E>(x, 0.0f, scale, softmax.peak[i / 2 % 2]);
            x = i < DFAR_POLYNOMIAL ? exp2_polynomial(x) : exp2_fast(x);
            sum[i / 2 % 2] += x;
        }
        if constexpr (KEPT) round_pairs<E>(pairs[j], s[j]);
    }
    if (!OnlineSoftmax::reference_holds(sum, slack)) return false;
    softmax.sum[0] += sum[0];
    softmax.sum[1] += sum[1];
    if constexpr (KEPT) {
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) accumulate_pairs<E, D>(acc, pairs[j], values + j * 16 * STRIDE);
    }
    return true;
}

// Takes a tile of keys, and of values if `kept`, for the warp's rows. A row sees `limit` of its
// columns, all rows see `seen_by_all`, the last row sees `columns`. `started`: every row has seen a
// key. A tile that is not kept adds to the denominator only.
template <class E, int D, bool CAREFUL>
__device__ __forceinline__ void take_tile(float (&acc)[D / 8][4], OnlineSoftmax& softmax, bool& started, const Rows<E, D, !CAREFUL>& q,
                                          float scale, const E* keys, const E* values, bool kept, float* scratch, int columns,
                                          int seen_by_all, const int (&limit)[2]) {
    constexpr int KEYS = TILE_ROWS<E, D>, STRIDE = Tile<E, D>::STRIDE;
    constexpr int AT_ONCE = CAREFUL ? 1 : KEYS / 16;  // chunks with scores in registers
    const int lane = lane_index();
    float slack[2] = {OnlineSoftmax::SLACK, OnlineSoftmax::SLACK};
    if constexpr (sizeof(E) == 2) {
        const bool seen = started && seen_by_all >= KEYS;
        if constexpr (CAREFUL) {
            // The slack that `take_seen_tile` reports for these references.
            float sum[2] = {0.0f, 0.0f};
#pragma unroll 1
            for (int j = 0; seen && j < KEYS / 16; ++j) {
                float c[2][4];
                scores(c, q, keys + j * 16 * STRIDE);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    sum[i / 2 % 2] += exp2_fast(exponent<E>(c[i / 4][i % 4], 0.0f, scale, softmax.peak[i / 2 % 2]));
                }
            }
            if (seen && OnlineSoftmax::reference_holds(sum, slack)) slack[0] = slack[1] = INF;
        } else if (seen) {
            const bool taken = kept ? take_seen_tile<E, D, true>(acc, softmax, q, scale, keys, values, slack)
                                    : take_seen_tile<E, D, false>(acc, softmax, q, scale, keys, values, slack);
            if (taken) return;
        }
        started = started || seen_by_all > 0;
    }
    float s[AT_ONCE][2][4];
    // Scores of chunk j, -inf where the row does not see the column.
    const auto visible_scores = [&](float (&c)[2][4], int j) {
        scores(c, q, keys + j * 16 * STRIDE);
        if (j * 16 + 16 <= seen_by_all) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int column = j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2;
            if (column >= limit[i / 2 % 2]) c[i / 4][i % 4] = -INF;
        }
    };
    float found[2] = {-INF, -INF};
#pragma unroll AT_ONCE
    for (int j = 0; j < KEYS / 16; ++j) {
        if (j * 16 >= columns) continue;
        auto& c = s[CAREFUL ? 0 : j];
        visible_scores(c, j);
#pragma unroll
        for (int i = 0; i < 8; ++i) found[i / 2 % 2] = largest(found[i / 2 % 2], c[i / 4][i % 4]);
    }
    found[0] *= scale;
    found[1] *= scale;
    float factor[2];
    if (softmax.raise(found, slack, factor)) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][i] *= factor[i / 2];
        }
    }
    const float peak[2] = {OnlineSoftmax::reference(softmax.peak[0]), OnlineSoftmax::reference(softmax.peak[1])};
    float sum[2] = {0.0f, 0.0f};  // in the order of `take_seen_tile`
#pragma unroll AT_ONCE
    for (int j = 0; j < KEYS / 16; ++j) {
        if (j * 16 >= columns) continue;
        auto& c = s[CAREFUL ? 0 : j];
        if constexpr (CAREFUL) visible_scores(c, j);
        float low[2][4];
        refine(c, low, scale, q, keys + j * 16 * STRIDE);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float& x = c[i / 4][i % 4];
            x = exp2_fast(exponent<E>(x, low[i / 4][i % 4], scale, peak[i / 2 % 2]));
            sum[i / 2 % 2] += x;
        }
        if (!kept) continue;
        if constexpr (CAREFUL) {
            const auto sees = [&](int i) { return j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2 < limit[i / 2 % 2]; };
            accumulate_carefully<E, D>(acc, c, values + j * 16 * STRIDE, scratch, sees);
        } else {
            accumulate<E, D>(acc, c, values + j * 16 * STRIDE, scratch);
        }
    }
    softmax.sum[0] += sum[0];
    softmax.sum[1] += sum[1];
}

// Outputs of a warp's 16 rows for all key heads, in shared memory of the warp.
template <class E, int D> struct HeadOutputs {
    float* values;  // [16, stride] unnormalized, relative to `peaks`
    float* peaks;   // [16, K] references of finished heads; then [16] sums, [16] final references

    static __device__ __forceinline__ int stride(const AttentionParams& p) { return p.key_slots * D + 4; }

    __device__ __forceinline__ HeadOutputs(const AttentionParams& p, Carve& carve, int warps, int warp) {
        values = carve.take<float>(warps * 16 * stride(p)) + warp * 16 * stride(p);
        peaks = carve.take<float>(warps * 16 * (p.key_slots + 2)) + warp * 16 * (p.key_slots + 2);
    }
    __device__ __forceinline__ void store(const AttentionParams& p, int head, const float (&acc)[D / 8][4],
                                          const OnlineSoftmax& softmax) const {
        store_accumulator<D>(values + head * D, stride(p), acc, 1.0f);
        if ((lane_index() & 3) == 0) {
            float* const peak = peaks + (lane_index() >> 2) * p.key_slots + head;
            peak[0] = softmax.peak[0];
            peak[8 * p.key_slots] = softmax.peak[1];
        }
    }
    // Writes o and lse of `rows` rows from `first` on. Two lanes share a row. True in a lane that
    // finds a non-finite output.
    __device__ __forceinline__ bool write(const AttentionParams& p, const Problem& problem, const Item& item, int first, int rows,
                                          const OnlineSoftmax& softmax) const {
        using T = Tile<E, D>;
        const int lane = lane_index(), row = lane & 15, heads = p.key_slots;
        float* const totals = peaks + 16 * heads;
        float* const references = totals + 16;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float total = softmax.total(i);
            if ((lane & 3) == 0) {
                totals[(lane >> 2) + i * 8] = total;
                references[(lane >> 2) + i * 8] = OnlineSoftmax::reference(softmax.peak[i]);
            }
        }
        __syncwarp();
        if (row >= rows) return false;
        const float total = totals[row], reference = references[row], inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const size_t at = problem.row(p, item, first + row);
        if (lane < 16) p.lse[at] = total == 0.0f ? -INF : (reference + log2_fast(total)) * LN_2;
        E* const to = static_cast<E*>(p.o) + at * (heads * D);
        const float* const from = values + row * stride(p);
        float zero = 0.0f;  // NaN if an output is non-finite
        for (int chunk = lane >> 4; chunk < heads * T::CHUNKS; chunk += 2) {
            const float peak = peaks[row * heads + chunk / T::CHUNKS];
            const float factor = peak == -INF ? 0.0f : exp2_fast(peak - reference) * inverse;
            *reinterpret_cast<uint4*>(to + chunk * T::PER_CHUNK) = narrow<E>(from + chunk * T::PER_CHUNK, factor);
#pragma unroll
            for (int i = 0; i < T::PER_CHUNK; ++i) zero = multiply_add(0.0f, from[chunk * T::PER_CHUNK + i], zero);
        }
        return zero != 0.0f;
    }
};
