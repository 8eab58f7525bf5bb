from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

compiler: str
cuda_version: str

class Error(RuntimeError): ...

def rules() -> dict[str, dict[str, Any]]: ...
def power(base: float, exponent: int) -> float: ...
def openmp_runtime() -> str | None: ...
def isas() -> list[str]: ...
def environment(variable: str) -> str | None: ...
def launches() -> int: ...

# Pass, rule, dtypes of parameter, gradient and states, nanoseconds, elements, chunks.
_Share = tuple[str, str, str, str, str, int, int, int]
# Begin, end, shares; begin, end, threads: times in nanoseconds of the monotonic clock.
_Thread = tuple[int, int, list[_Share]]
_Region = tuple[int, int, list[_Thread]]

def record_regions(on: bool) -> None: ...
def take_regions() -> list[_Region]: ...
def cuda() -> tuple[list[dict[str, Any]], str]: ...

GROUP_WORDS: int

class Table:
    def __buffer__(self, flags: int, /) -> memoryview: ...
    rule: str
    param: str
    state: str
    chunks: int
    chunk_tiles: int
    num_sums: int
    shape: dict[str, int]

class GradientScale:
    unscale: bool
    clip: bool
    inverse_scale: float
    clip_factor: float
    grad_scale: int
    clip_address: int
    found_inf: int

class StepPlan:
    def __init__(
        self,
        exchange: Any,
        describe: Any,
        shares_memory: Callable[[list[Tensor]], bool],
        stream: Callable[[int], int],
        triton: Callable[[int, int], Any] | None = None,
    ) -> None: ...
    def reset(self, groups: list[tuple[dict[str, Any], str, tuple[str, ...]]]) -> None: ...
    def refresh(
        self, param_groups: list[dict[str, Any]], attributes: dict[str, Any], touched: bool
    ) -> list[int] | None: ...
    def bind(
        self,
        index: int,
        backend: str,
        grad: Tensor,
        state: dict[str, Any],
        step: Tensor | None,
        clock: Tensor | None,
        timed: bool,
        fresh: bool,
        negate: bool,
        seed: int | None,
        first: int = 0,
    ) -> None: ...
    def bind_gradients(self, backends: list[str]) -> list[int]: ...
    def skip(self, index: int) -> None: ...
    def active(self) -> list[int]: ...
    def only_device(self) -> tuple[str, int] | None: ...
    def norm(self, kind: float, inverse_scale: float, threads: int) -> tuple[float, bool]: ...
    def partials(self) -> list[float]: ...
    def scale_gradients(self, factor: float, threads: int) -> None: ...
    def run(
        self,
        inverse_scale: float | None,
        clip_factor: float,
        threads: int,
        announce: Callable[[list[Tensor]], Any],
    ) -> None: ...
    def clip_on_device(self, kind: float, max_norm: float, result: int, found_inf: int) -> None: ...
    def run_on_device(
        self, grad_scale: int, found_inf: int, max_norm: float, announce: Callable[[list[Tensor]], Any]
    ) -> None: ...
    def device_norm(self) -> float: ...
    def release(self) -> None: ...
    isa: str
    @property
    def scheduled(self) -> bool: ...
    @property
    def trusts_states(self) -> bool: ...
    @property
    def has_exchange(self) -> bool: ...

# How much is kept of tensors that are gone.
KEPT_TENSOR_BYTES: int

def kept_bytes() -> int: ...
def kept_tensor(shape: Sequence[int], dtype: str) -> Any: ...

class NewtonSchulzOptions:
    def __init__(
        self, steps: tuple[tuple[float, float, float], ...], eps: float, divisor: float, aol: bool, gram: bool
    ) -> None: ...

# Address, dtype, shape, strides.
_Tensor = tuple[int, str, Sequence[int], Sequence[int]]
_Rate = tuple[int, bool, float, float]
_Muon = tuple[_Tensor, float, bool, bool, float, float, float | _Rate]
_Matrices = tuple[_Tensor, _Tensor, NewtonSchulzOptions, _Muon | None]

class NewtonSchulzCpu:
    def __init__(self, kept_bytes: int) -> None: ...
    def run(self, matrices: list[_Matrices], unit: str, threads: int) -> None: ...

def normalise(source: _Tensor, to: _Tensor, /, eps: float, divisor: float, threads: int) -> None: ...

class NewtonSchulzGpu:
    def __init__(self, device: int, shared_limit: int = ..., clusters: bool = ...) -> None: ...
    def run(self, matrices: list[_Matrices], allocate: Callable[[int], int], stream: int) -> None: ...

# Condition, a, b, c of each polynomial; Newton's steps.
_Attempt = tuple[list[tuple[float, float, float, float]], int]
# Address, matrices, side, strides from matrix to matrix, row to row, column to column; addresses of the results, the
# iterations and the statuses.
_RootStack = tuple[int, int, int, int, int, int, int, int, int]

class RootOptions:
    def __init__(
        self,
        *,
        p: int,
        eps: float,
        relative_eps: float,
        near: float,
        growth: float,
        fast_size: float,
        squarings: int,
        multiplications: int,
        fast: _Attempt,
        wide: _Attempt,
    ) -> None: ...

class GpuRoots:
    def __init__(self, device: int, shared_limit: int = ..., buffer_limit: int = ...) -> None: ...
    def run(
        self, stacks: list[_RootStack], options: RootOptions, allocate: Callable[[int], int], stream: int
    ) -> None: ...

# Address, matrices, rows, columns, strides from matrix to matrix, row to row, column to column; addresses of the bases,
# of whether they fell back, and of whether they are finite.
_BasisStack = tuple[int, int, int, int, int, int, int, int, int, int]

# L and G.
_Grams = tuple[_Tensor, _Tensor]

class GpuGrams:
    def __init__(self, device: int) -> None: ...
    def run(self, matrices: list[_Grams], beta: float, weight: float, stream: int) -> None: ...

# Address, strides from matrix to matrix, row to row, column to column.
_Place = tuple[int, int, int, int]
# Left, right, out; matrices, rows of the left, columns of the right, what is summed over.
_Product = tuple[_Place, _Place, _Place, int, int, int, int]

class GpuProducts:
    def __init__(self, device: int) -> None: ...
    def run(self, products: list[_Product], wide: bool, stream: int) -> None: ...

class GpuBases:
    def __init__(self, device: int, buffer_limit: int = ...) -> None: ...
    def run(
        self,
        stacks: list[_BasisStack],
        householder: bool,
        shift: float,
        limit: float,
        allocate: Callable[[int], int],
        stream: int,
    ) -> None: ...

def matrix_units() -> list[str]: ...

_Strided = tuple[int, int, int]

def product_units() -> list[str]: ...
def multiply_matrices(
    rows: int,
    columns: int,
    depth: int,
    a: _Strided,
    b: _Strided,
    c: _Strided,
    alpha: float,
    beta: float,
    symmetric: bool,
    unit: str,
    threads: int,
) -> None: ...
