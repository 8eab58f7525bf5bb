"""What a machine can do at most, and how much of it a step asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepladder.bench.cases import CASES, Case
from stepladder.bench.measure import YARDSTICK_MOST, Yardstick
from stepladder.bench.workload import make_parameters

# What the reference of an element-wise rule computes with; comparisons and copies are not counted.
ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "sqrt", "reciprocal", "neg", "abs", "maximum", "sum", "lerp"}
)
# What `ceilings` measures.
CEILINGS = ("gb_per_s", "gflops")
SIDE = 2048
TRIES = 3


class _Count(TorchDispatchMode):
    """Counts the elements that arithmetic gives."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.rstrip("_")
        if name in ARITHMETIC and isinstance(result, torch.Tensor):
            self.total += max(result.numel(), args[0].numel() if isinstance(args[0], torch.Tensor) else 0)
        return result


@cache
def _operations(name: str) -> int:
    n = 4096
    case = CASES[name]
    optimizer = case.ours(make_parameters([(n,)], torch.float32), **case.options, backend="reference")
    optimizer.step()
    with _Count() as count:
        optimizer.step()
    # What is done to scalars is less than one for each element.
    return count.total // n


def operations(case: Case) -> int:
    """Additions, multiplications, divisions and roots for each element, counted in a step of the reference."""
    return _operations(case.name)


def ceilings() -> dict[str, float]:
    """The most that torch reaches here in a few tries.

    Returns:
        gb_per_s, of `a += b` over half a GiB; gflops, of a product of fp32 matrices.
    """
    yardstick = Yardstick(YARDSTICK_MOST)
    a, b = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    return {
        "gb_per_s": yardstick.moved / 1e9 / _best(yardstick.step),
        "gflops": 2.0 * SIDE**3 / 1e9 / _best(lambda: a @ b),
    }


def _best(function: Callable[[], Any]) -> float:
    """Seconds of the fastest call."""
    function()
    times = []
    for _ in range(TRIES):
        begin = perf_counter()
        function()
        times.append(perf_counter() - begin)
    return min(times)
