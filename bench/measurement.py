"""What is known of a case once it was measured: the one form that tables, files, plots and comparisons read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

OURS = "stepladder"
# So begins why one of ours has no number whose check failed.
RED = "the check is RED"
YARDSTICK = "a += b"
# What a contender is: ours; another form of the same rule or function; another rule, for scale; a copy or the like.
ROLES = OWN, RIVAL, SCALE, MEASURE = "ours", "rival", "scale", "yardstick"


class Quantiles(NamedTuple):
    """Median and the quantiles 0.2 and 0.8."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Quantiles:
        return cls(*map(float, np.quantile(values, (0.5, 0.2, 0.8))))


@dataclass
class Contender:
    """One of those that took turns.

    Attributes:
        role: OWN, RIVAL, SCALE or MEASURE.
        ms: Milliseconds of each turn, a list for each process; those of one round stand in the same place of all
            contenders' lists.
        check: In a word, what was found before it was timed.
        moved: Bytes that a turn must move, where they are counted.
        flops: Floating-point operations of a turn, where they are counted.
        error: Relative distance from what it was checked against, where bits are not compared.
        state_bytes: What an optimizer keeps between steps.
        host_ms: Milliseconds of turns outside of the kernels, in all processes.
    """

    role: str
    ms: list[list[float]]
    check: str = ""
    moved: int | None = None
    flops: float | None = None
    error: float | None = None
    state_bytes: int | None = None
    host_ms: list[float] = field(default_factory=list)

    @property
    def pooled(self) -> NDArray[np.float64]:
        """Milliseconds of all turns of all processes."""
        return np.concatenate([np.asarray(turns, dtype=np.float64) for turns in self.ms])

    @property
    def milliseconds(self) -> Quantiles:
        return Quantiles.of(self.pooled)

    @property
    def host(self) -> Quantiles | None:
        """Quantiles of `host_ms`."""
        return Quantiles.of(np.array(self.host_ms)) if self.host_ms else None

    @property
    def gb_per_s(self) -> float | None:
        return None if self.moved is None else self.moved / self.milliseconds.median / 1e6

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second."""
        return None if self.flops is None else self.flops / self.milliseconds.median / 1e6


@dataclass
class Measurement:
    """A case that was measured, or was not and why.

    Attributes:
        kind: "optimizer" or "kernel".
        case: The name that `--optimizer` or `--kernel` takes.
        shapes: What `--shapes` takes.
        dtype: fp32 and so on.
        tensors: How many the set has.
        elements: How many they have together.
        skipped: Why it was not run; there are no contenders then.
        red: How the check of ours failed; there are no contenders then.
        absent: Those that have no number, and why: rivals, and backends of ours that are RED beside others that
            are not.
        writers: Rivals whose step changes the gradients: they get fresh ones.
        contenders: By name, ours first.
    """

    kind: str
    case: str
    shapes: str
    dtype: str
    tensors: int
    elements: int
    skipped: str | None = None
    red: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    writers: list[str] = field(default_factory=list)
    contenders: dict[str, Contender] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """Of which there is one in a run."""
        return self.case, self.shapes, self.dtype

    @property
    def label(self) -> str:
        return f"{self.case} {self.dtype} {self.shapes}"

    @property
    def ours(self) -> str | None:
        """The first contender of ours, with which the others are compared."""
        return next((name for name, c in self.contenders.items() if c.role == OWN), None)

    def refuse(self, red: Mapping[str, str]) -> None:
        """Take in which contenders of ours failed the check, and how; those with a number must be there already."""
        if self.ours:
            self.absent |= {name: f"{RED}: {reason}" for name, reason in red.items()}
        elif red:
            self.red = "; ".join(f"{name}: {reason}" for name, reason in red.items())
            self.contenders = {}

    @property
    def failures(self) -> list[str]:
        """The checks of ours that failed, in a line each."""
        if self.red:
            return [f"{self.label}: {RED}"]
        return [f"{self.label}, {name}: {RED}" for name, reason in self.absent.items() if reason.startswith(RED)]

    @property
    def processes(self) -> int:
        """How many have measured it."""
        return max((len(contender.ms) for contender in self.contenders.values()), default=0)

    @property
    def rounds(self) -> int:
        """Turns of each contender, in all processes."""
        return max((len(contender.pooled) for contender in self.contenders.values()), default=0)

    @property
    def milliseconds(self) -> dict[str, Quantiles]:
        """Of a turn, by contender but for the yardstick."""
        return {name: c.milliseconds for name, c in self.contenders.items() if c.role != MEASURE}

    @property
    def ratios(self) -> dict[str, Quantiles]:
        """How many times longer than ours the others take, within rounds, by contender but for the yardstick."""
        if self.ours is None:
            return {}
        ours = self.contenders[self.ours].pooled
        return {
            name: Quantiles.of(c.pooled / ours)
            for name, c in self.contenders.items()
            if name != self.ours and c.role != MEASURE
        }

    @property
    def ratio(self) -> float | None:
        """The median ratio of the fastest rival."""
        found = [q.median for name, q in self.ratios.items() if self.contenders[name].role == RIVAL]
        return min(found, default=None)

    @property
    def share(self) -> float | None:
        """The part of the yardstick's bandwidth that ours reaches."""
        yardstick = next((c for c in self.contenders.values() if c.role == MEASURE), None)
        if self.ours is None or yardstick is None:
            return None
        ours, theirs = self.contenders[self.ours].gb_per_s, yardstick.gb_per_s
        return ours / theirs if ours and theirs else None

    @property
    def red_or_skipped(self) -> bool:
        return bool(self.red or self.skipped)

    def add(self, other: Measurement) -> None:
        """Take in what another process has measured of the same case.

        A rival that is missing in one of the two is left out, as is everything where one of the two is red.
        """
        self.skipped, self.red = self.skipped or other.skipped, self.red or other.red
        self.absent |= other.absent
        if self.red_or_skipped:
            self.contenders = {}
            return
        self.contenders = {name: c for name, c in self.contenders.items() if name in other.contenders}
        for name, contender in self.contenders.items():
            contender.ms += other.contenders[name].ms
            contender.host_ms += other.contenders[name].host_ms

    def as_dict(self) -> dict[str, Any]:
        """Ready for json.dump: the fields, and what follows from them for whoever reads the file by other means."""
        derived = {"ratio": self.ratio, "share": self.share, "processes": self.processes, "rounds": self.rounds}
        for name in ("milliseconds", "ratios"):
            derived[name] = {key: value._asdict() for key, value in getattr(self, name).items()}
        return asdict(self) | derived


def from_dict(values: Mapping[str, Any]) -> Measurement:
    """The inverse of `as_dict`.

    Raises:
        ValueError: Fields are missing or have other types.
    """
    try:
        own = {name: values[name] for name in Measurement.__dataclass_fields__}
        own["contenders"] = {str(name): _contender(c) for name, c in own["contenders"].items()}
        found = Measurement(**own)
        names = (found.kind, found.case, found.shapes, found.dtype, *found.absent, *found.absent.values())
        if not 0 < found.tensors <= found.elements:
            raise ValueError(f"it has {found.tensors} tensors of {found.elements} elements")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a case is not as stepladder writes it: {type(error).__name__}: {error}") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"a case is not as stepladder writes it: {names} must be words")
    sizes = {tuple(map(len, contender.ms)) for contender in found.contenders.values()}
    if len(sizes) > 1:
        raise ValueError(f"{found.label}: the contenders have different numbers of turns")
    return found


def _contender(values: Mapping[str, Any]) -> Contender:
    found = Contender(**values)
    found.ms = [[float(ms) for ms in turns] for turns in found.ms]
    found.host_ms = [float(ms) for ms in found.host_ms]
    if not found.ms or not all(found.ms) or not all(0.0 < ms < float("inf") for turns in found.ms for ms in turns):
        raise ValueError(f"expected turns of more than 0 milliseconds, got {str(values['ms'])[:60]}")
    if found.role not in ROLES or not isinstance(found.check, str):
        raise ValueError(f"expected a role of {', '.join(ROLES)}, got {found.role!r}")
    counts = (found.moved, found.flops, found.error, found.state_bytes, *found.host_ms)
    if not all(count is None or math.isfinite(count) for count in counts):
        raise ValueError(f"expected counts, got {counts}")
    return found


def merged(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One for each case, in the order in which they first come."""
    found: dict[tuple[str, str, str], Measurement] = {}
    for measurement in measurements:
        if measurement.key in found:
            found[measurement.key].add(measurement)
        else:
            found[measurement.key] = measurement
    return list(found.values())
