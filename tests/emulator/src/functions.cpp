// Single functions of the kernels, as kernels of their own.
#define DFAR_MODULE "functions"
#include "online_softmax.cuh"

struct ValuesParams {
    const float* x;  // one value per thread of the grid
    float* y;
};

KERNEL(exp2_polynomial_of, ValuesParams, 128) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    p.y[i] = exp2_polynomial(p.x[i]);
}
