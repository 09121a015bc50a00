// A sequence whose keys and values all lie in shared memory, for forward and backward.
//
// `item_warps` warps of a block share a sequence, so a block holds several. The last block of a
// launch may hold empty items.
//
// Unlike streamed keys, these stay in token order: a row sees a prefix of one list instead of two.
// The cost is the products with values that are not kept; those values are zeros in shared memory
// and never loaded. Masked omits such pairs: a head's list is then the keys of its own label, in
// label order, and a row sees a prefix of it.
#pragma once
#include "attention/rows.cuh"

template <class E, int D> struct WholeKeys {
    using T = Tile<E, D>;
    const Problem problem;
    Item item;
    Team team;           // the threads that share the sequence
    E *k_tile, *v_tile;  // [heads, capacity, STRIDE]

    // `sharing`: p.item_warps, or the constant 1. A sequence has room for `rows` rows of keys and
    // as many of values.
    __device__ __forceinline__ WholeKeys(const AttentionParams& p, Carve& carve, int warps, int warp, int sharing, int rows) : problem(p) {
        const int items = warps / sharing, place = warp / sharing;
        item = load_item(p, blockIdx.x * items + place);
        team = Team{int(threadIdx.x) - place * sharing * 32, sharing * 32};
        k_tile = carve.take<E>(items * rows * T::STRIDE) + place * rows * T::STRIDE;
        v_tile = carve.take<E>(items * rows * T::STRIDE) + place * rows * T::STRIDE;
    }

    // Whether a head's list holds only the keys of its label.
    static __device__ __forceinline__ bool by_label(const AttentionParams& p) { return p.masked && p.group; }
    // List of a head: 1 for a head of the positives, by label; otherwise 0.
    static __device__ __forceinline__ int list_of(const AttentionParams& p, int head) { return by_label(p) && head >= int(p.group); }

    __device__ __forceinline__ int list_start(int list) const { return list ? item.negatives : 0; }
    __device__ __forceinline__ int list_length(const AttentionParams& p, int list) const {
        return by_label(p) && list == 0 ? item.negatives : item.length - list_start(list);
    }
    // Token at `index` of a list.
    __device__ __forceinline__ unsigned token(const AttentionParams& p, int list, int index) const {
        return by_label(p) ? token_at(p, item, list_start(list) + index) : item.start + index;
    }
    // Whether any value of the head is kept.
    __device__ __forceinline__ bool keeps(const AttentionParams& p, int head) const {
        return by_label(p) || p.group == 0 || (int(p.group) > head ? item.negatives : item.length - item.negatives) > 0;
    }

    // Number of keys visible to the token at `position`, in 16 bits for each list.
    __device__ __forceinline__ unsigned visible_to(const AttentionParams& p, unsigned position, const Feedback& feedback) const {
        const unsigned all = p.causal ? position + 1 : item.length;
        if (!by_label(p)) return all;
        const unsigned positives = p.causal ? feedback.positives : item.length - item.negatives;
        return (all - positives) | positives << 16;
    }
    // The same for a query row.
    __device__ __forceinline__ unsigned visible(const AttentionParams& p, unsigned row) const {
        const unsigned position = problem.position(p, row);
        return visible_to(p, position, by_label(p) ? load_feedback(p, item.start + position) : Feedback{0, 0});
    }
    static __device__ __forceinline__ int of_list(unsigned visible, int list) { return list ? visible >> 16 : visible & 0xffff; }

    // Starts copying keys and values, with zeros up to the next multiple of 16. HEADS: upper bound
    // of the number of key heads; 0: no bound.
    template <int HEADS> __device__ __forceinline__ void load(const AttentionParams& p) const {
        const bool labelled = p.group && !p.masked;  // values are kept by label
        const int column = team.thread % T::CHUNKS * T::PER_CHUNK;
        for (int list = 0; list < 1 + by_label(p); ++list) {
            const int count = list_length(p, list), first = list ? p.group : 0;
            const int end = by_label(p) && list == 0 ? p.group : problem.key_heads;
            for (int row = team.thread / T::CHUNKS; row < ((count + 15) & ~15); row += team.threads / T::CHUNKS) {
                const bool valid = row < count;
                const unsigned of = valid ? token(p, list, row) : item.start;
                const unsigned label = labelled ? load_feedback(p, of).label : 0;
                const size_t at = size_t(problem.key(p, of, 0)) * D + column;
                const E* const k = static_cast<const E*>(p.k) + at;
                const E* const v = static_cast<const E*>(p.v) + at;
                const int to = row * T::STRIDE + column;
#pragma unroll HEADS ? HEADS : 2
                for (int head = HEADS ? 0 : first; head < (HEADS ? HEADS : end); ++head) {
                    if (HEADS && (head < first || head >= end)) continue;
                    const int head_at = to + head * p.capacity * T::STRIDE;
                    copy_async(k_tile + head_at, k + head * D, valid);
                    copy_async(v_tile + head_at, v + head * D, valid && (!labelled || (head >= int(p.group)) == (label != 0)));
                }
            }
        }
    }

    // Barrier for the warps that share the sequence.
    __device__ __forceinline__ void sync(const AttentionParams& p) const {
        if (p.item_warps == 1) __syncwarp();
        else __syncthreads();
    }
};

// Copies `rows` query rows from `first` on to a warp's tile, and zeros behind them. Two lanes share
// row lane & 15. Returns the number of keys that this row sees. XORs every word with `flip`.
template <class E, int D>
__device__ __forceinline__ unsigned stage_queries(const AttentionParams& p, const WholeKeys<E, D>& keys, E* tile, int first, int rows,
                                                  unsigned flip) {
    using T = Tile<E, D>;
    const int lane = lane_index(), row = lane & 15;
    const unsigned position = keys.problem.position(p, first + row), token = keys.item.start + position;
    const Feedback feedback = row < rows && p.group ? load_feedback(p, token) : Feedback{0, 0};
    const unsigned slot = keys.problem.first_slot + first + row - position * keys.problem.slots;
    const E* const from = static_cast<const E*>(p.q) + size_t(token * p.heads + query_head(p, slot, feedback.label)) * D;
#pragma unroll
    for (int c = 0; c < T::CHUNKS; c += 2) {
        const int chunk = c + (lane >> 4);
        if (T::CHUNKS == 1 && chunk) continue;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < rows) x = *reinterpret_cast<const uint4*>(from + chunk * T::PER_CHUNK);
        *reinterpret_cast<uint4*>(tile + row * T::STRIDE + chunk * T::PER_CHUNK) =
            make_uint4(x.x ^ flip, x.y ^ flip, x.z ^ flip, x.w ^ flip);
    }
    return row < rows ? keys.visible_to(p, position, feedback) : 0;
}

// The groups of 16 rows or keys that one warp takes of a shared sequence: one of every
// `item_warps`, alternately from the front and the back. This balances the load: later rows see
// more keys, and later keys are seen by fewer rows.
struct Pieces {
    int at, step, both;
    __device__ __forceinline__ Pieces(const AttentionParams& p, int member)
        : at(member), step(2 * (int(p.item_warps) - member) - 1), both(2 * p.item_warps) {}
    __device__ __forceinline__ void advance() {
        at += step;
        step = both - step;
    }
};
