// Attention forward over short sequences: a warp's registers hold all scores of 16 query rows, in
// 16 bits. That is at most 8 chunks of 16 by 16: 64 tokens with two key heads, 32 with four.
//
// One warp owns a sequence, so there is no block barrier. The maximum and the sum of a row are
// known before the first product with V: outputs are normalized in registers and never rescaled.
// Short sequences are bound by instruction issue, so the numbers of heads and chunks are compiled
// in.
//
// Reads q, k, v, order, feedback; writes o and lse, each element once.
//
// Exponentials: H per visible (row, key), half of that with Masked, rounded up to 16 x 16 chunks at
// the diagonal and at the end.
#pragma once
#include "attention/forward_tile.cuh"
#include "attention/whole.cuh"

// With wider heads, few sequences fit a multiprocessor at once; warps share them instead
// (attention/forward_whole.cuh).
template <class E, int D> constexpr bool SHORT = sizeof(E) == 2 && D <= 32;

// Minimum resident blocks per multiprocessor, if the registers suffice without spills.
template <class E, int D> constexpr int SHORT_BLOCKS = SHORT<E, D> ? 4 - AMPERE - BLACKWELL : 1;

// A warp's sequence, with up to HEADS key heads and CHUNKS * 16 tokens; each head has room for that
// many rows in shared memory.
template <class E, int D, int HEADS, int CHUNKS> struct ShortForward {
    using T = Tile<E, D>;
    static constexpr int STRIDE = T::STRIDE;

    const WholeKeys<E, D> keys;
    E* q_tile;
    E* out;  // [16, out_stride]

    static __device__ __forceinline__ int out_stride(const AttentionParams& p) { return p.key_slots * D + T::PER_CHUNK; }

    __device__ __forceinline__ ShortForward(const AttentionParams& p, Carve carve, int warps, int warp) : keys(p, carve, warps, warp, 1, p.key_slots * p.capacity) {
        q_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
        out = carve.take<E>(warps * 16 * out_stride(p)) + warp * 16 * out_stride(p);
    }

    // Takes 16 query rows from `first` on. True in a lane that finds a non-finite output.
    template <bool CAREFUL> __device__ __forceinline__ bool take_rows(const AttentionParams& p, int first) const {
        const Problem& problem = keys.problem;
        const int lane = lane_index(), left = keys.item.length * problem.slots - first, rows = left < 16 ? left : 16;

        // Two lanes share row `row` of q and of o. A lane's accumulator rows are lane / 4 and lane
        // / 4 + 8.
        const int row = lane & 15;
        __syncwarp();  // all lanes have read the previous rows
        const unsigned visible = stage_queries(p, keys, q_tile, first, rows, Scale<E>(p).flip);
        const unsigned most = shuffle_from(visible, rows - 1), least = rows == 16 ? shuffle_from(visible, 0) : 0;
        const unsigned own[2] = {shuffle_from(visible, lane >> 2), shuffle_from(visible, (lane >> 2) + 8)};
        __syncwarp();
        Rows<E, D, !CAREFUL> q;
        q.set(q_tile);

        // Columns of a head that the last row sees (0 for a missing head), and columns that all
        // rows see.
        int columns[HEADS], seen_by_all[HEADS];
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
            const int list = keys.list_of(p, head);
            columns[head] = opaque(head < int(problem.key_heads) ? keys.of_list(most, list) : 0);
            seen_by_all[head] = opaque(keys.of_list(least, list));
        }
        // Whether the pair of element i of a chunk of scores is visible.
        const auto sees = [&](int head, int chunk, int i) {
            return chunk * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2 < keys.of_list(own[i / 2 % 2], keys.list_of(p, head));
        };

        const float scale = Scale<E>(p).factor;
        float s[HEADS][CHUNKS][2][4], peak[2] = {-INF, -INF};
#pragma unroll
        for (int j = 0; j < HEADS * CHUNKS; ++j) {
            const int head = j / CHUNKS, chunk = j % CHUNKS;
            auto& c = s[head][chunk];
            if (chunk * 16 >= columns[head]) continue;
            scores(c, q, keys.k_tile + j * 16 * STRIDE);
            if (chunk * 16 + 16 > seen_by_all[head]) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (!sees(head, chunk, i)) c[i / 4][i % 4] = -INF;
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) peak[i / 2 % 2] = largest(peak[i / 2 % 2], c[i / 4][i % 4]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            peak[i] = largest(peak[i], shuffle_xor(peak[i], 1));
            peak[i] = OnlineSoftmax::reference(largest(peak[i], shuffle_xor(peak[i], 2)) * scale);
        }

        float sum[2] = {0.0f, 0.0f};
        unsigned pairs[HEADS][CHUNKS][4];
#pragma unroll
        for (int j = 0; j < HEADS * CHUNKS; ++j) {
            const int head = j / CHUNKS, chunk = j % CHUNKS;
            auto& c = s[head][chunk];
            if (chunk * 16 >= columns[head]) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& x = c[i / 4][i % 4];
                x = exp2_fast(exponent<E>(x, 0.0f, scale, peak[i / 2 % 2]));
                sum[i / 2 % 2] += x;
            }
            if constexpr (!CAREFUL) round_pairs<E>(pairs[head][chunk], c);
        }
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] += shuffle_xor(sum[i], 1);
            sum[i] += shuffle_xor(sum[i], 2);
            inverse[i] = sum[i] == 0.0f ? 0.0f : reciprocal_fast(sum[i]);
        }
        {
            // Of the four lanes that share two rows, one writes lse of the first row, one that of
            // the second.
            const int second = lane & 1, r = (lane >> 2) + second * 8;
            const float total = second ? sum[1] : sum[0], reference = second ? peak[1] : peak[0];
            if (r < rows && !(lane & 2)) {
                p.lse[problem.row(p, keys.item, first + r)] = total == 0.0f ? -INF : (reference + log2_fast(total)) * LN_2;
            }
        }

        float zero = 0.0f;  // NaN if an output is non-finite
#pragma unroll
        for (int head = 0; head < HEADS; ++head) {
            if (head >= int(problem.key_heads)) continue;
            float acc[D / 8][4];
#pragma unroll
            for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
            const int kept_columns = keys.keeps(p, head) ? columns[head] : 0;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                if (chunk * 16 >= kept_columns) continue;
                const E* const values = keys.v_tile + (head * CHUNKS + chunk) * 16 * STRIDE;
                if constexpr (CAREFUL) {
                    accumulate_carefully<E, D>(acc, s[head][chunk], values, nullptr, [&](int i) { return sees(head, chunk, i); });
                } else {
                    accumulate_pairs<E, D>(acc, pairs[head][chunk], values);
                }
            }
            add_zeros<D>(zero, acc);
            E* const to = out + (lane >> 2) * out_stride(p) + head * D + (lane & 3) * 2;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                *reinterpret_cast<unsigned*>(to + n * 8) = pack<E>(acc[n][0] * inverse[0], acc[n][1] * inverse[0]);
                *reinterpret_cast<unsigned*>(to + 8 * out_stride(p) + n * 8) = pack<E>(acc[n][2] * inverse[1], acc[n][3] * inverse[1]);
            }
        }
        __syncwarp();
        if (row < rows) {
            const int width = problem.key_heads * D;
            E* const to = static_cast<E*>(p.o) + problem.row(p, keys.item, first + row) * width;
#pragma unroll 1
            for (int at = (lane >> 4) * T::PER_CHUNK; at < width; at += 2 * T::PER_CHUNK) {
                *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(out + row * out_stride(p) + at);
            }
        }
        return zero != 0.0f;
    }

    // Takes all rows. Stops and returns true at the first rows with a non-finite output, which need
    // CAREFUL mode.
    template <bool CAREFUL> __device__ __forceinline__ bool take_all(const AttentionParams& p) const {
        const int all_rows = keys.item.length * keys.problem.slots;
        for (int first = 0; first < all_rows; first += 16) {
            if (any_lane(take_rows<CAREFUL>(p, first)) && !CAREFUL) return true;
        }
        return false;
    }
};

// Not inlined: only sequences with non-finite values call it.
template <class E, int D, int HEADS, int CHUNKS> __device__ __noinline__ void forward_short_carefully(const AttentionParams& p) {
    const ShortForward<E, D, HEADS, CHUNKS> forward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    forward.template take_all<true>(p);
}

template <class E, int D, int HEADS, int CHUNKS> __device__ __forceinline__ void forward_short(const AttentionParams& p) {
    const ShortForward<E, D, HEADS, CHUNKS> forward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    forward.keys.template load<HEADS>(p);
    copy_wait();
    __syncwarp();
    if (forward.template take_all<false>(p)) forward_short_carefully<E, D, HEADS, CHUNKS>(p);
}
