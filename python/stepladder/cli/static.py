"""What can be said of a GPU kernel from its machine code alone: registers, memory, accesses, occupancy."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from stepladder.cli.cubins import Cubin, find_cuobjdump, run

WIDTHS = (32, 16, 8, 4, 2, 1)
# Bytes of shared memory that CUDA itself takes in each block, from compute capability 8.0 on.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at most. All of them have 65536 registers, in four partitions.

    From the CUDA Programming Guide's table of technical specifications per compute capability; the number of blocks
    and the granularities below are also in cuda_occupancy.h of the CUDA toolkit.
    """

    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "86": Multiprocessor(48, 16, 100 * 1024),
    "89": Multiprocessor(48, 24, 100 * 1024),
    "90": Multiprocessor(64, 32, 228 * 1024),
    "100": Multiprocessor(64, 32, 228 * 1024),
    "120": Multiprocessor(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """How much of a multiprocessor a kernel can fill: blocks, their warps, and the share of the warps it can hold."""

    blocks: int
    warps: int
    percent: float
    limited_by: str


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled.

    Attributes:
        name: Readable name.
        registers: Of a thread.
        shared: Bytes of static shared memory of a block, without what CUDA takes.
        dynamic_shared: Bytes that a launch adds.
        stack: Bytes of a thread's stack frame.
        local_loads: Instructions that read local memory: spilled registers, or arrays that are not in registers.
        local_stores: Those that write it.
        loads: Instructions that read global memory, by the bytes that a thread reads at once.
        stores: Those that write it.
        threads: Of a block.
        occupancy: What that allows.
    """

    name: str
    registers: int
    shared: int
    dynamic_shared: int
    stack: int
    local_loads: int
    local_stores: int
    loads: dict[int, int]
    stores: dict[int, int]
    threads: int
    occupancy: Occupancy


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def multiprocessor(arch: str) -> Multiprocessor:
    """Of an architecture such as sm_90a.

    Raises:
        ValueError: It is none that is known here.
    """
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if match is None or match[1] not in MULTIPROCESSORS:
        known = ", ".join(f"sm_{number}" for number in MULTIPROCESSORS)
        raise ValueError(f"{arch!r} is unknown, expected one of {known}, each with or without the suffix a or f")
    return MULTIPROCESSORS[match[1]]


def occupancy(arch: str, threads: int, registers: int, shared: int) -> Occupancy:
    """As cuda_occupancy.h has it.

    Args:
        arch: Architecture.
        threads: Of a block.
        registers: Of a thread.
        shared: Bytes of a block, static and dynamic.
    """
    sm = multiprocessor(arch)
    warps = -(-threads // 32)
    # Registers come to each warp in units of 256, out of its partition's quarter of 65536.
    warps_by_registers = 65536 // 4 // round_up(max(registers, 1) * 32, 256) * 4
    limits = {
        "blocks": sm.blocks,
        "warps": sm.warps // warps,
        "registers": warps_by_registers // warps,
        "shared memory": sm.shared // round_up(shared + RESERVED_SHARED, 128),
    }
    limited_by = min(limits, key=lambda key: limits[key])
    blocks = limits[limited_by]
    return Occupancy(blocks, blocks * warps, 100 * blocks * warps / sm.warps, limited_by)


# Address, predicate, operation, its suffixes. LD and ST are accesses to what may be global memory.
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(LDG|LD|LDL|LDGSTS|STG|ST|STL)((?:\.\w+)*)\s", re.M
)
BITS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def accesses(sass: str) -> dict[str, Counter[int]]:
    """Memory instructions in a kernel's disassembly: for load, store and the same of local memory, widths in bytes."""
    found: dict[str, Counter[int]] = {kind: Counter() for kind in ("load", "store", "local_load", "local_store")}
    for operation, suffixes in INSTRUCTION.findall(sass):
        # Without a suffix that says otherwise an access is one of 4 bytes.
        width = next((BITS[suffix] for suffix in suffixes.split(".") if suffix in BITS), 4)
        kind = "load" if operation.startswith("LD") else "store"
        found[f"local_{kind}" if operation in ("LDL", "STL") else kind][width] += 1
    return found


def inspect(cubin: Cubin, arch: str, wanted: str = "") -> list[Kernel]:
    """The kernels of a cubin whose readable names contain `wanted`.

    Raises:
        RuntimeError: cuobjdump failed.
        MissingError: There is none.
    """
    tool = find_cuobjdump()
    facts = run(tool, "-res-usage", "-elf", cubin.path)
    usage = {
        symbol: (int(registers), int(stack), int(shared))
        for symbol, registers, stack, shared in re.findall(
            r"^ Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", facts, re.M
        )
        if wanted in cubin.readable(symbol)
    }
    if not usage:
        return []
    # The disassembly of one function after another, each behind its symbol; asking for some of them takes longer.
    dumped = run(tool, "-sass", cubin.path)
    parts = re.split(r"^\s+Function : (\S+)$", dumped, flags=re.M)[1:]
    disassembly = dict(zip(parts[::2], parts[1::2], strict=True))
    kernels = []
    for symbol, (registers, stack, shared) in usage.items():
        if shared > 0 and int(re.sub(r"\D", "", arch)) >= 90:
            shared -= RESERVED_SHARED  # counted by cuobjdump from here on
        found = accesses(disassembly[symbol])
        dynamic = cubin.added_shared(cubin.readable(symbol))
        threads = threads_of_block(facts, symbol) or cubin.threads
        if threads is None:
            raise RuntimeError(f"{cubin.readable(symbol)} has no launch bounds: its occupancy is unknown")
        kernels.append(
            Kernel(
                cubin.readable(symbol),
                registers,
                shared,
                dynamic,
                stack,
                found["local_load"].total(),
                found["local_store"].total(),
                {width: found["load"][width] for width in WIDTHS},
                {width: found["store"][width] for width in WIDTHS},
                threads,
                occupancy(arch, threads, registers, shared + dynamic),
            )
        )
    return kernels


def threads_of_block(facts: str, symbol: str) -> int | None:
    """The block size that a kernel was compiled for, from what cuobjdump -elf says of it."""
    section = re.search(rf"^\.nv\.info\.{re.escape(symbol)}$(.*?)(?=^\.|\Z)", facts, re.M | re.S)
    bounds = section and re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:([0-9a-fx\s]+)", section[1])
    if not bounds:
        return None
    x, y, z = (int(size, 16) for size in bounds[1].split())
    return x * y * z
