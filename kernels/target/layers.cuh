// Layers of the target MLP for 16 scores at a time: one pair by 16 consecutive tokens.
//
// A warp keeps activations in the accumulators of mma.sync (primitives.cuh); those of one layer are
// the left operand of the next. Columns are permuted within groups of 16: the lanes at position q
// of their quad hold columns 4q .. 4q + 3 of the group, as columns 2q, 2q + 1 of its first eight
// and 2q, 2q + 1 of its second eight. A lane's global accesses are therefore 16 bytes wide. Weights
// and their gradients are stored by `position` in shared memory. A remainder of eight columns keeps
// its order.
//
// In bf16, operands go from registers to the tensor cores. In f32, they are read back from their
// staged rows and multiplied by fused multiply-adds in the same layout.
#pragma once
#include "carve.cuh"
#include "primitives.cuh"

using E = DFAR_ELEMENT;
constexpr int D = DFAR_WIDTH;      // width, padded to a multiple of 16
constexpr int H0 = DFAR_HIDDEN0;   // first hidden layer, padded to a multiple of 16
constexpr int H1 = DFAR_HIDDEN1;   // second hidden layer, padded to a multiple of 8
static_assert(D % 16 == 0 && H0 % 16 == 0 && H1 % 8 == 0, "padded by src/device/cuda/plan/target_shape.rs");
template <class T> constexpr bool IS_EXACT = sizeof(T) == 4;
constexpr bool EXACT = IS_EXACT<E>;

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;

// Elements per row in shared memory: an odd number of 16-byte pieces, so that eight rows cover all
// banks without a bank conflict.
__device__ constexpr int stride_of(int columns) {
    return columns * int(sizeof(E)) / 16 % 2 ? columns : columns + 16 / int(sizeof(E));
}
constexpr int X_STRIDE = stride_of(D), H0_STRIDE = stride_of(H0), H1_STRIDE = stride_of(H1);

// Position of a column, of COLUMNS, in the permuted order.
template <int COLUMNS> __device__ __forceinline__ int position(int column) {
    const bool dealt = column < (COLUMNS & ~15);
    return dealt ? (column & ~15) | (column & 2) << 2 | (column >> 1 & 6) | (column & 1) : column;
}

// -------------------------------------------------------------------------- four columns at a time

__device__ __forceinline__ float4 zero4() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
__device__ __forceinline__ float4 add4(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }
// x * y + z
__device__ __forceinline__ float4 multiply_add4(float4 x, float4 y, float4 z) {
    return make_float4(multiply_add(x.x, y.x, z.x), multiply_add(x.y, y.y, z.y), multiply_add(x.z, y.z, z.z),
                       multiply_add(x.w, y.w, z.w));
}

// Columns `column` .. + 3 of a row of `width` values, with zeros behind its end. One 16-byte access
// if the rows are aligned.
__device__ __forceinline__ float4 load4(const float* row, int column, int width) {
    if (width % 4 == 0) return column < width ? *reinterpret_cast<const float4*>(row + column) : zero4();
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = column + i < width ? row[column + i] : 0.0f;
    return make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store4(float* row, int column, int width, float4 x) {
    if (width % 4 == 0) {
        if (column < width) *reinterpret_cast<float4*>(row + column) = x;
        return;
    }
    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (column + i < width) row[column + i] = values[i];
    }
}

// 16 rows by N columns of f32 in shared memory, permuted so that each lane of a warp reads its part
// of an accumulator as float4s.
template <int N> struct LaneTile {
    static constexpr int FLOATS = 16 * N;
    float* at;

    // Columns 4 q .. 4 q + 3 of a row.
    __device__ __forceinline__ float4& quad(int row, int q) const {
        return reinterpret_cast<float4*>(at)[((q >> 2) * 2 + (row >> 3)) * 32 + (row & 7) * 4 + (q & 3)];
    }
    // This lane's part of sixteen columns.
    __device__ __forceinline__ void get(float (&c)[2][4], int sixteen) const {
        const int row = lane_index() >> 2, q = sixteen * 4 + (lane_index() & 3);
        const float4 low = quad(row, q), high = quad(row + 8, q);
        c[0][0] = low.x, c[0][1] = low.y, c[1][0] = low.z, c[1][1] = low.w;
        c[0][2] = high.x, c[0][3] = high.y, c[1][2] = high.z, c[1][3] = high.w;
    }
    // Fills the tile with rows of `width` values from global memory, zeros from row `rows` on, by
    // `threads` threads. If one warp fills a tile, each lane writes the values that it will `get`,
    // so no barrier is needed.
    __device__ __forceinline__ void fill(int thread, int threads, const float* source, int rows, int width) const {
        for (int i = thread; i < N / 16 * 64; i += threads) {
            const int row = (i >> 5 & 1) * 8 + (i >> 2 & 7), q = (i >> 6) * 4 + (i & 3);
            reinterpret_cast<float4*>(at)[i] = row < rows ? load4(source + size_t(row) * width, q * 4, width) : zero4();
        }
    }
};

// This lane's part of 16 columns of one row that all 16 scores share.
__device__ __forceinline__ float4 shared_columns(const float* row, int sixteen, int width) {
    return load4(row, sixteen * 16 + (lane_index() & 3) * 4, width);
}
// Column `i` of tile `j` in this lane's part of sixteen columns.
__device__ __forceinline__ float part(float4 x, int j, int i) { return j == 0 ? (i ? x.y : x.x) : (i ? x.w : x.z); }

// Sum over the columns of a row: over the lanes of a quad.
__device__ __forceinline__ float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// ------------------------------------------------------------------------------------- staged rows

template <class T> __device__ __forceinline__ void store_pair(T* at, float low, float high) {
    if constexpr (IS_EXACT<T>) *reinterpret_cast<float2*>(at) = make_float2(low, high);
    else *reinterpret_cast<unsigned*>(at) = pack<T>(low, high);
}
template <class T> __device__ __forceinline__ float2 load_pair(const T* at) {
    if constexpr (IS_EXACT<T>) return *reinterpret_cast<const float2*>(at);
    else return unpack<T>(*reinterpret_cast<const unsigned*>(at));
}

// Writes an accumulator of COUNT * 8 columns to 16 rows, by position.
template <int COUNT> __device__ __forceinline__ void stage(E* rows, int stride, const float (&c)[COUNT][4]) {
    E* const at = rows + (lane_index() >> 2) * stride + (lane_index() & 3) * 2;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        store_pair(at + n * 8, c[n][0], c[n][1]);
        store_pair(at + 8 * stride + n * 8, c[n][2], c[n][3]);
    }
}
// Columns 4 q .. 4 q + 3 of a staged row.
__device__ __forceinline__ float4 staged4(const E* row, int q) {
    const E* const at = row + (q >> 2) * 16 + (q & 3) * 2;
    const float2 first = load_pair(at), second = load_pair(at + 8);
    return make_float4(first.x, first.y, second.x, second.y);
}

// ---------------------------------------------------------------------------------------- products

// The left operand of a product: 16 rows by 16 (or 8) columns.
template <class T> struct Operand { unsigned a[4]; };
template <> struct Operand<float> {
    const float* at;  // row lane / 4 of the staged rows
    int stride;
};

// COUNT * 8 columns of an accumulator (COUNT: 1 or 2) as an operand. f32: they are staged in
// `rows`, and the warp has synchronised since.
template <int COUNT, class T> __device__ __forceinline__ Operand<T> operand(const float (*c)[4], const T* rows, int stride) {
    Operand<T> r;
    if constexpr (IS_EXACT<T>) {
        r.at = rows + (lane_index() >> 2) * stride, r.stride = stride;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT * 2; ++i) r.a[i] = pack<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
    }
    return r;
}

// acc[m] += a[m] b for M left operands that share b: [16, N], with `stride` elements per row.
template <int N, int M, class T>
__device__ __forceinline__ void multiply_rows(float (&acc)[M][N / 8][4], const Operand<T> (&a)[M], const T* b, int stride) {
    const int lane = lane_index();
    if constexpr (IS_EXACT<T>) {
        const T* const at = b + (lane & 3) * 2;
#pragma unroll 4
        for (int k = 0; k < 16; ++k) {
            float low[M], high[M];
#pragma unroll
            for (int m = 0; m < M; ++m) low[m] = a[m].at[k], high[m] = a[m].at[8 * a[m].stride + k];
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const float2 y = load_pair(at + k * stride + n * 8);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    acc[m][n][0] = multiply_add(low[m], y.x, acc[m][n][0]);
                    acc[m][n][1] = multiply_add(low[m], y.y, acc[m][n][1]);
                    acc[m][n][2] = multiply_add(high[m], y.x, acc[m][n][2]);
                    acc[m][n][3] = multiply_add(high[m], y.y, acc[m][n][3]);
                }
            }
        }
    } else {
        const T* const at = b + (lane & 15) * stride;
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            unsigned y[4];
            load_matrices_transposed(y, at + n * 16 + (lane >> 4) * 8);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply<T>(acc[m][2 * n], a[m].a, y[0], y[1]);
                multiply<T>(acc[m][2 * n + 1], a[m].a, y[2], y[3]);
            }
        }
        if constexpr (N % 16 != 0) {
            unsigned y[2];
            load_matrices_transposed(y, at + N - 8);
#pragma unroll
            for (int m = 0; m < M; ++m) multiply<T>(acc[m][N / 8 - 1], a[m].a, y[0], y[1]);
        }
    }
}

// acc += a b^T with b: [N, K], with `stride` elements per row; K is 16 or 8.
template <int N, int K, class T>
__device__ __forceinline__ void multiply_columns(float (&acc)[N / 8][4], const Operand<T>& a, const T* b, int stride) {
    static_assert(N % 16 == 0, "rows of b are taken by sixteen");
    const int lane = lane_index();
    if constexpr (IS_EXACT<T>) {
#pragma unroll 1
        for (int k = 0; k < K; k += 4) {
            const float4 low = *reinterpret_cast<const float4*>(a.at + k);
            const float4 high = *reinterpret_cast<const float4*>(a.at + 8 * a.stride + k);
#pragma unroll
            for (int i = 0; i < N / 4; ++i) {
                const float4 y = *reinterpret_cast<const float4*>(b + ((lane & 3) * 2 + i / 2 * 8 + i % 2) * stride + k);
                float &first = acc[i / 2][i % 2], &second = acc[i / 2][2 + i % 2];
                first = multiply_add(low.x, y.x, first), second = multiply_add(high.x, y.x, second);
                first = multiply_add(low.y, y.y, first), second = multiply_add(high.y, y.y, second);
                first = multiply_add(low.z, y.z, first), second = multiply_add(high.z, y.z, second);
                first = multiply_add(low.w, y.w, first), second = multiply_add(high.w, y.w, second);
            }
        }
    } else {
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            if constexpr (K == 16) {
                unsigned y[4];
                load_matrices(y, b + (n * 16 + (lane & 7) + (lane >> 4) * 8) * stride + (lane >> 3 & 1) * 8);
                multiply<T>(acc[2 * n], a.a, y[0], y[1]);
                multiply<T>(acc[2 * n + 1], a.a, y[2], y[3]);
            } else {
                unsigned y[2];
                const unsigned half[2] = {a.a[0], a.a[1]};
                load_matrices(y, b + (n * 16 + (lane & 15)) * stride);
                multiply<T>(acc[2 * n], half, y[0]);
                multiply<T>(acc[2 * n + 1], half, y[1]);
            }
        }
    }
}

// Sums sixteen columns over the 16 rows. Each lane returns the sums of its own columns. `c` is
// staged in `rows`, and the warp has synchronised since. In 16 bits a product with ones gives the
// sums.
template <class T>
__device__ __forceinline__ float4 row_sums(const float (&c)[2][4], const T* rows, int stride) {
    if constexpr (IS_EXACT<T>) {
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] = c[i / 2][i % 2] + c[i / 2][2 + i % 2];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sums[i] += shuffle_xor(sums[i], lanes);
        }
        return make_float4(sums[0], sums[1], sums[2], sums[3]);
    } else {
        Operand<T> ones[1];
#pragma unroll
        for (int i = 0; i < 4; ++i) ones[0].a[i] = pack<T>(1.0f, 1.0f);
        float sums[1][2][4] = {};
        multiply_rows<16>(sums, ones, rows, stride);
        return make_float4(sums[0][0][0], sums[0][0][1], sums[0][1][0], sums[0][1][1]);
    }
}

// ----------------------------------------------------------------------------------------- weights

// Weights of the MLP in shared memory, by position, padded with zeros to the compiled sizes.
struct Weights {
    E* product;  // [D, H0], H0_STRIDE per row: the block P of the first layer
    E* second;   // [H0, H1], H1_STRIDE per row
    float* b1;   // [H1]
    float* w2;   // [H1]
    float b2;

    // Allocates and fills shared memory. The caller synchronises the block afterwards.
    template <class Params> __device__ __forceinline__ Weights(Carve& carve, const Params& p) {
        product = carve.take<E>(D * H0_STRIDE);
        second = carve.take<E>(H0 * H1_STRIDE);
        b1 = carve.take<float>(H1);
        w2 = carve.take<float>(H1);
        b2 = *p.b2;
        const int width = p.width, h0 = p.hidden0, h1 = p.hidden1;
        spread<D, H0>(product, H0_STRIDE, p.w0 + size_t(3) * width * h0, width, h0);
        spread<H0, H1>(second, H1_STRIDE, p.w1, h0, h1);
        for (int i = threadIdx.x; i < H1; i += THREADS) {
            b1[position<H1>(i)] = i < h1 ? p.b1[i] : 0.0f;
            w2[position<H1>(i)] = i < h1 ? p.w2[i] : 0.0f;
        }
    }

    // Stores a matrix [rows, columns] by position as [ROWS, COLUMNS].
    template <int ROWS, int COLUMNS>
    static __device__ __forceinline__ void spread(E* to, int stride, const float* from, int rows, int columns) {
        static_assert(COLUMNS % 8 == 0, "four columns stay two and two");
        for (int i = threadIdx.x; i < ROWS * (COLUMNS / 4); i += THREADS) {
            const int row = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4;
            const float4 x = row < rows ? load4(from + size_t(row) * columns, column, columns) : zero4();
            E* const at = to + position<ROWS>(row) * stride;
            store_pair(at + position<COLUMNS>(column), x.x, x.y);
            store_pair(at + position<COLUMNS>(column + 2), x.z, x.w);
        }
    }
};
