"""Which cases take longer or shorter than in an earlier run, or in another build, by more than the noise.

Milliseconds of two runs on a machine that others use are not comparable: what is, is ours beside the others that took
turns with it, rivals and yardstick. The score of a process is the logarithm of our median time less the mean of those
of the others. Processes are the independent samples, and Welch's interval for the difference of two means of scores
says how far the two runs can be apart. It is wide enough that a run in which nothing has changed flags anything at all
with a probability of at most WRONG, however many cases it has (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepladder.bench.measurement import OWN, SCALE, Measurement

# The probability that a comparison of two equal builds flags any of its cases.
WRONG = 0.01
FEWEST_PROCESSES = 2
# Where intervals end: at a factor of a thousand. Two processes each say next to nothing.
WIDEST = math.log(1000.0)
SLOWER, FASTER, SAME, UNKNOWN = "slower", "faster", "within the noise", "unknown"


@dataclass(frozen=True)
class Change:
    """One contender of ours, now and before.

    Attributes:
        case: The optimizer or kernel.
        shapes: The shape set's name.
        dtype: fp32 and so on.
        contender: Which of ours.
        verdict: SLOWER, FASTER, SAME or UNKNOWN.
        reason: Why it is unknown.
        change: By which part more time it takes now: 0.1 is a tenth longer; None where it is unknown. Without an
            interval it may be known all the same.
        low: The least change that is compatible with what was measured.
        high: The greatest.
        processes: How many stand behind it, before and now.
    """

    case: str
    shapes: str
    dtype: str
    contender: str
    verdict: str
    reason: str = ""
    change: float | None = None
    low: float | None = None
    high: float | None = None
    processes: tuple[int, int] = (0, 0)

    @property
    def flagged(self) -> bool:
        """Whether it exceeds the noise."""
        return self.verdict in (SLOWER, FASTER)


def compare(base: Sequence[Measurement], now: Sequence[Measurement]) -> list[Change]:
    """Every contender of ours of every case of `now`, in its order.

    Args:
        base: What was measured before, or of the other build.
        now: What it is to be compared with.
    """
    before = {measurement.key: measurement for measurement in base}
    pairs = [(before.get(m.key), m, name) for m in now for name, c in m.contenders.items() if c.role == OWN]
    comparisons = sum(old is not None and name in old.contenders for old, _, name in pairs)
    return [_change(old, new, name, comparisons) for old, new, name in pairs]


def _change(old: Measurement | None, new: Measurement, name: str, comparisons: int) -> Change:
    known: dict[str, Any] = {"case": new.case, "shapes": new.shapes, "dtype": new.dtype, "contender": name}
    if old is None:
        return Change(**known, verdict=UNKNOWN, reason="it is not in the base")
    if name not in old.contenders:
        return Change(**known, verdict=UNKNOWN, reason=old.red or old.skipped or f"the base has no {name}")
    others = [
        other
        for other, c in new.contenders.items()
        if c.role not in (OWN, SCALE) and other in old.contenders and old.contenders[other].role == c.role
    ]
    if not others:
        return Change(**known, verdict=UNKNOWN, reason="nothing took turns with it in both runs")
    samples = scores(old, name, others), scores(new, name, others)
    known["processes"] = sizes = (len(samples[0]), len(samples[1]))
    known["change"] = _part(samples[1].mean() - samples[0].mean())
    if min(sizes) < FEWEST_PROCESSES:
        which = "the base" if sizes[0] < FEWEST_PROCESSES else "this run"
        return Change(**known, verdict=UNKNOWN, reason=f"{which} was measured in one process: its noise is not known")
    # Here, as it is an extra dependency and slow to import.
    from scipy import stats

    test = stats.ttest_ind(samples[1], samples[0], equal_var=False)
    interval = test.confidence_interval(1.0 - WRONG / comparisons)
    low, high = _part(interval.low), _part(interval.high)
    verdict = SLOWER if low > 0.0 else FASTER if high < 0.0 else SAME
    return Change(**known, verdict=verdict, low=low, high=high)


def _part(logarithm: float) -> float:
    return float(np.expm1(np.clip(logarithm, -WIDEST, WIDEST)))


def scores(measurement: Measurement, name: str, others: Collection[str]) -> NDArray[np.float64]:
    """The score of each process: the logarithm of a contender's median time in units of the others'."""
    logarithms = {
        contender: np.log([np.median(turns) for turns in measurement.contenders[contender].ms])
        for contender in (name, *others)
    }
    beside: NDArray[np.float64] = np.mean([logarithms[other] for other in others], axis=0)
    return logarithms[name] - beside
