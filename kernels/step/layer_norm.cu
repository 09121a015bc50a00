// Layer norm over rows, fused with a preceding residual sum or gather.
//
// MATHEMATICS. Over a row of `width` values, with the population variance:
//
//     mean = sum x / width     inverse = 1 / sqrt(sum (x - mean)^2 / width + 1e-8)
//     h = (x - mean) inverse     n = h gamma + beta
//     g = dn gamma     dx = inverse (g - mean(g) - h mean(g h))
//     dgamma = sum_rows dn h     dbeta = sum_rows dn
//
// TILING. A group of lanes owns a row. Rows with at most one access per lane (128 values; 32 if the
// width is not a multiple of 4) stay in registers between the passes; wider rows are read again,
// from L1. Backward: a block takes `block_rows` rows, first row by row for dx, then column by
// column for partial sums of dgamma and dbeta, which products_sum adds in block order.
//
// TRAFFIC in bytes per value: norm reads 4, writes 4; after a sum reads 8, writes 8; after
// gathering from t tables reads 4 t, writes 8. Backward reads 8 (12 if it adds to dx), writes 4.
#include "row_group.cuh"

struct NormParams {
    const float* tables[4];     // gather: [.., width]
    const unsigned* index[4];   // gather: [rows] row of each table
    const float* x;             // add: [rows, width] second summand
    float* y;                   // [rows, width] input of the norm; add: updated; gather: written
    const float* gamma;         // [width]
    const float* beta;          // [width]
    float* n;                   // [rows, width]
    unsigned rows, width;
    unsigned table_count;
    unsigned bits;              // log2 of the lanes per row
};
static_assert(sizeof(NormParams) == 120, "mirrored by src/device/cuda/ops/layer_norm.rs");

struct NormBackwardParams {
    const float* x;      // [rows, width]
    const float* gamma;  // [width]
    const float* dn;     // [rows, width]
    float* dx;           // [rows, width]
    float* partial;      // [gridDim.x, 2 * width] partial sums of dgamma, then dbeta
    unsigned rows, width;
    unsigned block_rows;
    unsigned bits;
    unsigned adds;       // 1: adds to dx
    unsigned unused;
};
static_assert(sizeof(NormBackwardParams) == 64, "mirrored by src/device/cuda/ops/layer_norm.rs");

constexpr int THREADS = 256;
constexpr float EPS = 1e-8f;

enum class Source { given, sum, tables };

template <int V, bool WHOLE, Source SOURCE> __device__ __forceinline__ void norm(const NormParams& p) {
    const RowGroup group(p.bits);
    const size_t row = group.row();
    const bool valid = row < p.rows;
    float* y = p.y + row * p.width;
    const unsigned first = group.lane * V, step = V << p.bits;

    float kept[V] = {};
    float sum = 0.0f;
    if (valid) {
        for (unsigned c = first; c < p.width; c += step) {
            float x[V];
            if constexpr (SOURCE == Source::tables) {
                load<V>(x, p.tables[0] + size_t(p.index[0][row]) * p.width + c);
                for (unsigned t = 1; t < p.table_count; ++t) {
                    float more[V];
                    load<V>(more, p.tables[t] + size_t(p.index[t][row]) * p.width + c);
                    add<V>(x, more);
                }
                store<V>(y + c, x);
            } else {
                load<V>(x, y + c);
                if constexpr (SOURCE == Source::sum) {
                    float more[V];
                    load<V>(more, p.x + row * p.width + c);
                    add<V>(x, more);
                    store<V>(y + c, x);
                }
            }
#pragma unroll
            for (int v = 0; v < V; ++v) sum += kept[v] = x[v];
        }
    }
    const float mean = group.sum(sum) / float(p.width);

    float squares = 0.0f;
    if (valid) {
        for (unsigned c = first; c < p.width; c += step) {
            if constexpr (!WHOLE) load<V>(kept, y + c);
#pragma unroll
            for (int v = 0; v < V; ++v) squares += (kept[v] - mean) * (kept[v] - mean);
        }
    }
    const float inverse = 1.0f / sqrtf(group.sum(squares) / float(p.width) + EPS);

    if (!valid) return;
    for (unsigned c = first; c < p.width; c += step) {
        float gamma[V], beta[V];
        load<V>(gamma, p.gamma + c);
        load<V>(beta, p.beta + c);
        if constexpr (!WHOLE) load<V>(kept, y + c);
#pragma unroll
        for (int v = 0; v < V; ++v) gamma[v] = (kept[v] - mean) * inverse * gamma[v] + beta[v];
        store<V>(p.n + row * p.width + c, gamma);
    }
}

template <int V, Source SOURCE> __device__ __forceinline__ void norm_of(const NormParams& p) {
    if (p.width <= unsigned(V << p.bits)) norm<V, true, SOURCE>(p);
    else norm<V, false, SOURCE>(p);
}

KERNEL_FOR_BOTH(layer_norm, NormParams, THREADS) {
    if (p.width % 4 == 0) norm_of<4, Source::given>(p);
    else norm_of<1, Source::given>(p);
}
KERNEL_FOR_BOTH(layer_norm_add, NormParams, THREADS) {
    if (p.width % 4 == 0) norm_of<4, Source::sum>(p);
    else norm_of<1, Source::sum>(p);
}
KERNEL_FOR_BOTH(layer_norm_gather, NormParams, THREADS) {
    if (p.width % 4 == 0) norm_of<4, Source::tables>(p);
    else norm_of<1, Source::tables>(p);
}

// ---------------------------------------------------------------------------------------- backward

// Computes dx of one row. Returns mean and `inverse` in all lanes.
template <int V, bool WHOLE>
__device__ __forceinline__ float2 backward_row(const NormBackwardParams& p, const RowGroup& group, size_t row, bool valid) {
    const unsigned first = group.lane * V, step = V << p.bits;
    const float* x_row = p.x + row * p.width;
    const float* dn_row = p.dn + row * p.width;
    float x[V] = {}, g[V] = {};
    float sum = 0.0f;
    if (valid) {
        for (unsigned c = first; c < p.width; c += step) {
            load<V>(x, x_row + c);
#pragma unroll
            for (int v = 0; v < V; ++v) sum += x[v];
        }
    }
    const float mean = group.sum(sum) / float(p.width);
    float squares = 0.0f;
    if (valid) {
        for (unsigned c = first; c < p.width; c += step) {
            if constexpr (!WHOLE) load<V>(x, x_row + c);
#pragma unroll
            for (int v = 0; v < V; ++v) squares += (x[v] - mean) * (x[v] - mean);
        }
    }
    const float inverse = 1.0f / sqrtf(group.sum(squares) / float(p.width) + EPS);

    const auto scaled = [&](unsigned c) {
        float gamma[V];
        load<V>(g, dn_row + c);
        load<V>(gamma, p.gamma + c);
#pragma unroll
        for (int v = 0; v < V; ++v) g[v] *= gamma[v];
    };
    float of_scaled = 0.0f, of_product = 0.0f;
    if (valid) {
        for (unsigned c = first; c < p.width; c += step) {
            if constexpr (!WHOLE) load<V>(x, x_row + c);
            scaled(c);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                of_scaled += g[v];
                of_product += g[v] * (x[v] - mean) * inverse;
            }
        }
    }
    of_scaled = group.sum(of_scaled) / float(p.width);
    of_product = group.sum(of_product) / float(p.width);
    if (valid) {
        for (unsigned c = first; c < p.width; c += step) {
            if constexpr (!WHOLE) {
                load<V>(x, x_row + c);
                scaled(c);
            }
            float dx[V];
#pragma unroll
            for (int v = 0; v < V; ++v) dx[v] = inverse * (g[v] - of_scaled - (x[v] - mean) * inverse * of_product);
            float* to = p.dx + row * p.width + c;
            if (p.adds) store_added<V>(to, dx);
            else store<V>(to, dx);
        }
    }
    return make_float2(mean, inverse);
}

template <int V> __device__ __forceinline__ void backward(const NormBackwardParams& p) {
    const RowGroup group(p.bits);
    const size_t first_row = size_t(blockIdx.x) * p.block_rows;
    // Mean and `inverse` of the block's rows, then the partial sums of the slices.
    float2* statistics = reinterpret_cast<float2*>(shared_memory());
    float* shares = reinterpret_cast<float*>(statistics + p.block_rows);

    const bool whole = p.width <= unsigned(V << p.bits);
    for (unsigned base = 0; base < p.block_rows; base += group.count()) {
        const unsigned r = base + group.index;
        const bool valid = r < p.block_rows && first_row + r < p.rows;
        const float2 found = whole ? backward_row<V, true>(p, group, first_row + r, valid)
                                   : backward_row<V, false>(p, group, first_row + r, valid);
        if (valid && group.lane == 0) statistics[r] = found;
    }
    __syncthreads();

    // Columns: `across` threads side by side, and as many slices of rows as fit the block.
    const unsigned rows = first_row + p.block_rows <= p.rows ? p.block_rows : unsigned(p.rows - first_row);
    const unsigned vectors = p.width / V;
    for (unsigned chunk = 0; chunk < vectors; chunk += THREADS) {
        const unsigned across = vectors - chunk < THREADS ? vectors - chunk : THREADS;
        const unsigned slices = THREADS / across;
        const unsigned slice = threadIdx.x / across, column = (chunk + threadIdx.x % across) * V;
        float dgamma[V] = {}, dbeta[V] = {};
        for (unsigned r = slice; slice < slices && r < rows; r += slices) {
            float x[V], dn[V];
            load<V>(x, p.x + (first_row + r) * p.width + column);
            load<V>(dn, p.dn + (first_row + r) * p.width + column);
            const float2 s = statistics[r];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                dgamma[v] += dn[v] * (x[v] - s.x) * s.y;
                dbeta[v] += dn[v];
            }
        }
        float* share = shares + threadIdx.x * 2 * V;
        store<V>(share, dgamma);
        store<V>(share + V, dbeta);
        __syncthreads();
        if (slice == 0) {
            for (unsigned other = 1; other < slices; ++other) {
                float more[V];
                load<V>(more, share + other * across * 2 * V);
                add<V>(dgamma, more);
                load<V>(more, share + other * across * 2 * V + V);
                add<V>(dbeta, more);
            }
            float* to = p.partial + size_t(blockIdx.x) * 2 * p.width + column;
            store<V>(to, dgamma);
            store<V>(to + p.width, dbeta);
        }
        __syncthreads();
    }
}

KERNEL_FOR_BOTH(layer_norm_backward, NormBackwardParams, THREADS, 4) { WITH_VECTORS(p.width, backward); }
