// Embedding tables: gathers and sums of rows, and their gradient, segmented sums.
//
// MATHEMATICS. Gather: y[n] = sum over tables of table[index[n]]. Segmented sum: y[i] (+)= l2
// table[row[i]] + sum of the members of segment i, where a member is a row of the stacked sources.
// This is the gradient of a gather: a segment is a row of a table, its members are the places it
// was gathered to. No atomics; the order of summation depends on the lists only.
//
// TILING. A group of lanes takes a row. Segments are as skewed as item popularity, so segmented
// sums are cut by members, not by segments: a group takes CHUNK consecutive members and writes
// every segment that begins and ends among them. For a segment that crosses a chunk border it
// writes a partial sum: `head` for one that began before the chunk, `tail` for one that continues
// after it. A second launch, with a block per border, adds the partial sums in order.
//
// TRAFFIC. Gather: reads 4 bytes per value and table (and an index per row), writes 4. Segmented
// sum: reads 4 bytes per value of every member and table row, writes 4 per value of y; partial sums
// are at most 2 / CHUNK of that.
#include "row_group.cuh"

constexpr int THREADS = 256;
constexpr unsigned CHUNK = 64;

// ------------------------------------------------------------------------------------------ gather

struct GatherParams {
    const float* tables[4];    // [.., width]
    const unsigned* index[4];  // [rows]
    float* y;                  // [rows, width]
    unsigned rows, width;
    unsigned table_count;
    unsigned bits;
};
static_assert(sizeof(GatherParams) == 88, "mirrored by src/device/cuda/ops/embedding.rs");

// y[n] = sum over tables of table[index[n]]
template <int V> __device__ __forceinline__ void gather_sum(const GatherParams& p) {
    const RowGroup group(p.bits);
    const size_t row = group.row();
    if (row >= p.rows) return;
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        float y[V];
        load<V>(y, p.tables[0] + size_t(p.index[0][row]) * p.width + c);
        for (unsigned t = 1; t < p.table_count; ++t) {
            float x[V];
            load<V>(x, p.tables[t] + size_t(p.index[t][row]) * p.width + c);
            add<V>(y, x);
        }
        store<V>(p.y + row * p.width + c, y);
    }
}
KERNEL_FOR_BOTH(embedding_gather_sum, GatherParams, THREADS) { WITH_VECTORS(p.width, gather_sum); }

struct ScatterParams {
    const float* x;         // [rows, width]
    const unsigned* index;  // [rows], all different
    float* y;               // [.., width]
    unsigned rows, width;
    unsigned bits;
    unsigned unused;
};
static_assert(sizeof(ScatterParams) == 40, "mirrored by src/device/cuda/ops/embedding.rs");

// y[index[n]] += x[n]
template <int V> __device__ __forceinline__ void scatter_add(const ScatterParams& p) {
    const RowGroup group(p.bits);
    const size_t row = group.row();
    if (row >= p.rows) return;
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        float x[V];
        load<V>(x, p.x + row * p.width + c);
        store_added<V>(p.y + size_t(p.index[row]) * p.width + c, x);
    }
}
KERNEL_FOR_BOTH(embedding_scatter_add, ScatterParams, THREADS) { WITH_VECTORS(p.width, scatter_add); }

// ----------------------------------------------------------------------------------- segmented sum

struct SegmentParams {
    const float* sources[3];  // [.., stride] stacked: members number their rows consecutively
    unsigned ends[3];         // end of each source, as a member number
    unsigned stride;          // values per row of a source
    unsigned column;          // first value of a member in its row
    float l2;
    const unsigned* offsets;  // [segments + 1]
    const unsigned* members;  // [offsets[segments]]
    const float* table;       // [.., width]; null: no l2 term
    const unsigned* row;      // [segments] table row of each segment
    float* y;                 // [segments, width]
    float* head;              // [chunks, width]
    float* tail;              // [chunks, width]
    unsigned segments, member_count;
    unsigned chunks;          // member_count / CHUNK + 1: every offset lies in a chunk
    unsigned width;
    unsigned bits;
    unsigned adds;            // 1: adds to y
};
static_assert(sizeof(SegmentParams) == 128, "mirrored by src/device/cuda/ops/embedding.rs");

__device__ __forceinline__ const float* member_row(const SegmentParams& p, unsigned m) {
    const float* source = p.sources[0];
    unsigned first = 0;
    if (m >= p.ends[0]) source = p.sources[1], first = p.ends[0];
    if (m >= p.ends[1]) source = p.sources[2], first = p.ends[1];
    return source + size_t(m - first) * p.stride + p.column;
}

// The first segment that begins at or after member `at`.
__device__ __forceinline__ unsigned first_segment(const SegmentParams& p, unsigned at) {
    unsigned low = 0, high = p.segments;
    while (low < high) {
        const unsigned middle = (low + high) / 2;
        if (p.offsets[middle] < at) low = middle + 1;
        else high = middle;
    }
    return low;
}

template <int V> __device__ __forceinline__ void sum_members(const SegmentParams& p, unsigned from, unsigned to, unsigned c, float (&sum)[V]) {
#pragma unroll 4
    for (unsigned i = from; i < to; ++i) {
        float x[V];
        load<V>(x, member_row(p, p.members[i]) + c);
        add<V>(sum, x);
    }
}

// Writes V columns of y for segment i, from the sum of its members.
template <int V> __device__ __forceinline__ void finish_segment(const SegmentParams& p, unsigned i, unsigned c, float (&sum)[V]) {
    if (p.table) {
        float x[V];
        load<V>(x, p.table + size_t(p.row[i]) * p.width + c);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += p.l2 * x[v];
    }
    float* y = p.y + size_t(i) * p.width + c;
    if (p.adds) store_added<V>(y, sum);
    else store<V>(y, sum);
}

template <int V> __device__ __forceinline__ void segment_chunks(const SegmentParams& p) {
    const RowGroup group(p.bits);
    const size_t chunk = group.row();
    if (chunk >= p.chunks) return;
    const unsigned first = unsigned(chunk) * CHUNK, end = first + CHUNK;  // in members
    const unsigned first_inside = first_segment(p, first);
    for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
        // The segment that began before the chunk.
        unsigned i = first_inside;
        const unsigned head_end = i < p.segments ? p.offsets[i] : p.member_count;
        if (head_end > first) {
            float sum[V] = {};
            sum_members<V>(p, first, head_end < end ? head_end : end, c, sum);
            store<V>(p.head + chunk * p.width + c, sum);
        }
        for (; i < p.segments; ++i) {
            const unsigned from = p.offsets[i], to = p.offsets[i + 1];
            if (from >= end) break;
            float sum[V] = {};
            if (to > end) {
                sum_members<V>(p, from, end, c, sum);
                store<V>(p.tail + chunk * p.width + c, sum);
                break;
            }
            sum_members<V>(p, from, to, c, sum);
            finish_segment<V>(p, i, c, sum);
        }
    }
}
KERNEL_FOR_BOTH(embedding_segment_chunks, SegmentParams, THREADS, 4) { WITH_VECTORS(p.width, segment_chunks); }

// A block adds up the segment that begins in chunk blockIdx.x and continues after it, if there is
// one.
template <int V> __device__ __forceinline__ void segment_borders(const SegmentParams& p) {
    const RowGroup group(p.bits);
    const unsigned chunk = blockIdx.x, end = (chunk + 1) * CHUNK;
    const unsigned next = first_segment(p, end);
    if (next == 0) return;
    const unsigned i = next - 1, from = p.offsets[i], to = p.offsets[i + 1];
    if (from < chunk * CHUNK || to <= end) return;
    const unsigned last = (to - 1) / CHUNK;  // chunk of its last member
    double* sums = reinterpret_cast<double*>(shared_memory());
    const unsigned lanes = 1u << p.bits;
    for (unsigned base = 0; base < p.width; base += V << p.bits) {
        const unsigned c = base + group.lane * V;
        double sum[V] = {};
        if (c < p.width) {
            for (unsigned k = chunk + 1 + group.index; k <= last; k += group.count()) {
                float x[V];
                load<V>(x, p.head + size_t(k) * p.width + c);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] += x[v];
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sums[threadIdx.x * V + v] = sum[v];
        __syncthreads();
        if (group.index == 0 && c < p.width) {
            float x[V];
            load<V>(x, p.tail + size_t(chunk) * p.width + c);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                double total = x[v];
                for (unsigned other = 0; other < group.count(); ++other) total += sums[(other * lanes + group.lane) * V + v];
                x[v] = float(total);
            }
            finish_segment<V>(p, i, c, x);
        }
        __syncthreads();
    }
}
KERNEL_FOR_BOTH(embedding_segment_borders, SegmentParams, THREADS) { WITH_VECTORS(p.width, segment_borders); }

// ----------------------------------------------------------------------------------------- squares

struct SquareParams {
    const float* table;   // [.., width]
    const unsigned* row;  // [rows]
    double* partial;      // [blocks]
    unsigned rows, width;
    unsigned block_rows;
    unsigned bits;
};
static_assert(sizeof(SquareParams) == 40, "mirrored by src/device/cuda/ops/embedding.rs");

// Sums of squares of the given rows, per block. loss_reduce adds them.
template <int V> __device__ __forceinline__ void squares(const SquareParams& p) {
    const RowGroup group(p.bits);
    const size_t first = size_t(blockIdx.x) * p.block_rows;
    double sum = 0.0;
    for (unsigned r = group.index; r < p.block_rows && first + r < p.rows; r += group.count()) {
        const float* x_row = p.table + size_t(p.row[first + r]) * p.width;
        for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
            float x[V];
            load<V>(x, x_row + c);
#pragma unroll
            for (int v = 0; v < V; ++v) sum += double(x[v]) * x[v];
        }
    }
    sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
}
KERNEL_FOR_BOTH(embedding_squares, SquareParams, THREADS) { WITH_VECTORS(p.width, squares); }
