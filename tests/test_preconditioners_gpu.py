"""Shampoo and SOAP by the GPU's kernels, in the emulator and in Triton's interpreter, against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from triton_interpreter import use_interpreter

import stepladder as sl
from stepladder import ranges
from stepladder.optim import together
from stepladder.optim.state import checked_state

# Of gradients whose factors have full rank: null spaces have no basis of their own.
SHAPES = ((12, 12), (9,), (3, 4, 5))
FREQUENCY = 3
LR, DAMPING = 0.01, 0.1


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    else:
        use_interpreter(monkeypatch)
    return request.param


def trained(
    make, backend: str | None, dtype=torch.float32, shapes=SHAPES, lie=lambda g: g
) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make(params, backend=backend)
    for _ in range(2 * FREQUENCY + 1):
        for p in params:
            p.grad = lie(torch.randn(p.shape, generator=generator).to(dtype))
        optimizer.step()
    return [p.detach() for p in params], optimizer


def check(found: list[torch.Tensor], make, shapes=SHAPES) -> None:
    """No further from the reference in fp64 than twice as far as the reference in fp32 is."""
    exact, _ = trained(make, "reference", torch.float64, shapes)
    rounded, _ = trained(make, "reference", shapes=shapes)
    for x, y, e in zip(found, rounded, exact, strict=True):
        assert float((x - e).abs().max()) <= 2.0 * float((y - e).abs().max())


def test_shampoo(backend):
    def make(params, backend):
        every = {"precondition_frequency": FREQUENCY, "merge_dims": False}
        return sl.Shampoo(params, lr=LR, relative_eps=DAMPING, backend=backend, **every)

    found, optimizer = trained(make, backend)
    check(found, make)
    assert all(float(state["failed_roots"]) == 0.0 for state in optimizer.state.values())


@pytest.mark.parametrize("variant", [None, "kl"])
def test_soap(backend, variant):
    def make(params, backend):
        return sl.SOAP(params, lr=LR, precondition_frequency=FREQUENCY, variant=variant, backend=backend)

    # KL-SOAP takes the same kernels one by one, and Triton's interpreter its time.
    shapes = SHAPES if variant is None or backend == "cuda" else ((5, 4), (3,))
    found, optimizer = trained(make, backend, shapes=shapes)
    check(found, make, shapes)
    assert all(float(state["failed_bases"]) == 0.0 for state in optimizer.state.values())


def across(g: torch.Tensor) -> torch.Tensor:
    """The same elements, the last dimension outermost."""
    return g.movedim(-1, 0).contiguous().movedim(0, -1)


SHAMPOO = {"lr": LR, "relative_eps": DAMPING, "precondition_frequency": FREQUENCY}
# Blocks of 6: 13 is cut into 5, 4 and 4, of which two lengths make two regular grids.
BLOCKED = {"max_preconditioner_dim": 6, "merge_dims": False}


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        (BLOCKED, ((13, 5), (7,), (13, 5), (2, 8, 3))),
        ({"merge_dims": False, "stagger": True}, SHAPES),
        ({"grafting": "none", "packed": True}, SHAPES),
        ({"grafting": "adagrad", "maximize": True, "precondition_1d": False, "betas": (0.0, 1.0)}, SHAPES),
        ({"grafting": "sgd", "bias_correction": False, "weight_decay": 0.1}, SHAPES),
    ],
)
def test_options_of_shampoo(emulated, options, shapes):
    def make(params, backend):
        return sl.Shampoo(params, backend=backend, **SHAMPOO | options)

    check(trained(make, "cuda", shapes=shapes)[0], make, shapes)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"packed": True, "maximize": True, "stagger": True}, SHAPES),
        # One side without a basis, and a vector with one.
        ({"max_preconditioner_dim": 10, "precondition_1d": True, "bias_correction": False}, ((12, 7), (9,), (7, 12))),
        ({"refresh_tolerance": 0.5, "betas": (0.9, 0.99), "shampoo_beta": 0.8}, SHAPES),
    ],
)
def test_options_of_soap(emulated, options, shapes):
    def make(params, backend):
        return sl.SOAP(params, lr=LR, precondition_frequency=FREQUENCY, backend=backend, **options)

    check(trained(make, "cuda", shapes=shapes)[0], make, shapes)


def make_shampoo(params, backend, **options):
    return sl.Shampoo(params, backend=backend, **SHAMPOO | BLOCKED | options)


def make_soap(params, backend, **options):
    return sl.SOAP(params, backend=backend, **{"lr": LR, "precondition_frequency": FREQUENCY} | options)


BOTH = pytest.mark.parametrize("make", [make_shampoo, make_soap], ids=["shampoo", "soap"])


def test_bunches(monkeypatch):
    monkeypatch.setattr(together, "MOST", 8)
    asked: list[int] = []
    assert [*together.bunches([3, 4, 5, 20, 1, 7], lambda n: asked.append(n) or n)] == [[3, 4], [5], [20], [1, 7]]
    assert asked == [3, 4, 5, 20, 1, 7]
    assert [*together.bunches([], len)] == []


@BOTH
@pytest.mark.parametrize("packed", [False, True])
def test_more_than_is_worked_on_at_a_time(emulated, make, packed, monkeypatch):
    """Of three parameters the first two are a bunch, and their factors three."""
    monkeypatch.setattr(together, "MOST", 160)

    def packing(params, backend):
        return make(params, backend, packed=packed)

    check(trained(packing, "cuda")[0], packing)


@BOTH
def test_gradients_are_read_as_they_lie(emulated, make):
    found, _ = trained(make, "cuda", lie=across)
    check(found, make)


@BOTH
def test_half_precision_is_storage(emulated, make):
    """Arithmetic is fp32, and weights and moments are rounded once: step by step from the same state.

    The reference in fp64 is exact, and what fp32 may be from it `check` says.
    """

    def reference(dtype: torch.dtype):
        others = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
        optimizer_of = make(others, "reference")
        optimizer_of.load_state_dict(copy.deepcopy(before))
        for p, other in zip(params, others, strict=True):
            other.grad = p.grad.to(dtype)
        optimizer_of.step()
        return others, optimizer_of

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    optimizer = make(params, "cuda")
    for time in range(1, 2 * FREQUENCY + 2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        before = optimizer.state_dict()
        wide, exact = reference(torch.float64)
        narrow, rounded = reference(torch.float32)
        optimizer.step()
        for p, w, n in zip(params, wide, narrow, strict=True):
            assert_rounded(p.detach(), w.detach(), n.detach())
            # New bases may differ by the signs of their columns.
            if (time - 1) % FREQUENCY != 0:
                own = (o.state[q]["exp_avg"] for o, q in ((optimizer, p), (exact, w), (rounded, n)))
                assert_rounded(*own)


def assert_rounded(x: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    """Half an ulp of 2⁻⁷ from what is no further from the exact value than twice as far as fp32 is."""
    near = 2.0 * float((rounded - exact).abs().max())
    assert ((x.double() - exact).abs() <= 2.0**-8 * (exact.abs() + near) + near).all()


@BOTH
def test_a_rate_of_0_moves_nothing(emulated, make):
    found, optimizer = trained(lambda params, backend: make(params, backend, lr=0.0), "cuda")
    generator = torch.Generator().manual_seed(0)
    for x, shape in zip(found, SHAPES, strict=True):
        assert torch.equal(x, torch.randn(shape, generator=generator))
    assert all(int(state["step"]) > FREQUENCY for state in optimizer.state.values())


@BOTH
def test_what_is_not_finite_stays_in_its_parameter(emulated, make):
    def spoil(g: torch.Tensor) -> torch.Tensor:
        spoilt.append(None)
        return g.fill_(torch.nan) if len(spoilt) % len(SHAPES) == 1 and len(spoilt) > len(SHAPES) else g

    clean, _ = trained(make, "cuda")
    spoilt: list[None] = []
    found, _ = trained(make, "cuda", lie=spoil)
    assert found[0].isnan().all()
    for x, y in zip(found[1:], clean[1:], strict=True):
        assert torch.equal(x, y)


class Names:
    """A listener that keeps the names of the kernels' ranges, and asks each for its work."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    @contextmanager
    def range(self, name: str, kernel: bool, work: Callable[[], ranges.Work] | None) -> Iterator[None]:
        yield
        if kernel:
            self.found.add(name)
        if work is not None:
            counted = work()
            assert counted.bytes + counted.flops > 0.0

    def workers(self):
        return nullcontext(lambda function: function)


@pytest.mark.parametrize(
    ("make", "always", "refreshing"),
    [
        (make_shampoo, {"update_gram_", "momentum", "precondition", "update"}, {"refresh", "inverse_root"}),
        (make_soap, {"update_gram_", "project", "update"}, {"rotate", "orthonormalize", "refresh"}),
    ],
    ids=["shampoo", "soap"],
)
def test_ranges(emulated, make, always, refreshing):
    """Those of a refresh only where there is one."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(params, "cuda")
    for time in range(2 * FREQUENCY + 1):
        for p in params:
            p.grad = torch.randn_like(p)
        names = Names()
        with ranges.listening(names):
            optimizer.step()
        # SOAP's first step makes its bases, and is not counted.
        count = time if make is make_soap else time + 1
        if count > FREQUENCY:
            assert names.found == always | (refreshing if count % FREQUENCY == 0 else set())


@pytest.fixture
def counting(backend, request, monkeypatch) -> Callable[[], Iterator[list[int]]]:
    """A context that ends with how many kernels of ours were launched in it."""
    if backend == "cuda":
        module = request.getfixturevalue("emulated_module")

        @contextmanager
        def counted():
            before, found = module.launches(), []
            yield found
            found.append(module.launches() - before)

        return counted
    from stepladder.triton_kernels import newton_schulz

    launched: list[None] = []
    launch = newton_schulz.Kernel.launch
    monkeypatch.setattr(
        newton_schulz.Kernel, "launch", lambda kernel, *a: (launched.append(None), launch(kernel, *a))[1]
    )

    @contextmanager
    def counted():
        before, found = len(launched), []
        yield found
        found.append(len(launched) - before)

    return counted


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        # Both ways for each of two dimensions, and the Gram matrices.
        (make_soap, 2 + 2 + 1),
        (lambda *a: make_shampoo(*a, max_preconditioner_dim=1024), 1 + 2),
    ],
    ids=["soap", "shampoo"],
)
def test_launches_do_not_grow_with_the_parameters(backend, counting, make, plain):
    """Of 2 parameters or of 4, all of different shapes: in a step, and in one that refreshes."""

    def launches(shapes: list[tuple[int, int]]) -> list[int]:
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = make(params, backend)
        found = []
        # Up to a step after the first refresh.
        for _ in range(FREQUENCY + 2):
            for p in params:
                p.grad = torch.randn_like(p)
            with counting() as counted:
                optimizer.step()
            found += counted
        return found

    few = launches([(16, 8), (8, 16)])
    many = launches([(16, 8), (8, 16), (8, 8), (16, 16)])
    assert many == few
    # Triton has a kernel for G that goes by rows, and one for the other side.
    assert min(few[-2:]) == plain + (backend == "triton") < max(few)


def test_a_step_count_stays_on_the_host():
    """Of a parameter on a GPU and from a checkpoint, too: reading it there would wait for all that is enqueued."""
    p = torch.nn.Parameter(torch.ones(3, 2, device="meta"))
    group = sl.SOAP([torch.nn.Parameter(torch.ones(3, 2))]).param_groups[0]
    names = sl.SOAP.states(group)
    entry = {name: torch.zeros(sl.SOAP.state_shape(name, p, group)) for name in names} | {"step": torch.tensor(4.0)}
    assert checked_state(sl.SOAP, 0, entry, p, group, "cuda")["step"].device.type == "cpu"
