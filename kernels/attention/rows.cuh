// Shared by all attention passes: rows, heads and tiles of a block; copies between global and
// shared memory.
#pragma once
#include "carve.cuh"
#include "online_softmax.cuh"
#include "attention/params.cuh"
#include "primitives.cuh"
#include "attention/seqlen.cuh"
#include "attention/warp_product.cuh"

constexpr int MAX_WARPS = 4;
constexpr int THREADS = MAX_WARPS * 32;

// Architectures whose register allocation differs from Hopper's.
#if defined(__CUDA_ARCH__)
constexpr bool AMPERE = __CUDA_ARCH__ < 900, BLACKWELL = __CUDA_ARCH__ >= 1000;
#else
constexpr bool AMPERE = false, BLACKWELL = false;
#endif

// Keys (dk_dv: query rows) per tile. 64 keep more loads in flight; wide heads have room for 32.
template <class E, int D> constexpr int TILE_ROWS = sizeof(E) == 2 && D <= 32 ? 64 : 32;

// Rows and heads of a block. With one key slot, heads are separate problems along blockIdx.y.
// Tensor rows are numbered in 32 bits: the host has checked the range.
struct Problem {
    unsigned slots;       // query rows per token
    unsigned first_slot;
    unsigned key_heads;
    unsigned first_key_head;

    __device__ __forceinline__ explicit Problem(const AttentionParams& p) {
        const bool separate = p.key_slots == 1;
        slots = separate ? 1 : p.query_slots;
        first_slot = first_key_head = separate ? blockIdx.y : 0;
        key_heads = p.key_slots;
    }
    // Position in the sequence of the token of query row `r`: r / slots. Exact while r * slots <
    // 2^31.
    static __device__ __forceinline__ unsigned position(const AttentionParams& p, unsigned r) { return multiply_high(2 * r, p.slot_share); }
    // Row of lse and delta; row of o in units of K * D elements.
    __device__ __forceinline__ size_t row(const AttentionParams& p, const Item& item, unsigned r) const {
        return item.start * p.query_slots + first_slot + r * (p.key_slots == 1 ? p.query_slots : 1);
    }
    // Row of q and dq in units of D elements. `other`: the head of the same slot for the opposite
    // label.
    __device__ __forceinline__ size_t query(const AttentionParams& p, const Item& item, unsigned r, bool other = false) const {
        const unsigned position = this->position(p, r), token = item.start + position;
        const unsigned label = load_feedback(p, token).label ^ unsigned(other);
        return token * p.heads + query_head(p, first_slot + r - position * slots, label);
    }
    __device__ __forceinline__ size_t key(const AttentionParams& p, unsigned token, unsigned head) const {
        return token * p.heads + first_key_head + head;
    }
};

// Scores are scaled into base 2 once. A negative scale would turn the maximum into a minimum, so
// the queries are negated instead: `flip` holds their sign bits.
template <class E> struct Scale {
    float factor;
    unsigned flip;
    __device__ __forceinline__ explicit Scale(const AttentionParams& p)
        : factor(largest(magnitude(p.scale) * LOG2_E, 1e-30f)),
          flip(int(__float_as_uint(p.scale)) >> 31 & (sizeof(E) == 4 ? 0x80000000u : 0x80008000u)) {}
};

// Copies 16 rows to the warp's tile: row i from `source` + D * `index`(i), zeros from `count` on.
// XORs every word with `flip`.
template <class E, int D, class Index>
__device__ __forceinline__ void stage_rows(E* tile, const void* source, int count, unsigned flip, Index index) {
    using T = Tile<E, D>;
    for (int i = lane_index(); i < 16 * T::CHUNKS; i += 32) {
        const int row = i / T::CHUNKS, chunk = i % T::CHUNKS;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < count) {
            x = *reinterpret_cast<const uint4*>(static_cast<const E*>(source) + index(row) * D + chunk * T::PER_CHUNK);
            x = make_uint4(x.x ^ flip, x.y ^ flip, x.z ^ flip, x.w ^ flip);
        }
        *reinterpret_cast<uint4*>(tile + row * T::STRIDE + chunk * T::PER_CHUNK) = x;
    }
}

// Threads that copy together: those of the block, or of the warps that share a sequence.
struct Team {
    int thread, threads;
};
__device__ __forceinline__ Team whole_block() { return Team{int(threadIdx.x), int(blockDim.x)}; }

// Starts copying rows to a tile: row i from `source` + D * `index`(i), zeros from `count` up to the
// next multiple of 16, and `more` rows of zeros. Rows beyond are neither written nor read.
template <class E, int D, class Index>
__device__ __forceinline__ void copy_rows(const Team& team, E* tile, const void* source, int count, int more, Index index) {
    using T = Tile<E, D>;
    const int rows = ((count + 15) & ~15) + more;
    for (int i = team.thread; i < rows * T::CHUNKS; i += team.threads) {
        const int row = i / T::CHUNKS, chunk = i % T::CHUNKS;
        const bool valid = row < count;
        const E* from = static_cast<const E*>(source) + (valid ? index(row) * D : 0) + chunk * T::PER_CHUNK;
        copy_async(tile + row * T::STRIDE + chunk * T::PER_CHUNK, from, valid);
    }
}

// Writes `count` rows of floats as elements: row i to `target` + D * `index`(i).
template <class E, int D, class Index>
__device__ __forceinline__ void write_rows(void* target, const float* from, int stride, int count, Index index) {
    using T = Tile<E, D>;
    for (int i = lane_index(); i < count * T::CHUNKS; i += 32) {
        const int row = i / T::CHUNKS, chunk = i % T::CHUNKS;
        *reinterpret_cast<uint4*>(static_cast<E*>(target) + index(row) * D + chunk * T::PER_CHUNK) =
            narrow<E>(from + row * stride + chunk * T::PER_CHUNK, 1.0f);
    }
}

// Iterates over the key tiles of a block of query rows: by head, label, position. All threads hold
// the same values.
template <int KEYS> struct KeyWalk {
    unsigned head;
    int label;
    int first;  // first key of the tile, counted inside its label
    int keys;   // number of keys of this label that the block sees
    bool kept;

    // Goes to the first non-empty tile; false if there is none.
    __device__ __forceinline__ bool start(const AttentionParams& p, const Problem& problem, const Visible& visible) {
        head = 0, label = -1, first = keys = 0, kept = false;
        return advance(p, problem, visible);
    }
    // Goes to the next non-empty tile; false if there is none.
    __device__ __forceinline__ bool advance(const AttentionParams& p, const Problem& problem, const Visible& visible) {
        first += KEYS;
        if (first < keys) return true;
        first = 0;
        for (;;) {
            if (++label == 2) label = 0, ++head;
            if (head >= problem.key_heads) return false;
            keys = visible.of(label);
            kept = is_kept(p, head, label);
            if (keys > 0 && (kept || !p.masked)) return true;
        }
    }
    // Number of keys of the tile.
    __device__ __forceinline__ int count() const { return keys - first < KEYS ? keys - first : KEYS; }
};

// A thread's part of copying tiles of K and, if kept, V: one column of every `step`-th row, so that
// a thread looks up few tokens. `find` loads the tokens ahead of `start`, which uses them.
template <class E, int D, int KEYS> struct KeyCopy {
    using T = Tile<E, D>;
    // Tokens that `find` loads: all of a thread's tokens in a full block. `start` looks up the
    // others.
    static constexpr int AHEAD = (KEYS * T::CHUNKS + THREADS - 1) / THREADS < 4 ? (KEYS * T::CHUNKS + THREADS - 1) / THREADS : 4;

    int row, step, to;   // first row, distance between rows, offset of the first row in the tile
    unsigned column;
    unsigned token[AHEAD];

    __device__ __forceinline__ KeyCopy()
        : row(threadIdx.x / T::CHUNKS), step(blockDim.x / T::CHUNKS), column(threadIdx.x % T::CHUNKS * T::PER_CHUNK) {
        to = row * T::STRIDE + column;
    }
    // Token of key `r` of the tile; for a key past the end, the first token of the sequence.
    static __device__ __forceinline__ unsigned token_of(const AttentionParams& p, const Item& item, const KeyWalk<KEYS>& walk, int r) {
        return r < walk.count() ? token_at(p, item, walk.first + (walk.label ? item.negatives : 0) + r) : item.start;
    }

    __device__ __forceinline__ void find(const AttentionParams& p, const Item& item, const KeyWalk<KEYS>& walk) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) token[i] = token_of(p, item, walk, row + i * step);
    }
    // Starts copying the tile given to `find`, with zeros up to the next multiple of 16 keys.
    __device__ __forceinline__ void start(E* k_tile, E* v_tile, const AttentionParams& p, const Problem& problem, const Item& item,
                                          const KeyWalk<KEYS>& walk) const {
        const int keys = walk.count(), rows = (keys + 15) & ~15;
        // In bytes: one 32-bit multiply-add into 64 bits gives a row address.
        const unsigned token_bytes = p.heads * D * unsigned(sizeof(E));
        const unsigned offset = ((problem.first_key_head + walk.head) * D + column) * unsigned(sizeof(E));
        const auto copy = [&](int i, unsigned of) {
            const size_t from = size_t(of) * token_bytes + offset;
            const int at = to + i * step * T::STRIDE;
            copy_async(k_tile + at, static_cast<const char*>(p.k) + from, row + i * step < keys);
            if (walk.kept) copy_async(v_tile + at, static_cast<const char*>(p.v) + from, row + i * step < keys);
        };
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (row + i * step < rows) copy(i, token[i]);
        }
        if (AHEAD * step >= KEYS) return;
        for (int i = AHEAD; row + i * step < rows; ++i) copy(i, token_of(p, item, walk, row + i * step));
    }
};

// Copies a tile and waits for it. All threads must have read the previous content.
template <class E, int D, int KEYS>
__device__ __forceinline__ void copy_now(E* k_tile, E* v_tile, const AttentionParams& p, const Problem& problem, const Item& item,
                                         const KeyWalk<KEYS>& walk) {
    KeyCopy<E, D, KEYS> copy;
    copy.find(p, item, walk);
    copy.start(k_tile, v_tile, p, problem, item, walk);
    copy_wait();
    __syncthreads();
}
