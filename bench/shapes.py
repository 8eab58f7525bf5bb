"""Shapes of the parameters that are stepped: real models, from their architectures' constants, and plain sets.

Every function returns the shapes in the order in which the model registers its parameters. Tied tensors
appear once, as an optimizer sees them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

Shape = tuple[int, ...]
Shapes = list[Shape]


def gpt2(vocab: int = 50257, context: int = 1024, width: int = 768, layers: int = 12) -> Shapes:
    """GPT-2 124M as released, its projections stored (in, out), its head tied to the embedding."""
    norm = [(width,), (width,)]
    block = [
        *norm,
        *_affine(width, 3 * width),
        *_affine(width, width),
        *norm,
        *_affine(width, 4 * width),
        *_affine(4 * width, width),
    ]
    return [(vocab, width), (context, width), *block * layers, *norm]


def resnet50(classes: int = 1000, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> Shapes:
    """ResNet-50: bottlenecks that widen fourfold; each convolution is followed by a batch norm."""

    def convolution(inputs: int, outputs: int, side: int) -> Shapes:
        return [(outputs, inputs, side, side), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (classes, inputs), (classes,)]


def vit_b16(image: int = 224, patch: int = 16, width: int = 768, layers: int = 12, classes: int = 1000) -> Shapes:
    """ViT-B/16 with a class token and learned positions; weights stored (out, in)."""
    tokens = (image // patch) ** 2 + 1
    norm = [(width,), (width,)]
    block = [
        *norm,
        *_linear(width, 3 * width),
        *_linear(width, width),
        *norm,
        *_linear(width, 4 * width),
        *_linear(4 * width, width),
    ]
    stem = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    return [*stem, *block * layers, *norm, *_linear(width, classes)]


def llama_1b(
    vocab: int = 128256, width: int = 2048, hidden: int = 8192, layers: int = 16, heads: int = 32, kv_heads: int = 8
) -> Shapes:
    """Llama 3.2 1B: grouped queries, a gated feed-forward, RMS norms, no biases, its head tied."""
    kv_width = width // heads * kv_heads
    attention = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
    feed_forward = [(hidden, width), (hidden, width), (width, hidden)]
    block = [*attention, *feed_forward, (width,), (width,)]
    return [(vocab, width), *block * layers, (width,)]


def _affine(inputs: int, outputs: int) -> Shapes:
    return [(inputs, outputs), (outputs,)]


def _linear(inputs: int, outputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


SETS: dict[str, Callable[[], Shapes]] = {
    "1000x768": lambda: [(768,)] * 1000,
    "400x4096": lambda: [(4096,)] * 400,
    "48x1M": lambda: [(2**20,)] * 48,
    "gpt2": gpt2,
    "resnet50": resnet50,
    "vit-b16": vit_b16,
    "llama-1b": llama_1b,
    "465-groups": lambda: [(768,)] * 465,
}
# Sets whose parameters stand in a group each, with a learning rate of their own.
APART = frozenset({"465-groups"})

# Of the models, tensors of two and more dimensions that are no hidden matrices: embeddings, heads, what reads pixels.
OUTSIDE: dict[str, Shapes] = {
    "gpt2": [(50257, 768), (1024, 768)],
    "resnet50": [(64, 3, 7, 7), (1000, 2048)],
    "vit-b16": [(1, 1, 768), (768, 3, 16, 16), (1, 197, 768), (1000, 768)],
    "llama-1b": [(128256, 2048)],
}


# Sets of matrices alone, for Muon and its like.
MATRIX_SETS: dict[str, Callable[[], Shapes]] = {
    "gpt2-layer": lambda: hidden(1),
    "gpt2-hidden": lambda: hidden(12),
}
# What `shapes_of` takes, in words.
SHAPES = f"{', '.join((*SETS, *MATRIX_SETS))}, or shapes as 768x3072,12*768: one matrix and twelve vectors"
_ITEM = re.compile(r"\s*(?:(\d+)\s*\*\s*)?(\d+(?:x\d+)*)\s*", re.ASCII)
# More is a slip of the keyboard.
MOST_ELEMENTS, MOST_TENSORS = 2**36, 10**6


def hidden(layers: int, width: int = 768) -> Shapes:
    """The hidden matrices of GPT-2 124M, or of some of its layers."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers


def shapes_of(text: str) -> Shapes:
    """The set of this name, or shapes such as 768x3072,12*768: sides joined by x, commas between, a count before a *.

    Raises:
        ValueError: It is neither, or more than MOST_ELEMENTS or MOST_TENSORS.
    """
    if make := SETS.get(text) or MATRIX_SETS.get(text):
        return make()
    shapes: Shapes = []
    total = 0
    for item in text.split(","):
        found = _ITEM.fullmatch(item)
        sides = tuple(map(int, found[2].split("x"))) if found else ()
        count = int(found[1] or 1) if found else 0
        if not count or 0 in sides:
            raise ValueError(f"{item.strip()!r} is no set and no shape, expected {SHAPES}")
        total += count * math.prod(sides)
        if total > MOST_ELEMENTS or len(shapes) + count > MOST_TENSORS:
            raise ValueError(f"{text!r} is more than {MOST_TENSORS} tensors or {MOST_ELEMENTS} elements")
        shapes += [sides] * count
    return shapes


def elements(shapes: Shapes) -> int:
    """How many elements the tensors of these shapes have together."""
    return sum(math.prod(shape) for shape in shapes)
