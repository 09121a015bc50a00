// Attention backward over whole short sequences: dq, dk and dv in one kernel, which computes each p once (in f32 twice, see below).
//
// Besides keys and values, queries and d_o lie in shared memory. A warp takes 16 keys of one head at a time, on transposed
// scores as in dk_dv, and walks down the query rows that see them, so that dk and dv stay in registers. dq is added up in shared memory,
// in f32, from ds transposed in registers: by each warp in a sum of its own, so that warps wait for each other only before and
// after. How many share a sequence is decided by its length alone; neither that nor the rest of the batch shows in the bits.
//
// Reads q, k, v, o, d_o, lse, order, feedback, each element once; writes dq, dk, dv, each element once. delta is computed
// while d_o passes through registers to shared memory.
#pragma once
#include "attention_backward.cuh"
#include "attention_whole.cuh"

// Floats between the rows of dq in shared memory: accumulators are read and written without bank conflicts.
template <int D> constexpr int DQ_STRIDE = D == 8 ? 8 : D + 8;

// Blocks that should be resident: what shared memory allows, where registers can be had for it without spills.
template <class E, int D> constexpr int WHOLE_BLOCKS = sizeof(E) == 4 ? (D == 8 ? 3 : 1) : D <= 16 ? 4 : D == 32 ? 3 : 1;

// First query row that sees a key that is not there.
constexpr int NEVER = 1 << 30;

// A warp's part in it.
template <class E, int D> struct WholeBackward {
    using T = Tile<E, D>;
    static constexpr int STRIDE = T::STRIDE;

    const WholeKeys<E, D> keys;
    int member, most_rows, all_rows;  // rows there is room for, and those there are
    E* q_tile;                        // [most_rows, STRIDE]
    E* d_o_tile;                      // [heads, most_rows, STRIDE]
    float *lse_tile, *delta_tile, *correction_tile;
    float* dq;                        // [item_warps, most_rows, DQ_STRIDE]
    float* scratch;

    __device__ __forceinline__ WholeBackward(const AttentionParams& p, Carve carve, int warps, int warp) : keys(p, carve, warps, warp, p.item_warps) {
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
        dq = carve.take<float>(warps * most_rows * DQ_STRIDE<D>) + place * p.item_warps * most_rows * DQ_STRIDE<D>;
        scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;
    }

    __device__ __forceinline__ float* own_dq() const { return dq + member * most_rows * DQ_STRIDE<D>; }

    // Everything there is comes to shared memory; zeros in rows up to the next multiple of 16.
    __device__ __forceinline__ void load(const AttentionParams& p) const {
        const Problem& problem = keys.problem;
        keys.template load<0>(p);
        copy_rows<E, D>(keys.team, q_tile, p.q, all_rows, 0, [&](int row) { return problem.query(p, keys.item, row); });
        const int lane = lane_index(), heads = problem.key_heads, chunks = heads * T::CHUNKS;
        for (int i = lane * 4; i < ((all_rows + 15) & ~15) * DQ_STRIDE<D>; i += 128) {
            *reinterpret_cast<float4*>(own_dq() + i) = float4{0.0f, 0.0f, 0.0f, 0.0f};
        }
        // Two lanes share a row of d_o.
        for (int row = member * 16 + (lane & 15); row < ((all_rows + 15) & ~15); row += p.item_warps * 16) {
            const bool there = row < all_rows;
            const size_t at = problem.row(p, keys.item, there ? row : 0);
            float delta = 0.0f;
#pragma unroll 2
            for (int chunk = lane >> 4; chunk < chunks; chunk += 2) {
                uint4 y = make_uint4(0, 0, 0, 0);
                if (there) {
                    const size_t from = at * (heads * D) + chunk * T::PER_CHUNK;
                    const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.o) + from);
                    y = *reinterpret_cast<const uint4*>(static_cast<const E*>(p.d_o) + from);
                    delta = add_product<E>(x, y, delta);
                }
                E* const to = d_o_tile + (chunk / T::CHUNKS * most_rows + row) * STRIDE + chunk % T::CHUNKS * T::PER_CHUNK;
                *reinterpret_cast<uint4*>(to) = y;
            }
            delta += shuffle_xor(delta, 16);
            if (lane < 16) {
                lse_tile[row] = there ? base_2_lse(p.lse[at]) : INF;
                delta_tile[row] = delta;
            }
        }
    }

    // A row's correction is needed before its p is used for dk and dv: its warp adds up all p once, beforehand.
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

    // 16 keys of a head, from `first` of its list on, and all query rows that see them. True if one of their gradients is not finite.
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
        E* const own_keys = keys.k_tile + (head * p.capacity + first) * STRIDE;
        E* const own_values = keys.v_tile + (head * p.capacity + first) * STRIDE;
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
            // Keys that are not there are hidden as those of the diagonal are.
            const bool diagonal = CAREFUL || row < all_from;
            float s[2][4];
            if (kept) {
                transposed_gradients<E, D, CAREFUL, true>(s, dv, k, v, queries, d_o, scale, lse_tile + row, delta_tile + row,
                                                          correction_tile + row, row, diagonal, own_from, scratch);
            } else {
                transposed_gradients<E, D, CAREFUL, false>(s, dv, k, v, queries, d_o, scale, lse_tile + row, delta_tile + row,
                                                           correction_tile + row, row, diagonal, own_from, scratch);
            }
            float* const dq_rows = own_dq() + row * DQ_STRIDE<D>;
            if constexpr (CAREFUL) {
                const auto sees = [&](int i) { return row + i / 4 * 8 + (lane & 3) * 2 + i % 2 >= own_from[i / 2 % 2]; };
                accumulate_transposed_carefully<E, D>(dq_rows, DQ_STRIDE<D>, s, own_keys, scratch, sees);
                accumulate_carefully<E, D>(dk, s, queries, scratch, sees);
            } else {
                accumulate<E, D>(dk, s, queries, scratch);
                accumulate_transposed<E, D>(dq_rows, DQ_STRIDE<D>, s, own_keys, scratch);
            }
        }
        // The keys and values have done their work: the gradients leave through their place.
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

    // Zeros in dk and dv of a head's keys that are in no list.
    __device__ __forceinline__ void clear_unlisted(const AttentionParams& p, int head) const {
        const int other = 1 - keys.list_of(p, head), from = keys.list_start(other);
        const int count = other ? keys.item.length - keys.item.negatives : keys.item.negatives;
        for (int i = keys.team.thread; i < count * T::CHUNKS; i += keys.team.threads) {
            const size_t to = keys.problem.key(p, token_at(p, keys.item, from + i / T::CHUNKS), head) * D + i % T::CHUNKS * T::PER_CHUNK;
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dk) + to) = make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dv) + to) = make_uint4(0, 0, 0, 0);
        }
    }

    // Writes dq of the warp's rows: the sum of what the warps have of it, and zeros for the heads of the other group. True if
    // one is not finite.
    __device__ __forceinline__ bool write_queries(const AttentionParams& p) const {
        float zero = 0.0f;
        for (int i = keys.team.thread; i < all_rows * T::CHUNKS; i += keys.team.threads) {
            const int row = i / T::CHUNKS, column = i % T::CHUNKS * T::PER_CHUNK;
            float* const sum = dq + row * DQ_STRIDE<D> + column;
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

    // True if a gradient may be other than it should be, as something is not finite.
    template <bool CAREFUL> __device__ __forceinline__ bool run(const AttentionParams& p) const {
        load(p);
        copy_wait();
        keys.meet(p);
        if constexpr (CORRECTED<E>) {
            correct(p);
            keys.meet(p);
        }
        bool spoiled = false;
        for (int head = 0; head < int(keys.problem.key_heads); ++head) {
            const int count = keys.list_length(p, keys.list_of(p, head));
            for (Pieces piece(p, unforeseen(member)); piece.at * 16 < count; piece.advance()) {
                spoiled |= take_keys<CAREFUL>(p, head, piece.at * 16);
            }
            if (keys.by_label(p)) clear_unlisted(p, head);
        }
        keys.meet(p);
        spoiled |= write_queries(p);
        return p.item_warps == 1 ? any_lane(spoiled) : any_thread(spoiled);
    }
};

// A call of its own, which only those with something that is not finite pay for.
template <class E, int D> __device__ __noinline__ void backward_whole_carefully(const AttentionParams& p) {
    const WholeBackward<E, D> backward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    backward.keys.meet(p);
    backward.template run<true>(p);
}

template <class E, int D> __device__ __forceinline__ void backward_whole(const AttentionParams& p) {
    const WholeBackward<E, D> backward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    if (backward.template run<false>(p)) backward_whole_carefully<E, D>(p);
}
