// Attention backward over streamed sequences, in two passes: dq (which also writes delta, and in
// f32 correction), then dk_dv. Each pass owns the rows of one side, streams the other side, and
// recomputes p, so each output element has one writer.
#pragma once
#include "attention/rows.cuh"

// Minimum resident blocks per multiprocessor: as many as registers allow without spills.
template <class E, int D> constexpr int DQ_BLOCKS = sizeof(E) == 4 ? (D <= 16 ? 3 : D == 32 ? 2 : 1) : D == 8 ? 6 - AMPERE : D == 16 ? 5 : D == 32 ? 4 : D == 64 ? 3 : 1;
template <class E, int D> constexpr int DK_DV_BLOCKS = sizeof(E) == 4 ? (D == 8 ? 4 : D <= 32 ? 3 : 1) : D == 8 ? 8 - AMPERE : D == 16 ? 6 : D == 32 ? 4 : D == 64 ? 3 : 1;

// Whether backward isolates non-finite values from rows that do not see them. f32 with D = 128 has
// no registers left for it.
template <class E, int D> constexpr bool ISOLATES = sizeof(E) == 2 || D < 128;

// sum += <x, y> over 16 bytes of elements.
template <class E> __device__ __forceinline__ float add_product(const uint4& x, const uint4& y, float sum) {
    const unsigned a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(E) == 4) {
            sum = multiply_add(__uint_as_float(a[i]), __uint_as_float(b[i]), sum);
        } else {
            const float2 u = unpack<E>(a[i]), w = unpack<E>(b[i]);
            sum = multiply_add(u.x, w.x, sum);
            sum = multiply_add(u.y, w.y, sum);
        }
    }
    return sum;
}

// delta = <o, d_o> over all key heads, for this thread's two accumulator rows: lane / 4 and lane /
// 4 + 8 of the `rows` rows from `first` on. The four lanes of a row share the work, and all get the
// sum.
template <class E, int D>
__device__ __forceinline__ void compute_delta(float (&delta)[2], const AttentionParams& p, const Problem& problem,
                                              const Item& item, int first, int rows) {
    constexpr int PER_CHUNK = Tile<E, D>::PER_CHUNK;
    const int chunks = problem.key_heads * Tile<E, D>::CHUNKS;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane_index() >> 2) + i * 8;
        delta[i] = 0.0f;
        if (row < rows) {
            const size_t start = problem.row(p, item, first + row) * problem.key_heads * D;
#pragma unroll 2
            for (int chunk = lane_index() & 3; chunk < chunks; chunk += 4) {
                const size_t at = start + chunk * PER_CHUNK;
                const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.o) + at);
                const uint4 y = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.d_o) + at);
                delta[i] = add_product<E>(x, y, delta[i]);
            }
        }
        delta[i] += shuffle_xor(delta[i], 1);
        delta[i] += shuffle_xor(delta[i], 2);
    }
}

// lse in base 2. For a row without a visible key it is inf, so that 2^(score - lse) is 0.
__device__ __forceinline__ float base_2_lse(float lse) { return lse == -INF ? INF : lse * LOG2_E; }

// Sets the elements of invisible pairs to 0, including NaN.
template <class Sees> __device__ __forceinline__ void hide(float (&s)[2][4], Sees sees) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (!sees(i)) s[i / 4][i % 4] = 0.0f;
    }
}

// Whether p is corrected for the rounding of lse. An f32 lse of 1e4 is off by up to 5e-4, and so is
// the p of its whole row. The pass that visits every p of a row divides by their sum, which should
// be 1, and writes the factor for dk_dv.
template <class E> constexpr bool CORRECTED = sizeof(E) == 4;

// Zeros dq of the other group's heads, for `rows` rows of the warp from `first` on.
template <class E, int D>
__device__ __forceinline__ void clear_other_group(const AttentionParams& p, const Problem& problem, const Item& item,
                                                  int first, int rows) {
    using T = Tile<E, D>;
    if (p.group == 0) return;
    for (int i = lane_index(); i < rows * T::CHUNKS; i += 32) {
        const size_t other = problem.query(p, item, first + i / T::CHUNKS, true);
        *reinterpret_cast<uint4*>(static_cast<E*>(p.dq) + other * D + i % T::CHUNKS * T::PER_CHUNK) = make_uint4(0, 0, 0, 0);
    }
}

// Turns the scores s of 16 keys into ds for the rows of a warp. Without KEPT, dp is 0. `limit`:
// columns that this lane's rows see; on the `diagonal`, columns beyond it are hidden. In f32, adds
// p to `sum`.
template <class E, int D, bool KEPT, bool HELD>
__device__ __forceinline__ void score_gradients(float (&s)[2][4], float (&sum)[2], const Rows<E, D, HELD>& q, const Rows<E, D, HELD>& d_o,
                                                const E* keys, const E* values, float scale, const float (&lse)[2],
                                                const float (&delta)[2], bool diagonal, const int (&limit)[2]) {
    float low[2][4], dp[2][4];
    scores(s, q, keys);
    refine(s, low, scale, q, keys);
    if constexpr (KEPT) scores(dp, d_o, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float& x = s[i / 4][i % 4];
        x = exp2_fast(exponent<E>(x, low[i / 4][i % 4], scale, lse[i / 2 % 2]));
    }
    if (diagonal) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i / 4 * 8 + (lane_index() & 3) * 2 + i % 2 >= limit[i / 2 % 2]) s[i / 4][i % 4] = 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float& x = s[i / 4][i % 4];
        if constexpr (CORRECTED<E>) sum[i / 2 % 2] += x;
        x *= (KEPT ? dp[i / 4][i % 4] : 0.0f) - delta[i / 2 % 2];
    }
}

// For a transposed chunk of 16 query rows, from `row` of the sequence on, by 16 keys: adds p to dv
// if KEPT, then turns s into ds. `own_from`: the first rows that see this lane's keys; on the
// `diagonal`, earlier rows are hidden.
template <class E, int D, bool CAREFUL, bool KEPT, bool HELD>
__device__ __forceinline__ void transposed_gradients(float (&s)[2][4], float (&dv)[D / 8][4], const Rows<E, D, HELD>& k,
                                                     const Rows<E, D, HELD>& v, const E* queries, const E* d_o, float scale,
                                                     const float* lse, const float* delta, const float* correction, int row,
                                                     bool diagonal, const int (&own_from)[2], float* scratch) {
    const int column = (lane_index() & 3) * 2;
    float low[2][4], dp[2][4];
    scores(s, k, queries);
    refine(s, low, scale, k, queries);
    if constexpr (KEPT) scores(dp, v, d_o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 l = *reinterpret_cast<const float2*>(lse + half * 8 + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[half][i] = exp2_fast(exponent<E>(s[half][i], low[half][i], scale, i % 2 ? l.y : l.x));
    }
    // Whether the pair of transposed element i is visible.
    const auto sees = [&](int i) { return row + i / 4 * 8 + column + i % 2 >= own_from[i / 2 % 2]; };
    if (diagonal) hide(s, sees);
    if constexpr (CORRECTED<E>) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 factor = *reinterpret_cast<const float2*>(correction + half * 8 + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) s[half][i] *= i % 2 ? factor.y : factor.x;
        }
    }
    if constexpr (CAREFUL) hide(s, sees);
    if constexpr (KEPT && CAREFUL) accumulate_carefully<E, D>(dv, s, d_o, scratch, sees);
    else if constexpr (KEPT) accumulate<E, D>(dv, s, d_o, scratch);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float2 d = *reinterpret_cast<const float2*>(delta + half * 8 + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[half][i] *= (KEPT ? dp[half][i] : 0.0f) - (i % 2 ? d.y : d.x);
    }
    if constexpr (CAREFUL) hide(s, sees);
}

// Divides dq of a warp's rows by the sum of their p (`sum` is this lane's share), and writes the
// factor for dk_dv.
template <int D>
__device__ __forceinline__ void correct_rows(float (&acc)[D / 8][4], float (&sum)[2], const AttentionParams& p, const Problem& problem,
                                             const Item& item, int first, int rows) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        sum[i] += shuffle_xor(sum[i], 1);
        sum[i] += shuffle_xor(sum[i], 2);
        const float correction = sum[i] == 0.0f ? 1.0f : 1.0f / sum[i];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            acc[n][2 * i] *= correction;
            acc[n][2 * i + 1] *= correction;
        }
        if ((lane & 3) == 0 && row < rows) p.correction[problem.row(p, item, first + row)] = correction;
    }
}

// dq: a block of query rows, as in forward. Reads q, k, v, o, d_o, lse, order, feedback. Writes
// delta of its rows; dq of its tokens, with zeros for the heads of the other group; and in f32
// correction.
template <class E, int D, bool CAREFUL> __device__ __forceinline__ bool dq(const AttentionParams& p) {
    constexpr int KEYS = CAREFUL ? 16 : TILE_ROWS<E, D>, STRIDE = Tile<E, D>::STRIDE;
    const int lane = lane_index(), warp = uniform(warp_index()), warps = blockDim.x / 32;
    const Item item = load_item(p, blockIdx.x);
    const Problem problem(p);

    Carve carve{shared_memory()};
    E* const k_tile = carve.take<E>(2 * KEYS * STRIDE);
    E* const v_tile = carve.take<E>(2 * KEYS * STRIDE);
    E* const q_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
    E* const d_o_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
    float* const out = carve.take<float>(warps * 16 * (D + 4)) + warp * 16 * (D + 4);
    float* const scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;

    const int all_rows = item.length * problem.slots, block_first = item.first, first = block_first + warp * 16;
    const int block_last = (block_first + warps * 16 < all_rows ? block_first + warps * 16 : all_rows) - 1;
    const int rows = first > block_last ? 0 : (block_last + 1 - first < 16 ? block_last + 1 - first : 16);
    const Visible nothing{0, 0};
    const Visible block_visible = visible_keys(p, item, problem.position(p, block_last));
    const Visible warp_most = rows ? visible_keys(p, item, problem.position(p, first + rows - 1)) : nothing;
    const Visible warp_least = rows == 16 ? visible_keys(p, item, problem.position(p, first)) : nothing;
    Visible own[2];
    float lse[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        own[i] = nothing;
        lse[i] = INF;
        if (row < rows) {
            own[i] = visible_keys(p, item, problem.position(p, first + row));
            lse[i] = base_2_lse(p.lse[problem.row(p, item, first + row)]);
        }
    }
    compute_delta<E, D>(delta, p, problem, item, first, rows);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        if ((lane & 3) == 0 && row < rows) p.delta[problem.row(p, item, first + row)] = delta[i];
    }

    const float scale = p.scale * LOG2_E;
    stage_rows<E, D>(q_tile, p.q, rows, 0, [&](int row) { return problem.query(p, item, first + row); });
    __syncwarp();
    Rows<E, D, !CAREFUL> q, d_o;
    q.set(q_tile);

    float acc[D / 8][4], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    KeyWalk<KEYS> walk;
    KeyCopy<E, D, KEYS> copy;
    int stage = 0;
    bool more = walk.start(p, problem, block_visible);
    if (!CAREFUL && more) {
        copy.find(p, item, walk);
        copy.start(k_tile, v_tile, p, problem, item, walk);
    }

    for (unsigned head = 0; head < problem.key_heads; ++head) {
        __syncwarp();  // all lanes have read the rows of the previous head
        stage_rows<E, D>(d_o_tile, p.d_o, rows, 0,
                         [&](int row) { return problem.row(p, item, first + row) * problem.key_heads + head; });
        __syncwarp();
        d_o.set(d_o_tile);

        while (more && walk.head == head) {
            const KeyWalk<KEYS> tile = walk;
            more = walk.advance(p, problem, block_visible);
            if constexpr (CAREFUL) {
                copy_now<E, D, KEYS>(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item, tile);
            } else {
                if (more) copy.find(p, item, walk);
                copy_wait();
                __syncthreads();
            }
            const E* const keys = k_tile + stage * KEYS * STRIDE;
            const E* const values = v_tile + stage * KEYS * STRIDE;
            stage ^= 1;
            if (!CAREFUL && more) copy.start(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item, walk);

            const int columns = warp_most.of(tile.label) - tile.first;
            const int seen_by_all = warp_least.of(tile.label) - tile.first;
            const int limit[2] = {own[0].of(tile.label) - tile.first, own[1].of(tile.label) - tile.first};
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                if (j * 16 >= columns) continue;
                const int rest[2] = {limit[0] - j * 16, limit[1] - j * 16};
                const bool diagonal = CAREFUL || j * 16 + 16 > seen_by_all;
                float s[2][4];
                if (tile.kept) {
                    score_gradients<E, D, true>(s, sum, q, d_o, keys + j * 16 * STRIDE, values + j * 16 * STRIDE, scale, lse, delta, diagonal, rest);
                } else {
                    score_gradients<E, D, false>(s, sum, q, d_o, keys + j * 16 * STRIDE, nullptr, scale, lse, delta, diagonal, rest);
                }
                if constexpr (CAREFUL) {
                    const auto sees = [&](int i) { return j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2 < limit[i / 2 % 2]; };
                    hide(s, sees);
                    accumulate_carefully<E, D>(acc, s, keys + j * 16 * STRIDE, scratch, sees);
                } else {
                    accumulate<E, D>(acc, s, keys + j * 16 * STRIDE, scratch);
                }
            }
        }
    }
    float zero = 0.0f;
    add_zeros<D>(zero, acc);

    if constexpr (CORRECTED<E>) correct_rows<D>(acc, sum, p, problem, item, first, rows);
    store_accumulator<D>(out, D + 4, acc, p.scale);
    __syncwarp();
    write_rows<E, D>(p.dq, out, D + 4, rows, [&](int row) { return problem.query(p, item, first + row); });
    clear_other_group<E, D>(p, problem, item, first, rows);
    return any_thread(zero != 0.0f);
}

template <class E, int D> __device__ __forceinline__ void dq_carefully(const AttentionParams& p) { dq<E, D, true>(p); }

// dk_dv: a block takes 16 * warps keys of one label and key head blockIdx.y, from item.first in
// label order on, and all query rows that see them. Reads q, k, v, d_o, lse, delta, order,
// feedback, and in f32 correction. Writes dk and dv of its keys, with zeros where no pair is kept.
// Works on transposed scores: rows are keys, columns are query rows.
template <class E, int D, bool CAREFUL> __device__ __forceinline__ bool dk_dv(const AttentionParams& p) {
    constexpr int QUERIES = CAREFUL ? 16 : TILE_ROWS<E, D>, STRIDE = Tile<E, D>::STRIDE;
    const int lane = lane_index(), warp = uniform(warp_index()), warps = blockDim.x / 32;
    const Item item = load_item(p, blockIdx.x);
    const Problem problem(p);
    const unsigned head = p.key_slots == 1 ? 0 : blockIdx.y;

    Carve carve{shared_memory()};
    E* const q_tile = carve.take<E>(2 * QUERIES * STRIDE);
    E* const d_o_tile = carve.take<E>(2 * QUERIES * STRIDE);
    float* const lse_tile = carve.take<float>(2 * QUERIES);
    float* const delta_tile = carve.take<float>(2 * QUERIES);
    float* const correction_tile = carve.take<float>(CORRECTED<E> ? 2 * QUERIES : 0);
    E* const k_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
    E* const v_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
    float* const out = carve.take<float>(warps * 16 * (D + 4)) + warp * 16 * (D + 4);
    float* const scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;

    // All keys of the block have one label: the host cuts tiles at the label border.
    const unsigned label = item.first >= item.negatives;
    const int label_end = label ? item.length : item.negatives;
    const int first = item.first + warp * 16;
    const int left = label_end - first, keys = left < 0 ? 0 : (left < 16 ? left : 16);
    const bool kept = is_kept(p, head, label);
    const auto key_index = [&](int row) { return problem.key(p, token_at(p, item, first + row), head); };
    const auto position = [&](int key) { return token_at(p, item, key) - item.start; };

    stage_rows<E, D>(k_tile, p.k, keys, 0, key_index);
    stage_rows<E, D>(v_tile, p.v, keys, 0, key_index);
    __syncwarp();
    Rows<E, D, (D <= 64 && !CAREFUL)> k, v;
    k.set(k_tile);
    v.set(v_tile);

    // A key is seen by the query rows from its own token on. First rows for the block's first key,
    // the warp's first and last key, and this thread's two keys. A warp without keys skips all
    // rows.
    const int all_rows = item.length * problem.slots;
    int block_from = 0, warp_from = keys ? 0 : all_rows + 16, warp_all_from = 0, own_from[2] = {0, 0};
    if (p.causal) {
        block_from = position(item.first) * problem.slots;
        if (keys) {
            warp_from = position(first) * problem.slots;
            warp_all_from = position(first + keys - 1) * problem.slots;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = (lane >> 2) + i * 8;
            if (row < keys) own_from[i] = position(first + row) * problem.slots;
        }
    }
    if (p.masked && !kept) block_from = all_rows;

    float dk[D / 8][4], dv[D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.0f;
    }
    const float scale = p.scale * LOG2_E;
    const auto copy_queries = [&](int stage, int from) {
        const int rest = all_rows - from, count = rest < QUERIES ? rest : QUERIES;
        copy_rows<E, D>(whole_block(), q_tile + stage * QUERIES * STRIDE, p.q, count, 0,
                        [&](int row) { return problem.query(p, item, from + row); });
        if (kept) {
            copy_rows<E, D>(whole_block(), d_o_tile + stage * QUERIES * STRIDE, p.d_o, count, 0, [&](int row) {
                return problem.row(p, item, from + row) * problem.key_heads + head;
            });
        }
        for (int i = threadIdx.x; i < QUERIES; i += blockDim.x) {
            const size_t row = problem.row(p, item, from + (i < count ? i : 0));
            lse_tile[stage * QUERIES + i] = i < count ? base_2_lse(p.lse[row]) : INF;
            delta_tile[stage * QUERIES + i] = i < count ? p.delta[row] : 0.0f;
            if constexpr (CORRECTED<E>) correction_tile[stage * QUERIES + i] = i < count ? p.correction[row] : 0.0f;
        }
    };

    int stage = 0;
    if (!CAREFUL && block_from < all_rows) copy_queries(0, block_from);
    for (int from = block_from; from < all_rows; from += QUERIES) {
        if constexpr (CAREFUL) {
            __syncthreads();
            copy_queries(0, from);
        }
        copy_wait();
        __syncthreads();  // the tile has arrived, and all threads have read the previous one
        const int at = stage * QUERIES;
        if constexpr (!CAREFUL) {
            stage ^= 1;
            if (from + QUERIES < all_rows) copy_queries(stage, from + QUERIES);
        }

#pragma unroll
        for (int j = 0; j < QUERIES / 16; ++j) {
            const int row = from + j * 16;
            if (row >= all_rows || (!CAREFUL && row + 16 <= warp_from)) continue;
            const bool diagonal = CAREFUL || row < warp_all_from;
            const E* const queries = q_tile + (at + j * 16) * STRIDE;
            const E* const d_o = d_o_tile + (at + j * 16) * STRIDE;
            float s[2][4];
            const float *const lse = lse_tile + at + j * 16, *const delta = delta_tile + at + j * 16;
            const float* const correction = correction_tile + at + j * 16;
            if (kept) {
                transposed_gradients<E, D, CAREFUL, true>(s, dv, k, v, queries, d_o, scale, lse, delta, correction, row, diagonal, own_from, scratch);
            } else {
                transposed_gradients<E, D, CAREFUL, false>(s, dv, k, v, queries, d_o, scale, lse, delta, correction, row, diagonal, own_from, scratch);
            }
            if constexpr (CAREFUL) {
                const auto sees = [&](int i) { return row + i / 4 * 8 + (lane & 3) * 2 + i % 2 >= own_from[i / 2 % 2]; };
                accumulate_carefully<E, D>(dk, s, queries, scratch, sees);
            } else {
                accumulate<E, D>(dk, s, queries, scratch);
            }
        }
    }
    float zero = 0.0f;
    add_zeros<D>(zero, dk);
    add_zeros<D>(zero, dv);

    store_accumulator<D>(out, D + 4, dk, p.scale);
    __syncwarp();
    write_rows<E, D>(p.dk, out, D + 4, keys, key_index);
    __syncwarp();
    store_accumulator<D>(out, D + 4, dv, 1.0f);
    __syncwarp();
    write_rows<E, D>(p.dv, out, D + 4, keys, key_index);
    return ISOLATES<E, D> && any_thread(zero != 0.0f);
}

template <class E, int D> __device__ __forceinline__ void dk_dv_carefully(const AttentionParams& p) {
    if constexpr (ISOLATES<E, D>) dk_dv<E, D, true>(p);
}
