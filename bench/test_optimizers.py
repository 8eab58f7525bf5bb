"""The cases of `stepladder bench` under pytest-benchmark: `pytest bench --benchmark-only`, with `-m ''` all of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest

from stepladder.bench.cases import CASES, DTYPES
from stepladder.bench.check import Verdict, check
from stepladder.bench.measure import Contenders, Settings
from stepladder.bench.measurement import OURS
from stepladder.bench.results import shortage
from stepladder.bench.rivals import names_of, rivals_of
from stepladder.bench.runner import DTYPE_NAMES, OPTIMIZERS, QUICK_SHAPES
from stepladder.bench.shapes import APART, SETS, elements

pytest.importorskip("pytest_benchmark", reason="measures; pip install 'stepladder[test]'")


def steps() -> Iterator[Any]:
    for shapes, optimizer, dtype in product(SETS, CASES, DTYPES):
        small = shapes in QUICK_SHAPES and optimizer in OPTIMIZERS and dtype in DTYPE_NAMES
        for contender in (OURS, *names_of(CASES[optimizer])):
            marks = () if small else (pytest.mark.large,)
            yield pytest.param(shapes, optimizer, dtype, contender, marks=marks)


@cache
def verdict(shapes: str, optimizer: str, dtype: str) -> Verdict:
    case = CASES[optimizer]
    return check(case, SETS[shapes](), DTYPES[dtype], rivals_of(case)[0], apart=shapes in APART)


@pytest.mark.parametrize(("shapes", "optimizer", "dtype", "contender"), list(steps()))
def test_step(benchmark: Any, shapes: str, optimizer: str, dtype: str, contender: str) -> None:
    case = CASES[optimizer]
    if reason := shortage(case, elements(SETS[shapes]()) * DTYPES[dtype].itemsize):
        pytest.skip(reason)
    rivals, absent = rivals_of(case, [contender])
    found = verdict(shapes, optimizer, dtype)
    assert found.red is None, found.red
    if reason := (absent | found.wrong).get(contender):
        pytest.skip(reason)
    contenders = Contenders(case, SETS[shapes](), DTYPES[dtype], rivals, found.writers, apart=shapes in APART)
    benchmark.group = f"{shapes} {optimizer} {dtype}"
    benchmark.pedantic(
        contenders.optimizers[contender].step,
        setup=lambda: contenders.prepare(contender),
        rounds=Settings().rounds[0 if shapes in QUICK_SHAPES else 1],
        warmup_rounds=1,
    )
