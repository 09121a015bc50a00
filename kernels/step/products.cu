// Several matrix products in one launch, and the sums of partial results.
//
// MATHEMATICS. c (+)= activation(a b + a2 b2 + bias), f32, row-major. Rows may be picked by an
// index; a factor may be masked by the derivative of ReLU. A product with a long inner dimension
// (the gradient of a weight) is cut into shares of it: each share writes partial sums of c, and of
// the columns of b (the gradient of a bias), and products_sum adds the shares in order.
//
// TILING. A block of 128 threads takes a tile of c, 64 or 32 rows by 32 columns, of one share. It
// copies 32 of the inner dimension at a time to shared memory; a thread adds up 4 columns of 4 (or
// 2) rows, 16 rows apart. In bf16 the factors are rounded on load; multiply-adds are f32.
//
// TRAFFIC. Products of a layer as narrow as the model's are bound by memory: with n, k <= 64, fewer
// than 16 multiply-adds per 4 bytes. Wide ones go to cuBLASLt (gpu.rs).
#include "row_group.cuh"

constexpr int THREADS = 128;
constexpr int COLUMNS = 32;         // of a tile of c
constexpr int CHUNK = 32;           // of the inner dimension
constexpr int A_STRIDE = CHUNK + 1; // odd: lanes that differ in the row use different banks
constexpr int B_STRIDE = COLUMNS + 4;
constexpr int MOST_PRODUCTS = 16;
constexpr int MOST_SUMS = 96;
constexpr int SUM_THREADS = 256;

// Bits of Product::flags.
constexpr unsigned A_TRANSPOSED = 1, B_TRANSPOSED = 2, ADDS = 4, RELU = 8, GATES_B = 16, ROUNDS = 32, ADDS_COLUMNS = 64,
                   ALIGNED = 128;

struct Product {
    const float* a;       // [m, k]; transposed: [k, m]
    const float* b;       // [k, n]; transposed: [n, k]
    const float* a2;      // as a; null: no second term
    const float* b2;      // as b
    float* c;             // [m, n]; in shares: [shares, m * n + n], c then column sums of b
    const float* bias;    // [n]; null: none
    const float* gate;    // as a (GATES_B: as b), which counts as 0 where gate <= 0. Not for a
                          // transposed factor. Null: none
    const unsigned* rows; // rows of a and c; of a and b if a is transposed; null: all
    unsigned m, n, k;
    unsigned share;       // of k per share; 0: no shares
    unsigned first_block;
    unsigned flags;
};
static_assert(sizeof(Product) == 88, "mirrored by src/device/cuda/gpu/products.rs");

struct ProductsParams {
    Product products[MOST_PRODUCTS];
    unsigned count, unused;
};
static_assert(sizeof(ProductsParams) == 1416, "mirrored by src/device/cuda/gpu/products.rs");

__device__ __forceinline__ float rounded(float x, bool rounds) { return rounds ? unpack<bf16>(pack<bf16>(x, 0.0f)).x : x; }

// ROWS: rows of c per thread.
template <int ROWS> __device__ __forceinline__ void tile(const Product& p) {
    constexpr unsigned HEIGHT = 16 * ROWS;
    float* const a_tile = reinterpret_cast<float*>(shared_memory());  // [HEIGHT][A_STRIDE]
    float* const b_tile = a_tile + 64 * A_STRIDE;                     // [CHUNK][B_STRIDE]
    const unsigned lane = lane_index(), warp = warp_index();
    const unsigned across = (p.n + COLUMNS - 1) / COLUMNS, down = (p.m + HEIGHT - 1) / HEIGHT;
    const unsigned at = blockIdx.x - p.first_block;
    const unsigned first_column = at % across * COLUMNS, first_row = at / across % down * HEIGHT;
    const size_t share = at / across / down;
    const size_t begin = share * p.share, end = p.share && begin + p.share < p.k ? begin + p.share : p.k;
    const bool a_transposed = p.flags & A_TRANSPOSED, b_transposed = p.flags & B_TRANSPOSED, rounds = p.flags & ROUNDS;
    const float* const gate_a = p.flags & GATES_B ? nullptr : p.gate;
    const float* const gate_b = p.flags & GATES_B ? p.gate : nullptr;

    const unsigned x = threadIdx.x % 8 * 4, y = threadIdx.x / 8;
    float sums[ROWS][4] = {};
    float column_sum = 0.0f;
    for (int term = 0; term < (p.a2 ? 2 : 1); ++term) {
        const float* const a = term ? p.a2 : p.a;
        const float* const b = term ? p.b2 : p.b;
        for (size_t first = begin; first < end; first += CHUNK) {
            const unsigned length = end - first < CHUNK ? unsigned(end - first) : CHUNK;
            if (a_transposed) {
                for (unsigned i = warp; i < CHUNK; i += THREADS / 32) {
                    const size_t row = i < length ? (p.rows ? p.rows[first + i] : first + i) : 0;
                    for (unsigned m = lane; m < HEIGHT; m += 32) {
                        const bool inside = i < length && first_row + m < p.m;
                        a_tile[m * A_STRIDE + i] = inside ? rounded(a[row * p.m + first_row + m], rounds) : 0.0f;
                    }
                }
            } else {
                for (unsigned m = warp; m < HEIGHT; m += THREADS / 32) {
                    float value = 0.0f;
                    if (first_row + m < p.m && lane < length) {
                        const size_t row = p.rows ? p.rows[first_row + m] : first_row + m;
                        value = a[row * p.k + first + lane];
                        if (gate_a) value = gate_a[row * p.k + first + lane] > 0.0f ? value : 0.0f;
                    }
                    a_tile[m * A_STRIDE + lane] = rounded(value, rounds);
                }
            }
            if (b_transposed) {
                for (unsigned n = warp; n < COLUMNS; n += THREADS / 32) {
                    const bool inside = first_column + n < p.n && lane < length;
                    const float value = inside ? b[size_t(first_column + n) * p.k + first + lane] : 0.0f;
                    b_tile[lane * B_STRIDE + n] = rounded(value, rounds);
                }
            } else {
                for (unsigned i = warp; i < CHUNK; i += THREADS / 32) {
                    float value = 0.0f;
                    if (i < length && first_column + lane < p.n) {
                        const size_t row = a_transposed && p.rows ? p.rows[first + i] : first + i;
                        value = b[row * p.n + first_column + lane];
                        if (gate_b) value = gate_b[row * p.n + first_column + lane] > 0.0f ? value : 0.0f;
                    }
                    column_sum += value;
                    b_tile[i * B_STRIDE + lane] = rounded(value, rounds);
                }
            }
            __syncthreads();
#pragma unroll 8
            for (unsigned i = 0; i < CHUNK; ++i) {
                float factor[4];
                load<4>(factor, b_tile + i * B_STRIDE + x);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float value = a_tile[(y + 16 * r) * A_STRIDE + i];
#pragma unroll
                    for (int v = 0; v < 4; ++v) sums[r][v] = multiply_add(value, factor[v], sums[r][v]);
                }
            }
            __syncthreads();
        }
    }

    const size_t size = size_t(p.m) * p.n;
    float* const c = p.c + share * (size + p.n);
    float bias[4] = {};
    if (p.bias) {
#pragma unroll
        for (int v = 0; v < 4; ++v) bias[v] = first_column + x + v < p.n ? p.bias[first_column + x + v] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const unsigned m = first_row + y + 16 * r;
        if (m >= p.m) continue;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            sums[r][v] += bias[v];
            if (p.flags & RELU) sums[r][v] = sums[r][v] < 0.0f ? 0.0f : sums[r][v];  // keeps a NaN
        }
        const size_t row = p.rows && !a_transposed ? p.rows[m] : m;
        float* const to = c + row * p.n + first_column + x;
        if (p.flags & ALIGNED) {
            if (first_column + x >= p.n) continue;
            if (p.flags & ADDS) store_added<4>(to, sums[r]);
            else store<4>(to, sums[r]);
        } else {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                if (first_column + x + v < p.n) to[v] = p.flags & ADDS ? to[v] + sums[r][v] : sums[r][v];
            }
        }
    }
    if (!(p.flags & ADDS_COLUMNS) || first_row > 0) return;
    a_tile[warp * 32 + lane] = column_sum;
    __syncthreads();
    if (warp == 0 && first_column + lane < p.n) {
        for (int other = 1; other < THREADS / 32; ++other) column_sum += a_tile[other * 32 + lane];
        c[size + first_column + lane] = column_sum;
    }
}

KERNEL(products, ProductsParams, THREADS) {
    unsigned i = 0;
    while (i + 1 < p.count && blockIdx.x >= p.products[i + 1].first_block) ++i;
    if (p.products[i].m <= 32) tile<2>(p.products[i]);
    else tile<4>(p.products[i]);
}

// ------------------------------------------------------------------------------------------- sums

struct Sum {
    const float* from;  // [count, stride]
    float* to;          // [width]
    unsigned count, width, stride;
    unsigned first_block;
};
static_assert(sizeof(Sum) == 32, "mirrored by src/device/cuda/gpu/products.rs");

struct SumsParams {
    Sum sums[MOST_SUMS];
    unsigned count, unused;
};
static_assert(sizeof(SumsParams) == 3080, "mirrored by src/device/cuda/gpu/products.rs");

// Column sums of partial results, in f64 and a fixed order. A warp takes 32 columns of every eighth
// row.
KERNEL(products_sum, SumsParams, SUM_THREADS) {
    unsigned i = 0;
    while (i + 1 < p.count && blockIdx.x >= p.sums[i + 1].first_block) ++i;
    const Sum& q = p.sums[i];
    const unsigned column = (blockIdx.x - q.first_block) * 32 + lane_index();
    double sum = 0.0;
    if (column < q.width) {
        for (size_t row = warp_index(); row < q.count; row += SUM_THREADS / 32) sum += q.from[row * q.stride + column];
    }
    double* sums = reinterpret_cast<double*>(shared_memory());
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= q.width) return;
    for (int warp = 1; warp < SUM_THREADS / 32; ++warp) sum += sums[warp * 32 + threadIdx.x];
    q.to[column] = float(sum);
}
