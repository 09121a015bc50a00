"""The network and its loss on dense tensors and right-padded histories, for groups of any size.

A batch has B histories of T positions with C candidates each. C = 1 is the layout of the published
code: every candidate has its own copy of the history. With C = 10 and a tenth of the histories, ten
candidates share a history. Padding needs no mask in causal attention (it follows every real token);
sums over tokens exclude it.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.w, self.b = nn.Parameter(nn.init.xavier_uniform_(torch.empty(i, o))), nn.Parameter(torch.zeros(o))

    def forward(self, x):
        return x @ self.w + self.b


class Norm(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta, eps=1e-8)


class Mlp(nn.ModuleList):
    def __init__(self, i, sizes):
        super().__init__(Linear(a, b) for a, b in zip((i, *sizes), (*sizes, 1)))

    def forward(self, x):
        for i, layer in enumerate(self):
            x = layer(torch.relu(x) if i else x)
        return x.squeeze(-1)


def fha(q, k, v, visible, serves, normalization):
    """Factorization-heads attention, all pairs of heads. q, k, v: [B, T, H, d];
    visible: [B or 1, T, T]; serves: [B, T, H], the heads that serve each token, or None without the
    label mask. -> [B, T, H, H, d]"""
    s = torch.einsum("biad,bjcd->baicj", q, k).float() if q.dtype == torch.bfloat16 else torch.einsum("biad,bjcd->baicj", q, k)
    s = s * q.shape[-1] ** -0.5
    inside = visible[:, None, :, None, :]
    if serves is not None and normalization == "masked":
        inside = inside & serves.transpose(1, 2)[:, None, None]
    s = s.masked_fill(~inside, torch.finfo(s.dtype).min)
    p = s.flatten(3).softmax(3).unflatten(3, s.shape[3:])
    if serves is not None:
        p = p * serves.transpose(1, 2)[:, None, None] * serves.transpose(1, 2)[:, :, :, None, None]
    return torch.einsum("baicj,bjcd->biacd", p.to(v.dtype), v)


class Block(nn.Module):
    def __init__(self, D, H):
        super().__init__()
        self.H = H
        self.ln_in, self.ln_ffn, self.ln_out = Norm(D), Norm(D), Norm(D)
        self.q, self.k, self.v = Linear(D, D), Linear(D, D), Linear(D, D)
        self.o, self.ffn1, self.ffn2 = Linear(H * D, D), Linear(D, D), Linear(D, D)

    def forward(self, s, visible, serves, normalization):
        u = self.ln_in(s)
        q, k, v = (f(x).unflatten(2, (self.H, -1)) for f, x in ((self.q, u), (self.k, s), (self.v, s)))
        n = self.ln_ffn(self.o(fha(q, k, v, visible, serves, normalization).flatten(2)) + u)
        return self.ln_out(self.ffn2(torch.relu(self.ffn1(n))) + n)


class Target(nn.Module):
    def __init__(self, D, sizes):
        super().__init__()
        self.w, self.mlp = nn.Parameter(nn.init.xavier_uniform_(torch.empty(D, D))), Mlp(4 * D, sizes)

    def forward(self, s, r, valid):
        """s: [B, T, D], r: [B, C, D] -> [B, C, D]"""
        a, r = torch.broadcast_tensors((s @ self.w)[:, None], r[:, :, None])
        e = self.mlp(torch.cat([a, r, a - r, a * r], -1))
        e = e.masked_fill(~valid[:, None], torch.finfo(e.dtype).min).softmax(-1)
        return e.to(s.dtype) @ s


def cosine(x, y):
    nx, ny = (x * x).sum(-1), (y * y).sum(-1)
    ok = (nx >= 1e-12) & (ny >= 1e-12)
    safe = lambda n: torch.where(ok, n, 1.0)
    return torch.where(ok, (x * y).sum(-1) / (safe(nx) * safe(ny)).sqrt(), 0.0)


class Dfar(nn.Module):
    def __init__(self, items, max_length, D, H, normalization="joint", attention=(80, 40), tower=(100, 64)):
        super().__init__()
        table = lambda n: nn.Parameter(nn.init.trunc_normal_(torch.empty(n, D), std=0.01))
        self.item, self.position, self.label = table(items), table(max_length), table(2)
        self.encoder, self.positive, self.negative = (Block(D, H) for _ in range(3))
        self.target_positive, self.target_negative = Target(D, attention), Target(D, attention)
        self.tower_positive, self.tower_negative = Mlp(4 * D, tower), Mlp(4 * D, tower)
        self.H, self.normalization = H, normalization

    def forward(self, items, labels, lengths, candidates):
        """items, labels: [B, T]; lengths: [B]; candidates: [B, C]
        -> logits (pos, neg) [B, C], means (all, pos, neg) [B, D], att (pos, neg) [B, C, D]"""
        T, device = items.shape[1], items.device
        valid = torch.arange(T, device=device) < lengths[:, None]
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()[None]
        s = self.item[items] + self.position[:T] + self.label[labels]
        serves = (torch.arange(self.H, device=device) >= self.H // 2) == (labels[:, :, None] == 1)
        seq = self.encoder(s, causal, serves, self.normalization)
        total = lambda x, where: torch.where(where[:, :, None], x, 0.0).sum(1) / lengths[:, None]
        means = [total(seq, valid)]
        for f, block in ((1, self.positive), (0, self.negative)):
            # Hides the keys of the other feedback and excludes its queries from the mean. The
            # result is the same as with the tokens of one feedback in a separate sequence.
            one = valid & (labels == f)
            means.append(total(block(seq, causal & one[:, None, :], None, self.normalization), one))
        c = self.item[candidates]
        logits, atts = [], []
        for f, own, target, tower in ((1, means[1], self.target_positive, self.tower_positive),
                                      (0, means[2], self.target_negative, self.tower_negative)):
            att = target(s, c + self.label[f], valid)
            wide = lambda x: x[:, None].expand_as(c)
            logits.append(tower(torch.cat([c, wide(means[0]), wide(own), att], -1)))
            atts.append(att)
        return logits, means, atts


def loss(model, items, labels, lengths, candidates, target, weights):
    """-> total, parts, logits [B * C, 2]. weights: bpr, idl, embed_l2."""
    (pos, neg), means, atts = model(items, labels, lengths, candidates)
    pos, neg = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (pos, neg))
    T = items.shape[1]
    touched = torch.zeros(model.item.shape[0], dtype=torch.bool, device=items.device)
    real = torch.where(torch.arange(T, device=items.device) < lengths[:, None], items, candidates[:, :1])
    touched = touched.index_fill(0, real.flatten(), True).index_fill(0, candidates.flatten(), True)
    rows = torch.where(touched[:, None], model.item, 0.0).square().sum() + model.label.square().sum() \
        + torch.where((torch.arange(T, device=items.device) < lengths.max())[:, None], model.position[:T], 0.0).square().sum()
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    parts = {"bce": (F.softplus(pos) - target * pos).mean(),
             "ibl": F.softplus(-(2 * target - 1) * (pos - neg)).mean(),
             "idl": cosine(wide(means[1]), wide(means[2])).mean() + cosine(wide(atts[0]), wide(atts[1])).mean(),
             "l2": 0.5 * rows}
    total = parts["bce"] + weights["bpr"] * parts["ibl"] + weights["idl"] * parts["idl"] + weights["embed_l2"] * parts["l2"]
    return total, parts, torch.stack([pos.flatten(), neg.flatten()], 1)


def clip_each(grads, limit):
    """Clips the gradient of each tensor to the given norm, in place."""
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, [(limit / n.clamp_min(limit)) for n in norms])
