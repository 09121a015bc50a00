// Backward of the MLP. A block of four warps takes an item; a warp takes one pair at a time.
//
// In a round each warp recomputes the activations of a pair, computes their gradients, and stages
// them in shared memory: 64 rows in all. Each warp writes the pair's sums over its 16 tokens. From
// the staged rows the block computes, in a fixed order, the gradients of both weights by matrix
// products (each warp keeps its strips in registers, over all items of its block), and the sums
// over pairs of each token. No atomics.
//
//     dh1 = de w2 where h1 > 0       dz = dh1 W1^T where h0 > 0       y = dz P^T
//     dP = x^T dz     dW1 = h0^T dh1     dw2 = sum of de h1     db1 = sum of dh1
//     per token: dZ = sum of dz, da = sum of y r         per pair: dc = sum of dz, dr = sum of y a
//
// y itself is not staged: y a is, for the sum of the pair, and then y r in its place.
//
// target/sums.cuh adds the sums over tokens and pairs.
#pragma once
#include "target/scores.cuh"

// The weight gradients are cut into strips of 16 rows by STRIP * 8 columns, assigned to the warps
// in turn. STRIP is 5 if both layers divide into whole strips, as 80 and 40 of the paper do.
constexpr bool WHOLE_STRIPS = H0 / 8 % 5 == 0 && H1 / 8 % 5 == 0;
constexpr int STRIP = WHOLE_STRIPS ? 5 : 4;
__device__ constexpr int strips_of(int rows, int columns) { return rows / 16 * ((columns / 8 + STRIP - 1) / STRIP); }
constexpr int PRODUCT_STRIPS = strips_of(D, H0), SECOND_STRIPS = strips_of(H0, H1);
constexpr int STRIPS = (PRODUCT_STRIPS + SECOND_STRIPS + WARPS - 1) / WARPS;  // per warp

// sums += left^T right over the rows of a round, for 16 columns of `left` and `tiles` * 8 columns
// of `right`.
template <class T>
__device__ __forceinline__ void accumulate_strip(float (&sums)[STRIP][4], const T* left, int left_stride, const T* right,
                                                 int right_stride, int tiles) {
    const int lane = lane_index();
    if constexpr (IS_EXACT<T>) {
        const T* const x = left + (lane >> 2);
        const T* const y = right + (lane & 3) * 2;
#pragma unroll 2
        for (int k = 0; k < WARPS * 16; ++k) {
            const float low = x[k * left_stride], high = x[k * left_stride + 8];
#pragma unroll
            for (int n = 0; n < STRIP; ++n) {
                if (!WHOLE_STRIPS && n >= tiles) continue;
                const float2 b = load_pair(y + k * right_stride + n * 8);
                sums[n][0] = multiply_add(low, b.x, sums[n][0]);
                sums[n][1] = multiply_add(low, b.y, sums[n][1]);
                sums[n][2] = multiply_add(high, b.x, sums[n][2]);
                sums[n][3] = multiply_add(high, b.y, sums[n][3]);
            }
        }
    } else {
        const T* const x = left + ((lane & 7) + (lane >> 4) * 8) * left_stride + (lane >> 3 & 1) * 8;
        const T* const y = right + (lane & 15) * right_stride;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) {
            unsigned a[4];
            load_matrices_transposed(a, x + k * 16 * left_stride);
#pragma unroll
            for (int n = 0; n < STRIP; n += 2) {
                const T* const at = y + k * 16 * right_stride + n * 8;
                if (n + 1 < STRIP && (WHOLE_STRIPS || n + 1 < tiles)) {
                    unsigned b[4];
                    load_matrices_transposed(b, at + (lane >> 4) * 8);
                    multiply<T>(sums[n], a, b[0], b[1]);
                    multiply<T>(sums[n + 1], a, b[2], b[3]);
                } else if (WHOLE_STRIPS || n < tiles) {
                    unsigned b[2];
                    load_matrices_transposed(b, at);
                    multiply<T>(sums[n], a, b[0], b[1]);
                }
            }
        }
    }
}

// A strip of left^T right over the staged rows.
struct Strip {
    const E *left, *right;   // first column of the strip in each
    int left_stride, right_stride;
    int row, column;         // first row and column of the strip in the gradient
    int columns;             // columns of the gradient
    int tiles;               // groups of 8 columns in the strip
    int gradient;            // offset of the gradient in weight_sums

    __device__ __forceinline__ Strip(int index, const E* x, const E* h0, const E* dz, const E* dh1) {
        const bool product = index < PRODUCT_STRIPS;
        const int i = product ? index : index - PRODUCT_STRIPS;
        columns = product ? H0 : H1;
        const int across = (columns / 8 + STRIP - 1) / STRIP;
        row = i / across * 16, column = i % across * STRIP * 8;
        tiles = columns / 8 - i % across * STRIP < STRIP ? columns / 8 - i % across * STRIP : STRIP;
        left_stride = product ? X_STRIDE : H0_STRIDE, right_stride = product ? H0_STRIDE : H1_STRIDE;
        left = (product ? x : h0) + row, right = (product ? dz : dh1) + column;
        gradient = product ? 0 : D * H0;
    }
    __device__ __forceinline__ static bool exists(int index) { return index < PRODUCT_STRIPS + SECOND_STRIPS; }

    // sums += this strip's part of the products of the round.
    __device__ __forceinline__ void accumulate(float (&sums)[STRIP][4]) const {
        accumulate_strip(sums, left, left_stride, right, right_stride, tiles);
    }

    __device__ __forceinline__ void write(float* weight_sums, const float (&sums)[STRIP][4]) const {
        float* const at = weight_sums + gradient + (row + (lane_index() >> 2)) * columns + column + (lane_index() & 3) * 2;
#pragma unroll
        for (int n = 0; n < STRIP; ++n) {
            if (!WHOLE_STRIPS && n >= tiles) continue;
            *reinterpret_cast<float2*>(at + n * 8) = make_float2(sums[n][0], sums[n][1]);
            *reinterpret_cast<float2*>(at + 8 * columns + n * 8) = make_float2(sums[n][2], sums[n][3]);
        }
    }
};

// Sum over the rows of a warp: over the lanes that hold a column.
__device__ __forceinline__ float lanes_sum(float x) {
    x += shuffle_xor(x, 4);
    x += shuffle_xor(x, 8);
    return x + shuffle_xor(x, 16);
}

__device__ constexpr int quads_of_thread(int quads) { return (quads + THREADS - 1) / THREADS; }

__device__ __forceinline__ void mlp_backward(const MlpParams& p) {
    Carve carve{shared_memory()};
    const Weights weights(carve, p);
    const LaneTile<D> a{carve.take<float>(LaneTile<D>::FLOATS)};
    const LaneTile<H0> z{carve.take<float>(LaneTile<H0>::FLOATS)};
    E* const x = carve.take<E>(WARPS * 16 * X_STRIDE);
    E* const y = carve.take<E>(WARPS * 16 * X_STRIDE);
    E* const h0 = carve.take<E>(WARPS * 16 * H0_STRIDE);
    E* const dz = carve.take<E>(WARPS * 16 * H0_STRIDE);
    E* const dh1 = carve.take<E>(WARPS * 16 * H1_STRIDE);
    const int warp = warp_index(), lane = lane_index(), column = (lane & 3) * 2;
    E* const own_x = x + warp * 16 * X_STRIDE;
    E* const own_y = y + warp * 16 * X_STRIDE;
    E* const own_h0 = h0 + warp * 16 * H0_STRIDE;
    E* const own_dz = dz + warp * 16 * H0_STRIDE;
    E* const own_dh1 = dh1 + warp * 16 * H1_STRIDE;

    float strips[STRIPS][STRIP][4] = {};
    float db1[H1 / 8][2] = {}, dw2[H1 / 8][2] = {};
#pragma unroll 1
    for (unsigned index = blockIdx.x; index < p.item_count; index += p.blocks) {
        const Item item = load_item(p.items, index);
        const int rows = rows_within(load_pair(p.pairs, item.first_pair).length, item.position);
        // The last round of the previous item ended with a barrier, so all threads have read its
        // data.
        a.fill(threadIdx.x, THREADS, p.a + size_t(item.token) * p.width, rows, p.width);
        z.fill(threadIdx.x, THREADS, p.z + size_t(item.token) * H0, rows, H0);
        __syncthreads();
        constexpr int Z_QUADS = quads_of_thread(4 * H0), A_QUADS = quads_of_thread(4 * D);
        float4 dz_sums[Z_QUADS], da_sums[A_QUADS];
#pragma unroll
        for (int i = 0; i < Z_QUADS; ++i) dz_sums[i] = zero4();
#pragma unroll
        for (int i = 0; i < A_QUADS; ++i) da_sums[i] = zero4();

#pragma unroll 1
        for (unsigned first = 0; first < item.pairs; first += WARPS) {
            // A warp without a pair repeats the last pair, with gradients of 0.
            const bool present = first + warp < item.pairs;
            const Pair pair = load_pair(p.pairs, item.first_pair + (present ? first + warp : item.pairs - 1));
            float de[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned t = item.position + (lane >> 2) + half * 8;
                de[half] = present && t < pair.length ? p.de[pair.score + t] : 0.0f;
            }
            const float* const r = p.r + size_t(pair.index) * p.width;
            float4* const sums = reinterpret_cast<float4*>(p.pair_sums + size_t(pair.unit + item.position / 16) * (H0 + D));
            Operand<E> x_operand[D / 16][1];
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                float c[2][4];
                product_inputs(c, a, k, shared_columns(r, k, p.width));
                stage(own_x + k * 16, X_STRIDE, c);
                x_operand[k][0] = operand<2>(c, own_x + k * 16, X_STRIDE);
            }
            float h1[1][H1 / 8][4];
            start_second(h1[0], weights);
            if constexpr (EXACT) __syncwarp();
#pragma unroll 1
            for (int n = 0; n < H0 / 16; ++n) {
                float c[1][2][4];
                layer_inputs(c[0], z, n, shared_columns(p.c + size_t(pair.index) * H0, n, H0));
#pragma unroll
                for (int k = 0; k < D / 16; ++k) {
                    multiply_rows<16>(c, x_operand[k], weights.product + k * 16 * H0_STRIDE + n * 16, H0_STRIDE);
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) c[0][i / 4][i % 4] = relu(c[0][i / 4][i % 4]);
                stage(own_h0 + n * 16, H0_STRIDE, c[0]);
                const Operand<E> h[1] = {operand<2>(c[0], own_h0 + n * 16, H0_STRIDE)};
                if constexpr (EXACT) __syncwarp();
                multiply_rows<H1>(h1, h, weights.second + n * 16 * H1_STRIDE, H1_STRIDE);
            }

            // From here on h1 holds the gradient dh1.
#pragma unroll
            for (int n = 0; n < H1 / 8; ++n) {
                const float2 w = *reinterpret_cast<const float2*>(weights.w2 + n * 8 + column);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float h = h1[0][n][i], gradient = h > 0.0f ? de[i / 2] * (i % 2 ? w.y : w.x) : 0.0f;
                    dw2[n][i % 2] = multiply_add(de[i / 2], relu(h), dw2[n][i % 2]);
                    db1[n][i % 2] += gradient;
                    h1[0][n][i] = gradient;
                }
            }
            stage(own_dh1, H1_STRIDE, h1[0]);
            constexpr int SIXTEENS = H1 / 16;
            Operand<E> gradient[SIXTEENS + H1 / 8 % 2];
#pragma unroll
            for (int k = 0; k < SIXTEENS; ++k) gradient[k] = operand<2>(h1[0] + 2 * k, own_dh1 + k * 16, H1_STRIDE);
            if constexpr (H1 % 16 != 0) gradient[SIXTEENS] = operand<1>(h1[0] + 2 * SIXTEENS, own_dh1 + SIXTEENS * 16, H1_STRIDE);
            float y_sums[D / 8][4] = {};
            if constexpr (EXACT) __syncwarp();
#pragma unroll 1
            for (int n = 0; n < H0 / 16; ++n) {
                float c[2][4] = {};
                const E* const w1 = weights.second + n * 16 * H1_STRIDE;
#pragma unroll
                for (int k = 0; k < SIXTEENS; ++k) multiply_columns<16, 16>(c, gradient[k], w1 + k * 16, H1_STRIDE);
                if constexpr (H1 % 16 != 0) multiply_columns<16, 8>(c, gradient[SIXTEENS], w1 + SIXTEENS * 16, H1_STRIDE);
                const E* const at = own_h0 + (lane >> 2) * H0_STRIDE + n * 16 + column;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 h = load_pair(at + i % 2 * 8 * H0_STRIDE + i / 2 * 8);
                    float(&g)[4] = c[i / 2];
                    if (!(h.x > 0.0f)) g[i % 2 * 2] = 0.0f;
                    if (!(h.y > 0.0f)) g[i % 2 * 2 + 1] = 0.0f;
                }
                stage(own_dz + n * 16, H0_STRIDE, c);
                const Operand<E> d = operand<2>(c, own_dz + n * 16, H0_STRIDE);
                __syncwarp();
                const float4 over_tokens = row_sums(c, own_dz + n * 16, H0_STRIDE);
                if (present && lane < 4) sums[n * 4 + lane] = over_tokens;
                multiply_columns<D, 16>(y_sums, d, weights.product + n * 16, H0_STRIDE);
            }
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                float c[2][4];
                a.get(c, k);
#pragma unroll
                for (int i = 0; i < 8; ++i) c[i / 4][i % 4] *= y_sums[2 * k + i / 4][i % 4];
                E* const at = own_y + k * 16;
                if constexpr (!EXACT) stage(at, X_STRIDE, c);
                __syncwarp();
                const float4 over_tokens = row_sums(c, at, X_STRIDE);
                if (present && lane < 4) sums[H0 / 4 + k * 4 + lane] = over_tokens;
                __syncwarp();
                const float4 of_pair = shared_columns(r, k, p.width);
#pragma unroll
                for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = y_sums[2 * k + i / 4][i % 4] * part(of_pair, i / 4, i % 2);
                stage(at, X_STRIDE, c);
            }
            __syncthreads();

#pragma unroll
            for (int i = 0; i < STRIPS; ++i) {
                if (Strip::exists(i * WARPS + warp)) Strip(i * WARPS + warp, x, h0, dz, dh1).accumulate(strips[i]);
            }
#pragma unroll
            for (int i = 0; i < Z_QUADS; ++i) {
                const int quad = threadIdx.x + i * THREADS, row = quad / (H0 / 4), q = quad % (H0 / 4);
                if (quad >= 4 * H0) continue;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) dz_sums[i] = add4(dz_sums[i], staged4(dz + (w * 16 + row) * H0_STRIDE, q));
            }
#pragma unroll
            for (int i = 0; i < A_QUADS; ++i) {
                const int quad = threadIdx.x + i * THREADS, row = quad / (D / 4), q = quad % (D / 4);
                if (quad >= 4 * D) continue;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) da_sums[i] = add4(da_sums[i], staged4(y + (w * 16 + row) * X_STRIDE, q));
            }
            __syncthreads();
        }

        float4* const sums = reinterpret_cast<float4*>(p.token_sums) + size_t(index) * (4 * (H0 + D));
#pragma unroll
        for (int i = 0; i < Z_QUADS; ++i) {
            const int quad = threadIdx.x + i * THREADS;
            if (quad < 4 * H0) sums[quad / (H0 / 4) * ((H0 + D) / 4) + quad % (H0 / 4)] = dz_sums[i];
        }
#pragma unroll
        for (int i = 0; i < A_QUADS; ++i) {
            const int quad = threadIdx.x + i * THREADS;
            if (quad < 4 * D) sums[quad / (D / 4) * ((H0 + D) / 4) + H0 / 4 + quad % (D / 4)] = da_sums[i];
        }
    }

    float* const weight_sums = p.weight_sums + blockIdx.x * size_t(D * H0 + H0 * H1 + 2 * H1);
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) {
        if (Strip::exists(i * WARPS + warp)) Strip(i * WARPS + warp, x, h0, dz, dh1).write(weight_sums, strips[i]);
    }
    // db1 and dw2: sums per warp, then per block, in the memory of the staged rows.
    static_assert(WARPS * 2 * H1 * sizeof(float) <= 2 * WARPS * 16 * X_STRIDE * sizeof(E), "they fit x and y");
    float* const shares = reinterpret_cast<float*>(x);
#pragma unroll
    for (int n = 0; n < H1 / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float bias = lanes_sum(db1[n][i]), weight = lanes_sum(dw2[n][i]);
            if (lane < 4) shares[warp * 2 * H1 + n * 8 + column + i] = bias, shares[warp * 2 * H1 + H1 + n * 8 + column + i] = weight;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * H1; i += THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += shares[w * 2 * H1 + i];
        weight_sums[D * H0 + H0 * H1 + i] = sum;
    }
}
