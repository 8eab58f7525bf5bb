"""Inverse roots against float64 eigendecompositions: methods, spectra, mixed batches, statuses, refusals."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from rounding import relative_error
from spectra import SPECTRA, eigenvalues, exact_root, with_eigenvalues
from torch import Tensor

import stepladder as sl
from stepladder import backends
from stepladder.ops import RootStatus
from stepladder.reference.matrix_root import NEAR_IDENTITY_WIDE, coupled_newton
from stepladder.root_starts import NEAR, minimax, starts

SIZES = (1, 2, 3, 17, 64, 200)
EXPONENTS = (1, 2, 4)
METHODS = ("eigh", "newton")
BACKENDS = ("cpu", "reference")
# What the package promises of fp32 matrices at a condition, whatever the method on a CPU.
PROMISED = {1e4: 1e-3, 1e6: 2e-2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Nothing here is large: on a busy machine, forking torch's threads would cost more than the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def all_spectra(n: int, condition: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[4, n, n], one for each spectrum."""
    return torch.stack([with_eigenvalues(eigenvalues(name, n, condition)) for name in SPECTRA]).to(dtype)


@pytest.mark.parametrize("condition", PROMISED)
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("method", METHODS)
def test_roots_of_fp32(method: str, p: int, condition: float):
    stacks = [all_spectra(n, condition) for n in SIZES]
    roots, infos = sl.ops.inverse_root(stacks, p, method=method)
    for a, x, info in zip(stacks, roots, infos, strict=True):
        assert x.dtype == torch.float32
        assert info.status.tolist() == [RootStatus.CONVERGED] * 4
        exact = exact_root(a, p)
        for name, mine, theirs in zip(SPECTRA, x, exact, strict=True):
            assert relative_error(mine, theirs) <= PROMISED[condition], (name, a.shape)
        assert torch.equal(x, x.mT)


@pytest.mark.parametrize(
    "damping", [{"eps": 0.3}, {"relative_eps": 1e-4}, {"eps": 1e-3, "relative_eps": 1e-3}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_damping(method: str, damping: dict[str, float]):
    # The condition is left to the damping.
    for p in EXPONENTS:
        a = 3.0 * all_spectra(17, 1e12)
        x, info = sl.ops.inverse_root(a, p, method=method, **damping)
        assert info.status.tolist() == [RootStatus.CONVERGED] * 4
        # The root moves by 1/p of what λmax is too small by, of which 0.3 % are allowed to "newton".
        slack = 3e-3 / p if method == "newton" and "relative_eps" in damping else 0.0
        for mine, exact in zip(x, exact_root(a, p, **damping), strict=True):
            assert relative_error(mine, exact) <= PROMISED[1e4] + slack


@pytest.mark.large
@pytest.mark.parametrize("condition", PROMISED)
@pytest.mark.parametrize("method", METHODS)
def test_roots_of_1024(method: str, condition: float):
    for name in SPECTRA:
        a = with_eigenvalues(eigenvalues(name, 1024, condition)).float()
        x, info = sl.ops.inverse_root(a, 4, method=method)
        assert int(info.status) == RootStatus.CONVERGED
        assert relative_error(x, exact_root(a, 4)) <= PROMISED[condition], name


def test_a_root_of_1024():
    # One that a test of every day can afford.
    a = with_eigenvalues(eigenvalues("half small", 1024, 1e4)).float()
    x, info = sl.ops.inverse_root(a, 4, method="newton")
    assert int(info.status) == RootStatus.CONVERGED
    assert relative_error(x, exact_root(a, 4)) <= PROMISED[1e4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_fp64_by_newton_is_eigh(p: int, backend: str):
    """Eigenvalues off by n·2^-53·λmax are κ·n·2^-53/p of the smallest's root: 7e-11 for κ = 1e4 and n = 64."""
    for n in (3, 17, 64):
        a = all_spectra(n, 1e4, torch.float64)
        by_newton, info = sl.ops.inverse_root(a, p, method="newton", backend=backend)
        by_eigh, _ = sl.ops.inverse_root(a, p, method="eigh", backend=backend)
        assert by_newton.dtype == by_eigh.dtype == torch.float64
        assert int(info.iterations.min()) > 0
        for mine, theirs, exact in zip(by_newton, by_eigh, exact_root(a, p), strict=True):
            assert relative_error(mine, theirs) <= 1e-10
            assert relative_error(theirs, exact) <= 1e-10


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_reference_works_in_fp32(p: int):
    """eigh is backward stable: eigenvalues off by n·2^-23·λmax at the most, and so their roots by κ·n·2^-23/p."""
    for n in (3, 17, 64):
        a = all_spectra(n, 1e3)
        x, _ = sl.reference.inverse_root(a, p, method="eigh")
        for mine, exact in zip(x, exact_root(a, p), strict=True):
            assert relative_error(mine, exact) <= 1e3 * n * 2.0**-23 / p


# What is known of each


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_residual_is_that_of_what_is_returned(method: str, backend: str):
    eps, relative_eps = 1e-4, 1e-3
    for p in EXPONENTS:
        a = all_spectra(17, 1e5)
        x, info = sl.ops.inverse_root(a, p, eps, method, relative_eps=relative_eps, backend=backend)
        top = torch.linalg.eigvalsh(a.double())[:, -1]
        delta = eps + relative_eps * top
        product = torch.linalg.matrix_power(x.double(), p) @ (a.double() + delta[:, None, None] * torch.eye(17))
        expected = (product - torch.eye(17)).abs().amax((-2, -1))
        assert info.residual.dtype == torch.float32
        # Another λmax moves the eigenvalue 1 by its relative error, times what damping is of the smallest.
        slack = 3e-3 if method == "newton" else 0.0
        assert bool(((info.residual - expected).abs() <= 1e-5 * expected + slack).all())
        assert bool((expected < 0.05).all())


def test_lambda_max_by_the_power_method_is_too_small_by_little():
    # For damping that is much more than the matrix, X is (δ)^(-1/p)·I: it tells what λmax was taken for.
    for n in (2, 17, 64, 200):
        for a in all_spectra(n, 1e4):
            x, _ = sl.ops.inverse_root(a, 1, relative_eps=1e6, method="newton")
            top = (1.0 / float(x.diagonal().double().mean())) / 1e6
            assert 1.0 - 3e-3 <= top <= 1.0 + 1e-5


def test_iterations():
    a = torch.stack([torch.eye(9), with_eigenvalues(eigenvalues("linear", 9, 1e3)).float()])
    _, info = sl.ops.inverse_root(a, 4, method="newton")
    assert info.iterations.dtype == torch.int32
    assert 0 < info.iterations[0] <= info.iterations[1]
    _, info = sl.ops.inverse_root(a, 4, method="eigh")
    assert info.iterations.tolist() == [0, 0]


# Batches, lists


def members(dtype: torch.dtype) -> dict[str, tuple[Tensor, RootStatus, RootStatus]]:
    """Matrices, and their status with eps=1e-6 and without damping."""
    n = 5
    good, bad, not_finite = RootStatus.CONVERGED, RootStatus.FAILED, RootStatus.NON_FINITE
    plain = with_eigenvalues(eigenvalues("logarithmic", n, 1e3))
    v = torch.linspace(1.0, 2.0, n, dtype=torch.float64)
    negative = with_eigenvalues(torch.tensor([1.0, 0.5, 0.3, 0.1, -0.2], dtype=torch.float64))
    poisoned = {name: plain.clone() for name in ("nan", "inf", "-inf")}
    for name, a in poisoned.items():
        a[1, 2] = a[2, 1] = float(name)
    return {
        "plain": (plain.to(dtype), good, good),
        "zero": (torch.zeros(n, n, dtype=dtype), good, bad),
        "identity": (torch.eye(n, dtype=dtype), good, good),
        "rank one": (torch.outer(v, v).to(dtype), good, bad),
        "negative": (negative.to(dtype), bad, bad),
        "large": ((1e30 * plain).to(dtype), good, good),
        "small": ((1e-30 * plain).to(dtype), good, good),
        **{name: (a.to(dtype), not_finite, not_finite) for name, a in poisoned.items()},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_mixed_batch(eps: float, method: str, backend: str):
    every = members(torch.float32)
    batch = torch.stack([a for a, _, _ in every.values()])
    for p in EXPONENTS:
        x, info = sl.ops.inverse_root(batch, p, eps, method, backend=backend)
        for k, (name, (a, damped, plain)) in enumerate(every.items()):
            status = RootStatus(int(info.status[k]))
            assert status == (damped if eps else plain), name
            if status != RootStatus.CONVERGED:
                assert x[k].isnan().all(), name
                assert info.residual[k].isnan(), name
                continue
            if name == "zero":
                # The root of a number, but for two roundings.
                expected = eps ** (-1.0 / p) * torch.eye(5, dtype=torch.float64)
                assert float((x[k].double() - expected).abs().max()) <= 1e-5 * eps ** (-1.0 / p)
            # At a rank of one with damping κ is 1e7, and fp32's eigh off by κ·n·2^-23/p.
            elif not (name == "rank one" and backend == "reference" and method == "eigh"):
                assert relative_error(x[k], exact_root(a, p, eps)) <= 2e-2, name
            # A neighbour changes nothing; where torch multiplies batches, that is another batch of as many.
            others = torch.eye(5).repeat(len(batch), 1, 1)
            others[k] = a
            alone, own = (a, ...) if backend == "cpu" else (others, k)
            again, same = sl.ops.inverse_root(alone, p, eps, method, backend=backend)
            assert torch.equal(again[own], x[k]), name
            assert same.residual[own].equal(info.residual[k])
            assert same.iterations[own].equal(info.iterations[k])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_singular_matrices_have_no_root_without_damping(method: str, backend: str):
    g = torch.Generator().manual_seed(5)
    for n in (2, 5, 29):
        for missing in {1, 3} & set(range(1, n)):
            # Gram matrices of small integers are exact, and so is their rank.
            factor = torch.randint(-6, 7, (6, n, n - missing), generator=g).float()
            singular = factor @ factor.mT
            regular = with_eigenvalues(eigenvalues("geometric", n, 1e6)).float()
            for p in EXPONENTS:
                x, info = sl.ops.inverse_root(torch.cat([singular, regular[None]]), p, 0.0, method, backend=backend)
                assert info.status.tolist() == 6 * [RootStatus.FAILED] + [RootStatus.CONVERGED]
                assert x[:-1].isnan().all()
                assert x[-1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_roots_at_the_end_of_fp64(backend: str):
    eye = torch.eye(2, dtype=torch.float64)
    for tiny in (1e-308, 5e-309):
        x, info = sl.ops.inverse_root(torch.stack([eye, tiny * eye]), 1, method="newton", backend=backend)
        reachable = 1.0 / tiny < math.inf
        # The last of Newton's steps squares the distance from I. Each step rounds sums of two twice, and so do the
        # scales before and after.
        rounding = 2.0 * 2.0 * (int(info.iterations.max()) + 2) * 2.0**-53
        close = {"rtol": 0.0, "atol": NEAR_IDENTITY_WIDE**2 + rounding}
        assert info.status.tolist() == [RootStatus.CONVERGED, RootStatus.CONVERGED if reachable else RootStatus.FAILED]
        torch.testing.assert_close(x[0], eye, **close)
        if reachable:
            torch.testing.assert_close(x[1] * tiny, eye, **close)


def test_absolute_damping_of_tiny_matrices():
    for backend in BACKENDS:
        for method in METHODS:
            x, info = sl.ops.inverse_root(1e-38 * torch.eye(2), 2, 1e3, method, backend=backend)
            assert int(info.status) == RootStatus.CONVERGED
            torch.testing.assert_close(x, 1e3**-0.5 * torch.eye(2))


@pytest.mark.parametrize("method", METHODS)
def test_a_root_that_is_too_large_has_failed(method: str):
    a = torch.stack([1e-39 * torch.eye(2), torch.eye(2)])
    for run in (sl.ops.inverse_root, sl.reference.inverse_root):
        x, info = run(a, 1, method=method)
        assert info.status.tolist() == [RootStatus.FAILED, RootStatus.CONVERGED]
        assert info.status.dtype == torch.int8
        assert x[0].isnan().all()
        assert info.residual[0].isnan()
        torch.testing.assert_close(x[1], torch.eye(2))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_lists_are_what_their_members_are(method: str, backend: str, threads: int):
    torch.set_num_threads(threads)
    shapes = ((3, 3), (2, 3, 7, 7), (0, 4, 4), (1, 1), (2, 0, 0), (3, 2, 2))
    given = [torch.zeros(shape) for shape in shapes]
    for a in given:
        for k, own in enumerate(a.reshape(a.shape[:-2].numel(), *a.shape[-2:])):
            own.copy_(with_eigenvalues(eigenvalues("linear", a.shape[-1], 10.0 + k), seed=k))
    roots, infos = sl.ops.inverse_root(given, 2, method=method, backend=backend)
    assert isinstance(roots, list)
    for a, x, info in zip(given, roots, infos, strict=True):
        assert x.shape == a.shape
        alone, own = sl.ops.inverse_root(a, 2, method=method, backend=backend)
        assert torch.equal(alone, x)
        for value, other in zip(info, own, strict=True):
            assert value.shape == a.shape[:-2]
            assert torch.equal(value, other)
    assert sl.ops.inverse_root([], 2) == ([], [])


def test_what_is_given_is_left_alone_and_may_have_any_strides():
    a = all_spectra(7, 1e3)
    wide = torch.zeros(7, 2, 4, 7)
    wide[:, 1] = a.permute(1, 0, 2)
    strided = wide[:, 1].permute(1, 0, 2)
    assert not strided.is_contiguous()
    before = strided.clone()
    for method in METHODS:
        x, _ = sl.ops.inverse_root(strided, 4, 1e-3, method, relative_eps=1e-3)
        expected, _ = sl.ops.inverse_root(a, 4, 1e-3, method, relative_eps=1e-3)
        # Products of other strides are summed in another order: κ·2^-23 of fp32's, with damping of 2e-3.
        assert relative_error(x, expected.double()) <= 500 * 7 * 2.0**-23
        assert torch.equal(strided, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_half_types_are_storage(method: str, dtype: torch.dtype):
    a = all_spectra(9, 30.0, dtype)
    x, info = sl.ops.inverse_root(a, 2, 0.1, method)
    wide, other = sl.ops.inverse_root(a.float(), 2, 0.1, method)
    assert (x.dtype, info.residual.dtype) == (torch.float32, torch.float32)
    assert torch.equal(x, wide)
    assert torch.equal(info.residual, other.residual)


def test_gradients_do_not_flow():
    x, _ = sl.ops.inverse_root(torch.eye(3, requires_grad=True), 2)
    assert not x.requires_grad


def test_auto_is_eigh_on_a_cpu():
    a = all_spectra(17, 1e4)
    assert torch.equal(sl.ops.inverse_root(a, 4)[0], sl.ops.inverse_root(a, 4, method="eigh")[0])


def test_an_iteration_that_ends_early_gives_the_nearest_it_found():
    d = with_eigenvalues(eigenvalues("half small", 16, 1e6))
    root, steps, status = coupled_newton(d, 4, 0.0, 1e4, most_steps=2)
    # Allowed for a condition of 1e4, what is below is not brought near 1 in two more steps.
    assert status == RootStatus.FAILED
    assert steps == len(starts(4, 1e4)) + 2
    assert root.isfinite().all()
    # Without polynomials before it one step is too few. The nearest is what the step began with, a multiple of I.
    d = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))
    root, steps, status = coupled_newton(d, 1, 0.5, 1.05, most_steps=1)
    assert (steps, status) == (1, RootStatus.STALLED)
    assert torch.equal(root, torch.diag(root[0, 0].repeat(2)))


# Minimax polynomials


def extrema(a: float, b: float, c: float, p: int, low: float) -> Tensor:
    """x(a + bx^p + cx^(2p)) at the ends of [low, 1], and where it turns, to the fp64 rounding: it is flat there."""
    x = torch.linspace(low, 1.0, 1000, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        return a + (p + 1) * b * x**p + (2 * p + 1) * c * x ** (2 * p)

    left = (slope(x[:-1]) * slope(x[1:]) < 0).nonzero().flatten()
    below, above = x[left], x[left + 1]
    for _ in range(50):
        middle = (below + above) / 2
        same = slope(middle) * slope(below) > 0
        below, above = torch.where(same, middle, below), torch.where(same, above, middle)
    x = torch.tensor([low, *below.tolist(), 1.0], dtype=torch.float64)
    return x * (a + b * x**p + c * x ** (2 * p))


@pytest.mark.parametrize("condition", [1.3, 10.0, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("p", EXPONENTS)
def test_the_starts_equioscillate(p: int, condition: float):
    low = condition ** (-1.0 / p)
    coefficients, error = minimax(low, p)
    deviation = extrema(*coefficients, p, low) - 1.0
    # Three coefficients: four extrema of alternating sign and one size, which no other polynomial of the kind is below.
    assert len(deviation) == 4
    assert deviation.sign().tolist() == [-1, 1, -1, 1]
    # Terms of up to 25 cancel.
    expected = torch.full((4,), error, dtype=torch.float64)
    torch.testing.assert_close(deviation.abs(), expected, rtol=0, atol=8 * 25 * 2.0**-53)


def test_the_published_start():
    (a, b, c), _ = minimax(1e6 ** (-1.0 / 4), 4)
    assert (a, b, c) == pytest.approx((4.5475, -14.2209, 11.5297), abs=1e-4)


@pytest.mark.parametrize("p", EXPONENTS)
def test_starts_follow_each_other(p: int):
    for condition in (1e4, 1e8):
        low = condition ** (-1.0 / p)
        for start in starts(p, condition):
            # It is made for all that the one before leaves, and turns no sign.
            assert start.condition ** (-1.0 / p) == pytest.approx(low, rel=1e-6)
            image = extrema(start.a, start.b, start.c, p, low)
            low = float(image.min())
            assert low > 0.0
            assert float(image.max()) == pytest.approx(1.0, abs=1e-13)
        assert low >= NEAR


def test_no_eigenvalue_turns_its_sign():
    # Three quarters of the bound √‖A²‖F of λmax is where the first polynomial for p = 1 is least, 9e-8 for κ = 1e8.
    bound = 1.0 / 0.75 / (1.0 + 2.0**-10)
    values = torch.tensor([1.0, 1.0, 1.0, (bound**4 - 3.0) ** 0.25, 1e-7], dtype=torch.float64)
    x, info = sl.ops.inverse_root(torch.diag(values), 1, method="newton")
    assert int(info.status) == RootStatus.CONVERGED
    # κ·n·2^-53
    torch.testing.assert_close(x.diagonal(), 1.0 / values, rtol=1e7 * 5 * 2.0**-53, atol=0)


# Refusals

EYE = torch.eye(3)
UNEVEN = torch.tensor([[1.0, 0.5], [0.25, 1.0]])
REFUSED: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
    (torch.ones(2, 3), {}, ValueError, r"A has shape \(2, 3\), expected square matrices \(..., n, n\)"),
    (torch.ones(3), {}, ValueError, r"A has shape \(3,\), expected square"),
    (torch.tensor(1.0), {}, ValueError, r"A has shape \(\), expected square"),
    (UNEVEN, {}, ValueError, r"A is not symmetric: matrix 0 has 0.5 at \(0, 1\) and 0.25 at \(1, 0\)"),
    (UNEVEN.bfloat16(), {}, ValueError, r"A is not symmetric: matrix 0 has 0.5"),
    (UNEVEN.half(), {}, ValueError, r"A is not symmetric: matrix 0 has 0.5"),
    (1e-30 * UNEVEN, {}, ValueError, r"A is not symmetric"),
    (torch.stack([math.nan * EYE, EYE + EYE.roll(1, 0)]), {}, ValueError, r"matrix 1 has .* at \("),
    ([EYE, UNEVEN], {}, ValueError, r"A\[1\] is not symmetric"),
    ([EYE, torch.ones(2, 3)], {}, ValueError, r"A\[1\] has shape \(2, 3\)"),
    (EYE.int(), {}, TypeError, r"A has dtype torch.int32"),
    (EYE.bool(), {}, TypeError, r"A has dtype torch.bool"),
    (EYE.to(torch.complex64), {}, TypeError, r"A has dtype torch.complex64"),
    ([EYE, [[1.0]]], {}, TypeError, r"A\[1\]"),
    (EYE, {"p": 3}, ValueError, r"p=3 is not supported, expected one of 1, 2, 4"),
    (EYE, {"p": 0}, ValueError, r"p=0 is not supported"),
    (EYE, {"p": -2}, ValueError, r"p=-2 is not supported"),
    (EYE, {"p": 2.0}, ValueError, r"p=2.0 is not supported"),
    (EYE, {"p": True}, ValueError, r"p=True is not supported"),
    (EYE, {"p": "4"}, ValueError, r"p='4' is not supported"),
    (EYE, {"eps": -1e-3}, ValueError, r"eps=-0.001 is out of range, expected a finite number of at least 0"),
    (EYE, {"eps": math.nan}, ValueError, r"eps=nan is out of range"),
    (EYE, {"eps": math.inf}, ValueError, r"eps=inf is out of range"),
    (EYE, {"eps": True}, TypeError, r"eps must be a number, got True"),
    (EYE, {"eps": 10**400}, ValueError, r"eps=10+ is out of range"),
    (None, {}, TypeError, r"A must be a tensor or a list of tensors, got None"),
    (EYE, {"eps": "small"}, TypeError, r"eps must be a number, got 'small'"),
    (EYE, {"relative_eps": -1.0}, ValueError, r"relative_eps=-1.0 is out of range"),
    (EYE, {"relative_eps": math.nan}, ValueError, r"relative_eps=nan is out of range"),
    (EYE, {"relative_eps": None}, TypeError, r"relative_eps must be a number, got None"),
    (EYE, {"method": "svd"}, ValueError, r"method='svd' is unknown, expected one of 'auto', 'eigh', 'newton'"),
    (EYE, {"method": None}, ValueError, r"method=None is unknown"),
    (EYE, {"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
)


@pytest.mark.parametrize(("a", "arguments", "error", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_refusals(a: Any, arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        sl.ops.inverse_root(a, **({"p": 2} | arguments))


def test_a_damping_may_be_any_real_number():
    x, _ = sl.ops.inverse_root(EYE, 2, Fraction(1, 4))
    assert torch.equal(x, sl.ops.inverse_root(EYE, 2, 0.25)[0])


def test_the_smallest_numbers_may_be_rounded_too():
    a = torch.tensor([[3e-42, 1e-42], [1e-42 + 1.4e-45, 3e-42]])
    assert int(sl.ops.inverse_root(a, 4, 1e-12)[1].status) == RootStatus.CONVERGED


def test_rounding_is_no_asymmetry():
    x = torch.randn(64, 5000)
    gram = x @ x.T
    uneven = gram + 100 * 2.0**-23 * float(gram.abs().max()) * torch.ones(64, 64).triu(1)
    sl.ops.inverse_root(uneven, 2)
    for dtype, eps in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        off = (gram / 5000).to(dtype)
        off[0, 1] = off[0, 1] + eps * off.abs().max()
        sl.ops.inverse_root(off, 2)
    with pytest.raises(ValueError, match="not symmetric"):
        sl.ops.inverse_root(gram + 600 * 2.0**-23 * float(gram.abs().max()) * torch.ones(64, 64).triu(1), 2)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch):
    reason = next(backend for backend in backends.TABLE if backend.name == name).missing()
    if reason is not None:
        with pytest.raises(RuntimeError, match=rf"backend='{name}' cannot run"):
            sl.ops.inverse_root(EYE, 2, backend=name)
    # What is refused before the device is asked for anything.
    monkeypatch.setattr(backends, "check_available", lambda name: None)
    with pytest.raises(ValueError, match=rf"method='eigh' is not what backend='{name}' computes"):
        sl.ops.inverse_root(EYE, 2, method="eigh", backend=name)
    with pytest.raises(TypeError, match=rf"A has dtype torch.float64, which backend='{name}' does not take"):
        sl.ops.inverse_root(EYE.double(), 2, backend=name)


def test_relative_damping_of_a_matrix_without_positive_sums():
    """Its one eigenvector is orthogonal to every vector of equal elements."""
    A = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    exact = torch.linalg.inv(A.double() + 0.2 * torch.eye(2, dtype=torch.float64))
    for method in ("eigh", "newton"):
        X, info = sl.ops.inverse_root(A, 1, method=method, relative_eps=0.1)
        assert int(info.status) == sl.ops.RootStatus.CONVERGED
        assert float((X.double() - exact).norm() / exact.norm()) < 1e-5


def test_damping_that_leaves_zeros():
    _, info = sl.ops.inverse_root(-torch.eye(3), 2, 1.0, "newton")
    assert int(info.status) == sl.ops.RootStatus.FAILED
