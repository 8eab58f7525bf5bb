"""The words that a launch is told by: a header of its own, then the table of csrc/multi_tensor/gpu_table.h.

Kernels take no other argument, so that nothing but rule and dtypes specialises them. Doubles are kept as their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepladder import _C

# Indices of the header's words. Where the table's columns begin, an absent column being 0:
TENSORS = tl.constexpr(0)
GRAD = tl.constexpr(1)
PARAM = tl.constexpr(2)  # the states' columns follow
STEP = tl.constexpr(3)
CLOCK = tl.constexpr(4)
FIRST = tl.constexpr(5)
NUMEL = tl.constexpr(6)
META = tl.constexpr(7)
LAYOUT = tl.constexpr(8)
SUMS_AT = tl.constexpr(9)
CHUNKS = tl.constexpr(10)
CHUNK_TILES = tl.constexpr(11)
# Addresses of what the executor keeps on the device.
TICKET = tl.constexpr(12)  # int32: counts the programs that are done; 0 between launches
SUMS = tl.constexpr(13)  # fp64: of each leaf
RATIOS = tl.constexpr(14)  # fp64: one for each tensor
PARTIALS = tl.constexpr(15)  # fp64: one for each tensor, and as many again for their fold
NORM = tl.constexpr(16)  # fp64: the norm, then the factor by which gradients are clipped
FOUND = tl.constexpr(17)  # fp32: set to 1 where an element is not finite, else to 0
NOT_FINITE = tl.constexpr(18)  # int32: 0 between launches
# How gradients are read, GradientScale of csrc/multi_tensor/tensor.h; a number counts where the address is 0.
UNSCALE = tl.constexpr(19)
INVERSE_SCALE = tl.constexpr(20)
GRAD_SCALE = tl.constexpr(21)
CLIP = tl.constexpr(22)
CLIP_FACTOR = tl.constexpr(23)
CLIP_ADDRESS = tl.constexpr(24)
FOUND_INF = tl.constexpr(25)
MAX_NORM = tl.constexpr(26)
HEADER = tl.constexpr(32)

# A group's words, and bits of a tensor's meta word.
GROUP_WORDS = tl.constexpr(_C.GROUP_WORDS)
HYPER = tl.constexpr(GROUP_WORDS.value - 3)
LR_ADDRESS = tl.constexpr(HYPER.value)
LR_IS_DOUBLE = tl.constexpr(HYPER.value + 1)
SEED = tl.constexpr(HYPER.value + 2)
NEGATE, STOCHASTIC, STEP_IS_DOUBLE, WIDE = (tl.constexpr(1 << bit) for bit in (2, 3, 4, 5))


@triton.jit
def number(table, i):
    """The double in a word."""
    return tl.load(table + i).to(tl.float64, bitcast=True)


@triton.jit
def column(table, which, tensor):
    """A tensor's word in one of the columns."""
    return tl.load(table + HEADER + tl.load(table + which) + tensor)


@triton.jit
def addresses(table, tensor, COLUMNS: tl.constexpr):
    """Of the parameter, the gradient, and the states."""
    found = (column(table, PARAM, tensor), column(table, GRAD, tensor))
    states = table + HEADER + tl.load(table + PARAM) + tensor
    for k in tl.static_range(1, COLUMNS - 1):
        found = found + (tl.load(states + tl.load(table + TENSORS) * k),)
    return found


@triton.jit
def group_of(meta):
    return (meta >> 8) & 0xFFFFFF


@triton.jit
def group_word(table, group, i):
    return tl.load(table + HEADER + group * GROUP_WORDS + i)


@triton.jit
def find_tensor(table, chunk):
    """The last tensor whose first chunk is not beyond `chunk`; empty tensors, which have none, are passed over."""
    first = table + HEADER + tl.load(table + FIRST)
    high = tl.load(table + TENSORS)
    low = high * 0
    while high - low > 1:
        middle = (low + high) >> 1
        begins = tl.load(first + middle) <= chunk
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return low


@triton.jit
def is_skipped(table):
    """Whether GradScaler found an infinity: nothing is then stepped."""
    found = tl.load(table + FOUND_INF)
    skipped = False
    if found != 0:
        skipped = tl.load(found.to(tl.pointer_type(tl.float32))) != 0
    return skipped


@triton.jit
def read_count(address, is_double):
    """A count that a step adds one to, as an integer; 0 where there is none."""
    count = tl.full((), 0, tl.int64)
    if address != 0:
        if is_double:
            count = tl.load(address.to(tl.pointer_type(tl.float64))).to(tl.int64)
        else:
            count = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.int64)
    return count


@triton.jit
def next_step(table, tensor, meta):
    return read_count(column(table, STEP, tensor), (meta & STEP_IS_DOUBLE) != 0) + 1


@triton.jit
def next_time(table, tensor, meta):
    """The time of the step about to be taken; a clock that is not the step count is fp32."""
    time = next_step(table, tensor, meta)
    if tl.load(table + CLOCK) != 0:
        clock = column(table, CLOCK, tensor)
        if clock != column(table, STEP, tensor):
            time = read_count(clock, False) + 1
    return time


@triton.jit
def read_hyper(table, group):
    """The group's hyper-parameters; the learning rate may be on the device."""
    tl.static_assert(HYPER == 5)
    at = HEADER + group * GROUP_WORDS
    lr = number(table, at)
    address = group_word(table, group, LR_ADDRESS)
    if address != 0:
        if group_word(table, group, LR_IS_DOUBLE) != 0:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return (lr, number(table, at + 1), number(table, at + 2), number(table, at + 3), number(table, at + 4))


@triton.jit
def add_one(addresses, wanted, S: tl.constexpr):
    counts = addresses.to(tl.pointer_type(S))
    tl.store(counts, tl.load(counts, mask=wanted, other=0.0) + 1.0, mask=wanted)


@triton.jit
def count_steps(table, LANES: tl.constexpr):
    """Adds one to every step count and clock."""
    tensors = tl.load(table + TENSORS)
    lanes = tl.arange(0, LANES)
    for begin in range(0, tensors, LANES):
        tensor = begin + lanes
        inside = tensor < tensors
        words = table + HEADER + tensor
        step = tl.load(words + tl.load(table + STEP), mask=inside, other=0)
        is_double = (tl.load(words + tl.load(table + META), mask=inside, other=0) & STEP_IS_DOUBLE) != 0
        add_one(step, (step != 0) & is_double, tl.float64)
        add_one(step, (step != 0) & (is_double == 0), tl.float32)
        if tl.load(table + CLOCK) != 0:
            clock = tl.load(words + tl.load(table + CLOCK), mask=inside, other=0)
            add_one(clock, clock != step, tl.float32)


@triton.jit
def is_last_program(table):
    """True in the program that ends last; only there may what others have read be overwritten."""
    ticket = tl.load(table + TICKET).to(tl.pointer_type(tl.int32))
    tl.debug_barrier()  # all threads of this program are done reading
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket, 0)
    return last
