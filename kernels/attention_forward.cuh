// Attention forward.
//
// Two regimes. Streamed: a block takes 16 * warps query rows of one sequence, starting at item.first, and key tiles pass by.
// Whole: `item_warps` of a block's warps take a whole short sequence, so a block holds several; all of its keys and values are
// loaded at once, and after one barrier each warp works by itself. A launch's last block may hold items of no tokens.
//
// Reads q, k, v, order, feedback; writes o and lse of its rows, each element once. The unnormalised output of a
// finished key head waits in shared memory, in f32, for the denominator, which is known when the last head is done.
//
// Exponentials: H per visible (row, key), up to 16 x 16 granularity at the diagonal and at the ends of the labels.
#pragma once
#include "attention_rows.cuh"

// Blocks of forward that should be resident, where registers can be had for it without spills.
template <class E, int D, bool WHOLE>
constexpr int FORWARD_BLOCKS = sizeof(E) == 4 ? (D <= 32 ? 3 : 1)
                             : D == 8         ? 4 - BLACKWELL
                             : D == 16        ? 5 - BLACKWELL - (!WHOLE && (AMPERE || BLACKWELL))
                             : D == 32        ? 4 - (!WHOLE && AMPERE)
                                              : 1;

// A tile of which every row of the warp sees every column, when every row has a reference already: no maximum, no test of a
// column, no branch between the products. False, with nothing changed but `slack`, when a reference turns out too low.
template <class E, int D, int KEYS, bool KEPT>
__device__ __forceinline__ bool take_seen_tile(float (&acc)[D / 8][4], OnlineSoftmax& softmax, const Rows<E, D, true>& q, float scale,
                                               const E* keys, const E* values, float (&slack)[2]) {
    constexpr int CHUNKS = KEYS / 16, STRIDE = Tile<E, D>::STRIDE;
    float s[CHUNKS][2][4], sum[2] = {0.0f, 0.0f};
    unsigned pairs[CHUNKS][4];
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) scores(s[j], q, keys + j * 16 * STRIDE);
#pragma unroll
    for (int j = 0; j < CHUNKS; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float& x = s[j][i / 4][i % 4];
            x = exponent<E>(x, 0.0f, scale, softmax.peak[i / 2 % 2]);
            x = i < DFAR_POLYNOMIAL ? exp2_polynomial(x) : exp2_fast(x);
            sum[i / 2 % 2] += x;
        }
        if constexpr (KEPT) round_pairs<E>(pairs[j], s[j]);
    }
    if (!OnlineSoftmax::serves(sum, slack)) return false;
    softmax.sum[0] += sum[0];
    softmax.sum[1] += sum[1];
    if constexpr (KEPT) {
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) accumulate_pairs<E, D>(acc, pairs[j], values + j * 16 * STRIDE);
    }
    return true;
}

// True if an output may be other than it should be, as something is not finite: to be done CAREFULLY.
template <class E, int D, bool WHOLE, bool CAREFUL> __device__ __forceinline__ bool forward(const AttentionParams& p) {
    constexpr int KEYS = TILE<E, D>, STRIDE = Tile<E, D>::STRIDE;
    constexpr int AT_ONCE = CAREFUL ? 1 : KEYS / 16;  // chunks with scores in registers
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
    Rows<E, D, !CAREFUL> q;
    q.set(q_tile);

    if constexpr (WHOLE) {
        const Team team{int(threadIdx.x) - member * item_warps * 32, item_warps * 32};
        for (unsigned head = 0; item.length && head < problem.key_heads; ++head) {
            E* const keys = k_tile + head * p.capacity * STRIDE;
            E* const values = v_tile + head * p.capacity * STRIDE;
            const auto index = [&](int row) { return problem.key(p, token_at(p, item, row), head); };
            // Chunks of the positives start anywhere, and end up to 15 rows after them.
            if (!p.masked) copy_rows<E, D>(team, keys, p.k, item.length, 16, index);
            for (int label = 0; label < 2; ++label) {
                const int from = label ? item.negatives : 0, count = label ? item.length - item.negatives : item.negatives;
                if (!is_kept(p, head, label) || count == 0) continue;
                const auto kept = [&](int row) { return index(from + row); };
                if (p.masked) copy_rows<E, D>(team, keys + from * STRIDE, p.k, count, 0, kept);
                copy_rows<E, D>(team, values + from * STRIDE, p.v, count, 0, kept);
            }
        }
        copy_wait();
        __syncthreads();
    }

    OnlineSoftmax softmax;
    KeyWalk<KEYS> walk;
    KeyCopy<E, D, KEYS> copy;
    int stage = 0;
    bool more = walk.start(p, problem, block_visible);
    if (!WHOLE && !CAREFUL && more) {
        copy.find(p, item, walk);
        copy.start(k_tile, v_tile, p, problem, item, walk);
    }
    softmax.clear();
    bool started = false;  // every row has seen a key
    float zero = 0.0f;     // unless an output is not finite
    for (unsigned head = 0; head < problem.key_heads; ++head) {
        float acc[D / 8][4];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;

        while (more && walk.head == head) {
            const KeyWalk<KEYS> tile = walk;
            more = walk.advance(p, problem, block_visible);
            if constexpr (!WHOLE && CAREFUL) {
                copy_now<E, D, KEYS>(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item, tile);
            } else if constexpr (!WHOLE) {
                if (more) copy.find(p, item, walk);
                copy_wait();
                __syncthreads();  // the tile is there, and everyone has done with the one before
            }
            const int at = WHOLE ? head * p.capacity + (tile.label ? item.negatives : 0) + tile.first : stage * KEYS;
            const E* const keys = k_tile + at * STRIDE;
            const E* const values = v_tile + at * STRIDE;
            stage ^= 1;
            if (!WHOLE && !CAREFUL && more) {
                copy.start(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item, walk);
            }

            // Columns of this tile that the warp's last row sees, and those that all its rows see.
            const int columns = warp_most.of(tile.label) - tile.first;
            const int seen_by_all = warp_least.of(tile.label) - tile.first;
            float slack[2] = {OnlineSoftmax::SLACK, OnlineSoftmax::SLACK};
            if constexpr (!WHOLE && sizeof(E) == 2) {
                const bool seen = started && seen_by_all >= KEYS;
                if constexpr (CAREFUL) {
                    // What `take_seen_tile` finds of the references.
                    float sum[2] = {0.0f, 0.0f};
#pragma unroll 1
                    for (int j = 0; seen && j < KEYS / 16; ++j) {
                        float c[2][4];
                        scores(c, q, keys + j * 16 * STRIDE);
#pragma unroll
                        for (int i = 0; i < 8; ++i) {
                            sum[i / 2 % 2] += exp2_fast(exponent<E>(c[i / 4][i % 4], 0.0f, scale, softmax.peak[i / 2 % 2]));
                        }
                    }
                    if (seen && OnlineSoftmax::serves(sum, slack)) slack[0] = slack[1] = INF;
                } else if (seen) {
                    const bool taken = tile.kept ? take_seen_tile<E, D, KEYS, true>(acc, softmax, q, scale, keys, values, slack)
                                                 : take_seen_tile<E, D, KEYS, false>(acc, softmax, q, scale, keys, values, slack);
                    if (taken) continue;
                }
                started = started || seen_by_all > 0;
            }
            const int limit[2] = {own[0].of(tile.label) - tile.first, own[1].of(tile.label) - tile.first};
            float s[AT_ONCE][2][4];
            // Scores of chunk j, -inf where a row does not see the column.
            const auto visible_scores = [&](float (&c)[2][4], int j) {
                scores(c, q, keys + j * 16 * STRIDE);
                if (j * 16 + 16 <= seen_by_all) return;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int column = j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2;
                    if (column >= limit[i / 2 % 2]) c[i / 4][i % 4] = -INF;
                }
            };
            float found[2] = {-INF, -INF};
#pragma unroll AT_ONCE
            for (int j = 0; j < KEYS / 16; ++j) {
                if (j * 16 >= columns) continue;
                auto& c = s[CAREFUL ? 0 : j];
                visible_scores(c, j);
#pragma unroll
                for (int i = 0; i < 8; ++i) found[i / 2 % 2] = largest(found[i / 2 % 2], c[i / 4][i % 4]);
            }
            found[0] *= scale;
            found[1] *= scale;
            float factor[2];
            if (softmax.raise(found, slack, factor)) {
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[n][i] *= factor[i / 2];
                }
            }
            const float peak[2] = {OnlineSoftmax::reference(softmax.peak[0]), OnlineSoftmax::reference(softmax.peak[1])};
            float sum[2] = {0.0f, 0.0f};  // as `take_seen_tile` adds up
#pragma unroll AT_ONCE
            for (int j = 0; j < KEYS / 16; ++j) {
                if (j * 16 >= columns) continue;
                auto& c = s[CAREFUL ? 0 : j];
                if constexpr (CAREFUL) visible_scores(c, j);
                float low[2][4];
                refine(c, low, scale, q, keys + j * 16 * STRIDE);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float& x = c[i / 4][i % 4];
                    x = exp2_fast(exponent<E>(x, low[i / 4][i % 4], scale, peak[i / 2 % 2]));
                    sum[i / 2 % 2] += x;
                }
                if (!tile.kept) continue;
                if constexpr (CAREFUL) {
                    const auto sees = [&](int i) { return j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2 < limit[i / 2 % 2]; };
                    accumulate_carefully<E, D>(acc, c, values + j * 16 * STRIDE, scratch, sees);
                } else {
                    accumulate<E, D>(acc, c, values + j * 16 * STRIDE, scratch);
                }
            }
            softmax.sum[0] += sum[0];
            softmax.sum[1] += sum[1];
        }

        store_accumulator<D>(out + head * D, out_stride, acc, 1.0f);
        add_zeros<D>(zero, acc);
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
    return any_thread(zero != 0.0f);
}

template <class E, int D, bool WHOLE> __device__ __noinline__ void forward_carefully(const AttentionParams& p) {
    forward<E, D, WHOLE, true>(p);
}
