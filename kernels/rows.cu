// Passes over rows of activations: sums, ReLU backward, column sums, concatenation, rows by label.
//
// TRAFFIC. Each is bound by memory: what is said to be read is read once, what is said to be written is written once,
// 16 bytes at a time where the length allows.
#include "primitives.cuh"

struct AddParams {
    const float* x;  // [len]
    float* y;        // [len]
    unsigned long long len;
};
static_assert(sizeof(AddParams) == 24, "mirrored by src/device/cuda/rows.rs");

// y += x. Reads x and y, writes y: 12 bytes a value. A thread owns four values.
KERNEL(rows_add, AddParams, 256) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= p.len) {
        const float4 x = *reinterpret_cast<const float4*>(p.x + i);
        float4 y = *reinterpret_cast<const float4*>(p.y + i);
        y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
        *reinterpret_cast<float4*>(p.y + i) = y;
    } else {
        for (size_t j = i; j < p.len; ++j) p.y[j] += p.x[j];
    }
}
