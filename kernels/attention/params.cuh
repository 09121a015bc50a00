// Arguments of the kernels, one struct per operation, passed by value.
//
// src/device/cuda/plan/params.rs declares the same structs for the host; both sides assert size and
// offsets.
#pragma once

// Arguments of every kernel of attention/attention.cu. N tokens, H heads, d their width, Q query
// slots, K key slots. Pointers that a kernel does not name in its contract may be null.
struct AttentionParams {
    const void* q;             // [N, H, d]
    const void* k;             // [N, H, d]
    const void* v;             // [N, H, d]
    void* o;                   // [N, Q, K, d]
    float* lse;                // [N, Q], natural logarithm
    const void* d_o;           // [N, Q, K, d]
    float* delta;              // [N, Q] of streamed sequences, from dq to dk_dv
    float* correction;         // [N, Q] of streamed sequences, f32 only: 1 / (sum of a row's p as backward computes them)
    void* dq;                  // [N, H, d]
    void* dk;                  // [N, H, d]
    void* dv;                  // [N, H, d]
    const unsigned* order;     // [N] tokens of each sequence by label, negatives first; null: original order
    const unsigned* feedback;  // [N] 2 * (positives of the sequence up to and with this token) + label; null: no labels
    const void* items;         // [gridDim.x], whole sequences several a block (see attention/seqlen.cuh); longest first
    unsigned heads;            // H
    unsigned query_slots;      // Q
    unsigned key_slots;        // K; with 1, blockIdx.y is the head and slot of query and key alike
    unsigned group;            // heads of one feedback group, H / 2; 0: no labels
    unsigned causal;           // a token sees itself and earlier tokens; else all tokens
    unsigned masked;           // only kept pairs enter the denominator
    float scale;               // factor on the scores
    unsigned item_warps;       // whole sequences: warps that share one
    unsigned capacity;         // whole sequences: rows that a head's keys have in shared memory
    unsigned slot_share;       // 2^31 over the query rows of a token, rounded up: for division (attention/rows.cuh)
};

static_assert(sizeof(AttentionParams) == 152, "AttentionParams is mirrored by src/device/cuda/params.rs");
#ifdef DFAR_EMULATOR  // NVRTC knows no offsetof before CUDA 13
static_assert(__builtin_offsetof(AttentionParams, items) == 104, "mirrored by src/device/cuda/params.rs");
static_assert(__builtin_offsetof(AttentionParams, scale) == 136, "mirrored by src/device/cuda/params.rs");
#endif
