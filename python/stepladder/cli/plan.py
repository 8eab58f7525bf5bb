"""`stepladder plan`: memory, traffic and time of a step on several ranks; docs/scaling.md has the formulas."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stepladder as sl
from stepladder.bench import output
from stepladder.bench.shapes import OUTSIDE, SHAPES, Shapes, shapes_of
from stepladder.distributed import costs
from stepladder.distributed.assignment import assign
from stepladder.distributed.sharded import Cut
from stepladder.optim.base import Group, Optimizer
from stepladder.optim.state import RULES, has_step, new_step

REPLICATED, SHARDED = "replicated", "sharded"
MATRICES: dict[str, Any] = {cls.__name__.lower(): cls for cls in (sl.Muon, sl.MuonH, sl.Shampoo, sl.SOAP)}
ELEMENTWISE: dict[str, Any] = {
    cls.__name__.lower(): cls
    for cls in (sl.SGD, sl.Adagrad, sl.RMSprop, sl.Adam, sl.AdamW, sl.SignSGD, sl.Lion, sl.LARS, sl.LAMB)
}
STAGGERED = ("shampoo", "soap")


@dataclass(frozen=True, slots=True)
class Plan:
    """A step of one scheme.

    Attributes:
        scheme: "replicated" or "sharded".
        state_bytes: Of each rank.
        operations: Of each rank's matrices, in the mean over the steps from one refresh to the next.
        waited_operations: Of the rank with the most of them at each step, in the same mean.
        busiest_operations: Of each rank, at the step where one has the most of all.
        collectives: Of the optimizer, for each rank.
        received_bytes: That each rank receives from others.
        in_turn_s: Seconds where work and exchange take turns, in the mean over steps; None where there are neither.
        overlapped_s: Seconds where they overlap; likewise.
        busiest_in_turn_s: Seconds of the busiest step; likewise.
        busiest_overlapped_s: Likewise.
    """

    scheme: str
    state_bytes: list[int]
    operations: list[float]
    waited_operations: float
    busiest_operations: list[float]
    collectives: int
    received_bytes: list[int]
    in_turn_s: float | None
    overlapped_s: float | None
    busiest_in_turn_s: float | None
    busiest_overlapped_s: float | None


def state_bytes(family: type[Optimizer], param: Tensor, group: Group) -> int:
    """Bytes of the states of a parameter, which may be on the device "meta"."""
    states = [
        family.initial_state(name, param, group, family.state_dtype(name, param, group))
        for name in family.states(group)
    ]
    return sum(state.nbytes for state in states) + (new_step().nbytes if has_step(family, group) else 0)


def plan(
    name: str,
    shapes: Shapes,
    outside: Shapes,
    dtype: torch.dtype,
    scheme: str,
    ranks: int,
    options: Group | None = None,
    **machine: float,
) -> Plan:
    """A step of an optimizer, all parameters having gradients.

    Args:
        name: A key of `MATRICES` or `ELEMENTWISE`.
        shapes: Of all parameters.
        outside: Those among them that are no hidden matrices, whatever their dimensions.
        dtype: Of parameters, gradients and states.
        scheme: "replicated" or "sharded".
        ranks: How many there are.
        options: Hyper-parameters of the matrices, where they are not the defaults.
        machine: What `costs.seconds` takes.
    """
    hidden = [name in MATRICES and len(shape) > 1 and shape not in outside for shape in shapes]
    matrices = [
        torch.empty(shape, dtype=dtype, device="meta") for shape, chosen in zip(shapes, hidden, strict=True) if chosen
    ]
    rest = Counter(shape for shape, chosen in zip(shapes, hidden, strict=True) if not chosen)
    elementwise = ELEMENTWISE.get(name, sl.AdamW)
    group = elementwise([torch.empty(0)]).defaults

    @cache
    def state_of(shape: torch.Size) -> int:
        return state_bytes(elementwise, torch.empty(shape, dtype=dtype, device="meta"), group)

    states = [0] * ranks
    for shape, count in rest.items():
        cut = Cut(torch.Size(shape), 0, ranks if scheme == SHARDED else 1)
        for rank in range(ranks):
            states[rank] += count * state_of(cut.shape_of(rank if scheme == SHARDED else 0))
    operations = [0.0] * ranks
    steps = [operations]
    if matrices:
        family = MATRICES[name]
        group = family([torch.empty(2, 2)]).defaults | (options or {}) | {"params": matrices}
        work = [family.cost(param, group) for param in matrices]
        due = family.refreshes([group])
        refreshes = [due.get(param, {}) for param in matrices]
        owners = assign(work, operations, refreshes, [{} for _ in range(ranks)])
        steps = costs.each_step(work, refreshes, owners, ranks)
        for param, owner in zip(matrices, owners, strict=True):
            states[owner] += state_bytes(family, param, group)
        if scheme == SHARDED:
            traffic = costs.sharded([param.shape for param in matrices], dtype.itemsize, owners, ranks)
        else:
            traffic = costs.replicated([param.nbytes for param in matrices], owners, ranks)
    elif scheme == SHARDED and RULES[elementwise.rule(group)]["norms"]:
        traffic = costs.norms(len(shapes), ranks)
    else:
        return Plan(scheme, states, operations, 0.0, operations, 0, [0] * ranks, None, None, None, None)
    busiest = max(steps, key=max)
    in_turn, overlapped = zip(*(costs.seconds(step, traffic, **machine) for step in steps), strict=True)
    return Plan(
        scheme,
        states,
        operations,
        fmean(map(max, steps)),
        busiest,
        traffic.collectives,
        traffic.received,
        fmean(in_turn),
        fmean(overlapped),
        *costs.seconds(busiest, traffic, **machine),
    )


def table(plans: list[Plan], title: str, refreshed: bool) -> Table:
    """A column for each scheme; where something is refreshed, rows for what steps have apart."""
    shown = Table("", *(plan.scheme for plan in plans), title=title, title_justify="left")

    def row(what: str, text: Any) -> None:
        shown.add_row(what, *(text(plan) for plan in plans))

    def milliseconds(seconds: float | None) -> str:
        return "–" if seconds is None else f"{1e3 * seconds:.3f}"

    row("state a rank, greatest, MB", lambda plan: f"{max(plan.state_bytes) / 1e6:.3f}")
    row("state a rank, mean, MB", lambda plan: f"{fmean(plan.state_bytes) / 1e6:.3f}")
    row("collectives a step", lambda plan: str(plan.collectives))
    row("received by a rank, greatest, MB", lambda plan: f"{max(plan.received_bytes) / 1e6:.3f}")
    row("operations of a rank, greatest, G", lambda plan: f"{max(plan.operations) / 1e9:.3f}")
    row(
        "greatest over mean",
        lambda plan: f"{max(plan.operations) / fmean(plan.operations):.3f}" if any(plan.operations) else "–",
    )
    if refreshed:
        row(
            "greatest at each step over mean",
            lambda plan: f"{plan.waited_operations / fmean(plan.operations):.3f}",
        )
        row("greatest at the busiest step, G", lambda plan: f"{max(plan.busiest_operations) / 1e9:.3f}")
    row("step, work and exchange in turn, ms", lambda plan: milliseconds(plan.in_turn_s))
    row("step, exchange behind work, ms", lambda plan: milliseconds(plan.overlapped_s))
    if refreshed:
        row("busiest step, in turn, ms", lambda plan: milliseconds(plan.busiest_in_turn_s))
        row("busiest step, exchange behind work, ms", lambda plan: milliseconds(plan.busiest_overlapped_s))
    return shown


def _shapes(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """A callback that refuses what names no shapes."""
    try:
        shapes_of(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return text


def _number(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A callback that refuses NaN, which click's ranges let pass."""
    if math.isnan(value):
        bounds: Any = parameter.type
        raise click.BadParameter(f"{value} is not in the range {bounds.min}<=x<={bounds.max}")
    return value


RATE = click.FloatRange(1e-6, 1e9)


@click.command(context_settings={"show_default": True})
@click.option("--optimizer", required=True, type=click.Choice([*MATRICES, *ELEMENTWISE]), help="With its defaults.")
@click.option("--model", required=True, callback=_shapes, metavar="NAME", help=f"{SHAPES}.")
@click.option("--ranks", required=True, type=click.IntRange(1, 4096), help="How many processes.")
@click.option("--bandwidth", required=True, type=RATE, callback=_number, help="That a rank receives, GB/s.")
@click.option("--flops", required=True, type=RATE, callback=_number, help="Of a rank on matrices, TFLOP/s.")
@click.option(
    "--latency",
    type=click.FloatRange(0, 1e9),
    callback=_number,
    default=20.0,
    help="Of each collective beside its bytes, µs; an assumption.",
)
@click.option("--stagger", is_flag=True, help="Spread the refreshes of shampoo or soap over steps.  [default: no]")
@click.option("--scheme", type=click.Choice([REPLICATED, SHARDED]), help="DDP's or FSDP2's.  [default: both]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Of parameters and states; factors are float32.",
)
@click.option(
    "--json",
    "json_file",
    type=output.FILE,
    callback=output.checked,
    help="Write the same as JSON to this file, with the numbers of each rank.",
)
def plan_command(
    optimizer: str,
    model: str,
    ranks: int,
    bandwidth: float,
    flops: float,
    latency: float,
    stagger: bool,
    scheme: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """What a step on several ranks needs: state, traffic, and a prediction of its time.

    State, collectives, bytes and operations are those of the real assignment. The time is a model: of the work on
    matrices and the optimizer's own collectives, at the rates given here; elementwise work and packing count for
    nothing. Of Shampoo and SOAP it is the mean over the steps from one refresh to the next, beside the busiest of them.
    """
    if stagger and optimizer not in STAGGERED:
        said = f"{optimizer} refreshes nothing, expected {' or '.join(STAGGERED)}"
        raise click.BadParameter(said, param_hint="--stagger")
    machine = {"flops": flops * 1e12, "bandwidth": bandwidth * 1e9, "latency": latency * 1e-6}
    options = {"stagger": True} if stagger else None
    shapes, outside = shapes_of(model), OUTSIDE.get(model, [])
    plans = [
        plan(optimizer, shapes, outside, getattr(torch, dtype), each, ranks, options, **machine)
        for each in ([scheme] if scheme else [REPLICATED, SHARDED])
    ]
    console = Console()
    works, refreshes = any(plans[0].operations), optimizer in STAGGERED
    title = f"{optimizer}{', staggered' * stagger}, {model}, {dtype}, ranks: {ranks}"
    console.print(table(plans, title, works and refreshes))
    if not works and any(plan.collectives for plan in plans):
        console.print(
            "No matrix is worked on: of the step, the exchange of norms is predicted alone; memory bounds the rest."
        )
    elif not works:
        console.print("No matrix is worked on: the optimizer exchanges nothing, and memory bounds its step.")
    else:
        work = "products and refreshes" if refreshes else "the iteration"
        console.print(
            f"Assumed: {flops:g} TFLOP/s of each rank in {work}, {bandwidth:g} GB/s that each receives, "
            f"{latency:g} µs for each collective; elementwise work and packing take no time.",
            highlight=False,
        )
    if json_file:
        settings = {
            "optimizer": optimizer,
            "model": model,
            "dtype": dtype,
            "ranks": ranks,
            "stagger": stagger,
            **machine,
        }
        text = json.dumps({"settings": settings, "plans": [asdict(each) for each in plans]}, indent=2)
        output.replace(json_file, "w", lambda file: file.write(text + "\n"))
