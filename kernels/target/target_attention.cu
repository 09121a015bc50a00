// Target attention (docs/mathematics.md, section 2): an MLP 4D -> H0 -> H1 -> 1 scores
// (history token, candidate) pairs; a softmax over each row's history weighs its tokens.
//
// MATHEMATICS. With the blocks A, R, S, P of the first layer's weight,
//
//     [a, r, a - r, a * r] w0 + b0 = z + c + (a * r) P      z = a (A + S)      c = r (R - S) + b0
//
// z (one row per token) and c (one row per candidate) are plain matrix products, so a score costs D
// H0 + H0 H1 multiply-adds.
//
// TILING. An item is 16 tokens by up to 32 pairs; tokens are the rows of mma.m16n8k16. An item
// loads a and z once, and r and c once per pair. A block loads the weights once and takes items in
// turn.
//
// TRAFFIC. The activations between a, z, r, c and e never reach global memory. Backward recomputes
// them and writes, in f32, H0 + D sums per 16 scores and 16 (H0 + D) per item.
//
// Compiled for DFAR_ELEMENT (float, bf16), DFAR_WIDTH, DFAR_HIDDEN0, DFAR_HIDDEN1: padded sizes.
// All values in global memory are f32; products are computed in the element type.
#include "target/backward.cuh"
#include "target/sums.cuh"

// Writes token, candidate, bias.
KERNEL_FOR_BOTH(target_combine, CombineParams, SUM_THREADS) { combine(p); }

// ----------------------------------------------------------------------------------------- forward

// Writes e.
KERNEL(target_scores, MlpParams, THREADS, 2) { scores(p); }
// Writes att and lse from s and e.
KERNEL_FOR_BOTH(target_softmax, SoftmaxParams, ROW_THREADS) { softmax(p); }

// ---------------------------------------------------------------------------------------- backward

// Writes de, adds to ds.
KERNEL(target_softmax_backward, SoftmaxParams, ROW_THREADS) { softmax_backward(p); }
// Writes token_sums, pair_sums, weight_sums.
KERNEL(target_backward, MlpParams, THREADS, 2) { mlp_backward(p); }
// Write dZ and part of da from token_sums; dc and part of dr from pair_sums.
KERNEL_FOR_BOTH(target_sum_tokens, SumParams, SUM_THREADS) { sum_tokens(p); }
KERNEL_FOR_BOTH(target_sum_pairs, SumParams, SUM_THREADS) { sum_pairs(p); }
// Writes the gradients of all weights.
KERNEL_FOR_BOTH(target_gradients, GradientParams, SUM_THREADS) { gradients(p, block_y); }
