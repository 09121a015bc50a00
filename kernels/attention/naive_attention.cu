// Unfused FHA, for benchmarks: the kernels between the matrix products. All scores are in memory.
//
// MATHEMATICS. As attention/attention.cu, in f32, for N tokens in sequences of one length T.
// Tensors are head-major, [heads, N, d], so that one strided batch of products computes the scores
// of a (query slot a, key head b) pair: s[a, b] = q[a] k[b]^T, [T, T] per sequence. softmax turns
// scores into kept probabilities, 0 where V is not read; softmax_backward turns scores and dp = do
// v^T into kept probabilities and ds.
//
// TILING. A warp takes a row of scores; a thread copies one value.
//
// TRAFFIC. softmax reads the scores three times and writes them once; softmax_backward reads scores
// and dp twice and writes both once. The invisible half of a causal [T, T] is written as zeros,
// because the products read it.
#include "online_softmax.cuh"

struct HeadsParams {
    const float* x;
    float* y;
    const unsigned char* label;  // [N]; null: slot s is head s
    unsigned tokens;             // N
    unsigned heads;              // of the token-major side, [N, heads, d]
    unsigned slots;              // of the head-major side, [slots, N, d]
    unsigned group;              // slot s of a token is head s + group * label
    unsigned width;              // d
    unsigned unused;
};
static_assert(sizeof(HeadsParams) == 48, "mirrored by src/device/cuda/ops/naive_attention.rs");

__device__ __forceinline__ unsigned first_head(const HeadsParams& p, size_t token) {
    return p.label ? p.group * p.label[token] : 0;
}

// Converts x: [N, heads, d] to y: [slots, N, d].
KERNEL(naive_split_heads, HeadsParams, 256) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = i / p.width, token = row % p.tokens, slot = row / p.tokens;
    if (slot >= p.slots) return;
    const size_t head = slot + first_head(p, token);
    p.y[i] = p.x[(token * p.heads + head) * p.width + i % p.width];
}

// Converts x: [slots, N, d] to y: [N, heads, d], with zeros in heads without a slot of their token.
KERNEL(naive_merge_heads, HeadsParams, 256) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = i / p.width, token = row / p.heads, head = row % p.heads;
    if (token >= p.tokens) return;
    const size_t first = first_head(p, token);
    const bool active = head >= first && head < first + p.slots;
    p.y[i] = active ? p.x[((head - first) * p.tokens + token) * p.width + i % p.width] : 0.0f;
}

struct SoftmaxParams {
    float* scores;               // [slots, keys, sequences, T, T]; becomes the kept probabilities
    float* d_scores;             // the same shape; backward: dp, becomes ds
    float* lse;                  // [N, slots]: written by forward, read by backward
    const unsigned char* label;  // [N]; null: every pair is kept
    unsigned sequences;
    unsigned length;             // T
    unsigned slots;
    unsigned keys;               // key heads
    unsigned group;              // key heads from this one on belong to label 1
    unsigned causal;
    unsigned masked;             // 1: only kept pairs enter the denominator
    float scale;
};
static_assert(sizeof(SoftmaxParams) == 64, "mirrored by src/device/cuda/ops/naive_attention.rs");

// A warp's row of scores: one slot of one query token.
struct ScoreRow {
    unsigned token, slot, start;  // start: first token of the sequence
    unsigned query;               // position in the sequence
    bool exists;
    __device__ __forceinline__ explicit ScoreRow(const SoftmaxParams& p) {
        const unsigned row = blockIdx.x * (blockDim.x / 32) + warp_index();
        const unsigned tokens = p.sequences * p.length;
        exists = row < tokens * p.slots;
        token = row % tokens, slot = row / tokens;
        query = token % p.length, start = token - query;
    }
    __device__ __forceinline__ size_t at(const SoftmaxParams& p, unsigned key_head) const {
        return (size_t(slot * p.keys + key_head) * p.sequences * p.length + token) * p.length;
    }
    __device__ __forceinline__ bool visible(const SoftmaxParams& p, unsigned key) const { return !p.causal || key <= query; }
    __device__ __forceinline__ bool kept(const SoftmaxParams& p, unsigned key_head, unsigned key) const {
        return !p.label || (key_head >= p.group) == (p.label[start + key] != 0);
    }
};

KERNEL(naive_softmax, SoftmaxParams, 256) {
    const ScoreRow row(p);
    if (!row.exists) return;
    const float scale = p.scale * LOG2_E;
    float peak = -INF, sum = 0.0f;
    for (unsigned b = 0; b < p.keys; ++b)
        for (unsigned j = lane_index(); j < p.length; j += 32)
            if (row.visible(p, j) && (!p.masked || row.kept(p, b, j))) peak = largest(peak, scale * p.scores[row.at(p, b) + j]);
    peak = warp_largest(peak);
    // With an empty denominator all probabilities are 0, and lse is -inf.
    const float shift = peak == -INF ? 0.0f : peak;
    for (unsigned b = 0; b < p.keys; ++b)
        for (unsigned j = lane_index(); j < p.length; j += 32)
            if (row.visible(p, j) && (!p.masked || row.kept(p, b, j))) sum += exp2_fast(scale * p.scores[row.at(p, b) + j] - shift);
    sum = warp_sum(sum);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (unsigned b = 0; b < p.keys; ++b)
        for (unsigned j = lane_index(); j < p.length; j += 32) {
            float& score = p.scores[row.at(p, b) + j];
            score = row.visible(p, j) && row.kept(p, b, j) ? exp2_fast(scale * score - shift) * inverse : 0.0f;
        }
    if (lane_index() == 0) p.lse[row.token * p.slots + row.slot] = sum > 0.0f ? (shift + log2_fast(sum)) * LN_2 : -INF;
}

KERNEL(naive_softmax_backward, SoftmaxParams, 256) {
    const ScoreRow row(p);
    if (!row.exists) return;
    const float scale = p.scale * LOG2_E, lse = p.lse[row.token * p.slots + row.slot] * LOG2_E;
    float delta = 0.0f;
    for (unsigned b = 0; b < p.keys; ++b)
        for (unsigned j = lane_index(); j < p.length; j += 32)
            if (row.visible(p, j) && row.kept(p, b, j))
                delta += exp2_fast(scale * p.scores[row.at(p, b) + j] - lse) * p.d_scores[row.at(p, b) + j];
    delta = warp_sum(delta);
    for (unsigned b = 0; b < p.keys; ++b)
        for (unsigned j = lane_index(); j < p.length; j += 32) {
            float& score = p.scores[row.at(p, b) + j];
            float& gradient = p.d_scores[row.at(p, b) + j];
            const bool kept = row.kept(p, b, j), counts = row.visible(p, j) && (kept || !p.masked);
            const float x = counts ? exp2_fast(scale * score - lse) : 0.0f;
            gradient = p.scale * x * ((kept ? gradient : 0.0f) - delta);
            score = kept ? x : 0.0f;
        }
}
