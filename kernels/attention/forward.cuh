// Attention forward over streamed sequences: a block takes 16 * warps query rows of one sequence,
// from item.first on, and loops over key tiles.
//
// Reads q, k, v, order, feedback; writes o and lse of its rows, each element once.
//
// Exponentials: H per visible (row, key), rounded up to 16 x 16 chunks at the diagonal and at the
// end of each label.
#pragma once
#include "attention/forward_tile.cuh"

// Minimum resident blocks per multiprocessor, if the registers suffice without spills.
template <class E, int D>
constexpr int FORWARD_BLOCKS = sizeof(E) == 4 ? (D <= 32 ? 3 : 1)
                             : D == 8         ? 3
                             : D == 16        ? 5 - BLACKWELL - (AMPERE || BLACKWELL)
                             : D == 32        ? 4 - AMPERE
                                              : 1;

// True if an output is non-finite: the caller then repeats the work in CAREFUL mode.
template <class E, int D, bool CAREFUL> __device__ __forceinline__ bool forward(const AttentionParams& p) {
    constexpr int KEYS = TILE_ROWS<E, D>, STRIDE = Tile<E, D>::STRIDE;
    const int lane = lane_index(), warp = uniform(warp_index()), warps = blockDim.x / 32;
    const Item item = load_item(p, blockIdx.x);
    const Problem problem(p);

    Carve carve{shared_memory()};
    E* const k_tile = carve.take<E>(2 * KEYS * STRIDE);
    E* const v_tile = carve.take<E>(2 * KEYS * STRIDE);
    E* const q_tile = carve.take<E>(warps * 16 * STRIDE) + warp * 16 * STRIDE;
    const HeadOutputs<E, D> outputs(p, carve, warps, warp);
    float* const scratch = carve.take<float>(warps * SCRATCH<E>) + warp * SCRATCH<E>;

    // Rows of the block and of the warp. A warp past the end has no rows and only helps to load.
    const int all_rows = item.length * problem.slots, block_first = item.first, first = block_first + warp * 16;
    const int block_last = (block_first + warps * 16 < all_rows ? block_first + warps * 16 : all_rows) - 1;
    const int rows = first > block_last ? 0 : (block_last + 1 - first < 16 ? block_last + 1 - first : 16);
    const Visible nothing{0, 0};
    const Visible block_visible = visible_keys(p, item, problem.position(p, block_last));
    const Visible warp_most = rows ? visible_keys(p, item, problem.position(p, first + rows - 1)) : nothing;
    const Visible warp_least = rows == 16 ? visible_keys(p, item, problem.position(p, first)) : nothing;
    Visible own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = (lane >> 2) + i * 8;
        own[i] = row < rows ? visible_keys(p, item, problem.position(p, first + row)) : nothing;
    }

    const Scale<E> scale(p);
    stage_rows<E, D>(q_tile, p.q, rows, scale.flip, [&](int row) { return problem.query(p, item, first + row); });
    __syncwarp();
    Rows<E, D, !CAREFUL> q;
    q.set(q_tile);

    OnlineSoftmax softmax;
    KeyWalk<KEYS> walk;
    KeyCopy<E, D, KEYS> copy;
    int stage = 0;
    bool more = walk.start(p, problem, block_visible);
    if (!CAREFUL && more) {
        copy.find(p, item, walk);
        copy.start(k_tile, v_tile, p, problem, item, walk);
    }
    softmax.clear();
    bool started = false;
    for (unsigned head = 0; head < problem.key_heads; ++head) {
        float acc[D / 8][4];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;

        while (more && walk.head == head) {
            const KeyWalk<KEYS> tile = walk;
            more = walk.advance(p, problem, block_visible);
            E* const keys = k_tile + stage * KEYS * STRIDE;
            E* const values = v_tile + stage * KEYS * STRIDE;
            if constexpr (CAREFUL) {
                copy_now<E, D, KEYS>(keys, values, p, problem, item, tile);
            } else {
                if (more) copy.find(p, item, walk);
                copy_wait();
                __syncthreads();  // the tile has arrived; all threads have read the previous one
            }
            stage ^= 1;
            if (!CAREFUL && more) {
                copy.start(k_tile + stage * KEYS * STRIDE, v_tile + stage * KEYS * STRIDE, p, problem, item, walk);
            }
            const int limit[2] = {own[0].of(tile.label) - tile.first, own[1].of(tile.label) - tile.first};
            take_tile<E, D, CAREFUL>(acc, softmax, started, q, scale.factor, keys, values, tile.kept, scratch,
                                     warp_most.of(tile.label) - tile.first, warp_least.of(tile.label) - tile.first, limit);
        }
        outputs.store(p, head, acc, softmax);
    }
    return any_thread(outputs.write(p, problem, item, first, rows, softmax));
}

template <class E, int D> __device__ __noinline__ void forward_carefully(const AttentionParams& p) { forward<E, D, true>(p); }
