"""FHA inside a PyTorch model of your own: next-like prediction from likes and skips.

    python examples/fha_in_your_model.py [steps]

The model has item and label embeddings, one `FactorizationHeadsAttention`, and a score by dot product.
Sequences have different lengths and are packed without padding. Prints the loss; the last line says
how often the liked item scores above a random one.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from dfar.torch import FactorizationHeadsAttention

ITEMS, WIDTH = 60, 32


class NextLike(nn.Module):
    """Scores items after each event of packed histories."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, WIDTH)
        self.label = nn.Embedding(2, WIDTH)
        self.attention = FactorizationHeadsAttention(WIDTH, num_heads=2)
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.normal_(self.label.weight, std=0.1)

    def forward(self, items: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.item(items) + self.label(labels)
        return self.norm(x + self.attention(x, labels, cu_seqlens)) @ self.item.weight.T


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A log with a rule: a user stays near an item that was liked, and leaves one that was skipped."""
    items, labels, lengths = [], [], torch.randint(5, 40, (32,), generator=generator)
    for length in lengths.tolist():
        item = int(torch.randint(ITEMS, (1,), generator=generator))
        for step, like in zip(
            torch.randint(1, 4, (length,), generator=generator).tolist(),
            torch.randint(2, (length,), generator=generator).tolist(),
        ):
            items.append(item)
            labels.append(like)
            item = (item + step + (0 if like else ITEMS // 2)) % ITEMS
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return torch.tensor(items), torch.tensor(labels), cu_seqlens


def main(steps: int) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = NextLike()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    above = 0.5
    for step in range(1, steps + 1):
        items, labels, cu_seqlens = batch(generator)
        scores = model(items, labels, cu_seqlens)
        # The target of an event is the next item of its sequence; the last event has none.
        has_next = torch.ones(len(items), dtype=torch.bool)
        has_next[cu_seqlens[1:].long() - 1] = False
        target = items.roll(-1)[has_next]
        loss = nn.functional.cross_entropy(scores[has_next], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps:
            other = torch.randint(ITEMS, target.shape, generator=generator)
            kept = scores[has_next].detach()
            rows = torch.arange(len(target))
            above = float((kept[rows, target] > kept[rows, other]).float().mean())
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"the next item scores above a random item: {above:.2f}")
    return above


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
