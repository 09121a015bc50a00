// The running softmax of two rows per thread, in base 2.
//
// A thread shares its rows (lane / 4 and lane / 4 + 8 of the warp's 16) with the three other lanes of its quad. The
// maximum is kept equal in the quad, the sum is the thread's own share until `total`. Exponents are taken relative to
// a maximum that may lag behind the true one by up to SLACK, so that accumulators are rescaled only rarely: terms
// stay below 2^SLACK, far from any overflow, and the factor cancels in the division.
//
// Once every row has a reference, columns that all rows see need no maximum at all: their terms are taken relative to the
// reference there is, and their sum, which is needed anyway, tells afterwards whether it still served (`serves`).
#pragma once
#include "primitives.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

struct OnlineSoftmax {
    static constexpr float SLACK = 8.0f;
    static constexpr float MOST = 4096.0f;  // a thread's sum over a tile: no term overflows in 16 bits

    float peak[2];  // maximum of scale * log2(e) * score, -inf before the first visible key
    float sum[2];   // this thread's share of sum of 2^(scaled score - peak)

    __device__ __forceinline__ void clear() {
        peak[0] = peak[1] = -INF;
        sum[0] = sum[1] = 0.0f;
    }

    // Takes in the largest scaled scores of this thread in new columns. Returns whether any row of the warp got a new
    // reference; then what was accumulated has to be multiplied by `factor`, which `sum` already was.
    __device__ __forceinline__ bool raise(const float (&found)[2], float (&factor)[2]) {
        float row[2];
        bool higher = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row[i] = largest(found[i], shuffle_xor(found[i], 1));
            row[i] = largest(row[i], shuffle_xor(row[i], 2));
            higher |= row[i] > peak[i] + SLACK;
        }
        if (!any_lane(higher)) return false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float top = largest(peak[i], row[i]);
            factor[i] = exp2_fast(peak[i] - reference(top));
            peak[i] = top;
            sum[i] *= factor[i];
        }
        return true;
    }

    // Whether every row of the warp has a reference.
    __device__ __forceinline__ bool started() const { return !any_lane(peak[0] == -INF || peak[1] == -INF); }

    // Whether sums of a tile's terms show that the reference they were taken with was high enough, in all rows of the warp.
    static __device__ __forceinline__ bool serves(const float (&tile)[2]) {
        return !any_lane(!(tile[0] <= MOST) || !(tile[1] <= MOST));
    }

    // What exponents are taken relative to. A row that has seen nothing yet has peak -inf, and -inf - -inf is not
    // a number: it uses 0, so that its terms are 2^-inf = 0.
    static __device__ __forceinline__ float reference(float peak) { return peak == -INF ? 0.0f : peak; }

    // The whole sum of row i, in every lane of the quad.
    __device__ __forceinline__ float total(int i) const {
        const float half = sum[i] + shuffle_xor(sum[i], 1);
        return half + shuffle_xor(half, 2);
    }
};
