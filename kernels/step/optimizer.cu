// Gradient clipping and Adam over all tensors of a model, in three launches.
//
// MATHEMATICS. With c the clip factor of the gradient (1, or limit / norm if the norm is larger),
// step t:
//
//     g = c gradient     m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2
//     w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//
// The gradient of an embedding table has only the rows that the batch touched; other rows and their
// moments do not change.
//
// TILING. All gradients are cut into chunks, one per block; a block finds its tensor in the table
// by bisection. Launches: squares per chunk; norms, clip factors and the check for non-finite
// values, in one block and a fixed order; the update. If the norm or a loss is non-finite, or the
// step before was refused, the update does nothing and the norm becomes NaN: the host learns of it
// with the losses, while later steps are in flight.
//
// TRAFFIC in bytes per value of the gradient: 4 for the norm; 16 read and 12 written for the
// update.
#include "row_group.cuh"

constexpr int THREADS = 256;
constexpr int NORM_THREADS = 1024;

struct Tensor {
    float* value;
    float* first;              // first and second moment, as long as value
    float* second;
    const float* gradient;     // as long as value, or [rows, width]
    const unsigned* rows;      // null: all rows, in order
    unsigned long long len;    // of the gradient
    unsigned width;            // values per row
    unsigned first_chunk;
};
static_assert(sizeof(Tensor) == 56, "mirrored by src/device/cuda/ops/optimizer.rs");

struct OptimizerParams {
    const Tensor* tensors;  // [tensor_count]
    double* squares;        // [chunk_count] sum of squares of each chunk
    double* tensor_square;  // [tensor_count]
    float* factor;          // [tensor_count] clip factors, then a 1 if the update runs, else a 0
    const double* losses;   // [loss_count] checked for non-finite values
    double* norm;           // [1] norm of all gradients; NaN if the update does not run
    const double* previous; // [1] norm of the step before, or null
    unsigned tensor_count, chunk_count;
    unsigned chunk;         // values per chunk, a multiple of 4
    unsigned loss_count;
    float lr, beta1, beta2, eps;
    float correction1, correction2;  // 1 - beta^t
    float limit;            // limit of the norm; negative: no clipping
    unsigned global;        // 1: the limit applies to the norm of all gradients; 0: to each tensor
};
static_assert(sizeof(OptimizerParams) == 104, "mirrored by src/device/cuda/ops/optimizer.rs");

// Index of the tensor that contains a chunk.
__device__ __forceinline__ unsigned tensor_of(const OptimizerParams& p, unsigned chunk) {
    unsigned low = 0, high = p.tensor_count;
    while (high - low > 1) {
        const unsigned middle = (low + high) / 2;
        if (p.tensors[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return low;
}

KERNEL(optimizer_squares, OptimizerParams, THREADS) {
    const Tensor& tensor = p.tensors[tensor_of(p, blockIdx.x)];
    const size_t first = size_t(blockIdx.x - tensor.first_chunk) * p.chunk;
    const size_t end = first + p.chunk < tensor.len ? first + p.chunk : tensor.len;
    double sum = 0.0;
    for (size_t i = first + threadIdx.x * 4; i < end; i += THREADS * 4) {
        if (i + 4 <= end) {
            float g[4];
            load<4>(g, tensor.gradient + i);
#pragma unroll
            for (int v = 0; v < 4; ++v) sum += double(g[v]) * g[v];
        } else {
#pragma unroll 1
            for (size_t j = i; j < end; ++j) sum += double(tensor.gradient[j]) * tensor.gradient[j];
        }
    }
    sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) p.squares[blockIdx.x] = sum;
}

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

// One block; each warp takes one tensor at a time.
KERNEL(optimizer_norms, OptimizerParams, NORM_THREADS) {
    for (unsigned t = warp_index(); t < p.tensor_count; t += NORM_THREADS / 32) {
        const unsigned end = t + 1 < p.tensor_count ? p.tensors[t + 1].first_chunk : p.chunk_count;
        double sum = 0.0;
        for (unsigned i = p.tensors[t].first_chunk + lane_index(); i < end; i += 32) sum += p.squares[i];
        sum = warp_sum(sum);
        if (lane_index() == 0) p.tensor_square[t] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double square = 0.0;
        for (unsigned t = 0; t < p.tensor_count; ++t) square += p.tensor_square[t];
        const double norm = sqrt(square);
        bool finite = is_finite(norm) && (p.previous == nullptr || is_finite(*p.previous));
        for (unsigned i = 0; i < p.loss_count; ++i) finite &= is_finite(p.losses[i]);
        *p.norm = finite ? norm : nan("");
        p.factor[p.tensor_count] = finite ? 1.0f : 0.0f;
    }
    __syncthreads();
    const double global = *p.norm;
    for (unsigned t = threadIdx.x; t < p.tensor_count; t += NORM_THREADS) {
        const double norm = p.global ? global : sqrt(p.tensor_square[t]);
        p.factor[t] = p.limit >= 0.0f && norm > double(p.limit) ? float(double(p.limit) / norm) : 1.0f;
    }
}

struct Update {
    const OptimizerParams& p;
    float factor;
    __device__ __forceinline__ void operator()(float gradient, float& value, float& first, float& second) const {
        const float g = gradient * factor;
        first = p.beta1 * first + (1.0f - p.beta1) * g;
        second = p.beta2 * second + (1.0f - p.beta2) * g * g;
        value -= p.lr * (first / p.correction1) / (sqrtf(second / p.correction2) + p.eps);
    }
};

KERNEL(optimizer_adam, OptimizerParams, THREADS) {
    if (p.factor[p.tensor_count] == 0.0f) return;
    const unsigned t = tensor_of(p, blockIdx.x);
    const Tensor& tensor = p.tensors[t];
    const Update update{p, p.factor[t]};
    const size_t first = size_t(blockIdx.x - tensor.first_chunk) * p.chunk;
    const size_t end = first + p.chunk < tensor.len ? first + p.chunk : tensor.len;
    // Index of the parameter that value i of the gradient belongs to.
    const auto place = [&](size_t i) { return tensor.rows ? size_t(tensor.rows[i / tensor.width]) * tensor.width + i % tensor.width : i; };
    const bool in_fours = tensor.rows == nullptr || tensor.width % 4 == 0;
    for (size_t i = first + threadIdx.x * 4; i < end; i += THREADS * 4) {
        if (in_fours && i + 4 <= end) {
            const size_t at = place(i);
            float g[4], w[4], m[4], v[4];
            load<4>(g, tensor.gradient + i);
            load<4>(w, tensor.value + at);
            load<4>(m, tensor.first + at);
            load<4>(v, tensor.second + at);
#pragma unroll
            for (int k = 0; k < 4; ++k) update(g[k], w[k], m[k], v[k]);
            store<4>(tensor.value + at, w);
            store<4>(tensor.first + at, m);
            store<4>(tensor.second + at, v);
        } else {
#pragma unroll 1
            for (size_t j = i; j < end && j < i + 4; ++j) {
                const size_t at = place(j);
                update(tensor.gradient[j], tensor.value[at], tensor.first[at], tensor.second[at]);
            }
        }
    }
}
