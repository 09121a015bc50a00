// The entry points of attention.cu for one element type, found by name.
#include "attention.cu"

template <class E, int D> void (*entry(const char* name))(const void*) {
#define ENTRY(kernel, ...) \
    if (std::strcmp(name, "attention_" #kernel) == 0) return [](const void* p) { __VA_ARGS__(*static_cast<const AttentionParams*>(p)); };
    ENTRY(forward, forward<E, D, false>)
    ENTRY(forward_whole, forward<E, D, true>)
    ENTRY(delta, delta<E, D>)
    ENTRY(dq, dq<E, D>)
    ENTRY(dk_dv, dk_dv<E, D>)
#undef ENTRY
    return nullptr;
}

#define ENTRIES(element, E)                                                                                  \
    extern "C" void (*dfar_emulator_##element(const char* name, unsigned head_dim))(const void*) {           \
        switch (head_dim) {                                                                                  \
            case 8: return entry<E, 8>(name);                                                                \
            case 16: return entry<E, 16>(name);                                                              \
            case 32: return entry<E, 32>(name);                                                              \
            case 64: return entry<E, 64>(name);                                                              \
            case 128: return entry<E, 128>(name);                                                            \
        }                                                                                                    \
        return nullptr;                                                                                      \
    }
