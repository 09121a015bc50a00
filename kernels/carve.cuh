// Bump allocation of a block's shared memory. `Carve` of src/device/cuda/plan/shared_memory.rs adds
// up the same sizes on the host.
#pragma once
#include "primitives.cuh"

struct Carve {
    unsigned char* at;
    template <class T> __device__ __forceinline__ T* take(int count) {
        T* r = reinterpret_cast<T*>(at);
        at += (count * int(sizeof(T)) + 15) & ~15;
        return r;
    }
};
