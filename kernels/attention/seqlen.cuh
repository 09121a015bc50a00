// The work item of a block, read once, and the arithmetic of packed sequences.
#pragma once
#include "attention/params.cuh"

// A piece of one sequence. The host lists the pieces, longest first.
struct Item {
    unsigned start;      // first token of the sequence: cu_seqlens[b]
    unsigned length;     // tokens of the sequence
    unsigned negatives;  // tokens of label 0; all tokens where there are no labels
    unsigned first;      // forward, dq: first query row; dk_dv: first key, counted in label order; whole: 0
};
static_assert(sizeof(Item) == 16, "Item is mirrored by src/device/cuda/params.rs");

// An item, in one 16-byte load.
__device__ __forceinline__ Item load_item(const AttentionParams& p, unsigned index) {
    const uint4 raw = static_cast<const uint4*>(p.items)[index];
    return Item{raw.x, raw.y, raw.z, raw.w};
}

// Feedback of one token.
struct Feedback {
    unsigned label;      // 0 or 1
    unsigned positives;  // tokens of label 1 up to and with this one
};

__device__ __forceinline__ Feedback load_feedback(const AttentionParams& p, unsigned token) {
    if (p.feedback == nullptr) return Feedback{0, 0};
    const unsigned raw = p.feedback[token];
    return Feedback{raw & 1, raw >> 1};
}

// Number of keys of each label that a query sees. Keys are visited in label order and keep their
// original order inside a label, so a query sees a prefix of each label: the causal test is a
// comparison with a count.
struct Visible {
    int negatives;
    int positives;

    __device__ __forceinline__ int of(int label) const { return label ? positives : negatives; }
};

// Keys visible to token `position` of the item's sequence.
__device__ __forceinline__ Visible visible_keys(const AttentionParams& p, const Item& item, unsigned position) {
    if (!p.causal) return Visible{int(item.negatives), int(item.length - item.negatives)};
    const unsigned positives = load_feedback(p, item.start + position).positives;
    return Visible{int(position + 1 - positives), int(positives)};
}

// The `index`-th token in label order.
__device__ __forceinline__ unsigned token_at(const AttentionParams& p, const Item& item, unsigned index) {
    const unsigned at = item.start + index;
    return p.order == nullptr ? at : p.order[at];
}

// Whether the values of key head `head` are kept for keys of `label`.
__device__ __forceinline__ bool is_kept(const AttentionParams& p, unsigned head, unsigned label) {
    return p.group == 0 || (head >= p.group) == (label != 0);
}

// The head of a query row's slot, given its token's label. Query rows are (token, slot) pairs in
// order.
__device__ __forceinline__ unsigned query_head(const AttentionParams& p, unsigned slot, unsigned label) {
    return slot + label * p.group;
}
