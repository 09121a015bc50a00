// Attention backward over whole sequences, in one or two passes.
//
// One pass (backward_whole), if a sequence and the partial sums of dq fit shared memory: each p is
// computed once (in f32 twice, see `correct`). A warp takes 16 keys of one head at a time, on
// transposed scores, and loops over the query rows that see them; dk and dv stay in registers. dq
// accumulates in shared memory in f32, from ds transposed in registers. Each warp has its own
// partial sum, so warps synchronise only before and after. Reads q, k, v, o, d_o, lse, order,
// feedback; writes dq, dk, dv; each element once. delta is computed while d_o passes through
// registers to shared memory.
//
// Two passes, if only one side fits: dq_whole holds the keys and values and takes 16 query rows at
// a time; dk_dv_whole holds the queries and d_o and takes 16 keys at a time. Each output element
// has one writer.
//
// The length of a sequence alone decides how many warps share it, so that its bits do not depend on
// the rest of the batch.
#pragma once
#include "attention/backward.cuh"
#include "attention/whole.cuh"

// Floats per row of dq in shared memory: padded so that accumulators are read and written without
// bank conflicts.
template <int D> constexpr int DQ_STRIDE = D == 8 ? 8 : D + 8;

// Minimum resident blocks per multiprocessor: as many as shared memory allows, if the registers
// suffice without spills.
template <class E, int D> constexpr int WHOLE_BLOCKS = sizeof(E) == 4 ? (D == 8 ? 3 : 1) : D <= 16 ? 4 : D == 32 ? 3 : 1;
template <class E, int D> constexpr int WHOLE_DQ_BLOCKS = sizeof(E) == 4 ? 1 : D <= 16 ? 4 : D == 32 ? 3 : 1;
template <class E, int D> constexpr int WHOLE_DK_DV_BLOCKS = sizeof(E) == 4 ? 1 : D <= 16 ? 4 : D == 32 ? 3 : 1;

// First query row of a key past the end of its list.
constexpr int NEVER = 1 << 30;

// The work of one warp in backward_whole (SUMS), or in dk_dv_whole, which has no partial sums of
// dq.
template <class E, int D, bool SUMS> struct WholeBackward {
    using T = Tile<E, D>;
    static constexpr int STRIDE = T::STRIDE;

    const WholeKeys<E, D> keys;
    int warp, member;         // index in the block; index among the warps of the sequence
    int most_rows, all_rows;  // capacity in query rows; actual query rows
    E* q_tile;                // [most_rows, STRIDE]
    E* d_o_tile;              // [heads, most_rows, STRIDE]
    float *lse_tile, *delta_tile, *correction_tile;
    float* dq;                // SUMS: [warps of the block, most_rows, DQ_STRIDE]
    float* scratch;

    // Without SUMS, a warp has room for 16 keys and values only.
    __device__ __forceinline__ WholeBackward(const AttentionParams& p, Carve carve, int warps, int warp)
        : keys(p, carve, warps, warp, p.item_warps, SUMS ? p.key_slots * p.capacity : p.item_warps * 16), warp(warp) {
        const int items = warps / p.item_warps, place = warp / p.item_warps;
        member = warp - place * p.item_warps;
        most_rows = p.capacity * keys.problem.slots;
        all_rows = keys.item.length * keys.problem.slots;
        const int heads = keys.problem.key_heads, sequences_rows = items * most_rows, row = place * most_rows;
        q_tile = carve.take<E>(sequences_rows * STRIDE) + row * STRIDE;
        d_o_tile = carve.take<E>(heads * sequences_rows * STRIDE) + heads * row * STRIDE;
        lse_tile = carve.take<float>(sequences_rows) + row;
        delta_tile = carve.take<float>(sequences_rows) + row;
        correction_tile = carve.take<float>(CORRECTED<E> ? sequences_rows : 0) + row;
        dq = carve.take<float>(SUMS ? warps * most_rows * DQ_STRIDE<D> : 0);
        scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;
    }

    // The partial sum of dq of a warp of the block.
    __device__ __forceinline__ float* dq_of(int warp) const { return dq + warp * most_rows * DQ_STRIDE<D>; }
    __device__ __forceinline__ float* own_dq() const { return dq_of(warp); }

    // Loads the sequence to shared memory, with zeros up to the next multiple of 16 rows.
    __device__ __forceinline__ void load(const AttentionParams& p) const {
        const Problem& problem = keys.problem;
        if constexpr (SUMS) keys.template load<0>(p);
        copy_rows<E, D>(keys.team, q_tile, p.q, all_rows, 0, [&](int row) { return problem.query(p, keys.item, row); });
        const int lane = lane_index(), heads = problem.key_heads, chunks = heads * T::CHUNKS;
        if constexpr (SUMS) {
            for (int i = lane * 4; i < ((all_rows + 15) & ~15) * DQ_STRIDE<D>; i += 128) {
                *reinterpret_cast<float4*>(own_dq() + i) = float4{0.0f, 0.0f, 0.0f, 0.0f};
            }
        }
        // Two lanes share a row of d_o.
        for (int row = member * 16 + (lane & 15); row < ((all_rows + 15) & ~15); row += p.item_warps * 16) {
            const bool there = row < all_rows;
            const size_t at = problem.row(p, keys.item, there ? row : 0);
            float delta = 0.0f;
#pragma unroll 2
            for (int chunk = lane >> 4; chunk < chunks; chunk += 2) {
                const size_t from = at * (heads * D) + chunk * T::PER_CHUNK;
                E* const to = d_o_tile + (chunk / T::CHUNKS * most_rows + row) * STRIDE + chunk % T::CHUNKS * T::PER_CHUNK;
                if constexpr (SUMS) {
                    uint4 y = make_uint4(0, 0, 0, 0);
                    if (there) {
                        const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.o) + from);
                        y = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.d_o) + from);
                        delta = add_product<E>(x, y, delta);
                    }
                    *reinterpret_cast<uint4*>(to) = y;
                } else {
                    copy_async(to, static_cast<const E*>(p.d_o) + from, there);
                }
            }
            if constexpr (SUMS) delta += shuffle_xor(delta, 16);
            if (lane < 16) {
                lse_tile[row] = there ? base_2_lse(p.lse[at]) : INF;
                delta_tile[row] = SUMS ? delta : there ? p.delta[at] : 0.0f;
                if constexpr (CORRECTED<E> && !SUMS) correction_tile[row] = there ? p.correction[at] : 0.0f;
            }
        }
    }

    // Computes the correction of this warp's rows: 1 over the sum of their p. It is needed before p
    // enters dk and dv, so all p are computed once before the pass.
    __device__ __forceinline__ void correct(const AttentionParams& p) const {
        const int lane = lane_index();
        const float scale = p.scale * LOG2_E;
        for (int first = member * 16; first < all_rows; first += p.item_warps * 16) {
            const int row = first + (lane >> 2);
            unsigned own[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) own[i] = row + i * 8 < all_rows ? keys.visible(p, row + i * 8) : 0;
            const unsigned most = keys.visible(p, (first + 16 < all_rows ? first + 16 : all_rows) - 1);
            Rows<E, D, false> q;
            q.set(q_tile + first * STRIDE);
            float sum[2] = {0.0f, 0.0f};
            for (int head = 0; head < int(keys.problem.key_heads); ++head) {
                const int list = keys.list_of(p, head);
                for (int from = 0; from < keys.of_list(most, list); from += 16) {
                    const E* const tile = keys.k_tile + (head * p.capacity + from) * STRIDE;
                    float s[2][4], low[2][4];
                    scores(s, q, tile);
                    refine(s, low, scale, q, tile);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int half = i / 2 % 2, column = from + i / 4 * 8 + (lane & 3) * 2 + i % 2;
                        const float weight = exp2_fast(exponent<E>(s[i / 4][i % 4], low[i / 4][i % 4], scale, lse_tile[row + half * 8]));
                        if (column < keys.of_list(own[half], list)) sum[half] += weight;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                sum[i] += shuffle_xor(sum[i], 1);
                sum[i] += shuffle_xor(sum[i], 2);
                if ((lane & 3) == 0) correction_tile[row + i * 8] = sum[i] == 0.0f ? 1.0f : 1.0f / sum[i];
            }
        }
    }

    // Takes 16 keys of a head, from `first` of its list on, and all query rows that see them. True
    // if one of their gradients is non-finite.
    template <bool CAREFUL> __device__ __forceinline__ bool take_keys(const AttentionParams& p, int head, int first) const {
        const Item& item = keys.item;
        const int lane = lane_index(), list = keys.list_of(p, head), left = keys.list_length(p, list) - first, count = left < 16 ? left : 16;
        const bool kept = keys.keeps(p, head);
        // First query row that sees the key at `index` of the list.
        const auto seen_from = [&](int index) {
            return p.causal ? int((keys.token(p, list, index) - item.start) * keys.problem.slots) : 0;
        };
        const int from = seen_from(first), all_from = count < 16 ? NEVER : seen_from(first + 15);
        int own_from[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = (lane >> 2) + i * 8;
            own_from[i] = key < count ? seen_from(first + key) : NEVER;
        }
        const int at = SUMS ? head * p.capacity + first : member * 16;
        E* const own_keys = keys.k_tile + at * STRIDE;
        E* const own_values = keys.v_tile + at * STRIDE;
        if constexpr (!SUMS) {
            const auto index = [&](int row) { return keys.problem.key(p, keys.token(p, list, first + row), head); };
            __syncwarp();  // all lanes have read the gradients of the previous keys
            stage_rows<E, D>(own_keys, p.k, count, 0, index);
            stage_rows<E, D>(own_values, p.v, count, 0, index);
            if (!keys.by_label(p) && p.group) {
                // Zeros the values that are not kept.
                __syncwarp();
                for (int i = lane; i < count * T::CHUNKS; i += 32) {
                    const int row = i / T::CHUNKS;
                    if (is_kept(p, head, load_feedback(p, keys.token(p, list, first + row)).label)) continue;
                    *reinterpret_cast<uint4*>(own_values + row * STRIDE + i % T::CHUNKS * T::PER_CHUNK) = make_uint4(0, 0, 0, 0);
                }
            }
            __syncwarp();
        }
        Rows<E, D, (D <= 64 && !CAREFUL)> k, v;
        k.set(own_keys);
        if (kept) v.set(own_values);
        float dk[D / 8][4], dv[D / 8][4];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.0f;
        }
        const float scale = p.scale * LOG2_E;
        for (int row = from & ~15; row < all_rows; row += 16) {
            const E* const queries = q_tile + row * STRIDE;
            const E* const d_o = d_o_tile + (head * most_rows + row) * STRIDE;
            // Keys past the end are hidden like those behind the diagonal.
            const bool diagonal = CAREFUL || row < all_from;
            float s[2][4];
            if (kept) {
                transposed_gradients<E, D, CAREFUL, true>(s, dv, k, v, queries, d_o, scale, lse_tile + row, delta_tile + row,
                                                          correction_tile + row, row, diagonal, own_from, scratch);
            } else {
                transposed_gradients<E, D, CAREFUL, false>(s, dv, k, v, queries, d_o, scale, lse_tile + row, delta_tile + row,
                                                           correction_tile + row, row, diagonal, own_from, scratch);
            }
            if constexpr (CAREFUL) {
                const auto sees = [&](int i) { return row + i / 4 * 8 + (lane & 3) * 2 + i % 2 >= own_from[i / 2 % 2]; };
                if constexpr (SUMS) {
                    accumulate_transposed_carefully<E, D>(own_dq() + row * DQ_STRIDE<D>, DQ_STRIDE<D>, s, own_keys, scratch, sees);
                }
                accumulate_carefully<E, D>(dk, s, queries, scratch, sees);
            } else {
                accumulate<E, D>(dk, s, queries, scratch);
                if constexpr (SUMS) {
                    accumulate_transposed<E, D>(own_dq() + row * DQ_STRIDE<D>, DQ_STRIDE<D>, s, own_keys, scratch);
                }
            }
        }
        // The keys and values are no longer needed; their memory stages the gradients.
        __syncwarp();
        store_elements<E, D>(own_keys, dk, p.scale);
        store_elements<E, D>(own_values, dv, 1.0f);
        __syncwarp();
        for (int i = lane; i < count * T::CHUNKS; i += 32) {
            const int key = i / T::CHUNKS, column = i % T::CHUNKS * T::PER_CHUNK;
            const unsigned token = keys.token(p, list, first + key);
            const size_t to = keys.problem.key(p, token, head) * D + column;
            const uint4 zeros = make_uint4(0, 0, 0, 0);
            const bool own = p.group == 0 || is_kept(p, head, load_feedback(p, token).label);
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dk) + to) = *reinterpret_cast<const uint4*>(own_keys + key * STRIDE + column);
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dv) + to) =
                own ? *reinterpret_cast<const uint4*>(own_values + key * STRIDE + column) : zeros;
        }
        float zero = 0.0f;
        add_zeros<D>(zero, dk);
        add_zeros<D>(zero, dv);
        return zero != 0.0f;
    }

    // Zeros dk and dv of the head's keys that are in no list.
    __device__ __forceinline__ void clear_unlisted(const AttentionParams& p, int head) const {
        const int other = 1 - keys.list_of(p, head), from = keys.list_start(other);
        const int count = other ? keys.item.length - keys.item.negatives : keys.item.negatives;
        for (int i = keys.team.thread; i < count * T::CHUNKS; i += keys.team.threads) {
            const size_t to = keys.problem.key(p, token_at(p, keys.item, from + i / T::CHUNKS), head) * D + i % T::CHUNKS * T::PER_CHUNK;
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dk) + to) = make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dv) + to) = make_uint4(0, 0, 0, 0);
        }
    }

    // Writes dq of the warp's rows: the sum of the partial sums of all warps, and zeros for the
    // heads of the other group. True if one is non-finite.
    __device__ __forceinline__ bool write_queries(const AttentionParams& p) const {
        float zero = 0.0f;
        for (int i = keys.team.thread; i < all_rows * T::CHUNKS; i += keys.team.threads) {
            const int row = i / T::CHUNKS, column = i % T::CHUNKS * T::PER_CHUNK;
            float* const sum = dq_of(warp - member) + row * DQ_STRIDE<D> + column;
            for (int warp = 1; warp < int(p.item_warps); ++warp) {
                const float* const more = sum + warp * most_rows * DQ_STRIDE<D>;
#pragma unroll
                for (int j = 0; j < T::PER_CHUNK; ++j) sum[j] += more[j];
            }
#pragma unroll
            for (int j = 0; j < T::PER_CHUNK; ++j) zero = multiply_add(0.0f, sum[j], zero);
            const size_t at = keys.problem.query(p, keys.item, row) * D + column;
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dq) + at) = narrow<E>(sum, p.scale);
            if (p.group) {
                const size_t other = keys.problem.query(p, keys.item, row, true) * D + column;
                *reinterpret_cast<uint4*>(static_cast<E*>(p.dq) + other) = make_uint4(0, 0, 0, 0);
            }
        }
        return zero != 0.0f;
    }

    // Takes the whole sequence. True if a gradient is non-finite.
    template <bool CAREFUL> __device__ __forceinline__ bool run(const AttentionParams& p) const {
        load(p);
        copy_wait();
        keys.sync(p);
        if constexpr (CORRECTED<E> && SUMS) {
            correct(p);
            keys.sync(p);
        }
        bool non_finite = false;
        for (int head = 0; head < int(keys.problem.key_heads); ++head) {
            const int count = keys.list_length(p, keys.list_of(p, head));
            for (Pieces piece(p, opaque(member)); piece.at * 16 < count; piece.advance()) {
                non_finite |= take_keys<CAREFUL>(p, head, piece.at * 16);
            }
            if (keys.by_label(p)) clear_unlisted(p, head);
        }
        if constexpr (SUMS) {
            keys.sync(p);
            non_finite |= write_queries(p);
        }
        return p.item_warps == 1 ? any_lane(non_finite) : any_thread(non_finite);
    }
};

// Not inlined: only sequences with non-finite values call it.
template <class E, int D, bool SUMS> __device__ __noinline__ void backward_whole_carefully(const AttentionParams& p) {
    const WholeBackward<E, D, SUMS> backward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    backward.keys.sync(p);
    backward.template run<true>(p);
}

template <class E, int D, bool SUMS> __device__ __forceinline__ void backward_whole(const AttentionParams& p) {
    const WholeBackward<E, D, SUMS> backward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    if (backward.template run<false>(p)) backward_whole_carefully<E, D, SUMS>(p);
}

// The work of one warp in dq_whole. Reads q, k, v, o, d_o, lse, order, feedback. Writes dq, with
// zeros for the heads of the other group; delta; and in f32 correction.
template <class E, int D> struct WholeDq {
    static constexpr int STRIDE = Tile<E, D>::STRIDE;

    const WholeKeys<E, D> keys;
    E *q_tile, *d_o_tile;
    float* out;  // [16, D + 4]
    float* scratch;

    __device__ __forceinline__ WholeDq(const AttentionParams& p, Carve carve, int warps, int warp)
        : keys(p, carve, warps, warp, p.item_warps, p.key_slots * p.capacity) {
        q_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
        d_o_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
        out = carve.take<float>(warps * 16 * (D + 4)) + warp * 16 * (D + 4);
        scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;
    }

    // Takes 16 query rows from `first` on. True if a gradient is non-finite.
    template <bool CAREFUL> __device__ __forceinline__ bool take_rows(const AttentionParams& p, int first) const {
        const Problem& problem = keys.problem;
        const Item& item = keys.item;
        const int lane = lane_index(), left = item.length * problem.slots - first, rows = left < 16 ? left : 16;
        __syncwarp();  // all lanes have read the previous rows
        const unsigned visible = stage_queries(p, keys, q_tile, first, rows, 0);
        const unsigned most = shuffle_from(visible, rows - 1), least = rows == 16 ? shuffle_from(visible, 0) : 0;
        const unsigned own[2] = {shuffle_from(visible, lane >> 2), shuffle_from(visible, (lane >> 2) + 8)};
        float lse[2], delta[2];
        compute_delta<E, D>(delta, p, problem, item, first, rows);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = (lane >> 2) + i * 8;
            lse[i] = row < rows ? base_2_lse(p.lse[problem.row(p, item, first + row)]) : INF;
            if ((lane & 3) == 0 && row < rows) p.delta[problem.row(p, item, first + row)] = delta[i];
        }
        __syncwarp();
        Rows<E, D, !CAREFUL> q, d_o;
        q.set(q_tile);

        const float scale = p.scale * LOG2_E;
        float acc[D / 8][4], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
        for (int head = 0; head < int(problem.key_heads); ++head) {
            __syncwarp();  // all lanes have read the rows of the previous head
            stage_rows<E, D>(d_o_tile, p.d_o, rows, 0,
                             [&](int row) { return problem.row(p, item, first + row) * problem.key_heads + head; });
            __syncwarp();
            d_o.set(d_o_tile);
            const int list = keys.list_of(p, head);
            const bool kept = keys.keeps(p, head);
            for (int from = 0; from < keys.of_list(most, list); from += 16) {
                const E* const own_keys = keys.k_tile + (head * p.capacity + from) * STRIDE;
                const E* const values = keys.v_tile + (head * p.capacity + from) * STRIDE;
                const int limit[2] = {keys.of_list(own[0], list) - from, keys.of_list(own[1], list) - from};
                const bool diagonal = CAREFUL || from + 16 > keys.of_list(least, list);
                float s[2][4];
                if (kept) score_gradients<E, D, true>(s, sum, q, d_o, own_keys, values, scale, lse, delta, diagonal, limit);
                else score_gradients<E, D, false>(s, sum, q, d_o, own_keys, values, scale, lse, delta, diagonal, limit);
                if constexpr (CAREFUL) {
                    const auto sees = [&](int i) { return i / 4 * 8 + (lane & 3) * 2 + i % 2 < limit[i / 2 % 2]; };
                    hide(s, sees);
                    accumulate_carefully<E, D>(acc, s, own_keys, scratch, sees);
                } else {
                    accumulate<E, D>(acc, s, own_keys, scratch);
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
        return any_lane(zero != 0.0f);
    }

    // Takes all rows of the warp. Stops and returns true at the first rows that need CAREFUL mode.
    template <bool CAREFUL> __device__ __forceinline__ bool take_all(const AttentionParams& p) const {
        const int all_rows = keys.item.length * keys.problem.slots;
        for (Pieces tile(p, uniform(warp_index()) % p.item_warps); tile.at * 16 < all_rows; tile.advance()) {
            if (take_rows<CAREFUL>(p, tile.at * 16) && !CAREFUL) return true;
        }
        return false;
    }
};

template <class E, int D> __device__ __noinline__ void dq_whole_carefully(const AttentionParams& p) {
    const WholeDq<E, D> dq(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    dq.template take_all<true>(p);
}

template <class E, int D> __device__ __forceinline__ void dq_whole(const AttentionParams& p) {
    const WholeDq<E, D> dq(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    dq.keys.template load<0>(p);
    copy_wait();
    dq.keys.sync(p);
    if (dq.template take_all<false>(p)) dq_whole_carefully<E, D>(p);
}
