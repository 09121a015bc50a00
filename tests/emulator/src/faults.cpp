// Kernels with one planted fault each. `data` holds 64 floats: `fill` has written the first half,
// the second half is uninitialized.
#include "primitives.cuh"

float dfar_emulator_keep;  // external, so that the compiler keeps the reads
#define keep dfar_emulator_keep

static void fill(const void* p) { (*static_cast<float* const*>(p))[threadIdx.x] = float(threadIdx.x); }

static void sound(const void* p) {
    float* data = *static_cast<float* const*>(p);
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = data[threadIdx.x & 31];
    __syncthreads();
    data[32 + (threadIdx.x & 31)] = shared[threadIdx.x ^ 33];
}
static void global_out_of_bounds(const void* p) {
    float* data = *static_cast<float* const*>(p);
    data[64 + threadIdx.x] = 1.0f;
}
static void global_before_the_start(const void* p) {
    float* data = *static_cast<float* const*>(p);
    keep = *(data - 1 - int(threadIdx.x));
}
static void shared_out_of_bounds(const void*) {
    reinterpret_cast<float*>(shared_memory())[threadIdx.x + 1] = 1.0f;
}
static void global_unwritten(const void* p) {
    float* data = *static_cast<float* const*>(p);
    keep = data[32 + threadIdx.x];
}
static void shared_unwritten(const void*) { keep = reinterpret_cast<float*>(shared_memory())[threadIdx.x]; }
static void copy_not_awaited(const void* p) {
    float* data = *static_cast<float* const*>(p);
    float* shared = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x < 8) copy_async(shared + threadIdx.x * 4, data + threadIdx.x * 4, true);
    __syncthreads();
    keep = shared[threadIdx.x & 31];
}
static void race_between_warps(const void*) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = 1.0f;
    __syncwarp();
    keep = shared[threadIdx.x & 31];
}
static void race_inside_a_warp(const void*) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = 1.0f;
    keep = shared[threadIdx.x & ~1u];
}
static void write_after_read(const void*) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = 1.0f;
    __syncthreads();
    if (threadIdx.x < 32) keep = shared[0];
    if (threadIdx.x == 32) shared[0] = 2.0f;
}
static void divergent_barrier(const void*) {
    if (threadIdx.x < 40) __syncthreads();
}
static void divergent_barrier_of_warps(const void*) {
    if (threadIdx.x < 32) __syncthreads();
}
static void divergent_warp(const void*) {
    if (threadIdx.x & 1) __syncwarp();
    else keep = shuffle_xor(1.0f, 1);
}
static void misaligned_matrix(const void*) {
    unsigned r[4];
    load_matrices(r, shared_memory() + 8);
}

#define FAULT(kernel) static const emulator::Entry kernel##_entry("faults", #kernel, kernel);
FAULT(fill)
FAULT(sound)
FAULT(global_out_of_bounds)
FAULT(global_before_the_start)
FAULT(shared_out_of_bounds)
FAULT(global_unwritten)
FAULT(shared_unwritten)
FAULT(copy_not_awaited)
FAULT(race_between_warps)
FAULT(race_inside_a_warp)
FAULT(write_after_read)
FAULT(divergent_barrier)
FAULT(divergent_barrier_of_warps)
FAULT(divergent_warp)
FAULT(misaligned_matrix)
