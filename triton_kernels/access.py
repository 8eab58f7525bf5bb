"""How elements are found, loaded exactly, and stored with one rounding.

bf16 is loaded and stored as int16 and rounded with integers: the interpreter's own conversions are wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder.triton_kernels.table import (
    CLIP,
    CLIP_ADDRESS,
    CLIP_FACTOR,
    GRAD_SCALE,
    HEADER,
    INVERSE_SCALE,
    LAYOUT,
    NEGATE,
    UNSCALE,
    column,
    number,
)

# Elements of the narrowest dtype in an access of 16 bytes.
VECTOR = tl.constexpr(8)
# Elements that a program takes at a time where it cannot access 16 bytes at once: every thread keeps as many addresses
# for each column as it has elements, and few of them leave registers free.
PART = tl.constexpr(128)


@triton.jit
def widen(x, S: tl.constexpr, T: tl.constexpr):
    """Elements as stored in S, in the arithmetic type."""
    if S == tl.bfloat16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(T)


@triton.jit
def narrow(x, S: tl.constexpr):
    """Rounded to nearest, ties to even; a double reaches a half type through fp32."""
    if S == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, (bits >> 16) | 0x40, rounded).to(tl.uint16).to(tl.int16, bitcast=True)
    elif S == tl.float16:
        return x.to(tl.float32).to(tl.float16)
    else:
        return x.to(S)


@triton.jit
def narrow_stochastically(x, random):
    """fp32 to bf16: 16 random bits are added below the kept mantissa, the rest is cut off. Inf and NaN pass."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = (bits + tl.where(magnitude < 0x7F800000, random, 0)) >> 16
    kept = tl.where(magnitude > 0x7F800000, (bits >> 16) | 0x40, rounded)
    return kept.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def rounding_bits(seed, step, index, block, BLOCKS: tl.constexpr):
    """16 random bits for each of the 8 * BLOCKS elements that begin at 8 * block, as in csrc/common/philox.h."""
    blocks = block + tl.arange(0, BLOCKS)
    low = (blocks & 0xFFFFFFFF).to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(
        seed.to(tl.uint64, bitcast=True), low, high, step.to(tl.uint32) + low * 0, index.to(tl.uint32) + low * 0
    )
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCKS, 2, 2]
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (8 * BLOCKS,))


@triton.jit
def pointer(address, S: tl.constexpr, VECTORS: tl.constexpr):
    if S == tl.bfloat16:
        to = address.to(tl.pointer_type(tl.int16))
    else:
        to = address.to(tl.pointer_type(S))
    # The hint marks the conversion just made, so that it holds on this path alone.
    return tl.multiple_of(to, 16) if VECTORS else to


@triton.jit
def layout_of(table, tensor):
    """Index of the first word of a tensor's layout, or 0."""
    layout = tl.load(table + LAYOUT)
    if layout != 0:
        layout = column(table, LAYOUT, tensor)
        layout = tl.where(layout != 0, layout + HEADER, 0)
    return layout


@triton.jit
def offsets(table, layout, c, index, VECTORS: tl.constexpr):
    """Of logical elements, in elements from the column's address."""
    result = index
    if not VECTORS:
        if layout != 0:
            dims = tl.load(table + layout)
            strides = layout + 1 + dims * (1 + c)
            result = index * 0
            rest = index
            d = dims - 1
            while d >= 0:
                size = tl.load(table + layout + 1 + d)
                result += rest % size * tl.load(table + strides + d)
                rest = rest // size
                d -= 1
    return result


@triton.jit
def is_aligned(columns, layout, COLUMNS: tl.constexpr):
    """Whether every column is flat and begins at a multiple of 16 bytes."""
    bits = tl.where(layout != 0, 1, 0).to(tl.int64)
    for c in tl.static_range(COLUMNS):
        bits = bits | columns[c]
    return (bits & 15) == 0


@triton.jit
def load(table, columns, layout, c: tl.constexpr, index, mask, S: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr):
    """Elements of one column."""
    at = pointer(columns[c], S, VECTORS) + offsets(table, layout, c, index, VECTORS)
    return widen(tl.load(at, mask=mask, other=0), S, T)


@triton.jit
def store(table, columns, layout, c: tl.constexpr, index, mask, bits, S: tl.constexpr, VECTORS: tl.constexpr):
    """`bits`: narrowed."""
    tl.store(pointer(columns[c], S, VECTORS) + offsets(table, layout, c, index, VECTORS), bits, mask=mask)


@triton.jit
def load_states(
    table, columns, layout, index, mask, COUNT: tl.constexpr, S: tl.constexpr, T: tl.constexpr, VECTORS: tl.constexpr
):
    states = ()
    for k in tl.static_range(COUNT):
        states = states + (load(table, columns, layout, 2 + k, index, mask, S, T, VECTORS),)
    return states


@triton.jit
def load_gradient(table, columns, layout, meta, index, mask, T: tl.constexpr, VECTORS: tl.constexpr):
    """The gradient, whose dtype is the tensor's own affair."""
    dtype = meta & 3
    if dtype == 0:
        g = load(table, columns, layout, 1, index, mask, tl.float64, T, VECTORS)
    elif dtype == 1:
        g = load(table, columns, layout, 1, index, mask, tl.float32, T, VECTORS)
    elif dtype == 2:
        g = load(table, columns, layout, 1, index, mask, tl.bfloat16, T, VECTORS)
    else:
        g = load(table, columns, layout, 1, index, mask, tl.float16, T, VECTORS)
    return g


@triton.jit
def store_gradient(table, columns, layout, meta, index, mask, g, VECTORS: tl.constexpr):
    dtype = meta & 3
    if dtype == 0:
        store(table, columns, layout, 1, index, mask, narrow(g, tl.float64), tl.float64, VECTORS)
    elif dtype == 1:
        store(table, columns, layout, 1, index, mask, narrow(g, tl.float32), tl.float32, VECTORS)
    elif dtype == 2:
        store(table, columns, layout, 1, index, mask, narrow(g, tl.bfloat16), tl.bfloat16, VECTORS)
    else:
        store(table, columns, layout, 1, index, mask, narrow(g, tl.float16), tl.float16, VECTORS)


@triton.jit
def inverse_scale(table, T: tl.constexpr):
    """By which gradients are multiplied first."""
    inverse = number(table, INVERSE_SCALE)
    address = tl.load(table + GRAD_SCALE)
    if address != 0:
        inverse = 1.0 / tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return inverse.to(T)


@triton.jit
def clip_factor(table):
    factor = number(table, CLIP_FACTOR)
    address = tl.load(table + CLIP_ADDRESS)
    if address != 0:
        factor = tl.load(address.to(tl.pointer_type(tl.float64)))
    return factor


@triton.jit
def read_scale(table, meta, T: tl.constexpr):
    """What `unscaled` and `seen` take: how the launch and the tensor change gradients as they are read."""
    unscale = tl.load(table + UNSCALE) != 0
    clip = tl.load(table + CLIP) != 0
    return unscale, inverse_scale(table, T), clip, clip_factor(table).to(T), (meta & NEGATE) != 0


@triton.jit
def unscaled(g, scale):
    return tl.where(scale[0], g * scale[1], g)


@triton.jit
def seen(g, scale):
    """Of an unscaled gradient, what the rule is given."""
    g = tl.where(scale[2], g * scale[3], g)
    return tl.where(scale[4], g * -1.0, g)
