"""The GRU of all states. x: [T, B, 3D], the input products with bias; U: [D, 3D]; columns r, u, n -> [T, B, D]

    r, u = sigmoid(x + h U)   n = tanh(x_n + r * (h U)_n)   h' = h + u * (n - h)
"""

import torch


def step(x, h, U):
    """-> r and u, the product of n, n, h'"""
    D = h.shape[1]
    y = h @ U
    ru = torch.sigmoid(x[:, : 2 * D] + y[:, : 2 * D])
    n = torch.tanh(torch.addcmul(x[:, 2 * D :], ru[:, :D], y[:, 2 * D :]))
    return ru, y[:, 2 * D :], n, torch.lerp(h, n, ru[:, D:])


def equations(x, U):
    """By the formulas; gradients by autograd."""
    h, states = x.new_zeros(x.shape[1], U.shape[0]), []
    for x_t in x:
        *_, h = step(x_t, h, U)
        states.append(h)
    return torch.stack(states)


class Gru(torch.autograd.Function):
    """With its own backward pass, which has one product for each step and one for the gradient of U,
    and all factors of the gradients for all steps at once."""

    @staticmethod
    def forward(ctx, x, U):
        h, kept = x.new_zeros(x.shape[1], U.shape[0]), []
        for x_t in x:
            kept.append(step(x_t, h, U))
            h = kept[-1][-1]
        ru, y, n, states = (torch.stack(part) for part in zip(*kept))
        ctx.save_for_backward(U, ru, y, n, states)
        return states

    @staticmethod
    def backward(ctx, d_states):
        U, ru, y, n, states = ctx.saved_tensors
        T, B, D = states.shape
        before = torch.cat([states.new_zeros(1, B, D), states[:-1]])
        r, u = ru[..., :D], ru[..., D:]
        of_n = u * (1 - n * n)
        of_r, of_u = of_n * y * r * (1 - r), (n - before) * u * (1 - u)
        factors = torch.stack([of_r, of_u, of_n * r], 2)
        keep, back, ups, d_h = 1 - u, U.t().contiguous(), [None] * T, torch.zeros_like(states[0])
        for t in reversed(range(T)):
            up = ups[t] = d_states[t] + d_h
            d_y = (up[:, None] * factors[t]).view(B, 3 * D)
            d_h = torch.addcmul(d_y @ back, up, keep[t])
        up = torch.stack(ups)
        d_y = (up[:, :, None] * factors).view(T * B, 3 * D)
        d_x = torch.cat([d_y.view(T, B, 3 * D)[..., : 2 * D], up * of_n], -1)
        return d_x, before.view(T * B, D).t() @ d_y
