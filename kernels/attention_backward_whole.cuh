// Attention backward over short sequences: dq, dk and dv in one kernel that holds a whole sequence in shared memory.
//
// `item_warps` of a block's warps share a sequence, and a block holds as many sequences as fit. A warp owns 16 keys of one
// head and label at a time, on transposed scores as in dk_dv, so that dk and dv stay in registers; dq is added up in shared
// memory, in f32, from ds transposed in registers. Each p is computed once (in f32 twice, see below).
//
// Warps walk down the query rows one tile of 16 behind each other: at step t, warp w is at tile t - w of its keys. So no
// two warps add to the same rows of dq between two barriers, and the rows get their keys in the order of the keys,
// whatever the number of warps: neither that nor the rest of the batch shows in the bits. A warp goes on to its next keys, `item_warps`
// chunks later, right after its last tile; the period is `item_warps`, which is no less than the tiles of any sequence.
//
// Keys lie in shared memory by head and label, each label from a multiple of 16 on, with zeros up to the next.
//
// What is not finite shows before the walk, of which keys and values do not outlast: in a row's lse or delta, or it is a key.
//
// Reads q, k, v, o, d_o, lse, order, feedback, each element once; writes dq, dk, dv, each element once. delta is computed
// while d_o passes through registers to shared memory.
#pragma once
#include "attention_backward.cuh"

// Floats between the rows of dq in shared memory: accumulators are read and written without bank conflicts.
template <int D> constexpr int DQ_STRIDE = D == 8 ? 8 : D + 8;

// Blocks that should be resident: what shared memory allows, where registers can be had for it without spills.
template <class E, int D> constexpr int WHOLE_BLOCKS = sizeof(E) == 4 ? (D == 8 ? 4 - BLACKWELL : 1) : D <= 16 ? 5 : D == 32 ? 4 : 1;

// First query row that sees a key that is not there.
constexpr int NEVER = 1 << 30;

// `visit`(head, first key, keys, kept, row where they lie) for each head and label that takes part. A function, as the oldest NVRTC knows no generic lambda.
template <class Visit>
__device__ __forceinline__ void each_key_list(const AttentionParams& p, const Item& item, int heads, int capacity,
                                              int negative_chunks, Visit visit) {
    for (int head = 0; item.length && head < heads; ++head) {
        for (int label = 0; label < 2; ++label) {
            const int from = label ? item.negatives : 0, count = label ? item.length - item.negatives : item.negatives;
            const bool kept = is_kept(p, head, label);
            if (count == 0 || (p.masked && !kept)) continue;
            visit(head, from, count, kept, head * capacity + (label ? negative_chunks * 16 : 0));
        }
    }
}

template <class E, int D> __device__ __forceinline__ void backward_whole(const AttentionParams& p) {
    using T = Tile<E, D>;
    constexpr int STRIDE = T::STRIDE;
    const int lane = lane_index(), warp = uniform(warp_index()), warps = blockDim.x / 32;
    const int item_warps = p.item_warps, items = warps / item_warps, place = warp / item_warps, member = warp % item_warps;
    const Item item = load_item(p, blockIdx.x * items + place);
    const Problem problem(p);
    const int heads = problem.key_heads, capacity = p.capacity, most_rows = item_warps * 16;

    Carve carve{shared_memory()};
    E* const q_tile = carve.take<E>(items * most_rows * STRIDE) + place * most_rows * STRIDE;
    E* const d_o_tile = carve.take<E>(items * heads * most_rows * STRIDE) + place * heads * most_rows * STRIDE;
    E* const k_tile = carve.take<E>(items * heads * capacity * STRIDE) + place * heads * capacity * STRIDE;
    E* const v_tile = carve.take<E>(items * heads * capacity * STRIDE) + place * heads * capacity * STRIDE;
    float* const dq = carve.take<float>(items * most_rows * DQ_STRIDE<D>) + place * most_rows * DQ_STRIDE<D>;
    float* const lse_tile = carve.take<float>(items * most_rows) + place * most_rows;
    float* const delta_tile = carve.take<float>(items * most_rows) + place * most_rows;
    float* const correction_tile = carve.take<float>(CORRECTED<E> ? items * most_rows : 0) + place * most_rows;
    int* const seen_from = carve.take<int>(items * capacity) + place * capacity;  // first row that sees a key
    float* const scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;

    // Chunks of 16 keys: `chunks_of` each label, the same in every head.
    const auto chunks_of = [](int keys) { return (keys + 15) / 16; };
    const auto chunks_of_head = [&](const Item& x) { return chunks_of(x.negatives) + chunks_of(x.length - x.negatives); };
    const int negative_chunks = chunks_of(item.negatives), head_chunks = chunks_of_head(item);
    const int chunks = heads * head_chunks, all_rows = item.length * problem.slots;

    // ---- everything there is comes to shared memory
    const Team team{int(threadIdx.x) - place * item_warps * 32, item_warps * 32};
    const int first = member * 16, rows = all_rows - first < 0 ? 0 : (all_rows - first < 16 ? all_rows - first : 16);
    each_key_list(p, item, heads, capacity, negative_chunks, [&](int head, int from, int count, bool kept, int row) {
        const int at = row * STRIDE;
        const auto index = [&](int row) { return problem.key(p, token_at(p, item, from + row), head); };
        copy_rows<E, D>(team, k_tile + at, p.k, count, 0, index);
        if (kept) copy_rows<E, D>(team, v_tile + at, p.v, count, 0, index);
    });
    copy_rows<E, D>(team, q_tile, p.q, all_rows, 0, [&](int row) { return problem.query(p, item, row); });
    for (int i = team.thread; i < head_chunks * 16; i += team.threads) {
        const int key = i < negative_chunks * 16 ? i : i - negative_chunks * 16 + item.negatives;
        const bool there = key < int(i < negative_chunks * 16 ? item.negatives : item.length);
        seen_from[i] = !there ? NEVER : p.causal ? int((token_at(p, item, key) - item.start) * problem.slots) : 0;
    }
    for (int i = team.thread; i < most_rows * DQ_STRIDE<D>; i += team.threads) dq[i] = 0.0f;
    float delta[2];
    compute_delta<E, D>(delta, p, problem, item, first, rows, [&](int row, int chunk, const uint4& x) {
        E* const to = d_o_tile + (chunk / T::CHUNKS * most_rows + first + row) * STRIDE + chunk % T::CHUNKS * T::PER_CHUNK;
        *reinterpret_cast<uint4*>(to) = x;
    });
    for (int i = lane; i < heads * (16 - rows) * T::CHUNKS; i += 32) {
        const int row = rows + i / T::CHUNKS % (16 - rows), head = i / T::CHUNKS / (16 - rows);
        *reinterpret_cast<uint4*>(d_o_tile + (head * most_rows + first + row) * STRIDE + i % T::CHUNKS * T::PER_CHUNK) =
            make_uint4(0, 0, 0, 0);
    }
    bool spoiled = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        if ((lane & 3) == 0) {
            const float lse = row < rows ? p.lse[problem.row(p, item, first + row)] : -INF;
            spoiled |= row < rows && !(magnitude(lse) < INF && magnitude(delta[i]) < INF);
            lse_tile[first + row] = base_2_lse(lse);
            delta_tile[first + row] = delta[i];
        }
    }
    copy_wait();
    each_key_list(p, item, heads, capacity, negative_chunks, [&](int, int, int count, bool, int row) {
        spoiled |= copied_spoiled<E, D>(team, k_tile + row * STRIDE, count);
    });
    const bool careful = any_thread(spoiled) && MENDED<E, D>;

    const float scale = p.scale * LOG2_E;
    if constexpr (CORRECTED<E>) {
        // A row's correction is needed before its p is used for dk and dv: its warp adds up all p once, beforehand.
        Rows<E, D, false> q;
        q.set(q_tile + first * STRIDE);
        const int row = first + (lane >> 2);
        float sum[2] = {0.0f, 0.0f};
        for (int chunk = 0; rows && chunk < chunks; ++chunk) {
            const int head = chunk / head_chunks, at = chunk % head_chunks;
            if (p.masked && !is_kept(p, head, at >= negative_chunks)) continue;
            if (seen_from[at * 16] >= first + rows) continue;  // none of the warp's rows sees a key of it
            const E* const keys = k_tile + (head * capacity + at * 16) * STRIDE;
            float s[2][4], low[2][4];
            scores(s, q, keys);
            refine(s, low, scale, q, keys);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int half = i / 2 % 2, column = at * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2;
                const float x = exponent<E>(s[i / 4][i % 4], low[i / 4][i % 4], scale, lse_tile[row + half * 8]);
                const float weight = exp2_fast(x);
                if (seen_from[column] <= row + half * 8) sum[half] += weight;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] += shuffle_xor(sum[i], 1);
            sum[i] += shuffle_xor(sum[i], 2);
            if ((lane & 3) == 0) correction_tile[row + i * 8] = sum[i] == 0.0f ? 1.0f : 1.0f / sum[i];
        }
        __syncthreads();
    }

    // ---- the walk
    int steps = 0;  // the longest of the block's items: barriers are the block's
    for (int i = 0; i < items; ++i) {
        const int rounds = (heads * chunks_of_head(load_item(p, blockIdx.x * items + i)) + item_warps - 1) / item_warps;
        const int need = rounds * item_warps + item_warps - 1;
        steps = rounds && need > steps ? need : steps;
    }
    Rows<E, D, (D <= 64)> k, v;
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    int tile = -member, chunk = member;  // of query rows; of keys
    int head = 0, at = 0;
    bool kept = false;
    for (int step = 0; step < steps; ++step) {
        if (tile >= 0 && chunk < chunks) {
            if (tile == 0) {
                head = chunk / head_chunks;
                at = chunk % head_chunks * 16;
                kept = is_kept(p, head, at >= negative_chunks * 16);
                if (kept || !p.masked) k.set(k_tile + (head * capacity + at) * STRIDE);
                if (kept) v.set(v_tile + (head * capacity + at) * STRIDE);
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.0f;
                }
            }
            const int row = tile * 16;
            E* const keys = k_tile + (head * capacity + at) * STRIDE;
            E* const values = v_tile + (head * capacity + at) * STRIDE;
            if (row < all_rows && row + 16 > seen_from[at] && (kept || !p.masked)) {
                const E* const queries = q_tile + row * STRIDE;
                const E* const d_o = d_o_tile + (head * most_rows + row) * STRIDE;
                // Keys that are not there, of the last chunk of a label, are hidden as those of the diagonal are.
                const bool diagonal = row < seen_from[at + 15];
                const int own_from[2] = {seen_from[at + (lane >> 2)], seen_from[at + (lane >> 2) + 8]};
                float s[2][4], low[2][4], dp[2][4];
                scores(s, k, queries);
                refine(s, low, scale, k, queries);
                if (kept) scores(dp, v, d_o);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int column = row + half * 8 + (lane & 3) * 2;
                    const float2 lse = *reinterpret_cast<const float2*>(lse_tile + column);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& x = s[half][i];
                        x = exp2_fast(exponent<E>(x, low[half][i], scale, i % 2 ? lse.y : lse.x));
                        if (diagonal && column + i % 2 < own_from[i / 2]) x = 0.0f;
                    }
                    if constexpr (CORRECTED<E>) {
                        const float2 factor = *reinterpret_cast<const float2*>(correction_tile + column);
#pragma unroll
                        for (int i = 0; i < 4; ++i) s[half][i] *= i % 2 ? factor.y : factor.x;
                    }
                }
                // Element i of transposed scores: its query row sees its key.
                const auto sees = [&](int i) { return row + i / 4 * 8 + (lane & 3) * 2 + i % 2 >= own_from[i / 2 % 2]; };
                if (careful) hide(s, sees);
                if (kept && careful) accumulate_carefully<E, D>(dv, s, d_o, scratch, sees);
                else if (kept) accumulate<E, D>(dv, s, d_o, scratch);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 delta = *reinterpret_cast<const float2*>(delta_tile + row + half * 8 + (lane & 3) * 2);
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[half][i] *= (kept ? dp[half][i] : 0.0f) - (i % 2 ? delta.y : delta.x);
                }
                float* const dq_rows = dq + row * DQ_STRIDE<D>;
                if (careful) {
                    hide(s, sees);
                    accumulate_transposed_carefully<E, D>(dq_rows, DQ_STRIDE<D>, s, keys, scratch, sees);
                    accumulate_carefully<E, D>(dk, s, queries, scratch, sees);
                } else {
                    accumulate<E, D>(dk, s, queries, scratch);
                    accumulate_transposed<E, D>(dq_rows, DQ_STRIDE<D>, s, keys, scratch);
                }
            }
            if (tile == item_warps - 1) {
                // The chunk's own keys and values have done their work: the gradients leave through their place.
                const bool label = at >= negative_chunks * 16;
                const int key = label ? at - negative_chunks * 16 + item.negatives : at;
                const int left = (label ? item.length : item.negatives) - key;
                const auto index = [&](int i) { return problem.key(p, token_at(p, item, key + i), head); };
                __syncwarp();
                store_elements<E, D>(keys, dk, p.scale);
                store_elements<E, D>(values, dv, 1.0f);
                __syncwarp();
                for (int i = lane; i < (left < 16 ? left : 16) * T::CHUNKS; i += 32) {
                    const int from = i / T::CHUNKS * STRIDE + i % T::CHUNKS * T::PER_CHUNK;
                    const size_t to = index(i / T::CHUNKS) * D + i % T::CHUNKS * T::PER_CHUNK;
                    *reinterpret_cast<uint4*>(static_cast<E*>(p.dk) + to) = *reinterpret_cast<const uint4*>(keys + from);
                    *reinterpret_cast<uint4*>(static_cast<E*>(p.dv) + to) = *reinterpret_cast<const uint4*>(values + from);
                }
            }
        }
        if (++tile == item_warps) {
            tile = 0;
            chunk += item_warps;
        }
        if (item_warps > 1) __syncthreads();
    }

    __syncwarp();
    for (int i = lane; i < rows * T::CHUNKS; i += 32) {
        const int row = first + i / T::CHUNKS, column = i % T::CHUNKS * T::PER_CHUNK;
        *reinterpret_cast<uint4*>(static_cast<E*>(p.dq) + problem.query(p, item, row) * D + column) =
            narrow<E>(dq + row * DQ_STRIDE<D> + column, p.scale);
    }
    clear_other_group<E, D>(p, problem, item, first, rows);
}
