// Target attention: a perceptron 4D -> H0 -> H1 -> 1 scores (history token, candidate) pairs; a
// softmax over each row's history weighs its tokens. docs/mathematics.md, section 3.
//
// MATHEMATICS. With the blocks A, R, S, P of the first layer's weight,
//
//     [a, r, a - r, a * r] w0 + b0 = z + c + (a * r) P      z = a (A + S)      c = r (R - S) + b0
//
// so that z (one row per token) and c (one row per candidate) are plain matrix products, and a
// score costs D H0 + H0 H1 multiply-adds.
//
// TILING. An item is 16 tokens by up to 32 pairs: tokens are the rows of mma.m16n8k16. a and z are
// loaded once per item, r and c of a pair once per 16 tokens, the weights once per block, which
// takes items until none is left.
//
// TRAFFIC. No activation between a, z, r, c and e is ever in global memory. Backward recomputes
// them, and writes, in f32, H0 + D sums per 16 scores and 16 (H0 + D) per item.
//
// Compiled for DFAR_ELEMENT (float, bf16), DFAR_WIDTH, DFAR_HIDDEN0, DFAR_HIDDEN1: padded sizes.
// All values in global memory are f32; products are computed in the element type.
#include "target/backward.cuh"
#include "target/sums.cuh"

// Writes token, candidate, bias.
KERNEL(target_combine, CombineParams, SUM_THREADS) { combine(p); }

// ----------------------------------------------------------------------------------------- forward

// Writes e.
KERNEL(target_scores, PerceptronParams, THREADS, 2) { scores(p); }
// Writes att and lse from s and e.
KERNEL(target_softmax, SoftmaxParams, ROW_THREADS) { softmax(p); }

// ---------------------------------------------------------------------------------------- backward

// Writes de, adds to ds.
KERNEL(target_softmax_backward, SoftmaxParams, ROW_THREADS) { softmax_backward(p); }
// Writes token_sums, pair_sums, weight_sums.
KERNEL(target_backward, PerceptronParams, THREADS, 2) { perceptron_backward(p); }
// Write dZ and the first part of da from token_sums, dc and that of dr from pair_sums.
KERNEL(target_sum_tokens, SumParams, SUM_THREADS) { sum_tokens(p); }
KERNEL(target_sum_pairs, SumParams, SUM_THREADS) { sum_pairs(p); }
// Writes the gradients of all weights.
KERNEL(target_gradients, GradientParams, SUM_THREADS) { gradients(p); }
