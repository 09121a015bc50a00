// Losses and their gradients. Computed in f64: rows are few and cancellation is frequent.
//
// MATHEMATICS (docs/mathematics.md, section 3). With softplus(x) = log(1 + e^x), sigma its
// derivative, z the target and s = 2 z - 1, over R rows:
//
//     bce = mean(softplus(pos) - z pos)               ibl = mean(softplus(m)),  m = -s (pos - neg)
//     d_pos = (sigma(pos) - z - bpr s sigma(m)) / R   d_neg = bpr s sigma(m) / R
//
//     cos = <x, y> / |x||y|, 0 if a square is below 1e-12     cosine = mean(cos)
//     dx += w / R (y / |x||y| - cos x / |x|^2), and dy likewise
//
// TILING. One thread per row (rank) or one group of lanes per row (cosine). Blocks write partial
// sums; loss_reduce adds them in block order into the loss buffer.
//
// TRAFFIC. rank: 12 bytes per row read, 8 written. cosine: 8 bytes per value read, 8 read and
// written.
#include "row_group.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ double softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(x > 0.0 ? -x : x)); }
__device__ __forceinline__ double sigmoid(double x) {
    const double e = exp(x > 0.0 ? -x : x);
    return x >= 0.0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
}

struct RankParams {
    const float* pos;     // [rows] logits
    const float* neg;     // [rows]
    const float* target;  // [rows]
    float* d_pos;         // [rows]
    float* d_neg;         // [rows]
    double* partial;      // [blocks, 2] sums of bce and ibl
    unsigned rows;
    float bpr;
};
static_assert(sizeof(RankParams) == 56, "mirrored by src/device/cuda/ops/loss.rs");

KERNEL(loss_rank, RankParams, THREADS) {
    const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
    double bce = 0.0, ibl = 0.0;
    if (i < p.rows) {
        const double pos = p.pos[i], neg = p.neg[i], z = p.target[i], rows = p.rows;
        const double sign = 2.0 * z - 1.0, margin = -sign * (pos - neg);
        bce = softplus(pos) - z * pos;
        ibl = softplus(margin);
        const double d_margin = double(p.bpr) * sigmoid(margin) * -sign;
        p.d_pos[i] = float((sigmoid(pos) - z + d_margin) / rows);
        p.d_neg[i] = float(-d_margin / rows);
    }
    double* shared = reinterpret_cast<double*>(shared_memory());
    bce = block_sum(bce, shared);
    ibl = block_sum(ibl, shared);
    if (threadIdx.x == 0) {
        p.partial[blockIdx.x * 2] = bce;
        p.partial[blockIdx.x * 2 + 1] = ibl;
    }
}

struct CosineParams {
    const float* x;   // [rows, width]
    const float* y;   // [rows, width]
    float* dx;        // [rows, width], adds to it
    float* dy;        // [rows, width], adds to it
    double* partial;  // [blocks] sums of cosines
    unsigned rows, width;
    unsigned bits;
    float weight;     // w, before division by the rows
};
static_assert(sizeof(CosineParams) == 56, "mirrored by src/device/cuda/ops/loss.rs");

template <int V> __device__ __forceinline__ void cosine(const CosineParams& p) {
    const RowGroup group(p.bits);
    const size_t row = group.row();
    const bool valid = row < p.rows;
    const float *x_row = p.x + row * p.width, *y_row = p.y + row * p.width;
    double xx = 0.0, yy = 0.0, xy = 0.0;
    if (valid) {
        for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
            float x[V], y[V];
            load<V>(x, x_row + c);
            load<V>(y, y_row + c);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                xx += double(x[v]) * x[v];
                yy += double(y[v]) * y[v];
                xy += double(x[v]) * y[v];
            }
        }
    }
    xx = group.sum(xx);
    yy = group.sum(yy);
    xy = group.sum(xy);
    double cos = 0.0;
    if (valid && !(xx < 1e-12 || yy < 1e-12)) {
        const double norms = sqrt(xx * yy), weight = double(p.weight) / double(p.rows);
        cos = xy / norms;
        const double across = weight / norms, along_x = weight * cos / xx, along_y = weight * cos / yy;
        for (unsigned c = group.lane * V; c < p.width; c += V << p.bits) {
            float x[V], y[V], dx[V], dy[V];
            load<V>(x, x_row + c);
            load<V>(y, y_row + c);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                dx[v] = float(across * y[v] - along_x * x[v]);
                dy[v] = float(across * x[v] - along_y * y[v]);
            }
            store_added<V>(p.dx + row * p.width + c, dx);
            store_added<V>(p.dy + row * p.width + c, dy);
        }
    }
    const double sum = block_sum(group.lane == 0 ? cos : 0.0, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
}
KERNEL_FOR_BOTH(loss_cosine, CosineParams, THREADS) { WITH_VECTORS(p.width, cosine); }

struct ReduceParams {
    const double* partial;  // [count, width]
    double* sums;           // [width]
    unsigned count, width;
    double factor;
};
static_assert(sizeof(ReduceParams) == 32, "mirrored by src/device/cuda/ops/loss.rs");

// sums = factor * column sums of partial, in a fixed order; 0 without rows. One block.
KERNEL_FOR_BOTH(loss_reduce, ReduceParams, THREADS) {
    for (unsigned column = 0; column < p.width; ++column) {
        double sum = 0.0;
        for (unsigned i = threadIdx.x; i < p.count; i += THREADS) sum += p.partial[size_t(i) * p.width + column];
        sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
        if (threadIdx.x == 0) p.sums[column] = sum * p.factor;
    }
}
