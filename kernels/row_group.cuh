// Groups of lanes that share a row: 2^bits lanes of a warp, each accessing V columns at a time (V =
// 4, 16 bytes, if the width is a multiple of 4; otherwise 1). A row of 32 values is one access of 8
// lanes; a warp then works on four rows.
#pragma once
#include "primitives.cuh"

template <int V> __device__ __forceinline__ void load(float (&x)[V], const float* p) {
    if constexpr (V == 4) {
        const float4 a = *reinterpret_cast<const float4*>(p);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    } else {
        x[0] = *p;
    }
}
template <int V> __device__ __forceinline__ void store(float* p, const float (&x)[V]) {
    if constexpr (V == 4) *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
    else *p = x[0];
}
template <int V> __device__ __forceinline__ void add(float (&x)[V], const float (&y)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] += y[v];
}
// p += x
template <int V> __device__ __forceinline__ void store_added(float* p, const float (&x)[V]) {
    float y[V];
    load<V>(y, p);
    add<V>(y, x);
    store<V>(p, y);
}

struct RowGroup {
    unsigned bits;   // log2 of the lanes per group
    unsigned lane;   // lane in the group
    unsigned index;  // index of the group in the block
    __device__ __forceinline__ explicit RowGroup(unsigned bits)
        : bits(bits), lane(threadIdx.x & ((1u << bits) - 1)), index(threadIdx.x >> bits) {}
    // Number of groups in the block.
    __device__ __forceinline__ unsigned count() const { return blockDim.x >> bits; }
    // Row of this group, with one row per group.
    __device__ __forceinline__ size_t row() const { return size_t(blockIdx.x) * count() + index; }
    // Sum over the lanes of the group, in each of them. All threads of the warp must call it.
    template <class T> __device__ __forceinline__ T sum(T x) const {
        for (int lanes = 1 << bits >> 1; lanes; lanes >>= 1) x += shuffle_xor(x, lanes);
        return x;
    }
};

// Sum over the block, in thread 0. `shared` has one value per warp. All threads must call it.
__device__ __forceinline__ double block_sum(double x, double* shared) {
    x = warp_sum(x);
    __syncthreads();  // all threads have read the previous sums
    if (lane_index() == 0) shared[warp_index()] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) x += shared[warp];
    }
    return x;
}

// Calls `body` with V = 4 or 1 as the width allows.
#define WITH_VECTORS(width, body) \
    if ((width) % 4 == 0) body<4>(p); \
    else body<1>(p)
// As WITH_VECTORS. `body` also gets the block's y.
#define WITH_VECTORS_AND_Y(width, body) \
    if ((width) % 4 == 0) body<4>(p, block_y); \
    else body<1>(p, block_y)
