"""What a machine can do at most, and how much of it a step asks for."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepladder.bench.cases import CASES, Case
from stepladder.bench.measure import YARDSTICK_MOST, Yardstick, milliseconds
from stepladder.bench.workload import Source, make_parameters

# What the reference of an element-wise rule computes with; comparisons and copies are not counted.
ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "sqrt", "reciprocal", "neg", "abs", "maximum", "sum", "lerp"}
)
# What `ceilings` measures.
CEILINGS = ("gb_per_s", "gflops")
TRIES = 3
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# Side of the product that the matrix rate is measured by.
SIDE = 2048


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
    yardstick, product = Yardstick(YARDSTICK_MOST), Product("fp32", torch.device("cpu"))
    added, multiplied = (min([step() for _ in range(1 + TRIES)][1:]) for step in (yardstick.step, product.timed))
    return {"gb_per_s": yardstick.moved / 1e6 / added, "gflops": 1e3 * product.rate(multiplied)}


class Product:
    """A large product by torch.

    Args:
        precision: One of PRECISIONS.
        device: Where.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        source = Source(device)
        self._a, self._b = (source.tensor((SIDE, SIDE), PRECISIONS[precision]) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def step(self) -> None:
        torch.mm(self._a, self._b, out=self._out)

    def timed(self) -> float:
        """Milliseconds of a step on the CPU."""
        return milliseconds(self.step)

    def rate(self, ms: float) -> float:
        """TFLOP/s."""
        return 2.0 * SIDE**3 / ms / 1e9
