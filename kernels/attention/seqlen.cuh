// Work items, and the arithmetic of packed sequences.
#pragma once
#include "attention/params.cuh"

// A work item: a sequence, or one block's part of it. The host sorts items longest first.
struct Item {
    unsigned start;      // first token of the sequence: cu_seqlens[b]
    unsigned length;     // tokens of the sequence
    unsigned negatives;  // tokens of label 0; without labels, all tokens
    unsigned first;      // first query row; dk_dv: first key in label order; whole: 0
};
static_assert(sizeof(Item) == 16, "Item is mirrored by src/device/cuda/plan/params.rs");

// Reads an item in one 16-byte load.
__device__ __forceinline__ Item load_item(const AttentionParams& p, unsigned index) {
    const uint4 raw = static_cast<const uint4*>(p.items)[index];
    return Item{raw.x, raw.y, raw.z, raw.w};
}

// Label of a token, and its rank among the positives.
struct Feedback {
    unsigned label;      // 0 or 1
    unsigned positives;  // tokens of label 1 up to and including this one
};

__device__ __forceinline__ Feedback load_feedback(const AttentionParams& p, unsigned token) {
    if (p.feedback == nullptr) return Feedback{0, 0};
    const unsigned raw = p.feedback[token];
    return Feedback{raw & 1, raw >> 1};
}

// Number of keys of each label that a query sees. Keys in label order keep their token order inside
// a label, so a query sees a prefix of each label, and the causal test compares with a count.
struct Visible {
    int negatives;
    int positives;

    __device__ __forceinline__ int of(int label) const { return label ? positives : negatives; }
};

// Keys visible to the token at `position` in the sequence.
__device__ __forceinline__ Visible visible_keys(const AttentionParams& p, const Item& item, unsigned position) {
    if (!p.causal) return Visible{int(item.negatives), int(item.length - item.negatives)};
    const unsigned positives = load_feedback(p, item.start + position).positives;
    return Visible{int(position + 1 - positives), int(positives)};
}

// Token at `index` in label order.
__device__ __forceinline__ unsigned token_at(const AttentionParams& p, const Item& item, unsigned index) {
    const unsigned at = item.start + index;
    return p.order == nullptr ? at : p.order[at];
}

// Whether the values of key head `head` are kept for keys of `label`.
__device__ __forceinline__ bool is_kept(const AttentionParams& p, unsigned head, unsigned label) {
    return p.group == 0 || (head >= p.group) == (label != 0);
}

// Query head of a slot of a token with this label. Query rows are (token, slot) pairs in order.
__device__ __forceinline__ unsigned query_head(const AttentionParams& p, unsigned slot, unsigned label) {
    return slot + label * p.group;
}
