"""What a rule's file gives the executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """An update rule as functions of Triton, each pure in values of the arithmetic type.

    Elementwise rules have `update`; norm-based ones have the three parts of csrc/rules/lars.h in its place.

    Attributes:
        scalars: (hyper-parameters in fp64, time, arithmetic type) -> tuple of scalars, rounded once.
        update: (scalars, w, g, states) -> (w, states).
        prepare: (scalars, g, states) -> states, those that the first pass changes.
        measure: (scalars, w, g, states) -> the two values whose norms are taken.
        ratio: (scalars, first norm, second norm) -> the ratio.
        apply: (scalars, ratio, w, g, states) -> (w, states).
        prepared: How many states, the first ones, `prepare` and `measure` see.
    """

    scalars: Any
    update: Any = None
    prepare: Any = None
    measure: Any = None
    ratio: Any = None
    apply: Any = None
    prepared: int = 0
