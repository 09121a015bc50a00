// Converts heads between f32 of any width and the layout of attention/attention.cu: DFAR_ELEMENT,
// padded to a compiled width.
//
// MATHEMATICS. y = round(x), padded with zero columns, which change neither scores nor outputs.
//
// TILING. A thread converts two columns.
//
// TRAFFIC. Each side is read or written once: 6 bytes per value in 16 bits, 8 in f32.
#include "row_group.cuh"

constexpr int THREADS = 256;

struct ConvertParams {
    float* wide;         // [rows, width]
    void* narrow;        // [rows, padded] of DFAR_ELEMENT
    unsigned long long rows;
    unsigned width;
    unsigned padded;     // a multiple of 8
};
static_assert(sizeof(ConvertParams) == 32, "mirrored by src/device/cuda/ops/convert.rs");

// Two adjacent values of the element type, in one access.
template <class E> __device__ __forceinline__ void store_pair(void* to, size_t index, float low, float high) {
    if constexpr (sizeof(E) == 4) reinterpret_cast<float2*>(to)[index] = make_float2(low, high);
    else reinterpret_cast<unsigned*>(to)[index] = pack<E>(low, high);
}
template <class E> __device__ __forceinline__ float2 load_pair(const void* from, size_t index) {
    if constexpr (sizeof(E) == 4) return reinterpret_cast<const float2*>(from)[index];
    else return unpack<E>(reinterpret_cast<const unsigned*>(from)[index]);
}

// One thread per pair of columns.
KERNEL_FOR_BOTH(convert_to, ConvertParams, THREADS) {
    const size_t pair = size_t(blockIdx.x) * THREADS + threadIdx.x, pairs = p.padded / 2;
    const size_t row = pair / pairs;
    if (row >= p.rows) return;
    const unsigned column = unsigned(pair % pairs) * 2;
    const float* from = p.wide + row * p.width;
    const float low = column < p.width ? from[column] : 0.0f, high = column + 1 < p.width ? from[column + 1] : 0.0f;
    store_pair<DFAR_ELEMENT>(p.narrow, pair, low, high);
}

KERNEL_FOR_BOTH(convert_from, ConvertParams, THREADS) {
    const size_t pair = size_t(blockIdx.x) * THREADS + threadIdx.x, pairs = p.padded / 2;
    const size_t row = pair / pairs;
    if (row >= p.rows) return;
    const unsigned column = unsigned(pair % pairs) * 2;
    const float2 x = load_pair<DFAR_ELEMENT>(p.narrow, pair);
    float* to = p.wide + row * p.width;
    if (column < p.width) to[column] = x.x;
    if (column + 1 < p.width) to[column + 1] = x.y;
}
