"""A small character-level GPT and its text, for the examples and the ladder."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Text:
    """The Python manual behind help(), as character indices; the last tenth is for validation."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))
        index = {character: i for i, character in enumerate(sorted(set(text)))}
        data = torch.tensor([index[character] for character in text])
        self.vocabulary = len(index)
        self.training, self.validation = data.split([len(data) - len(data) // 10, len(data) // 10])


def sample(data: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of the text, and the same one character on: two of [batch, context]."""
    starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
    stretch = data[starts + torch.arange(context + 1)]
    return stretch[:, :-1], stretch[:, 1:]


class Block(nn.Module):
    """Causal attention, then a multilayer perceptron, each on the normalised stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch, heads, context, width / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder whose output head is its token embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in nats a character; x and y are [batch, context]."""
        stream = self.blocks(self.token(x) + self.position.weight[: x.shape[1]])
        logits = F.linear(self.norm(stream), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
