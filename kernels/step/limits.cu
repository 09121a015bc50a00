// Measures peak rates of a GPU, as limits for the other benchmarks. Operands stay in registers,
// except in the copy.
//
// MATHEMATICS. A copy; chains of 2^-x, of multiply-adds and of tensor-core products.
//
// TILING. A thread has CHAINS independent chains of operations, enough to hide latency. It writes
// the results so that the compiler cannot remove the work.
//
// TRAFFIC. The copy reads and writes 4 bytes per value; the others write one value per thread.
#include "primitives.cuh"

constexpr int CHAINS = 8;

struct LimitsParams {
    const float* x;  // [len]; copy only
    float* y;        // copy: [len]; otherwise [threads]
    unsigned long long len;
    unsigned rounds;
    float seed;
};
static_assert(sizeof(LimitsParams) == 32, "mirrored by src/device/cuda/ops/limits.rs");

// y = x: 8 bytes per value, four values per thread.
KERNEL(limits_copy, LimitsParams, 256) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= p.len) *reinterpret_cast<float4*>(p.y + i) = *reinterpret_cast<const float4*>(p.x + i);
}

__device__ __forceinline__ void write_sum(const LimitsParams& p, const float (&x)[CHAINS]) {
    float sum = 0.0f;
    for (float value : x) sum += value;
    p.y[size_t(blockIdx.x) * blockDim.x + threadIdx.x] = sum;
}

// x = 2^-x, which stays between 0 and 1.
KERNEL(limits_exponentials, LimitsParams, 256) {
    float x[CHAINS];
    for (int i = 0; i < CHAINS; ++i) x[i] = p.seed + float(i) * 0.1f;
    for (unsigned round = 0; round < p.rounds; ++round)
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) x[i] = exp2_fast(-x[i]);
    write_sum(p, x);
}

// x = seed x + 1/2
KERNEL(limits_multiply_adds, LimitsParams, 256) {
    float x[CHAINS];
    for (int i = 0; i < CHAINS; ++i) x[i] = float(i);
    for (unsigned round = 0; round < p.rounds; ++round)
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) x[i] = multiply_add(x[i], p.seed, 0.5f);
    write_sum(p, x);
}

// 16 x 16 by 16 x 8 products of bf16 with f32 sums: 4096 operations per warp and product.
KERNEL(limits_products, LimitsParams, 256) {
    float c[CHAINS][4] = {};
    const unsigned word = pack<bf16>(p.seed, p.seed);
    const unsigned a[4] = {word, word, word, word};
    for (unsigned round = 0; round < p.rounds; ++round)
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) multiply<bf16>(c[i], a, word, word);
    float sums[CHAINS];
    for (int i = 0; i < CHAINS; ++i) sums[i] = c[i][0] + c[i][1] + c[i][2] + c[i][3];
    write_sum(p, sums);
}
