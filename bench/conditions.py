"""`--fail-if "adamw.ratio<1.1"`: bounds for scripts."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from stepladder.bench.compare import UNKNOWN, Change
from stepladder.bench.measurement import Contender, Measurement

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"\s*([\w*?-]+)\.(\w+)\s*(<=|>=|<|>)\s*(\S+)\s*")


def _of_ours(value: Callable[[Contender], float | None]) -> Callable[[Measurement], float | None]:
    return lambda measurement: value(measurement.contenders[measurement.ours]) if measurement.ours else None


METRICS: dict[str, Callable[[Measurement], float | None]] = {
    "ratio": lambda m: m.ratio,
    "share": lambda m: m.share,
    "ms": _of_ours(lambda c: c.milliseconds.median),
    "host_ms": _of_ours(lambda c: c.host.median if c.host else None),
    "gb_per_s": _of_ours(lambda c: c.gb_per_s),
    "gflops": _of_ours(lambda c: c.gflops),
    "state_bytes": _of_ours(lambda c: c.state_bytes),
}
CHANGE = "change"


@dataclass(frozen=True)
class Condition:
    """One bound.

    Attributes:
        text: As it was given.
        pattern: Names of optimizers and kernels, `*` any of them.
        metric: One of METRICS, or CHANGE.
        operator: One of OPERATORS.
        bound: What the metric is compared with.
    """

    text: str
    pattern: str
    metric: str
    operator: str
    bound: float

    def matches(self, case: str) -> bool:
        return fnmatchcase(case, self.pattern)

    def met(self, cases: Sequence[Measurement], changes: Sequence[Change]) -> list[str]:
        """The cases that meet it, each in a line.

        A case without the metric is said, too: where it was named, or where none that a pattern matches has it.
        """
        values = {m.label: self._value(m, changes) for m in cases if self.matches(m.case)}
        named = self.pattern in [m.case for m in cases]
        lines = []
        for label, value in values.items():
            if value is not None and OPERATORS[self.operator](value, self.bound):
                lines.append(f"{label}: {self.metric} is {value:.4g}")
            elif value is None and (named or not any(v is not None for v in values.values())):
                lines.append(f"{label} has no {self.metric}")
        return lines or ([] if values else [f"nothing was measured that is named {self.pattern}"])

    def _value(self, measurement: Measurement, changes: Sequence[Change]) -> float | None:
        return self._change(measurement, changes) if self.metric == CHANGE else METRICS[self.metric](measurement)

    def _change(self, measurement: Measurement, changes: Sequence[Change]) -> float | None:
        own = [c for c in changes if (c.case, c.shapes, c.dtype) == measurement.key]
        if not own or any(change.verdict == UNKNOWN for change in own):
            return None
        return max(100.0 * change.change if change.flagged and change.change else 0.0 for change in own)


def parse(text: str) -> Condition:
    """A condition from its text.

    Raises:
        ValueError: It is none, or its metric is unknown.
    """
    found = _FORM.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no condition, expected one as adamw.ratio<1.1")
    pattern, metric, sign, number = found.groups()
    if metric not in (*METRICS, CHANGE):
        raise ValueError(f"{metric!r} in {text!r} is no metric, expected one of {', '.join((*METRICS, CHANGE))}")
    try:
        bound = float(number)
    except ValueError:
        raise ValueError(f"{number!r} in {text!r} is no number") from None
    if bound != bound:
        raise ValueError(f"{number!r} in {text!r} can be compared with nothing")
    return Condition(text.strip(), pattern, metric, sign, bound)
