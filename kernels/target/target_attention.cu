// Target attention: a perceptron 4D -> H0 -> H1 -> 1 scores (history token, candidate) pairs, a softmax over each row's history
// weighs its tokens. docs/mathematics.md, section 3.
//
// MATHEMATICS. With the blocks A, R, S, P of the first layer's weight,
//
//     [a, r, a - r, a * r] w0 + b0 = z + c + (a * r) P      z = a (A + S)      c = r (R - S) + b0
//
// so that z and c, one a token and one a candidate, come from two plain products, and a pair costs D H0 + H0 H1 multiply-adds.
//
// TILING. An item is 16 tokens by some pairs: tokens are the rows of mma.m16n8k16. What the tokens have (a, z) is loaded once
// an item, what a pair has (r, c) once sixteen tokens, the weights once a block, which takes items until there are no more.
//
// TRAFFIC. Of everything between a, z, r, c and e nothing is ever in global memory. Backward computes it again, and leaves, in
// f32, H0 + D sums every 16 scores and 16 (H0 + D) an item.
//
// Compiled for DFAR_ELEMENT (float, bf16), DFAR_WIDTH, DFAR_HIDDEN0, DFAR_HIDDEN1: padded sizes. All values in global memory
// are f32; the element is what products are computed in.
#include "target/backward.cuh"
#include "target/sums.cuh"

// Writes token, candidate, bias.
KERNEL(target_combine, CombineParams, SUM_THREADS) { combine(p); }

// ------------------------------------------------------------------------------------------------------------- forward

// Writes e.
KERNEL(target_scores, PerceptronParams, THREADS, 2) { scores(p); }
// Writes att and lse from s and e.
KERNEL(target_softmax, SoftmaxParams, ROW_THREADS) { softmax(p); }

// ------------------------------------------------------------------------------------------------------------ backward

// Writes de, adds to ds.
KERNEL(target_softmax_backward, SoftmaxParams, ROW_THREADS) { softmax_backward(p); }
// Writes token_sums, pair_sums, weight_sums.
KERNEL(target_backward, PerceptronParams, THREADS, 2) { perceptron_backward(p); }
// Write dZ and the first part of da from token_sums, dc and that of dr from pair_sums.
KERNEL(target_sum_tokens, SumParams, SUM_THREADS) { sum_tokens(p); }
KERNEL(target_sum_pairs, SumParams, SUM_THREADS) { sum_pairs(p); }
// Writes the gradients of all weights.
KERNEL(target_gradients, GradientParams, SUM_THREADS) { gradients(p); }
