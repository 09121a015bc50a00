// All PTX and intrinsics. tests/emulator implements the same functions on the CPU.
//
// Fragments have the layout of mma.sync (PTX ISA, "Matrix fragments for mma.m16n8k16"). With row =
// lane / 4 and column = lane % 4 * 2, an accumulator c holds the elements (row, column), (row,
// column + 1), (row + 8, column), (row + 8, column + 1).
#pragma once

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

constexpr float INF = __builtin_bit_cast(float, 0x7f800000);
constexpr float NOT_A_NUMBER = __builtin_bit_cast(float, 0x7fffffff);

#ifdef DFAR_EMULATOR
#include "emulator.h"
#else

// Defines a kernel with one argument, `p`. Further arguments: maximum threads per block, minimum
// resident blocks per multiprocessor.
#define KERNEL(name, Params, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Params p)

// ----------------------------------------------------------------------------------------- threads

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_index() { return threadIdx.x >> 5; }
// Tells the compiler that all lanes hold the same value.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }
__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffff, x, lanes); }
__device__ __forceinline__ double shuffle_xor(double x, int lanes) { return __shfl_xor_sync(0xffffffff, x, lanes); }
__device__ __forceinline__ unsigned shuffle_from(unsigned x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
__device__ __forceinline__ bool any_lane(bool x) { return __any_sync(0xffffffff, x); }
// Ballot: one bit per lane.
__device__ __forceinline__ unsigned ballot(bool x) { return __ballot_sync(0xffffffff, x); }
// Whether x holds in any thread of the block. Acts as a block barrier.
__device__ __forceinline__ bool any_thread(bool x) { return __syncthreads_or(x); }

// Returns x, opaque to the compiler: expressions of the result are recomputed at each use instead
// of occupying registers across a loop.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ------------------------------------------------------------------------------------------ memory

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ uint4 dynamic_shared_memory[];
    return reinterpret_cast<unsigned char*>(dynamic_shared_memory);
}

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Starts an asynchronous copy of 16 bytes from global to shared memory. If not `valid`, writes
// zeros and does not read `source`.
__device__ __forceinline__ void copy_async(void* shared, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0) : "memory");
}
// Waits for the asynchronous copies of this thread.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Reads 8x8 matrices of 16-bit elements from shared memory. Lane i passes the address of row i % 8
// of matrix i / 8. A thread receives two adjacent elements of each matrix, from (lane / 4, lane % 4
// * 2) on; of the transposed matrix, from (lane % 4 * 2, lane / 4) on.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements held by the warp in the layout of `load_matrices`.
__device__ __forceinline__ unsigned transpose_matrix(unsigned x) {
    unsigned r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// ----------------------------------------------------------------------------------------- numbers

// 2^x and log2(x) on the special-function unit. 2^-inf is 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, to within one unit in the last place.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float largest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
// Upper 32 bits of the product.
__device__ __forceinline__ unsigned multiply_high(unsigned a, unsigned b) { return __umulhi(a, b); }
// Rounded once, never fused with the next operation.
__device__ __forceinline__ float multiply_exactly(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add_exactly(float a, float b) { return __fadd_rn(a, b); }

// Two numbers, rounded to nearest, in one register. `low` is first in memory.
template <class E> __device__ __forceinline__ unsigned pack(float low, float high);
template <> __device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> __device__ __forceinline__ unsigned pack<f16>(float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <class E> __device__ __forceinline__ float2 unpack(unsigned pair);
template <> __device__ __forceinline__ float2 unpack<bf16>(unsigned pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<f16>(unsigned pair) {
    float2 r;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(r.x), "=f"(r.y) : "r"(pair));
    return r;
}

// ------------------------------------------------------------------------------------ tensor cores

// c += a b, with a: 16 x 16 and b: 16 x 8, or a: 16 x 8 and b: 8 x 8. Volatile: the compiler must not
// move a product behind a branch that not all lanes take, because some of its results are used there
// only.
template <class E>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply<bf16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<f16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <class E>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b0);
template <>
__device__ __forceinline__ void multiply<bf16>(float (&c)[4], const unsigned (&a)[2], unsigned b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
}
template <>
__device__ __forceinline__ void multiply<f16>(float (&c)[4], const unsigned (&a)[2], unsigned b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
}

#endif

// ------------------------------------------------------------------------------ over a whole warp

// Sum over the lanes of the warp, in each of them.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
    for (int lanes = 16; lanes; lanes >>= 1) x += shuffle_xor(x, lanes);
    return x;
}
// The largest over the lanes of the warp, in each of them.
__device__ __forceinline__ float warp_largest(float x) {
    for (int lanes = 16; lanes; lanes >>= 1) x = largest(x, shuffle_xor(x, lanes));
    return x;
}

// ----------------------------------------------------------------------------- one or two problems

// The argument of a kernel for one or two problems. Mirrored by src/device/cuda/gpu/queue.rs.
template <class Params> struct Both {
    Params of[2];
    unsigned blocks[2];  // along x
    unsigned problems;   // 1 or 2
    unsigned unused;
};

// Defines a kernel whose launch solves one problem, or two independent ones of the same kind: block
// `block_y` of the grid's y takes problem block_y % 2. The body sees `p` and `block_y` of its own.
#define KERNEL_FOR_BOTH(name, Params, ...)                                          \
    __device__ __forceinline__ void name##_of(const Params& p, unsigned block_y);   \
    KERNEL(name, Both<Params>, __VA_ARGS__) {                                       \
        const unsigned i = p.problems == 2 ? blockIdx.y % 2 : 0;                    \
        if (blockIdx.x < p.blocks[i]) name##_of(p.of[i], blockIdx.y / p.problems);  \
    }                                                                               \
    __device__ __forceinline__ void name##_of(const Params& p, [[maybe_unused]] unsigned block_y)
