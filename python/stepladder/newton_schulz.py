"""Newton-Schulz iterations over the backends: checks, the choice of a form, and who multiplies."""

from __future__ import annotations

import functools
import math
import numbers
import os
import platform
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from stepladder import _C, backends, pool, ranges
from stepladder.backends import current_stream
from stepladder.choices import gram_from
from stepladder.coefficients import Coefficients, CoefficientSet, resolve
from stepladder.reference.newton_schulz import METHODS, iterate, polynomials

# What kernels take; fp64 is left to the reference.
KERNEL_DTYPES = tuple(pool.DTYPE_NAMES)
FLOATING_DTYPES = (*KERNEL_DTYPES, torch.float64)
# Names the fastest matrix unit of the CPU that may be used: "amx", "avx512_bf16", or "torch" for torch's products.
UNIT_VARIABLE = "STEPLADDER_MATRIX_UNIT"
TORCH = "torch"
# Whether CUDA kernels take clusters of blocks for matrices with a smaller side of 129 to 256: "1", or "0", the default.
CLUSTERS_VARIABLE = "STEPLADDER_CLUSTERS"
# Of workspace that is kept from call to call.
KEPT_BYTES = 1 << 28
# Multiplications m·m·n of all matrices of a tensor up to which torch's products are faster in fp32 than on tiles.
LEAST_BF16 = 1 << 22


@overload
def newton_schulz(
    X: Tensor,
    coefficients: Coefficients | None = "jordan",
    steps: int | None = None,
    method: str = "auto",
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> Tensor: ...
@overload
def newton_schulz(
    X: Sequence[Tensor],
    coefficients: Coefficients | None = "jordan",
    steps: int | None = None,
    method: str = "auto",
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> list[Tensor]: ...
def newton_schulz(
    X: Tensor | Sequence[Tensor],
    coefficients: Coefficients | None = "jordan",
    steps: int | None = None,
    method: str = "auto",
    eps: float = 1e-7,
    *,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Move all singular values of matrices towards 1, by products of matrices alone.

    X is divided by max(‖X‖F, eps) and by the set's divisor, then X ← aX + (bA + cA²)X with A = XXᵀ, once for each
    step. Operands are bf16, or fp32 where torch multiplies and that is faster; sums are fp32, and the norm is safe from
    1e-38 to 1e38. fp64 is computed in fp64, by the reference. Zeros stay zeros; a matrix with a NaN or infinite element
    becomes NaN and leaves the others alone.

    Args:
        X: Matrices [..., m, n] of fp32, bf16, fp16 or fp64, of any strides; or a list of such tensors of any shapes,
            whose products then go together.
        coefficients: Name of a set (`stepladder.coefficients.SETS`), one triple (a, b, c) for all steps, or a triple
            for each step; None means "jordan".
        steps: How many; None means as many as the set has, and five for a single triple. Beyond the set's, its last
            is repeated.
        method: "standard"; "gram", which iterates on m×m matrices and starts afresh after two steps; or "auto", the
            one that was measured to be faster for the shape (docs/performance.md). "aol4" is always "standard".
        eps: The least norm to divide by.
        backend: "cpu", "cuda", "triton", "reference", or None to choose by the device.

    Returns:
        Tensors as given, of the same shapes and dtypes. Large ones on a CPU may lie in memory that is kept for later
        ones once they are gone; such tensors cannot be resized to more elements.

    Raises:
        TypeError: X is no floating-point tensor, or of a dtype that the backend asked for does not take.
        ValueError: X has fewer than two dimensions, or another argument is out of range.
        RuntimeError: The backend asked for cannot run here.

    Papers: Bernstein & Newhouse 2024, arXiv:2409.20325; Jordan 2024; Gram form: Dao-AILab 2025, gram-newton-schulz.
    """
    chosen = resolve(coefficients, steps)
    check(method, eps)
    backends.check_available(backend)
    given = [X] if isinstance(X, Tensor) else list(X)
    for index, x in enumerate(given):
        check_matrix(x, "X" if isinstance(X, Tensor) else f"X[{index}]", backend)
    results = orthogonalise(given, chosen, method, float(eps), backend)
    return results[0] if isinstance(X, Tensor) else results


def check(method: str, eps: float) -> None:
    """Refuse arguments of an iteration that are out of range.

    Raises:
        TypeError: `eps` is no number.
        ValueError: `method` is unknown, or `eps` negative or not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(map(repr, METHODS))}")
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, numbers.Real)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps={eps} is out of range, expected a finite number of at least 0")


def check_matrix(x: Tensor, where: str, backend: str | None) -> None:
    """Refuse what is no matrix that the backend can take."""
    check_floating(x, where)
    if x.ndim < 2:
        raise ValueError(f"{where} has shape {tuple(x.shape)}, expected matrices (..., m, n)")
    if x.dtype == torch.float64 and backend not in (None, "reference"):
        raise TypeError(f"{where} has dtype {x.dtype}, which backend={backend!r} does not take: its products are bf16")


def check_floating(x: Tensor, where: str) -> None:
    """Refuse what is no strided tensor of a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where} is a {type(x).__name__}, expected a tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{where} has layout {x.layout}, expected torch.strided")
    if x.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{where} has dtype {x.dtype}, expected float32, bfloat16, float16 or float64")


def orthogonalise(
    given: Sequence[Tensor], chosen: CoefficientSet, method: str, eps: float, backend: str | None
) -> list[Tensor]:
    """The iteration on tensors [..., m, n] that were checked."""
    results: list[Tensor | None] = [None] * len(given)
    shared: dict[tuple[str, torch.device], list[int]] = {}
    for index, x in enumerate(given):
        name = "reference" if x.dtype == torch.float64 else backends.choose(backend, x.device.type)
        shared.setdefault((name, x.device), []).append(index)
    for (name, _), indices in shared.items():
        run = {"cpu": _on_cpu, "reference": _by_reference, "cuda": _by_cuda, "triton": _by_triton}[name]
        members = [given[i] for i in indices]
        with ranges.kernel("newton_schulz", partial(work_of, members, chosen, name)):
            found = run(members, chosen, method, eps)
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def work_of(given: Iterable[Tensor], chosen: CoefficientSet, name: str) -> ranges.Work:
    """What the iteration of matrices takes by its standard form, 2(2m²n + m³) for each step; `name`: the backend."""
    flops = size = 0.0
    given, precision = list(given), "bf16"
    for x in given:
        m, n = sorted(x.shape[-2:])
        flops += x.shape[:-2].numel() * len(chosen.steps) * 2.0 * (2.0 * m * m * n + float(m) ** 3)
        size += 2 * x.nbytes
        if name == "reference":
            precision = "fp64" if x.dtype == torch.float64 else "fp32"
    if name == "cpu" and matrix_unit() == TORCH and all(_torch_dtype(chosen, x) == torch.float32 for x in given):
        precision = "fp32"
    return ranges.Work(size, flops, precision)


def form_for(method: str, shape: torch.Size, unit: str, chosen: CoefficientSet) -> str:
    """The form in which matrices [..., m, n] are iterated on; "auto" goes by what was measured (choices.csv).

    A set with the AOL prescale takes the standard form always: it has no margin, and where rows are nearly alike the
    roundings of a Gram matrix all go the same way, beyond where two steps in a row converge.
    """
    if chosen.aol:
        return "standard"
    if method != "auto":
        return method
    m, n = shape[-2], shape[-1]
    if m > n:
        m, n = n, m
    return "gram" if unit != TORCH and n >= gram_from(unit, m) * m else "standard"


@functools.cache
def _units(module: Any) -> tuple[str, ...]:
    return *module.matrix_units(), TORCH


def matrix_unit() -> str:
    """Who multiplies on this CPU: the fastest unit that the environment allows, or torch."""
    names, asked = _units(_C), _C.environment(UNIT_VARIABLE)
    if asked is None:
        return names[0]
    if asked not in ("amx", "avx512_bf16", TORCH):
        raise ValueError(f"{UNIT_VARIABLE}={asked!r} is unknown, expected 'amx', 'avx512_bf16' or 'torch'")
    if asked not in names:
        raise RuntimeError(f"{UNIT_VARIABLE}={asked!r} cannot run here: this processor and build have {list(names)}")
    return asked


def clusters_asked() -> bool:
    """Whether the environment asks for clusters of blocks.

    Raises:
        ValueError: It says neither yes nor no.
    """
    asked = os.environ.get(CLUSTERS_VARIABLE, "0")
    if asked not in ("0", "1"):
        raise ValueError(f"{CLUSTERS_VARIABLE}={asked!r} is unknown, expected '0' or '1'")
    return asked == "1"


@torch.no_grad()
def _by_reference(given: list[Tensor], chosen: CoefficientSet, method: str, eps: float) -> list[Tensor]:
    return [iterate(x, chosen, method, eps, x.dtype) for x in given]


@functools.cache
def _torch_has_bf16() -> bool:
    """Whether torch's products in bf16 can be faster than those in fp32.

    On x86 that takes tiles: by AVX-512, with its bf16 instructions or without, they took 1.3 to 4.6 times as long, as
    measured by hand (docs/performance.md).
    """
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # What torch's library of products, oneDNN, may use at the most.
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    allowed = most.upper() in ("DEFAULT", "ALL") or "AMX" in most.upper()
    return allowed and torch.cpu._is_amx_tile_supported()


def _torch_dtype(chosen: CoefficientSet, x: Tensor) -> torch.dtype:
    """What torch's products round to."""
    # Sets that need a margin diverge in bf16, as the diagonal of a Gram matrix is rounded like everything else.
    if chosen.divisor != 1.0 or not _torch_has_bf16():
        return torch.float32
    return torch.bfloat16 if x.numel() * min(x.shape[-2:]) > LEAST_BF16 else torch.float32


@torch.no_grad()
def _by_torch(given: list[Tensor], chosen: CoefficientSet, method: str, eps: float) -> list[Tensor]:
    return [_iterate_by_torch(x.resolve_neg(), chosen, method, eps) for x in given]


def _iterate_by_torch(x: Tensor, chosen: CoefficientSet, method: str, eps: float) -> Tensor:
    # Contiguous, so that strides change no bit.
    y = torch.empty(x.shape, dtype=_torch_dtype(chosen, x), device=x.device)
    _C.normalise(view_of(x), view_of(y), eps, chosen.divisor, torch.get_num_threads())
    y = polynomials(y, chosen, form_for(method, x.shape, TORCH, chosen))
    return y if y.dtype == x.dtype else pool.empty(x.shape, x.dtype, x.device).copy_(y)


# Of a tensor [..., m, n]: address, dtype, shape, strides.
View = tuple[int, str, Sequence[int], Sequence[int]]
# Address of a learning rate on the device, whether it is a double, weight decay, scale.
Rate = tuple[int, bool, float, float]
# Buffer, momentum, whether it averages, Nesterov's form, the gradient's scale, decay, step or what makes both.
MuonPart = tuple[View, float, bool, bool, float, float, float | Rate]
# In, out, options, and what Muon adds.
Matrices = tuple[View, View, _C.NewtonSchulzOptions, MuonPart | None]


def view_of(x: Tensor) -> View:
    """What the compiled kernels are told of a tensor [..., m, n]; it has to outlive them."""
    return x.data_ptr(), pool.DTYPE_NAMES[x.dtype], x.shape, x.stride()


def options_of(chosen: CoefficientSet, eps: float, form: str) -> _C.NewtonSchulzOptions:
    """What the compiled kernels are told of an iteration."""
    options: _C.NewtonSchulzOptions = _options_of(_C, chosen, eps, form)
    return options


@functools.lru_cache(maxsize=64)
def _options_of(module: Any, chosen: CoefficientSet, eps: float, form: str) -> Any:
    return module.NewtonSchulzOptions(chosen.steps, eps, chosen.divisor, chosen.aol, form == "gram")


# This thread's iterations, with the workspace that they keep: one for the CPU, one for each GPU.
_kept = threading.local()


def kept_iterations() -> list[object]:
    """This thread's iterations; graphs that were captured point into their memory."""
    return list(_iterations().values())


def workspace(size: int, device: torch.device) -> Tensor:
    """Bytes on a GPU; of a captured call they lie in the graph's own pool, which no one else gets."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def gpu_iteration(device: torch.device) -> _C.NewtonSchulzGpu:
    """This thread's for a GPU, with clusters of blocks where the environment asks for them.

    Raises:
        ValueError: The environment's answer is unknown.
        RuntimeError: It asks for clusters, and this GPU or build has none.
    """
    index, clusters = device.index or 0, clusters_asked()
    kept = _iterations()
    key = ("cuda", index, clusters)
    if key not in kept:
        try:
            kept[key] = _C.NewtonSchulzGpu(index, clusters=clusters)
        except _C.Error as error:
            raise RuntimeError(f"{CLUSTERS_VARIABLE}='1' cannot run here: {error}") from error
    iteration: _C.NewtonSchulzGpu = kept[key]
    return iteration


def _iterations() -> dict[tuple[Any, ...], Any]:
    if not hasattr(_kept, "iterations"):
        _kept.iterations = {}
    kept: dict[tuple[Any, ...], Any] = _kept.iterations
    return kept


def run_compiled(matrices: list[Matrices], unit: str, device: torch.device) -> None:
    """Run the compiled kernels on all matrices together, which lie on this device; `unit`: the CPU's, or "cuda"."""
    if unit != "cuda":
        kept = _iterations()
        if ("cpu",) not in kept:
            kept["cpu",] = _C.NewtonSchulzCpu(KEPT_BYTES)
        kept["cpu",].run(matrices, unit, torch.get_num_threads())
        return
    iteration = gpu_iteration(device)
    workspaces: list[Tensor] = []

    def allocate(count: int) -> int:
        workspaces.append(workspace(count, device))
        return workspaces[-1].data_ptr()

    iteration.run(matrices, allocate, current_stream(device.index or 0))


def _compiled(given: list[Tensor], chosen: CoefficientSet, method: str, eps: float, unit: str) -> list[Tensor]:
    given = [x.resolve_neg() for x in given]
    results = [pool.empty(x.shape, x.dtype, x.device) for x in given]
    matrices: list[Matrices] = []
    for x, result in zip(given, results, strict=True):
        options = options_of(chosen, eps, form_for(method, x.shape, unit, chosen))
        matrices.append((view_of(x), view_of(result), options, None))
    run_compiled(matrices, unit, given[0].device)
    return results


def _on_cpu(given: list[Tensor], chosen: CoefficientSet, method: str, eps: float) -> list[Tensor]:
    unit = matrix_unit()
    if unit == TORCH:
        return _by_torch(given, chosen, method, eps)
    return _compiled(given, chosen, method, eps, unit)


def _by_cuda(given: list[Tensor], chosen: CoefficientSet, method: str, eps: float) -> list[Tensor]:
    return _compiled(given, chosen, method, eps, "cuda")


def _by_triton(given: list[Tensor], chosen: CoefficientSet, method: str, eps: float) -> list[Tensor]:
    from stepladder.triton_kernels.newton_schulz import newton_schulz as run

    results: dict[int, Tensor] = {}
    for form in ("standard", "gram"):
        indices = [i for i, x in enumerate(given) if form_for(method, x.shape, "triton", chosen) == form]
        if indices:
            results |= dict(zip(indices, run([given[i] for i in indices], chosen, form, eps), strict=True))
    return [results[i] for i in range(len(given))]
