"""What sl.Muon has beyond torch's, MuonH, QK-Clip: against the reference functions, and refused with the values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rounding import STORED, allowed_error
from test_muon import matrix
from torch import Tensor
from torch_cases import assert_unchanged, copy_of, normal, random_gradients, snapshot

import stepladder as sl
from stepladder import reference
from stepladder.coefficients import SETS
from stepladder.newton_schulz import TORCH, UNIT_VARIABLE, matrix_unit
from stepladder.optim.memory import waves_of
from stepladder.reference.muon import adamuon_update, decayed, normuon_update

DOUBLE = torch.float64
# Relative error of an iteration whose operands are bf16; see test_muon.py.
RELATIVE = 0.06


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Of two orders of operations in fp64: five steps lift a rounding of 2⁻⁵³ by up to 3.4445⁵ = 485, and each of up to
# four steps of the optimizer has some tens of them.
WIDE = 4 * 50 * 485 * 2.0**-53


def parameter(shape: tuple[int, ...], dtype: torch.dtype = DOUBLE, seed: int = 0) -> torch.nn.Parameter:
    return copy_of(normal([shape], dtype, seed)[0])


# Every option, in fp64, where the optimizer and the functions of the reference agree to rounding.

NAMES = ("lr", "weight_decay", "momentum", "nesterov", "momentum_form", "ns_coefficients", "ns_steps", "eps")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum_form": "sum", "momentum": 0.9},
    {"momentum_form": "sum", "momentum": 0.9, "nesterov": False},
    {"momentum": 0.3},
    {"cautious_weight_decay": True},
    {"adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "spectral"},
    {"adjust_lr_fn": "essay"},
    {"adjust_lr_fn": 0.25},
    {"adjust_lr_fn": 3},
    *({"ns_coefficients": name, "ns_steps": None} for name in SETS),
    {"ns_coefficients": "polar_express"},
    {"ns_coefficients": "aol4", "ns_steps": 6},
    {"ns_coefficients": None, "ns_steps": 3},
    {"ns_coefficients": [[3.0, -3.2, 1.2], (2.0, -1.5, 0.5)], "ns_steps": 4},
    {"ns_coefficients": (2, -1.5, 0.5), "ns_steps": None, "ns_method": "gram"},
    {"variant": "normuon"},
    {"variant": "normuon", "beta2": 0.5, "adjust_lr_fn": "match_rms_adamw", "cautious_weight_decay": True},
    {"variant": "adamuon"},
    {"variant": "adamuon", "beta2": 0.0, "nesterov": False},
)


def by_reference(w: Tensor, grads: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Weights and states after steps with the reference functions, of matrices [..., m, n]."""
    options = {"lr": 0.1, "weight_decay": 0.2} | options
    variant = options.pop("variant", None)
    step = {None: reference.muon, "normuon": reference.normuon, "adamuon": reference.adamuon}[variant]
    states = [torch.zeros_like(w)]
    if variant == "normuon":
        m, n = w.shape[-2:]
        states.append(w.new_zeros((*w.shape[:-2], m, 1) if m >= n else (*w.shape[:-2], 1, n)))
    if variant == "adamuon":
        states.append(torch.zeros_like(w))
    for g in grads:
        w, *states = step(w, g, *states, **options)
    return [w, *states]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_the_references(options: dict[str, Any], shape: tuple[int, ...], backend: str | None):
    p = parameter(shape)
    grads = normal([shape] * 4, DOUBLE, 1)
    expected = by_reference(p.detach().clone(), grads, options)
    optimizer = sl.Muon([p], lr=0.1, weight_decay=0.2, backend=backend, **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
    for found, value in zip([p.detach(), *optimizer.state[p].values()], expected, strict=True):
        torch.testing.assert_close(found, value, rtol=WIDE, atol=WIDE)


@pytest.mark.parametrize("options", OPTIONS[:6] + OPTIONS[-4:], ids=str)
def test_options_in_fp32_and_their_sizes(options: dict[str, Any]):
    p = copy_of(matrix((24, 10), 0))
    grads = [matrix((24, 10), seed) for seed in range(3)]
    expected = by_reference(p.detach().double(), [g.double() for g in grads], options)
    optimizer = sl.Muon([p], lr=0.1, weight_decay=0.2, **options)
    for g in grads:
        p.grad = g
        optimizer.step()
    # The reference's update is no longer than 1.3 a singular value; AdaMuon's has the norm 0.2√(mn).
    scale = reference.adjustment(options.get("adjust_lr_fn"), 24, 10)
    length = 0.2 * math.sqrt(240) if options.get("variant") == "adamuon" else 1.3 * math.sqrt(10) * scale
    # Normalising by the elements' own sizes turns their absolute errors into relative ones.
    relative = RELATIVE if options.get("variant") != "adamuon" else 4 * RELATIVE
    assert float((p.detach().double() - expected[0]).norm()) <= 3 * (0.1 * relative * length + 1e-5)


def test_normuons_update_has_the_norm_of_the_plain_one_and_equal_neurons():
    o = matrix((40, 10), 3, DOUBLE)
    v = torch.zeros(40, 1, dtype=DOUBLE)
    update, v = normuon_update(o, v, 0.5)
    torch.testing.assert_close(update.norm(), o.norm())
    torch.testing.assert_close(v, 0.5 * o.square().mean(1, keepdim=True))
    # At the first step, every row is divided by its own size.
    torch.testing.assert_close(update.square().sum(1), torch.full((40,), float(o.square().sum() / 40), dtype=DOUBLE))


def test_adamuons_first_update_is_the_sign():
    o = matrix((6, 4), 3, DOUBLE)
    update, v = adamuon_update(o, torch.zeros(6, 4, dtype=DOUBLE), 0.75)
    # O/√(O²/4) is ±2, and what has the norm 0.2√(mn) then ±0.2; ε is 1e-8.
    smallest = float(o.abs().min()) / 2
    torch.testing.assert_close(update, 0.2 * o.sign(), rtol=2 * 1e-8 / smallest, atol=0)
    torch.testing.assert_close(v, 0.25 * o.square())
    assert float(update.norm()) == pytest.approx(0.2 * math.sqrt(24))


def test_cautious_decay_by_hand():
    w = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=DOUBLE)
    update = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=DOUBLE)
    result = decayed(w, update, 0.5, 0.2, True)
    assert result.tolist() == [[0.9, -1.0], [1.0, -0.9]]


# Shapes. In fp64, each way to make matrices is the same as doing so by hand.


def steps(optimizer: Any, params: list[Tensor], grads: list[list[Tensor]]) -> None:
    for gradients in grads:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()


SHAPED: tuple[tuple[tuple[int, ...], dict[str, Any], list[tuple[int, ...]]], ...] = (
    # A parameter's shape, keys of its group, and the matrices [..., m, n] of consecutive rows that it is made of.
    ((6, 3, 2, 2), {}, [(6, 12)]),
    ((6, 3, 2, 2, 2), {}, [(6, 24)]),
    ((6, 3, 2, 2), {"flatten": True}, [(6, 12)]),
    ((6, 3, 4), {}, [(6, 3, 4)]),
    ((6, 3, 4), {"flatten": True}, [(6, 12)]),
    ((2, 3, 4, 5), {"flatten": False}, [(2, 3, 4, 5)]),
    ((12, 5), {"flatten": True}, [(12, 5)]),
    ((12, 5), {"split_sizes": (6, 3, 3)}, [(6, 5), (3, 5), (3, 5)]),
    ((12, 5), {"split_sizes": [10, 2]}, [(10, 5), (2, 5)]),
    ((12, 5), {"num_heads": 3}, [(3, 4, 5)]),
    ((12, 5), {"num_heads": 1}, [(12, 5)]),
    ((12, 5), {"num_heads": [4]}, [(4, 3, 5)]),
    ((12, 5), {"split_sizes": (6, 3, 3), "num_heads": 3}, [(3, 2, 5), (3, 1, 5), (3, 1, 5)]),
    ((12, 5), {"split_sizes": (6, 4, 2), "num_heads": (3, 2, 1)}, [(3, 2, 5), (2, 2, 5), (1, 2, 5)]),
    ((8, 3, 2, 2), {"num_heads": 2}, [(2, 4, 12)]),
)


@pytest.mark.parametrize("options", [{}, {"variant": "normuon"}, {"variant": "adamuon"}, {"h": True}], ids=str)
@pytest.mark.parametrize(("shape", "keys", "parts"), SHAPED, ids=str)
def test_parameters_are_made_of_matrices(shape: Any, keys: dict[str, Any], parts: list[Any], options: dict[str, Any]):
    p = parameter(shape)
    grads = normal([shape] * 3, DOUBLE, 1)
    flat = [x.reshape(-1) for x in (p.detach(), *grads)]
    sizes = [math.prod(part) for part in parts]
    # One parameter for each part, of the values that stand one after the other.
    values, *gradients = [[c.view(s).clone() for c, s in zip(x.split(sizes), parts, strict=True)] for x in flat]
    q = [copy_of(x) for x in values]
    if "h" in options:
        whole, apart = sl.MuonH([{"params": [p], **keys}], lr=0.1), sl.MuonH(q_groups(q), lr=0.1)
    else:
        whole, apart = sl.Muon([{"params": [p], **keys}], lr=0.1, **options), sl.Muon(q_groups(q), lr=0.1, **options)
    steps(whole, [p], [[g] for g in grads])
    steps(apart, q, gradients)
    torch.testing.assert_close(
        p.detach().reshape(-1), torch.cat([x.detach().reshape(-1) for x in q]), rtol=WIDE, atol=WIDE
    )
    assert whole.state[p]["momentum_buffer"].shape == p.shape
    # A checkpoint of it fits.
    twin = type(whole)([{"params": [copy_of(p)], **keys}], **{k: v for k, v in options.items() if k != "h"})
    twin.load_state_dict(whole.state_dict())
    (state,) = twin.state.values()
    for name, value in whole.state[p].items():
        assert torch.equal(state[name], value)


def q_groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params, "flatten": False}]


def test_parts_are_scaled_by_their_own_shapes():
    p = parameter((12, 4))
    w = p.detach().clone()
    exact = {"ns_coefficients": "jordan8_exact2", "ns_steps": None}
    optimizer = sl.Muon([{"params": [p], "split_sizes": (8, 4)}], lr=0.5, weight_decay=0, momentum=0.0, **exact)
    p.grad = matrix((12, 4), 1, DOUBLE)
    optimizer.step()
    moved = (w - p.detach()).split((8, 4))
    # Eight steps end between 0.68 and 1.14, and the two exact ones take that to within 0.0006 of 1.
    for part, scale in zip(moved, (math.sqrt(2), 1.0), strict=True):
        torch.testing.assert_close(
            torch.linalg.svdvals(part / (0.5 * scale)), torch.ones(4, dtype=DOUBLE), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("variant", [None, "normuon", "adamuon"])
@pytest.mark.parametrize("gradient", ["channels_last", "contiguous"])
def test_a_convolution_in_any_memory_format(gradient: str, variant: str | None):
    w = normal([(6, 5, 3, 3)], DOUBLE, 0)[0]
    grads = normal([(6, 5, 3, 3)] * 3, DOUBLE, 1)
    p, q = copy_of(w), copy_of(w.to(memory_format=torch.channels_last))
    wide = torch.zeros(6, 5, 3, 4, dtype=DOUBLE)
    r = torch.nn.Parameter(wide[..., :3])
    with torch.no_grad():
        r.copy_(w)
    assert q.is_contiguous(memory_format=torch.channels_last)
    for x in (p, q, r):
        optimizer = sl.Muon([x], lr=0.1, variant=variant)
        for g in grads:
            x.grad = g.to(memory_format=getattr(torch, f"{gradient}_format" if gradient == "contiguous" else gradient))
            optimizer.step()
        found = [x.detach(), *optimizer.state[x].values()]
        if x is p:
            expected = found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=WIDE, atol=WIDE)
        assert optimizer.state[x]["momentum_buffer"].stride() == torch.empty_like(x).stride()
    assert not wide[..., 3].any()


def test_transposed_and_sliced_matrices():
    w, grads = normal([(6, 9)], DOUBLE, 0)[0], normal([(6, 9)] * 3, DOUBLE, 1)
    base = torch.zeros(12, 20, dtype=DOUBLE)
    views = [w.clone(), w.t().clone().t(), base[::2, 1:19:2]]
    params = [torch.nn.Parameter(x) for x in views]
    with torch.no_grad():
        params[2].copy_(w)
    optimizer = sl.Muon([{"params": params, "num_heads": 2}], lr=0.1)
    steps(optimizer, params, [[g, g.t().contiguous().t(), g] for g in grads])
    for p in params[1:]:
        torch.testing.assert_close(p.detach(), params[0].detach(), rtol=WIDE, atol=WIDE)


IN_OUT: tuple[dict[str, Any], ...] = (
    *({"adjust_lr_fn": scale} for scale in (None, "match_rms_adamw", "spectral", "essay", 0.3)),
    {"split_sizes": (2, 4)},
    {"num_heads": 3},
    {"split_sizes": (4, 2), "num_heads": (2, 1), "adjust_lr_fn": "spectral"},
    {"variant": "normuon"},
    {"variant": "normuon", "split_sizes": (2, 4)},
    {"variant": "adamuon", "num_heads": 2},
    {"cautious_weight_decay": True},
)


def in_and_out(cls: type[Any], shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, **more: Any) -> Any:
    """Optimizers after three steps, of a weight [..., out, in] and of the same, stored as [..., in, out]."""
    w, *grads = normal([shape] * 4, dtype, 0)
    p, q = copy_of(w), copy_of(w.mT.contiguous())
    ours = cls([{"params": [p], **options}], lr=0.1, **more)
    stored = cls([{"params": [q], "fan_in_fan_out": True, **options}], lr=0.1, **more)
    steps(ours, [p], [[g] for g in grads])
    steps(stored, [q], [[g.mT.contiguous()] for g in grads])
    assert q.is_contiguous()
    assert stored.state[q]["momentum_buffer"].shape == q.shape
    return ours, stored


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 9), (6, 6), (2, 6, 3)], ids=str)
@pytest.mark.parametrize("options", [*IN_OUT, {"h": True}, {"h": True, "num_heads": 2}], ids=str)
def test_weights_stored_as_in_out(options: dict[str, Any], shape: tuple[int, ...], backend: str | None):
    cls = sl.MuonH if "h" in options else sl.Muon
    options = {key: value for key, value in options.items() if key != "h"}
    ours, stored = in_and_out(cls, shape, options, DOUBLE, backend=backend)
    (p,), (q,) = (optimizer.param_groups[0]["params"] for optimizer in (ours, stored))
    torch.testing.assert_close(q.detach().mT, p.detach(), rtol=WIDE, atol=WIDE)
    for name, value in ours.state[p].items():
        found = stored.state[q][name]
        # Statistics of neurons are of the matrix, everything else is stored as the weight.
        found = found if name == "radius" or (options.get("variant") == "normuon" and "second" in name) else found.mT
        torch.testing.assert_close(found, value, rtol=WIDE, atol=WIDE)
    twin = cls([{"params": [copy_of(q)], "fan_in_fan_out": True, **options}], backend=backend)
    twin.load_state_dict(stored.state_dict())
    assert torch.equal(next(iter(twin.state.values()))["momentum_buffer"], stored.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (48, 48), (2, 12, 20)], ids=str)
def test_the_kernels_see_no_difference_in_weights_stored_as_in_out(shape: tuple[int, ...]):
    """Bit for bit: the same matrix by other strides."""
    if matrix_unit() == TORCH:
        pytest.skip("torch's own products may depend on the strides")
    ours, stored = in_and_out(sl.Muon, shape, {"num_heads": 2}, torch.float32)
    assert torch.equal(stored.param_groups[0]["params"][0].mT, ours.param_groups[0]["params"][0])


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral", "essay", 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_the_reference_of_weights_stored_as_in_out(scale: str | float, dtype: torch.dtype):
    w, g, u = normal([(3, 6, 4)] * 3, dtype, 0)
    v = torch.rand(3, 6, 1, dtype=dtype)
    for step, states in ((reference.muon, (u,)), (reference.normuon, (u, v))):
        expected = step(w, g, *states, lr=0.1, adjust_lr_fn=scale)
        found = step(w.mT, g.mT, u.mT, *states[1:], lr=0.1, adjust_lr_fn=scale, fan_in_fan_out=True)
        assert found[0].dtype == dtype
        turned = [found[0].mT, found[1].mT, *found[2:]]
        assert all(torch.equal(a, b) for a, b in zip(turned, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (3, 0, 2, 2)], ids=str)
@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
def test_empty_parameters(cls: type[Any], shape: tuple[int, ...]):
    p, q = parameter(shape), parameter((3, 3))
    optimizer = cls([p, q])
    steps(optimizer, [p, q], [random_gradients([p, q], 0)])
    assert optimizer.state[p]["momentum_buffer"].shape == shape


def test_one_iteration_for_all_matrices(monkeypatch):
    from stepladder.optim import matrix as module

    calls: list[list[tuple[int, ...]]] = []
    newton_schulz = sl.ops.newton_schulz

    def counted(X: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append([tuple(x.shape) for x in X])
        return newton_schulz(X, *args, **kwargs)

    monkeypatch.setattr(module.ops, "newton_schulz", counted)
    monkeypatch.setenv(UNIT_VARIABLE, TORCH)
    shapes = [(6, 4), (4, 6), (2, 3, 4), (8, 2, 2, 2)]
    p = [copy_of(x) for x in normal([*shapes, (6, 4)], torch.float32, 0)]
    # Other rates, decays and scales do not part them.
    groups = [{"params": p[:2], "lr": 0.3}, {"params": p[2:4], "adjust_lr_fn": "essay"}]
    groups.append({"params": p[4:], "split_sizes": (4, 2), "variant": "normuon"})
    optimizer = sl.Muon(groups)
    steps(optimizer, p, [random_gradients(p, 0)])
    assert calls == [[(6, 4), (4, 6), (2, 3, 4), (8, 8), (4, 4), (2, 4)]]


def test_one_call_of_the_kernels_for_all_matrices(monkeypatch):
    from stepladder.optim import matrix as module

    if matrix_unit() == TORCH:
        pytest.skip("no matrix unit runs here")
    calls = []
    run = module.run_compiled
    monkeypatch.setattr(module, "run_compiled", lambda *args: (calls.append(1), run(*args)))
    p = [copy_of(x) for x in normal([(6, 4), (4, 6), (2, 3, 4), (8, 2, 2, 2)], torch.float32, 0)]
    groups = [{"params": p[:2], "lr": 0.3, "ns_coefficients": "you"}, {"params": p[2:], "momentum_form": "sum"}]
    optimizer = sl.Muon(groups)
    for seed in range(2):
        steps(optimizer, p, [random_gradients(p, seed)])
    assert len(calls) == 2


def test_parameters_that_share_memory_step_one_after_another():
    start, steps_each = torch.randn(300, 300), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(10):
            w = start.clone()
            p, q, other = (torch.nn.Parameter(x) for x in (w, w.view(300, 300), torch.randn(40, 40)))
            optimizer = sl.Muon([p, other, q], lr=0.1)
            generator = torch.Generator().manual_seed(1)
            for x in (p, other, q):
                x.grad = torch.randn(x.shape, generator=generator)
            optimizer.step()
            steps_each.append(p.detach().clone())
    assert all(torch.equal(steps_each[0], x) for x in steps_each[1:])
    # Two updates of 300 singular values near 1 each, at right angles but for chance.
    assert float((steps_each[0] - start).norm()) > 0.1 * 300**0.5


def test_waves():
    w = torch.zeros(10, 4)
    params = [w, torch.zeros(3, 3), w[2:], torch.zeros(0, 4), w[:2], w.T]
    assert waves_of(params) == [[0, 1], [2], [4], [5]]
    assert waves_of([w[:2], w[2:5], w[5:]]) == [[0, 1, 2]]
    assert waves_of([]) == []


@pytest.mark.parametrize("column", ["gradient", "buffer"])
def test_a_wide_column_beside_a_narrow_parameter(column: str):
    p, q = (torch.nn.Parameter(torch.ones(6, 4) * 0.5) for _ in range(2))
    for x in (p, q):
        x.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    optimizers = [sl.Muon([x]) for x in (p, q)]
    for optimizer in optimizers:
        optimizer.step()
    if column == "buffer":
        optimizers[0].state[p]["momentum_buffer"] = optimizers[0].state[p]["momentum_buffer"].double()
    elif hasattr(p, "grad_dtype"):
        p.grad_dtype = None
        p.grad = p.grad.double()
    else:
        pytest.skip("this torch has no Tensor.grad_dtype")
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=2.0**-6, atol=2.0**-16)


def test_an_expanded_gradient_is_unscaled():
    p, q = parameter((6, 4)), torch.nn.Parameter(torch.zeros(3))
    p.grad, q.grad = torch.full((1,), 8.0, dtype=p.dtype).expand(6, 4), torch.ones(3)
    optimizer = sl.Muon([{"params": [p]}, {"params": [q], "algorithm": "adamw"}])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(p.grad, torch.full((6, 4), 2.0, dtype=p.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"momentum_form": "sum", "maximize": True}], ids=str)
def test_the_kernels_do_what_the_parts_do(
    options: dict[str, Any], state_dtype: torch.dtype | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    shapes = [(40, 40), (33, 70), (70, 33), (2, 36, 50), (5, 3), (48, 4, 3, 3)]
    results = []
    for unit in (None, TORCH):
        if unit:
            monkeypatch.setenv(UNIT_VARIABLE, unit)
        p = [copy_of(x) for x in normal(shapes, dtype, 0)]
        before = [x.detach().clone() for x in p]
        optimizer = sl.Muon(p, lr=0.5, state_dtype=state_dtype, **options)
        steps(optimizer, p, [random_gradients(p, 1)])
        results.append((p, [optimizer.state[x]["momentum_buffer"] for x in p]))
    for w, a, b, u, v in zip(before, results[0][0], results[1][0], results[0][1], results[1][1], strict=True):
        assert torch.equal(u, v)
        # What is orthogonalised is a multiple of the gradient at the first step. Both results have the error of their
        # roundings, and both weights are stored.
        x = u.float().flatten(1) if u.ndim > 3 else u.float()
        allowed = allowed_error(x, method="auto") + allowed_error(x, diagonal_apart=False)
        moved = float((b.detach().double() - (1 - 0.5 * 0.1) * w.double()).norm())
        stored = 2 * STORED[dtype] * float(w.double().norm() + b.detach().double().norm())
        assert float((a.detach().double() - b.detach().double()).norm()) < allowed * moved + stored


# MuonH


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum_form": "sum", "nesterov": False}, {"ns_coefficients": "you"}], ids=str
)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (3, 4, 4)], ids=str)
def test_muonh_is_the_references(shape: tuple[int, ...], options: dict[str, Any], backend: str | None):
    p = parameter(shape)
    grads = normal([shape] * 4, DOUBLE, 1)
    w, u = p.detach().clone(), torch.zeros(shape, dtype=DOUBLE)
    radius = torch.linalg.matrix_norm(w)
    optimizer = sl.MuonH([p], lr=0.1, backend=backend, **options)
    for g in grads:
        w, u = reference.muonh(w, g, u, radius, lr=0.1, **options)
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), w, rtol=WIDE, atol=WIDE)
    torch.testing.assert_close(optimizer.state[p]["radius"], radius)
    torch.testing.assert_close(torch.linalg.matrix_norm(p.detach()), radius, rtol=1e-14, atol=0)


def test_muonh_by_hand():
    # Of a matrix with equal singular values, the update is a multiple of the gradient.
    w, g = torch.eye(2, dtype=DOUBLE), torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=DOUBLE)
    p = torch.nn.Parameter(w.clone())
    optimizer = sl.MuonH([p], lr=0.5)
    p.grad = g
    optimizer.step()
    moved = w - 0.5 * g / 3.0
    torch.testing.assert_close(p.detach(), moved * (w.norm() / moved.norm()), rtol=1e-12, atol=1e-15)


def test_muonh_keeps_the_norm_over_a_thousand_steps():
    p = [copy_of(x) for x in normal([(30, 20), (4, 8, 8), (5, 3, 3, 3)], torch.float32, 0)]
    with torch.no_grad():
        p[0].mul_(1e-3)
        p[1].mul_(1e3)
    groups = [{"params": p[:2]}, {"params": p[2:], "num_heads": 5}]
    optimizer = sl.MuonH(groups, lr=0.05)

    def norms() -> Tensor:
        a, b, c = (x.detach().double() for x in p)
        return torch.cat([a.norm()[None], b.norm(dim=(1, 2)), c.flatten(1).norm(dim=1)])

    before = norms()
    start = [x.detach().clone() for x in p]
    for step in range(1000):
        for x, g in zip(p, random_gradients(p, step), strict=True):
            x.grad = g
        optimizer.step()
    assert float(((norms() - before) / before).abs().max()) <= 1e-6
    assert all(float((x.detach() - w).norm()) > 0.5 * float(w.norm()) for x, w in zip(p, start, strict=True))


def test_muonhs_radius_is_fp32_and_comes_from_the_checkpoint():
    p = parameter((4, 4), torch.bfloat16)
    optimizer = sl.MuonH([p], lr=0.1)
    p.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    optimizer.step()
    radius = optimizer.state[p]["radius"]
    assert (radius.dtype, radius.shape) == (torch.float32, ())
    other = copy_of(10 * p.detach())
    twin = sl.MuonH([other], lr=0.1)
    twin.load_state_dict(optimizer.state_dict())
    other.grad = torch.randn(4, 4).bfloat16()
    twin.step()
    assert other.detach().float().norm().item() == pytest.approx(float(radius), rel=2.0**-8)
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["radius"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"the state 'radius' of parameter 0 has shape \(2,\), expected \(\)"):
        twin.load_state_dict(state_dict)


def test_a_matrix_of_zeros_has_no_radius():
    sound, zero = parameter((3, 3)), torch.nn.Parameter(torch.zeros(2, 3, 3))
    with torch.no_grad():
        zero[1] = 1.0
    optimizer = sl.MuonH([sound, zero])
    sound.grad, zero.grad = torch.ones(3, 3, dtype=DOUBLE), torch.ones(2, 3, 3)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 has a matrix of norm 0.0, which MuonH would keep"):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


# QK-Clip


def attention(heads: int, key_heads: int, d: int, rope: int, value: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    q, k = normal([(heads * (d + rope), 7), (key_heads * (d + value), 7)], DOUBLE, seed)
    return q, k


@pytest.mark.parametrize(
    ("heads", "key_heads", "rope", "value"), [(4, 4, 0, 0), (4, 2, 0, 0), (4, 1, 0, 0), (4, 4, 3, 0), (4, 4, 3, 5)]
)
def test_qk_clip_is_the_references(heads: int, key_heads: int, rope: int, value: int):
    query, key = attention(heads, key_heads, 6, rope, value)
    largest = torch.tensor([50.0, 400.0, -3.0, 101.0])
    q, k = torch.nn.Parameter(query.clone()), torch.nn.Parameter(key.clone())
    gamma = sl.qk_clip_(q, k, largest, rope_dim=rope, value_dim=value)
    expected_q, expected_k = reference.qk_clip(query, key, largest, rope_dim=rope, value_dim=value)
    torch.testing.assert_close(q.detach(), expected_q, rtol=1e-7, atol=0)
    torch.testing.assert_close(k.detach(), expected_k, rtol=1e-7, atol=0)
    assert gamma.shape == (4,)
    assert (q._version, k._version) == (1, 1)
    if key_heads == 4:
        torch.testing.assert_close(gamma, torch.tensor([1.0, 0.25, 1.0, 100 / 101], dtype=DOUBLE))


def test_qk_clip_brings_the_logits_down_to_tau():
    query, key = attention(4, 2, 6, 0, 0)
    x = normal([(20, 7)], DOUBLE, 5)[0]

    def largest(q: Tensor, k: Tensor) -> Tensor:
        queries = (x @ q.T).view(20, 4, 6).transpose(0, 1)  # [heads, tokens, d]
        keys = (x @ k.T).view(20, 2, 6).transpose(0, 1).repeat_interleave(2, 0)
        return (queries @ keys.mT).amax((1, 2)) / math.sqrt(6)

    before = largest(query, key)
    tau = float(before.median())
    gamma = sl.qk_clip_(query, key, before, tau)
    torch.testing.assert_close(largest(query, key), before * gamma)
    assert bool((largest(query, key) <= tau * (1 + 1e-12)).all())
    again = query.clone(), key.clone()
    sl.qk_clip_(query, key, largest(query, key).clamp(max=tau), tau)
    assert torch.equal(query, again[0])
    assert torch.equal(key, again[1])


def test_qk_clip_on_views_biases_and_half_precision():
    fused = torch.nn.Parameter(normal([(24, 5)], torch.bfloat16, 0)[0])
    before = fused.detach().clone()
    with torch.no_grad():
        sl.qk_clip_(fused[:8], fused[8:16], torch.tensor([400.0, 1.0]))
    assert torch.equal(fused[16:], before[16:])
    assert torch.equal(fused[4:8], before[4:8])
    assert torch.equal(fused[:4], before[:4] / 2)
    assert torch.equal(fused[8:12], before[8:12] / 2)
    q, k = torch.ones(8), torch.ones(8)
    sl.qk_clip_(q, k, torch.tensor([400.0, 1.0]))
    assert q.tolist() == k.tolist() == [0.5] * 4 + [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, r"tau=0.0 is out of range, expected a finite number above 0"),
        ({"tau": math.nan}, ValueError, r"tau=nan is out of range"),
        ({"tau": "high"}, ValueError, r"tau='high' is out of range"),
        ({"rope_dim": -1}, ValueError, r"rope_dim=-1 is out of range, expected an integer of at least 0"),
        ({"value_dim": 0.5}, ValueError, r"value_dim=0.5 is out of range"),
        ({"query": [1.0]}, TypeError, r"query is list, expected a strided tensor of torch.float64"),
        ({"key": torch.ones(8, 3, dtype=torch.int64)}, TypeError, r"key is torch.int64, torch.strided, expected"),
        ({"query": torch.ones(8, 3).to_sparse()}, TypeError, r"query is torch.float32, torch.sparse_coo, expected"),
        ({"query": torch.tensor(1.0)}, ValueError, r"query has no dimensions"),
        ({"query": torch.ones(3).expand(8, 3)}, ValueError, r"elements of query, of strides \(0, 1\), share memory"),
        ({"query": torch.ones(7, 3)}, ValueError, r"query has 7 rows, expected 2 heads of equal size"),
        ({"rope_dim": 4}, ValueError, r"query has 8 rows, expected 2 heads .* of more than rope_dim=4 rows each"),
        ({"key": torch.ones(9, 3)}, ValueError, r"key has 9 rows, expected heads of 4 \+ value_dim=0 rows"),
        ({"key": torch.ones(12, 3)}, ValueError, r"key has 12 rows, .* that divides the 2 query heads"),
        ({"key": torch.ones(8, 3), "value_dim": 2}, ValueError, r"key has 8 rows, expected heads of 4 \+ value_dim=2"),
        ({"max_logits": [1.0, 2.0]}, TypeError, r"max_logits is list, expected a floating-point tensor"),
        ({"max_logits": torch.ones(2, dtype=torch.int64)}, TypeError, r"max_logits is torch.int64"),
        ({"max_logits": torch.ones(2, 1)}, ValueError, r"max_logits has shape \(2, 1\), expected one number for each"),
        ({"max_logits": torch.tensor([1.0, math.nan])}, ValueError, r"max_logits must be finite, got \[1.0, nan\]"),
        ({"max_logits": torch.tensor([math.inf, 1.0])}, ValueError, r"max_logits must be finite, got \[inf, 1.0\]"),
    ],
    ids=str,
)
def test_qk_clip_refuses(arguments: dict[str, Any], error: type[Exception], message: str):
    sound = {"query": torch.ones(8, 3), "key": torch.ones(8, 3), "max_logits": torch.tensor([400.0, 1.0])}
    called = sound | arguments
    with pytest.raises(error, match=message):
        sl.qk_clip_(called.pop("query"), called.pop("key"), called.pop("max_logits"), **called)
    assert bool((sound["query"] == 1).all())
    assert bool((sound["key"] == 1).all())


# Refusals of the optimizers

ROWS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"lr": -0.1}, ValueError, r"Learning rate should be >= 0 but is: -0.1"),
    ({"lr": math.nan}, ValueError, r"Learning rate should be >= 0 but is: nan \(lr must be in \[0, inf\)\)"),
    ({"lr": math.inf}, ValueError, r"Learning rate should be >= 0 but is: inf"),
    ({"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element, got shape \(2,\)"),
    ({"lr": "fast"}, TypeError, r"lr must be a number or a 1-element tensor, got 'fast'"),
    ({"momentum": -0.5}, ValueError, r"momentum should be >= 0 but is: -0.5"),
    ({"momentum": math.nan}, ValueError, r"momentum should be >= 0 but is: nan"),
    ({"eps": -1e-8}, ValueError, r"Invalid epsilon value: -1e-08 \(eps must be in \[0, inf\)\)"),
    ({"momentum_form": "nag"}, ValueError, r"momentum_form='nag' is unknown, expected one of 'ema', 'sum'"),
    ({"ns_method": "fast"}, ValueError, r"ns_method='fast' is unknown, expected one of 'auto', 'standard', 'gram'"),
    ({"ns_coefficients": "keller"}, ValueError, r"ns_coefficients='keller' .* is unknown, expected one of 'jordan'"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, r"exactly 3 values for each step, got \(1.0, 2.0\)"),
    ({"ns_coefficients": (1.0, math.nan, 2.0)}, ValueError, r"must be finite numbers, got nan in"),
    ({"ns_coefficients": 3.0}, TypeError, r"ns_coefficients=3.0 .* got 3.0"),
    ({"ns_steps": 0}, ValueError, r"steps=0 is out of range, expected 1 to 99"),
    ({"ns_steps": 100}, ValueError, r"steps=100 is out of range, expected 1 to 99"),
    ({"ns_steps": 2.5}, TypeError, r"steps must be an integer or None, got 2.5"),
    (
        {"ns_coefficients": "jordan8_exact2"},
        ValueError,
        r"ns_coefficients='jordan8_exact2' with ns_steps=5: .*expected at least 10; ns_steps=None takes as many",
    ),
    (
        {"ns_coefficients": [(2.0, -1.5, 0.5)] * 6},
        ValueError,
        r"ns_steps=5 leaves out some of the 6 triples in ns_coefficients, .*ns_steps=None takes all of them",
    ),
    ({"stochastic_rounding": True}, ValueError, r"stochastic_rounding=True is not supported for the matrices of Muon"),
    ({"differentiable": True}, RuntimeError, r"differentiable=True is not supported"),
    ({"state_dtype": torch.float16}, ValueError, r"state_dtype=torch.float16 is unknown"),
)
MUONS: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"weight_decay": -1}, ValueError, r"weight decay should be >= 0 but is: -1.0"),
    ({"capturable": True, "variant": "normuon"}, ValueError, r"capturable=True does not go with variant='normuon'"),
    ({"capturable": True, "cautious_weight_decay": True}, ValueError, r"cautious_weight_decay=True, expected None and"),
    ({"weight_decay": math.nan}, ValueError, r"weight decay should be >= 0 but is: nan"),
    ({"adjust_lr_fn": "best"}, ValueError, r"Adjust learning rate function 'best' is not supported: .*'spectral'"),
    ({"adjust_lr_fn": 0.0}, ValueError, r"Adjust learning rate function 0.0 is not supported: .*number above 0"),
    ({"adjust_lr_fn": math.nan}, ValueError, r"Adjust learning rate function nan is not supported"),
    ({"adjust_lr_fn": True}, ValueError, r"Adjust learning rate function True is not supported"),
    ({"variant": "turbo"}, ValueError, r"variant='turbo' is unknown, expected one of None, 'normuon', 'adamuon'"),
    ({"beta2": 1.0}, ValueError, r"Invalid beta2 value: 1.0 \(beta2 must be in \[0, 1.0\)\)"),
    ({"beta2": math.nan}, ValueError, r"Invalid beta2 value: nan"),
    (
        {"variant": "adamuon", "adjust_lr_fn": "original"},
        ValueError,
        r"adjust_lr_fn='original' does not go with variant='adamuon'",
    ),
)
MUONHS = (({"capturable": True}, ValueError, r"capturable=True is not supported for the matrices of MuonH, expected"),)
CASES = [(sl.Muon, *row) for row in ROWS + MUONS] + [(sl.MuonH, *row) for row in ROWS + MUONHS]


@pytest.mark.parametrize(("cls", "arguments", "error", "message"), CASES, ids=lambda x: str(x)[:60])
def test_hyper_parameters(cls: type[Any], arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        cls([parameter((3, 3))], **arguments)
    optimizer = cls([parameter((3, 3))])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter((3, 3))], **arguments})
    assert_unchanged(before, snapshot(optimizer))
    # And by hand, at the next step.
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    version = p._version
    optimizer.param_groups[0].update(arguments)
    if "differentiable" not in arguments and "state_dtype" not in arguments:
        with pytest.raises(error, match=message):
            optimizer.step()
        assert p._version == version
        assert not optimizer.state


SHAPE_ROWS: tuple[tuple[tuple[int, ...], dict[str, Any], type[Exception], str], ...] = (
    (
        (3,),
        {},
        ValueError,
        r"only supports parameters of 2 or more dimensions whereas we found parameter 1 with size \(3,\)",
    ),
    ((), {}, ValueError, r"parameter 1 with size \(\): give it to a group with another algorithm, such as 'adamw'"),
    (
        (6, 4),
        {"split_sizes": (4, 4)},
        ValueError,
        r"split_sizes=\(4, 4\) add up to 8, expected the 6 rows of parameter 1",
    ),
    ((6, 2, 2, 2), {"split_sizes": (2, 2)}, ValueError, r"add up to 4, expected the 6 rows of .*\(6, 2, 2, 2\)"),
    ((5, 6, 4), {"split_sizes": (3, 2)}, ValueError, r"add up to 5, expected the 6 rows"),
    ((6, 4), {"fan_in_fan_out": 1.5}, TypeError, r"fan_in_fan_out must be True or False, got 1.5"),
    ((6, 4), {"fan_in_fan_out": None}, TypeError, r"fan_in_fan_out must be True or False, got None"),
    ((6, 2, 2, 2), {"fan_in_fan_out": True}, ValueError, r"does not go with .*\(6, 2, 2, 2\), which is flattened"),
    (
        (6, 4),
        {"fan_in_fan_out": True, "split_sizes": (3, 3)},
        ValueError,
        r"split_sizes=\(3, 3\) add up to 6, expected the 4 columns of .*\(6, 4\)",
    ),
    (
        (6, 4),
        {"fan_in_fan_out": True, "num_heads": 3},
        ValueError,
        r"num_heads=3 does not divide the 4 columns of .*\(6, 4\)",
    ),
    ((6, 4), {"split_sizes": 6}, TypeError, r"split_sizes must be a sequence of integers of at least 1, got 6"),
    ((6, 4), {"split_sizes": (6, 0)}, TypeError, r"integers of at least 1, got \(6, 0\)"),
    ((6, 4), {"split_sizes": (8, -2)}, TypeError, r"integers of at least 1, got \(8, -2\)"),
    ((6, 4), {"split_sizes": ()}, TypeError, r"integers of at least 1, got \(\)"),
    ((6, 4), {"num_heads": 4}, ValueError, r"num_heads=4 does not divide the 6 rows of parameter 1 of size \(6, 4\)"),
    ((6, 4), {"num_heads": 0}, TypeError, r"num_heads must be an integer of at least 1, or one for each part, got 0"),
    ((6, 4), {"num_heads": 1.5}, TypeError, r"num_heads must be .*got 1.5"),
    (
        (6, 4),
        {"num_heads": (2, 2)},
        ValueError,
        r"num_heads=\(2, 2\) has 2 numbers, expected one for each part of \(6,\)",
    ),
    (
        (6, 4),
        {"split_sizes": (4, 2), "num_heads": (4, 4)},
        ValueError,
        r"num_heads=\(4, 4\) does not divide the 2 rows",
    ),
    ((6, 4), {"flatten": "yes"}, TypeError, r"flatten must be True, False or None, got 'yes'"),
)


@pytest.mark.parametrize("cls", [sl.Muon, sl.MuonH])
@pytest.mark.parametrize(("shape", "keys", "error", "message"), SHAPE_ROWS, ids=str)
def test_shapes(shape: tuple[int, ...], keys: dict[str, Any], error: type[Exception], message: str, cls: type[Any]):
    optimizer = cls([parameter((3, 3))])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [parameter(shape)], **keys})
    assert_unchanged(before, snapshot(optimizer))
    with pytest.raises(error, match=message.replace("parameter 1", r"parameter 0 \(w\)")):
        cls([{"params": [("w", parameter(shape))], **keys}])


def test_keys_changed_by_hand_are_checked_at_the_next_step():
    p = parameter((6, 4))
    optimizer = sl.Muon([p])
    p.grad = torch.ones(6, 4, dtype=DOUBLE)
    optimizer.param_groups[0]["num_heads"] = 4
    with pytest.raises(ValueError, match=r"num_heads=4 does not divide the 6 rows of parameter 0"):
        optimizer.step()
    optimizer.param_groups[0]["num_heads"] = 3
    optimizer.step()
    del optimizer.param_groups[0]["eps"]
    with pytest.raises(KeyError, match="eps"):
        optimizer.step()


def with_grad(p: Tensor, g: Tensor) -> Tensor:
    if p.is_floating_point() or p.is_complex():
        p.requires_grad_()
    p.grad = g
    return p


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: with_grad(torch.ones(3, 3, dtype=torch.complex64), torch.ones(3, 3, dtype=torch.complex64)), TypeError,
         r"parameter 1 has dtype torch.complex64, Muon takes torch.float64"),
        (lambda: with_grad(torch.ones(3, 3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.int64)), TypeError,
         r"parameter 1 has dtype torch.int64, Muon takes torch.float64"),
        (lambda: with_grad(torch.ones(3, 3), torch.eye(3).to_sparse()), RuntimeError,
         r"Muon does not support sparse gradients, got torch.sparse_coo for parameter 1"),
        (lambda: with_grad(torch.ones(3).expand(4, 3), torch.ones(4, 3)), RuntimeError,
         r"more than one element of parameter 1 refers to a single memory location"),
    ],
    ids=["complex", "integers", "sparse", "overlapping"],
)  # fmt: skip
def test_tensors(make: Any, error: type[Exception], message: str):
    sound = torch.nn.Parameter(torch.ones(3, 3))
    vector = torch.nn.Parameter(torch.ones(3))
    sound.grad, vector.grad = torch.ones(3, 3), torch.ones(3)
    optimizer = sl.Muon([{"params": [sound, make()]}, {"params": [vector], "algorithm": "adamw"}])
    with pytest.raises(error, match=message):
        optimizer.step()
    assert (sound._version, vector._version, len(optimizer.state)) == (0, 0, 0)
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert (sound._version > 0, vector._version > 0) == (True, True)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice():
    p = parameter((3, 3))
    optimizer = sl.Muon([p, p])
    p.grad = torch.ones(3, 3, dtype=DOUBLE)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 stands in the groups more than once"):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.update(momentum_buffer=torch.zeros(4, 3)), ValueError, r"'momentum_buffer' .* shape \(4, 3\)"),
        (lambda s: s.pop("momentum_buffer"), ValueError, r"lacks 'momentum_buffer'"),
        (lambda s: s.update(momentum_buffer=0.0), TypeError, r"'momentum_buffer' of parameter 0 is a float"),
        (
            lambda s: s.update(second_momentum_buffer=torch.zeros(3, 4)),
            ValueError,
            r"has shape \(3, 4\), expected \(1, 4\)",
        ),
        (lambda s: s.update(exp_avg=torch.zeros(3, 4)), ValueError, r"unknown 'exp_avg'"),
    ],
)
def test_states_that_do_not_fit(change: Any, error: type[Exception], message: str):
    p = parameter((3, 4))
    optimizer = sl.Muon([p], variant="normuon")
    p.grad = torch.ones(3, 4, dtype=DOUBLE)
    optimizer.step()
    state_dict = optimizer.state_dict()
    state_dict["state"] = {0: dict(state_dict["state"][0])}
    change(state_dict["state"][0])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state_dict)
    assert_unchanged(before, snapshot(optimizer))
    if "unknown" not in message:
        change(optimizer.state[p])
        with pytest.raises(error, match=message):
            optimizer.step()


def test_a_backend_that_does_not_serve_the_parameters_device():
    p = torch.nn.Parameter(torch.ones(3, 3, device="meta"))
    p.grad = torch.ones(3, 3, device="meta")
    with pytest.raises(ValueError, match=r"backend='cpu' serves parameters on cpu, got a parameter on meta"):
        sl.Muon([p], backend="cpu").step()


def test_the_slow_optimizer_of_the_reference():
    optimizer = reference.Muon([parameter((3, 3))], lr=0.3)
    assert isinstance(optimizer, sl.Muon)
    assert optimizer._backend == "reference"
    assert isinstance(reference.MuonH([parameter((3, 3))]), sl.MuonH)
