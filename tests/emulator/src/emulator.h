// CUDA's names on the CPU: the functions that primitives.cuh defines in PTX, defined here by
// rendezvous of fibres.
//
// A thread of a block is a fibre. A warp operation suspends its 32 fibres until all have called it
// from the same line, and then runs once for all of them; a barrier does the same for the block.
// The compiler inserts a check of each memory access of a kernel (see build.rs); accesses made here
// on behalf of a kernel are checked by `access`.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define EMULATOR_PLAIN __attribute__((no_sanitize("thread")))

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int opaque(int x) { return x; }
inline unsigned multiply_high(unsigned a, unsigned b) { return unsigned(std::uint64_t(a) * b >> 32); }

namespace emulator {

struct Thread {
    uint3 thread_index, block_index, block_size;
    unsigned char* shared;
};
extern constinit thread_local Thread* self;

enum class Access { read, write };
// Checks an access of the current thread, or of lane `lane` of the current warp.
void access(const void* at, size_t bytes, Access kind);
void access_by(int lane, const void* at, size_t bytes, Access kind);

// Suspends the fibre until the whole warp has called. `run` is called once, with the arguments of
// all lanes.
void meet_warp(int line, void* argument, void (*run)(void* const (&arguments)[32]));
void meet_block(int line);
// As `meet_block`. Returns whether x holds in any thread.
bool meet_block_any(bool x, int line);

// Counts executed operations, for the cost model: exponentials per thread, multiply-adds of
// tensor-core products. `start_copy` counts the bytes of `copy_async`.
void count_exponential();
void count_multiply_adds(size_t count);

// Asynchronous copies: started here, executed by the thread's next wait.
void start_copy(void* shared, const void* source, bool valid);
void finish_copies();

template <class A> void meet(int line, A& argument, void (*run)(void* const (&)[32])) { meet_warp(line, &argument, run); }

// __launch_bounds__: maximum threads per block (0: any), minimum resident blocks.
struct Bounds { int threads = 0, blocks = 1; };

// A kernel that can be launched by name. The constructor registers it.
struct Entry {
    const char *module, *name;
    void (*run)(const void* params);
    size_t params_bytes;
    Bounds bounds;
    const Entry* next;
    Entry(const char* module, const char* name, void (*run)(const void* params), size_t params_bytes = 0, Bounds bounds = {});
};

inline float widen(unsigned short bits, bool is_bf16) {
    if (is_bf16) return std::bit_cast<float>(unsigned(bits) << 16);
    return float(std::bit_cast<_Float16>(bits));
}

}  // namespace emulator

// DFAR_MODULE: the source's name and macros, defined by build.rs for each module.
#define KERNEL(name, Params, ...)                                                                   \
    static void name(const Params& p);                                                              \
    static const emulator::Entry name##_entry(DFAR_MODULE, #name, [](const void* p) { name(*static_cast<const Params*>(p)); }, sizeof(Params), {__VA_ARGS__}); \
    static void name(const Params& p)

#define threadIdx (emulator::self->thread_index)
#define blockIdx (emulator::self->block_index)
#define blockDim (emulator::self->block_size)

inline void __syncthreads(int line = __builtin_LINE()) { emulator::meet_block(line); }
inline void __syncwarp(int line = __builtin_LINE()) { emulator::meet_warp(line, nullptr, nullptr); }

inline int lane_index() { return threadIdx.x & 31; }
inline int warp_index() { return threadIdx.x >> 5; }

template <class T> EMULATOR_PLAIN T shuffle(T x, int lanes, int line) {
    struct A { T x; int lanes; T result; } a{x, lanes, x};
    emulator::meet(line, a, [](void* const (&all)[32]) EMULATOR_PLAIN {
        for (int i = 0; i < 32; ++i) {
            A& mine = *static_cast<A*>(all[i]);
            const int from = mine.lanes < 0 ? 0 : i ^ mine.lanes;
            mine.result = static_cast<A*>(all[from])->x;
        }
    });
    return a.result;
}
inline int uniform(int x, int line = __builtin_LINE()) { return shuffle(x, -1, line); }
inline float shuffle_xor(float x, int lanes, int line = __builtin_LINE()) { return shuffle(x, lanes, line); }
inline double shuffle_xor(double x, int lanes, int line = __builtin_LINE()) { return shuffle(x, lanes, line); }
EMULATOR_PLAIN inline unsigned shuffle_from(unsigned x, int lane, int line = __builtin_LINE()) {
    struct A { unsigned x; int lane; unsigned result; } a{x, lane, 0};
    emulator::meet(line, a, [](void* const (&all)[32]) EMULATOR_PLAIN {
        for (void* i : all) static_cast<A*>(i)->result = static_cast<A*>(all[static_cast<A*>(i)->lane])->x;
    });
    return a.result;
}
EMULATOR_PLAIN inline bool any_lane(bool x, int line = __builtin_LINE()) {
    struct A { bool x, result; } a{x, false};
    emulator::meet(line, a, [](void* const (&all)[32]) EMULATOR_PLAIN {
        bool any = false;
        for (void* i : all) any |= static_cast<A*>(i)->x;
        for (void* i : all) static_cast<A*>(i)->result = any;
    });
    return a.result;
}
EMULATOR_PLAIN inline unsigned ballot(bool x, int line = __builtin_LINE()) {
    struct A { bool x; unsigned result; } a{x, 0};
    emulator::meet(line, a, [](void* const (&all)[32]) EMULATOR_PLAIN {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= unsigned(static_cast<A*>(all[i])->x) << i;
        for (void* i : all) static_cast<A*>(i)->result = bits;
    });
    return a.result;
}
inline bool any_thread(bool x, int line = __builtin_LINE()) { return emulator::meet_block_any(x, line); }

inline unsigned char* shared_memory() { return emulator::self->shared; }
inline void copy_async(void* shared, const void* source, bool valid) { emulator::start_copy(shared, source, valid); }
inline void copy_wait() { emulator::finish_copies(); }

namespace emulator {
template <int COUNT, bool TRANSPOSED> EMULATOR_PLAIN inline void load_matrices(unsigned (&r)[COUNT], const void* row, int line) {
    struct A { const void* row; unsigned* r; } a{row, r};
    meet(line, a, [](void* const (&all)[32]) EMULATOR_PLAIN {
        for (int matrix = 0; matrix < COUNT; ++matrix) {
            unsigned short x[8][8];
            for (int i = 0; i < 8; ++i) {
                const void* from = static_cast<A*>(all[matrix * 8 + i])->row;
                access_by(matrix * 8 + i, from, 16, Access::read);
                std::memcpy(x[i], from, 16);
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int i = lane / 4, j = lane % 4 * 2;
                const unsigned low = TRANSPOSED ? x[j][i] : x[i][j], high = TRANSPOSED ? x[j + 1][i] : x[i][j + 1];
                static_cast<A*>(all[lane])->r[matrix] = low | high << 16;
            }
        }
    });
}
}  // namespace emulator
inline void load_matrices(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) { emulator::load_matrices<4, false>(r, row, line); }
inline void load_matrices(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) { emulator::load_matrices<2, false>(r, row, line); }
inline void load_matrices_transposed(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) { emulator::load_matrices<4, true>(r, row, line); }
inline void load_matrices_transposed(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) { emulator::load_matrices<2, true>(r, row, line); }
EMULATOR_PLAIN inline unsigned transpose_matrix(unsigned x, int line = __builtin_LINE()) {
    struct A { unsigned x, result; } a{x, 0};
    emulator::meet(line, a, [](void* const (&all)[32]) EMULATOR_PLAIN {
        const auto at = [&](int i, int j) { return static_cast<A*>(all[i * 4 + j / 2])->x >> j % 2 * 16 & 0xffff; };
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            static_cast<A*>(all[lane])->result = at(j, i) | at(j + 1, i) << 16;
        }
    });
    return a.result;
}

inline float exp2_fast(float x) {
    emulator::count_exponential();
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // .ftz; keeps a NaN
}
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float log2_fast(float x) { return std::log2(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float largest(float a, float b) { return std::fmax(a, b); }
inline float magnitude(float x) { return std::fabs(x); }
inline float multiply_exactly(float a, float b) { return a * b; }
inline float add_exactly(float a, float b) { return a + b; }

template <class E> unsigned pack(float low, float high);
template <> inline unsigned pack<bf16>(float low, float high) {
    const auto round = [](float x) -> unsigned {
        const unsigned bits = std::bit_cast<unsigned>(x);
        if (x != x) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}
template <> inline unsigned pack<f16>(float low, float high) {
    const auto round = [](float x) { return unsigned(std::bit_cast<unsigned short>(_Float16(x))); };
    return round(low) | round(high) << 16;
}
template <class E> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;
template <class E> float2 unpack(unsigned pair) {
    return {emulator::widen(pair & 0xffff, IS_BF16<E>), emulator::widen(pair >> 16, IS_BF16<E>)};
}

// Fragments of mma.m16n8k16 and, with K = 8, mma.m16n8k8, by the PTX ISA. A holds (row, k), (row +
// 8, k), then both at k + 8. B holds (k, column), then (k + 8, column). A register holds two
// elements of successive k.
namespace emulator {
template <class E, int K> EMULATOR_PLAIN inline void multiply(float (&c)[4], const unsigned (&a)[K / 4], const unsigned (&b)[K / 8], int line) {
    struct A { float* c; const unsigned *a, *b; } mine{c, a, b};
    meet(line, mine, [](void* const (&all)[32]) EMULATOR_PLAIN {
        count_multiply_adds(16 * 8 * K);
        float x[16][K], y[8][K];
        for (int lane = 0; lane < 32; ++lane) {
            const A& from = *static_cast<A*>(all[lane]);
            const int row = lane / 4, k = lane % 4 * 2;
            for (int i = 0; i < K / 4; ++i) {
                const float2 v = unpack<E>(from.a[i]);
                x[row + i % 2 * 8][k + i / 2 * 8] = v.x;
                x[row + i % 2 * 8][k + i / 2 * 8 + 1] = v.y;
            }
            for (int i = 0; i < K / 8; ++i) {
                const float2 v = unpack<E>(from.b[i]);
                y[row][k + i * 8] = v.x;
                y[row][k + i * 8 + 1] = v.y;
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            float* to = static_cast<A*>(all[lane])->c;
            for (int i = 0; i < 4; ++i) {
                float sum = 0;
                for (int k = 0; k < K; ++k) sum += x[lane / 4 + i / 2 * 8][k] * y[lane % 4 * 2 + i % 2][k];
                to[i] += sum;
            }
        }
    });
}
}  // namespace emulator
template <class E> void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    const unsigned b[2] = {b0, b1};
    emulator::multiply<E, 16>(c, a, b, line);
}
template <class E> void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b0, int line = __builtin_LINE()) {
    const unsigned b[1] = {b0};
    emulator::multiply<E, 8>(c, a, b, line);
}
