// Factorization-heads attention (FHA): forward, and backward as three deterministic passes. No atomics.
//
// MATHEMATICS. A query row is a (token i, slot a): the token's a-th active query head, which with labels is head
// a + label[i] * H/2. It meets every key head b of every visible token j of its sequence, in one softmax:
//
//     s = scale <q, k[j, b]>      lse = log sum_{j, b} e^s      p = e^(s - lse)      o[b] = sum_{j kept} p v[j, b]
//
// A pair is kept if key head b belongs to label[j]; Masked leaves the others out of lse as well. Backward:
//
//     delta = sum_b <do[b], o[b]>     ds = p (dp - delta),  dp = <do[b], v[j, b]> where kept, else 0
//     dq = scale sum_{j, b} ds k      dk = scale sum ds q      dv = sum_{kept} p do
//
// TILING. Keys of a sequence are visited head by head and, inside a head, in label order (`order`). Whether a pair
// is kept is then a property of a whole tile, never of an element: V is neither loaded nor multiplied where it is
// not, and what a query sees of a label is a prefix, so that the causal test is a comparison with a count and only
// tiles across the diagonal make it. Queries stay in their own order. A warp owns 16 rows, a block up to 4 warps
// that share key tiles, double-buffered by cp.async; blocks take items longest first.
//
// TRAFFIC. Forward reads q once, k and v once per block of query rows of their sequence (from L2 after the first),
// and writes o and lse once. Nothing of size T^2 exists. All global accesses of tensors are 16 bytes wide.
#include "online_softmax.cuh"
#include "params.cuh"
#include "primitives.cuh"
#include "seqlen.cuh"
#include "warp_product.cuh"

constexpr int MAX_WARPS = 4;
constexpr int THREADS = MAX_WARPS * 32;

// Keys (dk_dv: query rows) of one tile. 64 keep more loads in flight; wide heads have room for 32.
template <class E, int D> constexpr int TILE = sizeof(E) == 2 && D <= 32 ? 64 : 32;

// Bump allocation of the block's shared memory; src/device/cuda/tile.rs adds up the same sizes.
struct Carve {
    unsigned char* at;
    template <class T> __device__ __forceinline__ T* take(int count) {
        T* r = reinterpret_cast<T*>(at);
        at += (count * int(sizeof(T)) + 15) & ~15;
        return r;
    }
};

// Which rows and heads a block works on. With one key slot, heads are separate problems along blockIdx.y.
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
    // Row of lse and delta, and of o when counted in K * D elements.
    __device__ __forceinline__ size_t row(const AttentionParams& p, const Item& item, unsigned r) const {
        return size_t(item.start + r / slots) * p.query_slots + first_slot + r % slots;
    }
    // Row of q and dq, counted in D elements.
    __device__ __forceinline__ size_t query(const AttentionParams& p, const Item& item, unsigned r) const {
        const unsigned token = item.start + r / slots;
        const unsigned head = query_head(p, first_slot + r % slots, load_feedback(p, token).label);
        return size_t(token) * p.heads + head;
    }
    __device__ __forceinline__ size_t key(const AttentionParams& p, unsigned token, unsigned head) const {
        return size_t(token) * p.heads + first_key_head + head;
    }
};

// Copies 16 rows to the warp's own tile: row i from `source` + D * `index`(i), zeros from `count` on. `flip` is
// xor-ed into every word.
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

// Threads that copy together: the block's, or those that share one sequence.
struct Team {
    int thread, threads;
};
__device__ __forceinline__ Team whole_block() { return Team{int(threadIdx.x), int(blockDim.x)}; }

// The team starts copying rows to a tile: row i from `source` + D * `index`(i), zeros from `count` up to the next multiple
// of 16 and `more` rows beyond; what lies further is not touched, and not read.
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

// Writes the warp's 16 rows of floats as elements: row i to `target` + D * `index`(i).
template <class E, int D, class Index>
__device__ __forceinline__ void write_rows(void* target, const float* from, int stride, int count, Index index) {
    using T = Tile<E, D>;
    for (int i = lane_index(); i < count * T::CHUNKS; i += 32) {
        const int row = i / T::CHUNKS, chunk = i % T::CHUNKS;
        *reinterpret_cast<uint4*>(static_cast<E*>(target) + index(row) * D + chunk * T::PER_CHUNK) =
            narrow<E>(from + row * stride + chunk * T::PER_CHUNK, 1.0f);
    }
}

// The key tiles that a block of query rows meets, in order: by head, by label, by position. All threads hold the same.
template <int KEYS> struct KeyWalk {
    unsigned head;
    int label;
    int first;  // of the keys of this label

    __device__ __forceinline__ void start() { head = label = first = 0; }
    __device__ __forceinline__ void advance() { first += KEYS; }
    // Moves on to the first tile that is not empty; false when there is none.
    __device__ __forceinline__ bool settle(const AttentionParams& p, const Problem& problem, const Visible& visible) {
        for (; head < problem.key_heads; ++head, label = 0) {
            for (; label < 2; ++label, first = 0) {
                if (first < visible.of(label) && !(p.masked && !is_kept(p, head, label))) return true;
            }
        }
        return false;
    }
};

// What the tile at `walk` starts loading: K, and V where it is kept.
template <class E, int D, int KEYS>
__device__ __forceinline__ void copy_keys(E* k_tile, E* v_tile, const AttentionParams& p, const Problem& problem,
                                          const Item& item, const Visible& visible, const KeyWalk<KEYS>& walk) {
    const int left = visible.of(walk.label) - walk.first, count = left < KEYS ? left : KEYS;
    const unsigned sorted = walk.first + (walk.label ? item.negatives : 0);
    const auto index = [&](int row) { return problem.key(p, token_at(p, item, sorted + row), walk.head); };
    copy_rows<E, D>(whole_block(), k_tile, p.k, count, 0, index);
    if (is_kept(p, walk.head, walk.label)) copy_rows<E, D>(whole_block(), v_tile, p.v, count, 0, index);
}

// ------------------------------------------------------------------------------------------------------------ forward
//
// Two regimes. Streamed: a block takes 16 * warps query rows of one sequence, starting at item.first, and key tiles pass by.
// Whole: `item_warps` of a block's warps take a whole short sequence, so a block holds several; all of its keys and values are
// loaded at once, and after one barrier each warp works by itself. A launch's last block may hold items of no tokens.
//
// Reads q, k, v, order, feedback; writes o and lse of its rows, each element once. The unnormalised output of a
// finished key head waits in shared memory, in f32, for the denominator, which is known when the last head is done.
//
// Exponentials: H per visible (row, key), up to 16 x 16 granularity at the diagonal and at the ends of the labels.
template <class E, int D, bool WHOLE> __device__ __forceinline__ void forward(const AttentionParams& p) {
    constexpr int KEYS = TILE<E, D>, STRIDE = Tile<E, D>::STRIDE;
    const int lane = lane_index(), warp = uniform(warp_index()), warps = blockDim.x / 32;
    const int item_warps = WHOLE ? p.item_warps : warps, items = warps / item_warps, member = warp / item_warps;
    const Item item = load_item(p, blockIdx.x * items + member);
    const Problem problem(p);
    const int out_stride = problem.key_heads * D + 4;

    // Streamed: two stages of one tile. Whole: all keys of all heads, in label order, `capacity` rows a head.
    Carve carve{shared_memory()};
    const int tile_rows = WHOLE ? problem.key_heads * p.capacity : 2 * KEYS;
    E* const k_tile = carve.take<E>(items * tile_rows * STRIDE) + member * tile_rows * STRIDE;
    E* const v_tile = carve.take<E>(items * tile_rows * STRIDE) + member * tile_rows * STRIDE;
    E* const q_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
    float* const out = carve.take<float>(warps * 16 * out_stride) + warp * 16 * out_stride;
    // Of each row and head: the reference its output is relative to; then 1 / denominator and the last reference.
    float* const peaks = carve.take<float>(warps * 16 * (problem.key_heads + 2)) + warp * 16 * (problem.key_heads + 2);
    float* const scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;
    float* const inverse = peaks + 16 * problem.key_heads;
    float* const last_peak = inverse + 16;

    // Rows of the block and of the warp; a warp past the end has none, and only helps loading.
    const int all_rows = item.length * problem.slots, block_first = item.first;
    const int first = block_first + (warp - member * item_warps) * 16;
    const int block_last = (block_first + item_warps * 16 < all_rows ? block_first + item_warps * 16 : all_rows) - 1;
    const int rows = first > block_last ? 0 : (block_last + 1 - first < 16 ? block_last + 1 - first : 16);
    const Visible nothing{0, 0};
    const Visible block_visible = item.length ? visible_keys(p, item, block_last / problem.slots) : nothing;
    const Visible warp_most = rows ? visible_keys(p, item, (first + rows - 1) / problem.slots) : nothing;
    const Visible warp_least = rows == 16 ? visible_keys(p, item, first / problem.slots) : nothing;
    Visible own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        own[i] = row < rows ? visible_keys(p, item, (first + row) / problem.slots) : nothing;
    }

    // Scores are scaled into base 2 once. A negative scale would turn the maximum into a minimum: q is negated instead.
    const float scale = largest((p.scale < 0 ? -p.scale : p.scale) * LOG2_E, 1e-30f);
    const unsigned flip = p.scale < 0 ? (sizeof(E) == 4 ? 0x80000000u : 0x80008000u) : 0;
    stage_rows<E, D>(q_tile, p.q, rows, flip, [&](int row) { return problem.query(p, item, first + row); });
    __syncwarp();
    Rows<E, D, true> q;
    q.set(q_tile);

    OnlineSoftmax softmax;
    softmax.clear();
    KeyWalk<KEYS> walk;
    walk.start();
    int stage = 0;
    bool more = walk.settle(p, problem, block_visible);
    if constexpr (WHOLE) {
        const Team team{int(threadIdx.x) - member * item_warps * 32, item_warps * 32};
        for (unsigned head = 0; item.length && head < problem.key_heads; ++head) {
            E* const keys = k_tile + head * p.capacity * STRIDE;
            E* const values = v_tile + head * p.capacity * STRIDE;
            const auto index = [&](int row) { return problem.key(p, token_at(p, item, row), head); };
            // Chunks of the positives start anywhere, and end up to 15 rows after them.
            copy_rows<E, D>(team, keys, p.k, item.length, 16, index);
            for (int label = 0; label < 2; ++label) {
                const int from = label ? item.negatives : 0, count = label ? item.length - item.negatives : item.negatives;
                if (!is_kept(p, head, label) || count == 0) continue;
                copy_rows<E, D>(team, values + from * STRIDE, p.v, count, 0, [&](int row) { return index(from + row); });
            }
        }
        copy_wait();
        __syncthreads();
    } else if (more) {
        copy_keys<E, D, KEYS>(k_tile, v_tile, p, problem, item, block_visible, walk);
    }

    for (unsigned head = 0; head < problem.key_heads; ++head) {
        float acc[D / 8][4];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;

        while (more && walk.head == head) {
            if constexpr (!WHOLE) {
                copy_wait();
                __syncthreads();  // the tile is there, and everyone has done with the one before
            }
            const KeyWalk<KEYS> tile = walk;
            const int at = WHOLE ? head * p.capacity + (tile.label ? item.negatives : 0) + tile.first : stage * KEYS;
            const E* const keys = k_tile + at * STRIDE;
            const E* const values = v_tile + at * STRIDE;
            stage ^= 1;
            walk.advance();
            more = walk.settle(p, problem, block_visible);
            if (!WHOLE && more) {
                copy_keys<E, D, KEYS>(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item,
                                      block_visible, walk);
            }

            // Columns of this tile that the warp's last row sees, and those that all its rows see.
            const int columns = warp_most.of(tile.label) - tile.first;
            const int seen_by_all = warp_least.of(tile.label) - tile.first;
            const int limit[2] = {own[0].of(tile.label) - tile.first, own[1].of(tile.label) - tile.first};
            float s[KEYS / 16][2][4];
            float found[2] = {-INF, -INF};
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                if (j * 16 >= columns) continue;
                scores(s[j], q, keys + j * 16 * STRIDE);
                if (j * 16 + 16 > seen_by_all) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int column = j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2;
                        if (column >= limit[i / 2 % 2]) s[j][i / 4][i % 4] = -INF;
                    }
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) found[i / 2 % 2] = largest(found[i / 2 % 2], s[j][i / 4][i % 4]);
            }
            found[0] *= scale;
            found[1] *= scale;
            float factor[2];
            if (softmax.raise(found, factor)) {
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[n][i] *= factor[i / 2];
                }
            }
            const bool kept = is_kept(p, head, tile.label);
            const float peak[2] = {OnlineSoftmax::reference(softmax.peak[0]), OnlineSoftmax::reference(softmax.peak[1])};
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                if (j * 16 >= columns) continue;
                float low[2][4];
                refine(s[j], low, scale, q, keys + j * 16 * STRIDE);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& x = s[j][i / 4][i % 4];
                    x = exp2_fast(exponent<E>(x, low[i / 4][i % 4], scale, peak[i / 2 % 2]));
                    softmax.sum[i / 2 % 2] += x;
                }
                if (kept) accumulate<E, D>(acc, s[j], values + j * 16 * STRIDE, scratch);
            }
        }

        store_accumulator<D>(out + head * D, out_stride, acc, 1.0f);
        if ((lane & 3) == 0) {
            peaks[(lane >> 2) * problem.key_heads + head] = softmax.peak[0];
            peaks[((lane >> 2) + 8) * problem.key_heads + head] = softmax.peak[1];
        }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        const float total = softmax.total(i);
        if ((lane & 3) == 0) {
            inverse[row] = total == 0.0f ? 0.0f : 1.0f / total;
            last_peak[row] = OnlineSoftmax::reference(softmax.peak[i]);
            if (row < rows) {
                const float lse = (last_peak[row] + log2_fast(total)) * LN_2;
                p.lse[problem.row(p, item, first + row)] = total == 0.0f ? -INF : lse;
            }
        }
    }
    __syncwarp();
    using T = Tile<E, D>;
    const int chunks = problem.key_heads * T::CHUNKS;
    for (int i = lane; i < rows * chunks; i += 32) {
        const int row = i / chunks, chunk = i % chunks;
        const float peak = peaks[row * problem.key_heads + chunk / T::CHUNKS];
        const float factor = peak == -INF ? 0.0f : exp2_fast(peak - last_peak[row]) * inverse[row];
        *reinterpret_cast<uint4*>(static_cast<E*>(p.o) + problem.row(p, item, first + row) * problem.key_heads * D +
                                  chunk * T::PER_CHUNK) = narrow<E>(out + row * out_stride + chunk * T::PER_CHUNK, factor);
    }
}

// ----------------------------------------------------------------------------------------------------------- backward
//
// delta: four lanes a row of N * Q. Reads o and d_o, writes delta.
template <class E, int D> __device__ __forceinline__ void delta(const AttentionParams& p) {
    constexpr int PER_CHUNK = Tile<E, D>::PER_CHUNK;
    const unsigned row = (blockIdx.x * blockDim.x + threadIdx.x) / 4, quarter = threadIdx.x & 3;
    float sum = 0.0f;
    if (row < p.rows) {
        const unsigned width = p.key_slots * D;
        const E* const o = static_cast<const E*>(p.o) + size_t(row) * width;
        const E* const d_o = static_cast<const E*>(p.d_o) + size_t(row) * width;
        for (unsigned at = quarter * PER_CHUNK; at < width; at += 4 * PER_CHUNK) {
            const uint4 x = *reinterpret_cast<const uint4*>(o + at), y = *reinterpret_cast<const uint4*>(d_o + at);
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
        }
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (row < p.rows && quarter == 0) p.delta[row] = sum;
}

// lse in base 2, such that 2^(score - lse) is 0 for a row that saw nothing.
__device__ __forceinline__ float base_2_lse(float lse) { return lse == -INF ? INF : lse * LOG2_E; }

// Whether p is corrected for the rounding of lse. An lse of 1e4 in f32 is off by up to 5e-4, and p of the whole row with it.
// The pass that visits a row's every p adds them up and divides by the sum, which should be 1; it leaves the factor for dk_dv.
template <class E> constexpr bool CORRECTED = sizeof(E) == 4;

// dq: a block of query rows as in forward. Reads q, k, v, d_o, lse, delta, order, feedback; writes dq of its tokens,
// zeros for the heads of the other group included, and in f32 correction.
template <class E, int D> __device__ __forceinline__ void dq(const AttentionParams& p) {
    constexpr int KEYS = TILE<E, D>, STRIDE = Tile<E, D>::STRIDE;
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
    const Visible block_visible = visible_keys(p, item, block_last / problem.slots);
    const Visible warp_most = rows ? visible_keys(p, item, (first + rows - 1) / problem.slots) : nothing;
    const Visible warp_least = rows == 16 ? visible_keys(p, item, first / problem.slots) : nothing;
    Visible own[2];
    float lse[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        own[i] = nothing;
        lse[i] = INF;
        delta[i] = 0.0f;
        if (row < rows) {
            own[i] = visible_keys(p, item, (first + row) / problem.slots);
            lse[i] = base_2_lse(p.lse[problem.row(p, item, first + row)]);
            delta[i] = p.delta[problem.row(p, item, first + row)];
        }
    }

    const float scale = p.scale * LOG2_E;
    float sum[2] = {0.0f, 0.0f};
    stage_rows<E, D>(q_tile, p.q, rows, 0, [&](int row) { return problem.query(p, item, first + row); });
    __syncwarp();
    Rows<E, D, true> q, d_o;
    q.set(q_tile);

    float acc[D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
    KeyWalk<KEYS> walk;
    walk.start();
    int stage = 0;
    bool more = walk.settle(p, problem, block_visible);
    if (more) copy_keys<E, D, KEYS>(k_tile, v_tile, p, problem, item, block_visible, walk);

    for (unsigned head = 0; head < problem.key_heads; ++head) {
        __syncwarp();  // the rows of the head before have been read
        stage_rows<E, D>(d_o_tile, p.d_o, rows, 0,
                         [&](int row) { return problem.row(p, item, first + row) * problem.key_heads + head; });
        __syncwarp();
        d_o.set(d_o_tile);

        while (more && walk.head == head) {
            copy_wait();
            __syncthreads();
            const KeyWalk<KEYS> tile = walk;
            const E* const keys = k_tile + stage * KEYS * STRIDE;
            const E* const values = v_tile + stage * KEYS * STRIDE;
            stage ^= 1;
            walk.advance();
            more = walk.settle(p, problem, block_visible);
            if (more) {
                copy_keys<E, D, KEYS>(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item,
                                      block_visible, walk);
            }

            const int columns = warp_most.of(tile.label) - tile.first;
            const int seen_by_all = warp_least.of(tile.label) - tile.first;
            const int limit[2] = {own[0].of(tile.label) - tile.first, own[1].of(tile.label) - tile.first};
            const bool kept = is_kept(p, head, tile.label);
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j) {
                if (j * 16 >= columns) continue;
                float s[2][4], low[2][4], dp[2][4];
                scores(s, q, keys + j * 16 * STRIDE);
                refine(s, low, scale, q, keys + j * 16 * STRIDE);
                if (kept) scores(dp, d_o, values + j * 16 * STRIDE);
                const bool diagonal = j * 16 + 16 > seen_by_all;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int half = i / 2 % 2, column = j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2;
                    float& x = s[i / 4][i % 4];
                    float weight = exp2_fast(exponent<E>(x, low[i / 4][i % 4], scale, lse[half]));
                    if (diagonal && column >= limit[half]) weight = 0.0f;
                    if constexpr (CORRECTED<E>) sum[half] += weight;
                    x = weight * ((kept ? dp[i / 4][i % 4] : 0.0f) - delta[half]);
                }
                accumulate<E, D>(acc, s, keys + j * 16 * STRIDE, scratch);
            }
        }
    }

    if constexpr (CORRECTED<E>) {
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
    store_accumulator<D>(out, D + 4, acc, p.scale);
    __syncwarp();
    write_rows<E, D>(p.dq, out, D + 4, rows, [&](int row) { return problem.query(p, item, first + row); });
    if (p.group != 0) {
        using T = Tile<E, D>;
        for (int i = lane; i < rows * T::CHUNKS; i += 32) {
            const unsigned r = first + i / T::CHUNKS, token = item.start + r / problem.slots;
            const unsigned other = query_head(p, r % problem.slots, 1 - load_feedback(p, token).label);
            *reinterpret_cast<uint4*>(static_cast<E*>(p.dq) + (size_t(token) * p.heads + other) * D +
                                      i % T::CHUNKS * T::PER_CHUNK) = make_uint4(0, 0, 0, 0);
        }
    }
}

// dk_dv: one block takes 16 * warps keys of one label, starting at item.first in label order, of key head blockIdx.y, and
// all query rows that see them. Reads q, k, v, d_o, lse, delta, order, feedback, in f32 correction; writes dk and dv of its keys (zeros where
// nothing is kept). Works on transposed scores: rows are keys, columns query rows.
template <class E, int D> __device__ __forceinline__ void dk_dv(const AttentionParams& p) {
    constexpr int QUERIES = TILE<E, D>, STRIDE = Tile<E, D>::STRIDE;
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

    // Keys of the block all have one label: the host cuts tiles there.
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
    Rows<E, D, (D <= 64)> k, v;
    k.set(k_tile);
    v.set(v_tile);

    // Query rows that see a key are those from its own token on: rows of the block's first key, of the warp's first
    // and last, and of this thread's two.
    const int all_rows = item.length * problem.slots;
    int block_from = 0, warp_from = keys ? 0 : all_rows, warp_all_from = 0, own_from[2] = {0, 0};
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
    if (block_from < all_rows) copy_queries(0, block_from);
    for (int from = block_from; from < all_rows; from += QUERIES) {
        copy_wait();
        __syncthreads();  // the tile is there, and everyone has done with the one before
        const int at = stage * QUERIES;
        stage ^= 1;
        if (from + QUERIES < all_rows) copy_queries(stage, from + QUERIES);

#pragma unroll
        for (int j = 0; j < QUERIES / 16; ++j) {
            const int row = from + j * 16;
            if (row >= all_rows || row + 16 <= warp_from) continue;
            const bool diagonal = row < warp_all_from;
            const E* const queries = q_tile + (at + j * 16) * STRIDE;
            const E* const d_o = d_o_tile + (at + j * 16) * STRIDE;
            float s[2][4], low[2][4], dp[2][4];
            scores(s, k, queries);
            refine(s, low, scale, k, queries);
            if (kept) scores(dp, v, d_o);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = half * 8 + (lane & 3) * 2;
                const float2 lse = *reinterpret_cast<const float2*>(lse_tile + at + j * 16 + column);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& x = s[half][i];
                    x = exp2_fast(exponent<E>(x, low[half][i], scale, i % 2 ? lse.y : lse.x));
                    if (diagonal && row + column + i % 2 < own_from[i / 2]) x = 0.0f;
                }
                if constexpr (CORRECTED<E>) {
                    const float2 factor = *reinterpret_cast<const float2*>(correction_tile + at + j * 16 + column);
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[half][i] *= i % 2 ? factor.y : factor.x;
                }
            }
            if (kept) accumulate<E, D>(dv, s, d_o, scratch);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = half * 8 + (lane & 3) * 2;
                const float2 delta = *reinterpret_cast<const float2*>(delta_tile + at + j * 16 + column);
#pragma unroll
                for (int i = 0; i < 4; ++i) s[half][i] *= (kept ? dp[half][i] : 0.0f) - (i % 2 ? delta.y : delta.x);
            }
            accumulate<E, D>(dk, s, queries, scratch);
        }
    }

    store_accumulator<D>(out, D + 4, dk, p.scale);
    __syncwarp();
    write_rows<E, D>(p.dk, out, D + 4, keys, key_index);
    __syncwarp();
    store_accumulator<D>(out, D + 4, dv, 1.0f);
    __syncwarp();
    write_rows<E, D>(p.dv, out, D + 4, keys, key_index);
}

// ------------------------------------------------------------------------------------------------------- entry points
//
// A module is compiled for one element type and width: -DDFAR_ELEMENT=bf16 -DDFAR_HEAD_DIM=16.
KERNEL(attention_forward, AttentionParams, THREADS, 1) { forward<DFAR_ELEMENT, DFAR_HEAD_DIM, false>(p); }
KERNEL(attention_forward_whole, AttentionParams, THREADS, 1) { forward<DFAR_ELEMENT, DFAR_HEAD_DIM, true>(p); }
KERNEL(attention_delta, AttentionParams, THREADS, 1) { delta<DFAR_ELEMENT, DFAR_HEAD_DIM>(p); }
KERNEL(attention_dq, AttentionParams, THREADS, 1) { dq<DFAR_ELEMENT, DFAR_HEAD_DIM>(p); }
KERNEL(attention_dk_dv, AttentionParams, THREADS, 1) { dk_dv<DFAR_ELEMENT, DFAR_HEAD_DIM>(p); }
