// The running softmax of two rows per thread, in base 2.
//
// A thread shares its rows (lane / 4 and lane / 4 + 8 of the warp's 16) with the three other lanes
// of its quad. All four hold the same maximum, and each holds its share of the sum until `total`.
// Exponents are relative to a reference that may lag behind the true maximum by up to SLACK, so
// accumulators are rescaled rarely: terms stay below 2^SLACK, far from overflow, and the factor
// cancels in the division.
//
// Once every row has a reference, columns that all rows see need no maximum. Their terms are taken
// relative to the current reference; their sum, needed anyway, then shows whether the reference was
// high enough (`reference_holds`).
//
// The warp branches together, but each row decides alone: its bits do not depend on its neighbours,
// even on non-finite ones.
#pragma once
#include "primitives.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Number of 8 exponentials that use the multiply-add pipes instead of the special-function unit, in
// tiles that all rows see (16 bits, streamed). Default 0: the loop has no issue slots left, see
// docs/kernels/attention.md. `dfar-bench attention --polynomial` measures others. Above 0, rows
// beside a non-finite row may change in their last digits.
#ifndef DFAR_POLYNOMIAL
#define DFAR_POLYNOMIAL 0
#endif

// 2^x for x from -125 to 127, with a relative error of 7.6e-5. x is clamped to this range. NaN
// becomes 127, which `reference_holds` rejects. The nearest integer goes to the exponent bits, the
// remainder through a minimax polynomial.
__device__ __forceinline__ float exp2_polynomial(float x) {
    constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = largest(-largest(-x, -127.0f), -125.0f);
    const float shifted = add_exactly(x, WHOLE);
    const float rest = add_exactly(x, -add_exactly(shifted, -WHOLE));
    float y = multiply_add(0.0551716685f, rest, 0.242611125f);
    y = multiply_add(y, rest, 0.693260968f);
    y = multiply_add(y, rest, 0.999928057f);
    return __uint_as_float(__float_as_uint(y) + (__float_as_uint(shifted) << 23));
}

struct OnlineSoftmax {
    static constexpr float SLACK = 8.0f;
    static constexpr float MOST = 4096.0f;  // limit of a thread's sum over a tile, in 16 bits

    float peak[2];  // reference: a maximum of scale * log2(e) * score; -inf before the first key
    float sum[2];   // this thread's share of the sum of 2^(scaled score - peak)

    __device__ __forceinline__ void clear() {
        peak[0] = peak[1] = -INF;
        sum[0] = sum[1] = 0.0f;
    }

    // Takes the largest scaled scores of this thread in new columns. Rows that exceed their
    // reference by more than `slack` get a new reference. Returns whether any row of the warp did:
    // the caller then multiplies its accumulators by `factor`; `sum` is already multiplied.
    __device__ __forceinline__ bool raise(const float (&found)[2], const float (&slack)[2], float (&factor)[2]) {
        float row[2];
        bool higher = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row[i] = largest(found[i], shuffle_xor(found[i], 1));
            row[i] = largest(row[i], shuffle_xor(row[i], 2));
            higher |= row[i] > peak[i] + slack[i];
        }
        if (!any_lane(higher)) return false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float top = row[i] > peak[i] + slack[i] ? row[i] : peak[i];
            factor[i] = exp2_fast(peak[i] - reference(top));
            peak[i] = top;
            sum[i] *= factor[i];
        }
        return true;
    }

    // Whether the sums of a tile's terms show that the reference was high enough in all rows of the
    // warp. If not, `slack` becomes the excess that the repetition allows: infinite for rows whose
    // reference was high enough, which thus keep it.
    static __device__ __forceinline__ bool reference_holds(const float (&tile)[2], float (&slack)[2]) {
        if (!any_lane(!(tile[0] <= MOST) || !(tile[1] <= MOST))) return true;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float half = largest(tile[i], shuffle_xor(tile[i], 1));
            slack[i] = largest(half, shuffle_xor(half, 2)) <= MOST ? INF : SLACK;
        }
        return false;
    }

    // The reference of exponents. A row without a visible key has peak -inf, and -inf - -inf is
    // NaN: it uses 0, so that its terms are 2^-inf = 0.
    static __device__ __forceinline__ float reference(float peak) { return peak == -INF ? 0.0f : peak; }

    // The total sum of row i, in every lane of the quad.
    __device__ __forceinline__ float total(int i) const {
        const float half = sum[i] + shuffle_xor(sum[i], 1);
        return half + shuffle_xor(half, 2);
    }
};
