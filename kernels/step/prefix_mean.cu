// Means of prefixes of packed sequences, and their gradient.
//
// MATHEMATICS. Group g of sequence b averages the first count[g] tokens of b; counts ascend inside
// a sequence:
//
//     mean[g] = sum of x[start[b]..start[b] + count[g]] / divisor[g]     (0 if the divisor is 0)
//     dx[start[b] + t] = sum over the groups with count[g] > t of dmean[g] / divisor[g]
//
// With a rate, rows are weighed by age, where position[row] is the place of a row in the history,
// whose length L is the divisor, and w(age) = exp(-rate age):
//
//     mean[g] = sum of w(L - 1 - position) x / (w(0) + .. + w(L - 1))
//
// A running sum is relative to its newest row: it is multiplied by w(gap) before the next is added.
//
// TILING. A block takes a sequence and a chunk of columns (block_y). Each group of lanes takes a
// run of tokens and sums it. It reads the sums of the runs before it (backward: behind it) from
// shared memory, and loops over its run again to write the prefixes that end in it. Sums are f64,
// because a prefix may be as long as a history.
//
// TRAFFIC. x is read twice, the second time from L1 or L2, and mean is written once. Backward reads
// dmean twice and writes dx once.
#include "row_group.cuh"

constexpr int THREADS = 256;

struct PrefixMeanParams {
    const unsigned* start;          // [sequences + 1] first token of each sequence
    const unsigned* group_offsets;  // [sequences + 1] first group of each sequence
    const unsigned* count;          // [groups]
    const unsigned* divisor;        // [groups]
    float* x;                       // [tokens, width]; backward: dx
    float* mean;                    // [groups, width]; backward: dmean
    const unsigned* position;       // [tokens]; not read without a rate
    double rate;                    // ln 2 / half-life, or 0
    unsigned width;
    unsigned bits;
};
static_assert(sizeof(PrefixMeanParams) == 72, "mirrored by src/device/cuda/ops/prefix_mean.rs");

// The sequence of the block, and the run of tokens of this group of lanes.
struct Run {
    unsigned first_token, tokens;  // of the sequence
    unsigned first_group, end_group;
    unsigned length;               // of every run but the last that is not empty
    unsigned begin, end;           // of the run, as places in the sequence
    __device__ __forceinline__ Run(const PrefixMeanParams& p, const RowGroup& group) {
        const unsigned b = blockIdx.x;
        first_token = p.start[b];
        tokens = p.start[b + 1] - first_token;
        first_group = p.group_offsets[b];
        end_group = p.group_offsets[b + 1];
        length = (tokens + group.count() - 1) / group.count();
        begin = group.index * length < tokens ? group.index * length : tokens;
        end = begin + length < tokens ? begin + length : tokens;
    }
    // Weight of token `older` relative to `newer`, both of the sequence, older <= newer.
    __device__ __forceinline__ double weight(const PrefixMeanParams& p, unsigned older, unsigned newer) const {
        if (p.rate == 0.0) return 1.0;
        return exp(-p.rate * double(p.position[first_token + newer] - p.position[first_token + older]));
    }
    // The factor of the sum of group g, whose newest token is count[g] - 1.
    __device__ __forceinline__ double factor(const PrefixMeanParams& p, unsigned g) const {
        const double length = p.divisor[g];
        if (length == 0.0) return 0.0;
        if (p.rate == 0.0) return 1.0 / length;
        if (p.count[g] == 0) return 0.0;
        const double age = length - 1.0 - double(p.position[first_token + p.count[g] - 1]);
        // Divided by the geometric series 1 + w + .. + w^(L - 1).
        return exp(-p.rate * age) * expm1(-p.rate) / expm1(-p.rate * length);
    }
    // The first group with more than `tokens` tokens.
    __device__ __forceinline__ unsigned first_longer(const PrefixMeanParams& p, unsigned tokens) const {
        unsigned low = first_group, high = end_group;
        while (low < high) {
            const unsigned middle = (low + high) / 2;
            if (p.count[middle] <= tokens) low = middle + 1;
            else high = middle;
        }
        return low;
    }
};

template <int V> __device__ __forceinline__ void forward(const PrefixMeanParams& p, unsigned block_y) {
    const RowGroup group(p.bits);
    const Run run(p, group);
    const unsigned c = (block_y << p.bits) * V + group.lane * V;
    const bool valid = c < p.width;
    double* sums = reinterpret_cast<double*>(shared_memory());
    double sum[V] = {};
    const float* x = p.x + size_t(run.first_token) * p.width + c;
    if (valid) {
#pragma unroll 4
        for (unsigned t = run.begin; t < run.end; ++t) {
            float value[V];
            load<V>(value, x + size_t(t) * p.width);
            const double kept = t > run.begin ? run.weight(p, t - 1, t) : 1.0;
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] = sum[v] * kept + value[v];
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sums[threadIdx.x * V + v] = sum[v];
    __syncthreads();
    if (!valid) return;
    const unsigned lanes = 1u << p.bits;
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = 0.0;
    for (unsigned before = 0; before < group.index && run.begin < run.end; ++before) {
        const double kept = run.weight(p, (before + 1) * run.length - 1, run.begin - 1);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += kept * sums[(before * lanes + group.lane) * V + v];
    }
    const auto write = [&](unsigned g) {
        const double factor = run.factor(p, g);
        float mean[V];
#pragma unroll
        for (int v = 0; v < V; ++v) mean[v] = float(sum[v] * factor);
        store<V>(p.mean + size_t(g) * p.width + c, mean);
    };
    // The first run, which may be empty, writes the empty groups; others are written by the run of
    // their last token.
    unsigned g = run.first_group;
    if (group.index == 0) {
        for (; g < run.end_group && p.count[g] == 0; ++g) write(g);
    }
    if (run.begin == run.end) return;
    g = run.first_longer(p, run.begin);
    for (unsigned t = run.begin; t < run.end && g < run.end_group; ++t) {
        float value[V];
        load<V>(value, x + size_t(t) * p.width);
        const double kept = t > 0 ? run.weight(p, t - 1, t) : 1.0;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] = sum[v] * kept + value[v];
        for (; g < run.end_group && p.count[g] == t + 1; ++g) write(g);
    }
}
KERNEL_FOR_BOTH(prefix_mean_forward, PrefixMeanParams, THREADS) { WITH_VECTORS_AND_Y(p.width, forward); }

template <int V> __device__ __forceinline__ void backward(const PrefixMeanParams& p, unsigned block_y) {
    const RowGroup group(p.bits);
    const Run run(p, group);
    const unsigned c = (block_y << p.bits) * V + group.lane * V;
    const bool valid = c < p.width;
    double* sums = reinterpret_cast<double*>(shared_memory());
    double sum[V] = {};
    // Adds the gradient of group g to a sum that is relative to token `newest`, at most count[g] - 1.
    const auto take = [&](unsigned g, unsigned newest) {
        const double factor = run.factor(p, g) * run.weight(p, newest, p.count[g] - 1);
        float value[V];
        load<V>(value, p.mean + size_t(g) * p.width + c);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += value[v] * factor;
    };
    // The groups whose last token is in the run: more than `begin` and at most `end` tokens.
    const unsigned first = run.first_longer(p, run.begin), last = run.first_longer(p, run.end);
    if (valid && run.begin < run.end) {
        for (unsigned g = first; g < last; ++g) take(g, run.begin);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sums[threadIdx.x * V + v] = sum[v];
    __syncthreads();
    if (!valid || run.begin == run.end) return;
    const unsigned lanes = 1u << p.bits;
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = 0.0;
    // The sum of a run is relative to its first token; empty runs are behind all others.
    for (unsigned behind = group.count() - 1; behind > group.index; --behind) {
        if (behind * run.length >= run.tokens) continue;
        const double kept = run.weight(p, run.end - 1, behind * run.length);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += kept * sums[(behind * lanes + group.lane) * V + v];
    }
    unsigned g = last;
    for (unsigned t = run.end; t-- > run.begin;) {
        const double kept = t + 1 < run.end ? run.weight(p, t, t + 1) : 1.0;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] *= kept;
        for (; g > first && p.count[g - 1] > t; --g) take(g - 1, t);
        float dx[V];
#pragma unroll
        for (int v = 0; v < V; ++v) dx[v] = float(sum[v]);
        store<V>(p.x + (size_t(run.first_token) + t) * p.width + c, dx);
    }
}
KERNEL_FOR_BOTH(prefix_mean_backward, PrefixMeanParams, THREADS) { WITH_VECTORS_AND_Y(p.width, backward); }
