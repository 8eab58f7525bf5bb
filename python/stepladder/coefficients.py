"""The coefficient sets of Newton-Schulz iterations: (a, b, c) for each step X ← aX + (bA + cA²)X, A = XXᵀ."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]
# Steps of a single triple, as torch.optim.Muon takes by default.
DEFAULT_STEPS = 5
MAX_STEPS = 99


@dataclass(frozen=True)
class CoefficientSet:
    """One published set.

    Attributes:
        steps: (a, b, c) of each step; a longer iteration repeats the last.
        source: Where the figures were published.
        divisor: What the normalised input is divided by: at 1.03, which rounding to bf16 can make of a
            singular value of 1, some sets diverge or change sign.
        safety: Folded into every step s but the first and the last: (a/s, b/s³, c/s⁵). Some sets take singular values
            to within 2 % of where the next step lets them grow, which rounding to bf16 oversteps.
        aol: Rows of X are divided by √(Σⱼ|Aᵢⱼ|), A = XXᵀ, in place of X by its Frobenius norm.
        whole: The set means something only with all of its steps.
    """

    steps: tuple[Triple, ...]
    source: str
    divisor: float = 1.0
    safety: float = 1.0
    aol: bool = False
    whole: bool = False


_JORDAN = (3.4445, -4.7750, 2.0315)

SETS: dict[str, CoefficientSet] = {
    "jordan": CoefficientSet((_JORDAN,) * 5, "Jordan 2024, kellerjordan.github.io/posts/muon"),
    "you": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "You 2024, in modded-nanogpt",
    ),
    "polar_express": CoefficientSet(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (15 / 8, -10 / 8, 3 / 8),
        ),
        "Amsel et al. 2025, arXiv:2505.16932",
        divisor=1.05,
        safety=1.01,
    ),
    "cans": CoefficientSet(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        "Grishina et al. 2025, arXiv:2506.10935",
        divisor=1.05,
        safety=1.01,
    ),
    "aol4": CoefficientSet(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        "Turbo-Muon 2025, arXiv:2512.04632",
        aol=True,
        whole=True,
    ),
    "cubic5": CoefficientSet(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        "arXiv:2606.00371",
        divisor=1.05,
    ),
    "jordan8_exact2": CoefficientSet((_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2, "DeepSeek-V4", whole=True),
}


def resolve(coefficients: Coefficients | None, steps: int | None) -> CoefficientSet:
    """The set that an iteration of `steps` steps takes, with one triple for each, safety folded in.

    Args:
        coefficients: The name of a set, one triple (a, b, c) for all steps, or a triple for each step;
            None means "jordan".
        steps: How many; None means as many as there are triples, and five for a single triple.

    Raises:
        TypeError: `coefficients` or `steps` has the wrong type.
        ValueError: An unknown name, no triples, a coefficient that is not finite, a number of steps out of range.
    """
    name = "jordan" if coefficients is None else coefficients
    return _whole(name) if isinstance(name, str) and steps is None else _resolved(name, steps)


# An 8×8 matrix is iterated on in less time than this takes.
@functools.cache
def _whole(name: str) -> CoefficientSet:
    return _resolved(name, None)


def _resolved(name: Coefficients, steps: int | None) -> CoefficientSet:
    if isinstance(name, str):
        if name not in SETS:
            raise ValueError(f"coefficients={name!r} is unknown, expected one of {', '.join(map(repr, SETS))}, "
                             "a triple (a, b, c), or a triple for each step")  # fmt: skip
        chosen = SETS[name]
    else:
        chosen = CoefficientSet(_triples(name), "given")
    if steps is None:
        single = not isinstance(name, str) and isinstance(name[0], numbers.Real)
        steps = DEFAULT_STEPS if single else len(chosen.steps)
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
        raise TypeError(f"steps must be an integer or None, got {steps!r}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps} is out of range, expected 1 to {MAX_STEPS}")
    if chosen.whole and steps < len(chosen.steps):
        raise ValueError(f"steps={steps} is too few for coefficients={name!r}, expected at least {len(chosen.steps)}")
    safe = (chosen.steps[0], *(folded(step, chosen.safety) for step in chosen.steps[1:-1]), chosen.steps[-1])
    repeated = (*safe[: len(chosen.steps)], *(chosen.steps[-1],) * (int(steps) - len(chosen.steps)))
    taken = (*repeated[: int(steps) - 1], chosen.steps[min(int(steps), len(chosen.steps)) - 1])
    return replace(chosen, steps=taken)


def folded(step: Triple, safety: float) -> Triple:
    """The step's polynomial of x/safety."""
    a, b, c = step
    return a / safety, b / safety**3, c / safety**5


def _triples(given: Sequence[float] | Sequence[Sequence[float]]) -> tuple[Triple, ...]:
    if not isinstance(given, (tuple, list)) or not given:
        raise TypeError(f"coefficients must be a name, a triple (a, b, c), or a triple for each step, got {given!r}")
    rows = [given] if isinstance(given[0], numbers.Real) else given
    result = []
    for row in rows:
        if not isinstance(row, (tuple, list)) or len(row) != 3:
            raise ValueError(f"coefficients must be a tuple of exactly 3 values for each step, got {row!r}")
        for value in row:
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"coefficients must be finite numbers, got {value!r} in {row!r}")
        a, b, c = map(float, row)
        result.append((a, b, c))
    return tuple(result)
