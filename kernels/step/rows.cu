// Passes over rows of activations: sums, ReLU backward with column sums, concatenation, label
// order.
//
// MATHEMATICS. y += x; column sums with dy = 0 where y <= 0; [x_0 | x_1 | ..]; permutations of
// rows.
//
// TILING. A group of lanes takes a row. For column sums, a block sums its rows, and products_sum adds
// the partial sums of the blocks.
//
// TRAFFIC. All kernels are bound by memory. Each reads its inputs and writes its outputs once, 16
// bytes at a time if the width is a multiple of 4.
#include "row_group.cuh"

constexpr int THREADS = 256;

// --------------------------------------------------------------------------------------------- add

struct AddParams {
    const float* x;  // [len]
    float* y;        // [len]
    unsigned long long len;
};
static_assert(sizeof(AddParams) == 24, "mirrored by src/device/cuda/ops/rows.rs");

// y += x: 12 bytes per value, four values per thread.
KERNEL_FOR_BOTH(rows_add, AddParams, THREADS) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= p.len) {
        float x[4];
        load<4>(x, p.x + i);
        store_added<4>(p.y + i, x);
    } else {
#pragma unroll 1
        for (size_t j = i; j < p.len; ++j) p.y[j] += p.x[j];
    }
}

// ------------------------------------------------------------------------------------- column sums

struct ColumnSumParams {
    const float* y;  // [rows, width] output of the ReLU; null: no ReLU
    float* dy;       // [rows, width]; set to 0 where y <= 0
    float* partial;  // [gridDim.x, width]
    unsigned rows, width;
    unsigned block_rows;
    unsigned unused;
};
static_assert(sizeof(ColumnSumParams) == 40, "mirrored by src/device/cuda/ops/rows.rs");

// ReLU backward in place, and column sums over the block's rows: the gradient of a bias. blockIdx.y
// is a chunk of THREADS vectors of columns. Reads 4 bytes per value; with ReLU reads 8, writes 4.
template <int V> __device__ __forceinline__ void column_sums(const ColumnSumParams& p) {
    const unsigned chunk = blockIdx.y * THREADS, vectors = p.width / V;
    const unsigned across = vectors - chunk < THREADS ? vectors - chunk : THREADS;
    const unsigned slices = THREADS / across;
    const unsigned slice = threadIdx.x / across, column = (chunk + threadIdx.x % across) * V;
    const size_t first = size_t(blockIdx.x) * p.block_rows;
    const size_t last = first + p.block_rows < p.rows ? first + p.block_rows : p.rows;
    float sums[V] = {};
    for (size_t row = first + slice; slice < slices && row < last; row += slices) {
        float dy[V];
        load<V>(dy, p.dy + row * p.width + column);
        if (p.y) {
            float y[V];
            load<V>(y, p.y + row * p.width + column);
#pragma unroll
            for (int v = 0; v < V; ++v) dy[v] = y[v] > 0.0f ? dy[v] : 0.0f;
            store<V>(p.dy + row * p.width + column, dy);
        }
        add<V>(sums, dy);
    }
    float* share = reinterpret_cast<float*>(shared_memory()) + threadIdx.x * V;
    store<V>(share, sums);
    __syncthreads();
    if (slice == 0) {
        for (unsigned other = 1; other < slices; ++other) {
            float more[V];
            load<V>(more, share + other * across * V);
            add<V>(sums, more);
        }
        store<V>(p.partial + blockIdx.x * size_t(p.width) + column, sums);
    }
}
KERNEL(rows_column_sums, ColumnSumParams, THREADS) { WITH_VECTORS(p.width, column_sums); }

// ----------------------------------------------------------------------------------- concatenation

struct ConcatParams {
    const float* parts[4];     // [.., width]
    const unsigned* index[4];  // [rows]; null: part row n goes to row n
    float* y;                  // [rows, part_count * width]
    unsigned rows, width;
    unsigned bits;
    unsigned part_count;
};
static_assert(sizeof(ConcatParams) == 88, "mirrored by src/device/cuda/ops/rows.rs");

// block_y is the part. 8 bytes per value of y.
template <int V> __device__ __forceinline__ void concat(const ConcatParams& p, unsigned part) {
    const RowGroup group(p.bits);
    const size_t row = group.row();
    if (row >= p.rows) return;
    const unsigned* index = p.index[part];
    const float* from = p.parts[part] + (index ? index[row] : row) * p.width;
    float* to = p.y + (row * p.part_count + part) * p.width;
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        float x[V];
        load<V>(x, from + c);
        store<V>(to + c, x);
    }
}
KERNEL_FOR_BOTH(rows_concat, ConcatParams, THREADS) { WITH_VECTORS_AND_Y(p.width, concat); }

struct TakePartParams {
    const float* dy;  // [rows, parts * width]
    float* dx;        // [rows, width]
    unsigned rows, width;
    unsigned part, parts;
    unsigned bits;
    unsigned adds;    // 1: adds to dx
};
static_assert(sizeof(TakePartParams) == 40, "mirrored by src/device/cuda/ops/rows.rs");

// dx (+)= one part of dy. The gradient of a part with an index is a segmented sum
// (step/embedding.cu).
template <int V> __device__ __forceinline__ void take_part(const TakePartParams& p) {
    const RowGroup group(p.bits);
    const size_t row = group.row();
    if (row >= p.rows) return;
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        float x[V];
        load<V>(x, p.dy + (row * p.parts + p.part) * p.width + c);
        float* to = p.dx + row * p.width + c;
        if (p.adds) store_added<V>(to, x);
        else store<V>(to, x);
    }
}
KERNEL_FOR_BOTH(rows_take_part, TakePartParams, THREADS) { WITH_VECTORS(p.width, take_part); }

// ----------------------------------------------------------------------------------- rows by label

struct SplitParams {
    const unsigned* index[2];  // [count[f]] row indices of label f
    const float* x;            // [rows, width]
    float* y;                  // [rows, width]
    unsigned count[2];         // their sum is the number of rows
    unsigned width;
    unsigned bits;
    unsigned adds;             // merge: 1 adds to y
    unsigned unused;
};
static_assert(sizeof(SplitParams) == 56, "mirrored by src/device/cuda/ops/rows.rs");

// Index of row `i` of the label order.
__device__ __forceinline__ size_t by_label(const SplitParams& p, size_t i) {
    return i < p.count[0] ? p.index[0][i] : p.index[1][i - p.count[0]];
}

// y: the rows of x in label order, label 0 first. 8 bytes per value.
template <int V> __device__ __forceinline__ void split(const SplitParams& p) {
    const RowGroup group(p.bits);
    const size_t i = group.row();
    if (i >= p.count[0] + p.count[1]) return;
    const size_t row = by_label(p, i);
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        float x[V];
        load<V>(x, p.x + row * p.width + c);
        store<V>(p.y + i * p.width + c, x);
    }
}
KERNEL(rows_split, SplitParams, THREADS) { WITH_VECTORS(p.width, split); }

// The inverse of split: x is in label order, y in token order.
template <int V> __device__ __forceinline__ void merge(const SplitParams& p) {
    const RowGroup group(p.bits);
    const size_t i = group.row();
    if (i >= p.count[0] + p.count[1]) return;
    const size_t row = by_label(p, i);
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        float x[V];
        load<V>(x, p.x + i * p.width + c);
        float* to = p.y + row * p.width + c;
        if (p.adds) store_added<V>(to, x);
        else store<V>(to, x);
    }
}
KERNEL(rows_merge, SplitParams, THREADS) { WITH_VECTORS(p.width, merge); }
