// Factorization-heads attention (FHA), forward and backward: short sequences stay whole in shared
// memory, long ones are streamed. Deterministic, without atomics.
//
// MATHEMATICS. A query row is a pair (token i, slot a): the token's a-th active query head, which
// with labels is head a + label[i] * H/2. A row attends to every key head b of every visible token
// j of its sequence, in one softmax:
//
//     s = scale <q, k[j, b]>     lse = log sum_{j, b} e^s     p = e^(s - lse)
//     o[b] = sum_{j kept} p v[j, b]
//
// A pair is kept if key head b belongs to label[j]. With Masked, the others do not enter lse
// either. Backward:
//
//     dp = <do[b], v[j, b]> where kept, else 0     delta = sum_b <do[b], o[b]>
//     ds = p (dp - delta)     dq = scale sum_{j, b} ds k     dk = scale sum ds q
//     dv = sum_{kept} p do
//
// TILING. Queries stay in token order. A warp owns 16 rows (query rows or keys) at a time. Whole:
// shared memory holds all keys of a sequence in token order, with zeros for values that are not
// kept; a query sees a prefix of them. Streamed: keys are visited head by head and, inside a head,
// in label order (`order`). A tile is then kept or not as a whole, without a test per element: V is
// neither loaded nor multiplied where it is not kept, and a query sees a prefix of each label. The
// causal test is a comparison with a count, and only diagonal tiles need it. Up to 4 warps share
// streamed tiles, double-buffered by cp.async. Blocks take the longest items first.
//
// TRAFFIC. No tensor has size T^2. All global accesses to tensors are 16 bytes wide. Whole: each
// tensor is read or written once. Streamed: forward reads k and v once per block of query rows of
// their sequence (from L2 after the first). Backward has two passes, dq over query rows and dk_dv
// over keys; each streams the other side.
//
// NON-FINITE VALUES. A pair behind the diagonal has weight 0, but 0 times NaN is NaN: a NaN would
// reach rows of its 16 by 16 tile that do not see it. Each kernel checks its outputs at the end. If
// one is non-finite, the warp or block repeats its work in CAREFUL mode: it takes the chunks of a
// tile one by one, and leaves non-finite rows out of the products for rows that do not see them.
// All other rows keep their bits.
//
//     attention/rows.cuh            rows, heads and tiles, shared by all passes
//     attention/whole.cuh           a sequence in shared memory
//     attention/forward_tile.cuh    a tile of keys in forward, and the outputs of key heads
//     attention/forward_short.cuh   o and lse of sequences whose scores fit registers
//     attention/forward_whole.cuh   o and lse of the others whose keys and values fit shared memory
//     attention/forward.cuh         o and lse of streamed sequences
//     attention/backward_whole.cuh  dq, dk and dv of sequences that fit shared memory
//     attention/backward.cuh        dq, then dk and dv, of streamed sequences
#include "attention/backward.cuh"
#include "attention/backward_whole.cuh"
#include "attention/forward.cuh"
#include "attention/forward_short.cuh"
#include "attention/forward_whole.cuh"

// A module is compiled for one element type and width: -DDFAR_ELEMENT=bf16 -DDFAR_HEAD_DIM=16.
using E = DFAR_ELEMENT;
constexpr int D = DFAR_HEAD_DIM;

KERNEL(attention_forward_short, AttentionParams, THREADS, SHORT_BLOCKS<E, D>) {
    if constexpr (SHORT<E, D>) {
        if (p.key_slots > 2) forward_short<E, D, 4, 2>(p);
        else if (p.capacity > 32) forward_short<E, D, 2, 4>(p);
        else forward_short<E, D, 2, 2>(p);
    }
}
KERNEL(attention_forward_whole, AttentionParams, THREADS, WHOLE_FORWARD_BLOCKS<E, D>) { forward_whole<E, D>(p); }
KERNEL(attention_forward, AttentionParams, THREADS, FORWARD_BLOCKS<E, D>) {
    if (forward<E, D, false>(p)) forward_carefully<E, D>(p);
}
KERNEL(attention_backward_whole, AttentionParams, THREADS, WHOLE_BLOCKS<E, D>) {
    if constexpr (D < 128) backward_whole<E, D, true>(p);  // wider heads would spill registers
}
KERNEL(attention_dq_whole, AttentionParams, THREADS, WHOLE_DQ_BLOCKS<E, D>) {
    if constexpr (D < 128) dq_whole<E, D>(p);
}
KERNEL(attention_dk_dv_whole, AttentionParams, THREADS, WHOLE_DK_DV_BLOCKS<E, D>) {
    if constexpr (D < 128) backward_whole<E, D, false>(p);
}
KERNEL(attention_dq, AttentionParams, THREADS, DQ_BLOCKS<E, D>) {
    if (dq<E, D, false>(p)) dq_carefully<E, D>(p);
}
KERNEL(attention_dk_dv, AttentionParams, THREADS, DK_DV_BLOCKS<E, D>) {
    if (dk_dv<E, D, false>(p)) dk_dv_carefully<E, D>(p);
}
