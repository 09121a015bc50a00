// Arguments of the attention kernels, passed by value. The host declares the same struct in
// src/device/cuda/plan/params.rs; both sides assert sizes and offsets.
#pragma once

// Arguments of every kernel of attention/attention.cu. N tokens, H heads of width d, Q query slots,
// K key slots. Pointers that the contract of a kernel does not name may be null.
struct AttentionParams {
    const void* q;             // [N, H, d]
    const void* k;             // [N, H, d]
    const void* v;             // [N, H, d]
    void* o;                   // [N, Q, K, d]
    float* lse;                // [N, Q], natural logarithm
    const void* d_o;           // [N, Q, K, d]
    float* delta;              // [N, Q] sum_b <d_o, o>, from dq to dk_dv
    float* correction;         // [N, Q] f32 only: 1 / (sum of the row's p), from dq to dk_dv
    void* dq;                  // [N, H, d]
    void* dk;                  // [N, H, d]
    void* dv;                  // [N, H, d]
    const unsigned* order;     // [N] tokens by sequence and label, negatives first; null: no labels
    const unsigned* feedback;  // [N] 2 * (positives up to this token, included) + label; or null
    const void* items;         // [gridDim.x] Items; whole: several per block; longest first
    unsigned heads;            // H
    unsigned query_slots;      // Q
    unsigned key_slots;        // K; if 1, blockIdx.y is the head of query and key
    unsigned group;            // heads per feedback group, H / 2; 0: no labels
    unsigned causal;           // 1: a token sees itself and earlier tokens; 0: all tokens
    unsigned masked;           // 1: only kept pairs enter the denominator
    float scale;               // factor of the scores
    unsigned item_warps;       // whole sequences: warps that share a sequence
    unsigned capacity;         // whole sequences: rows per key head in shared memory
    unsigned slot_share;       // 2^31 / query rows per token, rounded up: see Problem::position
};

static_assert(sizeof(AttentionParams) == 152, "AttentionParams is mirrored by src/device/cuda/plan/params.rs");
#ifdef DFAR_EMULATOR  // NVRTC knows no offsetof before CUDA 13
static_assert(__builtin_offsetof(AttentionParams, items) == 104, "mirrored by src/device/cuda/plan/params.rs");
static_assert(__builtin_offsetof(AttentionParams, scale) == 136, "mirrored by src/device/cuda/plan/params.rs");
#endif
