"""What a step must move: bytes for each element, by rule and dtypes, as docs/performance.md shows them."""

from __future__ import annotations

from stepladder.optim.state import RULES

# Sizes in bytes of parameter, gradient and state.
DTYPES = {"fp64": (8, 8, 8), "fp32": (4, 4, 4), "bf16, fp16": (2, 2, 2), "the same, fp32 states": (2, 2, 4)}


def names() -> list[str]:
    """The rules, those with fewer states first."""
    return sorted(RULES, key=lambda name: (len(RULES[name]["states"]), name))


def bytes_per_element(rule: str, param: int, grad: int, state: int) -> int:
    """Parameter, gradient and states read once, parameter and states written once.

    Args:
        rule: A name of rules.def.
        param: Bytes of an element of the parameter.
        grad: Of its gradient.
        state: Of each of its states.
    """
    return 2 * param + grad + 2 * state * len(RULES[rule]["states"])


def bytes_of_pass(kind: str, rule: str, param: int, grad: int, state: int) -> int:
    """Bytes for each element that one pass of the CPU's kernels must move.

    Args:
        kind: "update"; "prepare" and "apply", the two passes of a rule that takes norms; "measure" or "scale", of
            gradients alone.
        rule: A name of rules.def; of gradients alone it is not looked at.
        param: Bytes of an element of the parameter.
        grad: Of its gradient.
        state: Of each of its states.
    """
    if kind in ("measure", "scale"):
        return grad if kind == "measure" else 2 * grad
    if kind == "update":
        return bytes_per_element(rule, param, grad, state)
    prepared = RULES[rule]["prepared"]
    if kind == "prepare":
        return param + grad + 2 * state * prepared
    # Where the first pass has taken the gradient into the states, the second reads those alone.
    others = len(RULES[rule]["states"]) - prepared
    return 2 * param + (0 if prepared else grad) + state * prepared + 2 * state * others


def table() -> str:
    """Every rule in Markdown; a dagger marks those that take norms, and so go over their tensors twice."""
    lines = [f"| rule | states | {' | '.join(DTYPES)} |", "|---|---|" + "--:|" * len(DTYPES)]
    for name in names():
        states = ", ".join(RULES[name]["states"]) or "–"
        counts = " | ".join(str(bytes_per_element(name, *sizes)) for sizes in DTYPES.values())
        lines.append(f"| {name}{' †' if RULES[name]['norms'] else ''} | {states} | {counts} |")
    return "\n".join(lines)
