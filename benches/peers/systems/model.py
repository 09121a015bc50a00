"""The networks and their loss, with the parameters of dfar's files.

A history is encoded once for all its prefixes and candidates. Padding needs no mask: it follows every
event, and encoders look back only.
"""

import torch
import torch.nn.functional as F

from .gru import Gru, equations


def linear(p, name, x):
    flat = torch.addmm(p[name + ".b"], x.reshape(-1, x.shape[-1]), p[name + ".w"])
    return flat.view(*x.shape[:-1], -1)


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[name + ".gamma"], p[name + ".beta"], 1e-8)


def sasrec(p, rows, b, form):
    """-> [B * T, D]: the mean of each prefix, and where the groups' are"""
    (B, T), D = b.items.shape, rows.shape[1]
    s = F.embedding(b.items, rows) + p["position"][:T]
    u = norm(p, "encoder.ln_in", s)
    heads = lambda x: x.view(B, T, form.heads, -1).transpose(1, 2)
    q, k, v = (heads(linear(p, "encoder." + n, x)) for n, x in (("q", u), ("k", s), ("v", s)))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
    n = norm(p, "encoder.ln_ffn", linear(p, "encoder.o", o) + u)
    hidden = form.relu(linear(p, "encoder.ffn1", n))
    seq = norm(p, "encoder.ln_out", linear(p, "encoder.ffn2", hidden) + n)
    return (b.mean @ seq).view(B * T, D), b.last


def gru4rec(p, rows, b, form):
    """-> [T * B, D]: the states, and where the groups' are"""
    (B, T), D = b.items.shape, rows.shape[1]
    s = F.embedding(b.items_by_time, rows)
    if form.cell == "library":
        weights = [p[f"gru.{n}"] for n in ("weight_ih", "weight_hh", "bias_ih")]
        weights.append(torch.zeros_like(weights[2]))
        states, _ = torch.gru(
            s, s.new_zeros(1, B, D), weights, True, 1, 0.0, True, False, False
        )
    else:
        x = torch.addmm(p["gru.b"], s.view(-1, D), p["gru.w"]).view(T, B, 3 * D)
        states = (equations if form.cell == "equations" else Gru.apply)(x, p["gru.u"])
    return states.reshape(T * B, D), b.last_by_time


SYSTEMS = {"sasrec": sasrec, "gru4rec": gru4rec}


def tower(p, rows, b, g, form):
    """rows: [U, D]; g: [G, D] -> logits [G, C]"""
    (G, C), D = b.candidate.shape, rows.shape[1]
    w, bias = p["tower.0.w"], p["tower.0.b"]
    if form.split_tower:
        # [e, g] W = e W_e + g W_g: the first once for each candidate of a history, the second for
        # each prefix.
        of_pair = F.embedding(b.pair, rows) @ w[:D]
        h = F.embedding(b.candidate, of_pair) + torch.addmm(bias, g, w[D:])[:, None]
    else:
        e = F.embedding(b.candidate_item, rows)
        x = torch.cat([e, g[:, None].expand_as(e)], -1)
        h = torch.addmm(bias, x.view(G * C, -1), w)
    h = form.relu(linear(p, "tower.1", form.relu(h.reshape(G * C, -1))))
    return linear(p, "tower.2", h).view(G, C)


def loss(p, rows, b, form):
    """p: parameters but for `item`; rows: its touched rows -> total, BCE, L2"""
    vectors, last = SYSTEMS[form.system](p, rows, b, form)
    logits = tower(p, rows, b, F.embedding(last, vectors) * b.seen, form)
    bce = F.binary_cross_entropy_with_logits(logits, b.target)
    l2 = rows.square().sum()
    if "position" in p:
        l2 = l2 + p["position"][: b.items.shape[1]].square().sum()
    l2 = 0.5 * l2
    return bce + form.embed_l2 * l2, bce, l2
