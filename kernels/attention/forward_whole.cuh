// Attention forward over whole sequences: a block loads the keys and values of all heads at once.
// Then each warp works independently, on 16 query rows at a time.
//
// Reads q, k, v, order, feedback; writes o and lse, each element once.
//
// Exponentials: H per visible (row, key), half of that with Masked, rounded up to 16 x 16 chunks at
// the diagonal and at the end.
#pragma once
#include "attention/forward_tile.cuh"
#include "attention/whole.cuh"

// Minimum resident blocks per multiprocessor, if the registers suffice without spills.
template <class E, int D>
constexpr int WHOLE_FORWARD_BLOCKS = sizeof(E) == 4 ? (D <= 32 ? 3 : 1) : D == 8 ? 4 - BLACKWELL : D == 16 ? 5 - BLACKWELL : D == 32 ? 4 : 1;

// The work of one warp.
template <class E, int D> struct WholeForward {
    const HeadOutputs<E, D> outputs;
    const WholeKeys<E, D> keys;
    E* q_tile;
    float* scratch;

    __device__ __forceinline__ WholeForward(const AttentionParams& p, Carve carve, int warps, int warp)
        : outputs(p, carve, warps, warp), keys(p, carve, warps, warp, p.item_warps, p.key_slots * p.capacity) {
        q_tile = carve.take<E>(warps * 16 * Tile<E, D>::STRIDE) + warp * 16 * Tile<E, D>::STRIDE;
        scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;
    }

    // Takes 16 query rows from `first` on. True if an output is non-finite.
    template <bool CAREFUL> __device__ __forceinline__ bool take_rows(const AttentionParams& p, int first) const {
        constexpr int KEYS = TILE_ROWS<E, D>, STRIDE = Tile<E, D>::STRIDE;
        const Problem& problem = keys.problem;
        const Item& item = keys.item;
        const int lane = lane_index(), left = item.length * problem.slots - first, rows = left < 16 ? left : 16;
        const unsigned visible = stage_queries(p, keys, q_tile, first, rows, Scale<E>(p).flip);
        const unsigned most = shuffle_from(visible, rows - 1), least = rows == 16 ? shuffle_from(visible, 0) : 0;
        const unsigned own[2] = {shuffle_from(visible, lane >> 2), shuffle_from(visible, (lane >> 2) + 8)};
        __syncwarp();
        Rows<E, D, !CAREFUL> q;
        q.set(q_tile + opaque(0));

        const Scale<E> scale(p);
        OnlineSoftmax softmax;
        softmax.clear();
        bool started = false;
        for (int head = 0; head < int(problem.key_heads); ++head) {
            float acc[D / 8][4];
#pragma unroll
            for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
            const int list = keys.list_of(p, head), columns = keys.of_list(most, list);
            const bool kept = keys.keeps(p, head);
            for (int from = 0; from < columns; from += KEYS) {
                const int at = (head * p.capacity + from) * STRIDE;
                const int limit[2] = {keys.of_list(own[0], list) - from, keys.of_list(own[1], list) - from};
                take_tile<E, D, CAREFUL>(acc, softmax, started, q, scale.factor, keys.k_tile + at, keys.v_tile + at, kept, scratch,
                                         columns - from, keys.of_list(least, list) - from, limit);
            }
            outputs.store(p, head, acc, softmax);
        }
        return any_lane(outputs.write(p, problem, item, first, rows, softmax));
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

// Not inlined: only sequences with non-finite values call it.
template <class E, int D> __device__ __noinline__ void forward_whole_carefully(const AttentionParams& p) {
    const WholeForward<E, D> forward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    forward.template take_all<true>(p);
}

template <class E, int D> __device__ __forceinline__ void forward_whole(const AttentionParams& p) {
    const WholeForward<E, D> forward(p, Carve{shared_memory()}, blockDim.x / 32, uniform(warp_index()));
    forward.keys.template load<0>(p);
    copy_wait();
    forward.keys.sync(p);
    if (forward.template take_all<false>(p)) forward_whole_carefully<E, D>(p);
}
