"""Trains a small character-level GPT on the Python manual and times its optimizer.

    python examples/train_charlm.py --optimizer Lion
    python examples/train_charlm.py --optimizer Muon --lr 0.02
    python examples/train_charlm.py --compare torch.AdamW:fused AdamW
    torchrun --standalone --nproc-per-node 2 examples/train_charlm.py --optimizer Muon

Under torchrun the model is sharded by FSDP2, and every process takes its share of each batch.

The text is the one behind Python's own help(), so nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import stepladder as sl
from stepladder.bench.charlm import GPT, Text, sample

# Learning rates that suit this model where --lr is not given, and the one for any other optimizer.
RATES = {"SGD": 0.3, "Adagrad": 1e-2, "RMSprop": 1e-3, "Lion": 1e-3, "SignSGD": 1e-3, "LARS": 10.0, "LAMB": 3e-2}
RATES |= {"Muon": 2e-2, "MuonH": 1e-2}
OTHER_RATE = 3e-3
FORMS = {"": {}, "fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"foreach": False}}
UNTIMED = 3  # first steps: they create states and warm up
COMPARED = 20  # steps over which --compare holds the curves together
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def shard(model: GPT) -> None:
    """Give every process its share of each parameter; gradients then are means over the processes."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")


def mean(loss: Tensor) -> float:
    """Over all processes, each of which has the mean over its part of the batch."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return loss.item() / RANKS


def parse(spec: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """`torch.AdamW:fused`, `Lion` ...: the class and its arguments, the default learning rate among them."""
    path, _, form = spec.partition(":")
    name = path.removeprefix("torch.")
    cls = getattr(torch.optim, name, None) if path != name else vars(sl.optim).get(name)
    known = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if not known or form not in FORMS or (cls is torch.optim.Muon and form):
        ours = ", ".join(sl.optim.__all__)
        raise click.BadParameter(
            f"{spec!r} is none of {ours}, or torch.NAME with nothing, :fused, :foreach or :forloop (Muon: nothing)"
        )
    return cls, {"lr": RATES.get(name, OTHER_RATE), **FORMS[form]}


def optimizers(spec: str, model: nn.Module, lr: float | None, fallback_lr: float) -> list[torch.optim.Optimizer]:
    """What steps a model: one object, or two where torch's Muon leaves the rest to AdamW."""
    cls, arguments = parse(spec)
    if lr is not None:
        arguments["lr"] = lr
    if not hasattr(cls, "algorithm") and cls is not torch.optim.Muon:
        return [cls(model.parameters(), **arguments)]
    groups = sl.param_groups(
        model, algorithm=getattr(cls, "algorithm", "muon"), adamw={"lr": fallback_lr, "weight_decay": 0.01}
    )
    if cls is not torch.optim.Muon:
        return [cls(groups, **arguments)]
    matrices = [p for group in groups if group["algorithm"] == "muon" for p in group["params"]]
    rest = [p for group in groups if group["algorithm"] != "muon" for p in group["params"]]
    return [cls(matrices, **arguments), torch.optim.AdamW(rest, lr=fallback_lr, weight_decay=0.01)]


class Run:
    """One model in training, with its losses (nats) and times (seconds), an entry for each step."""

    def __init__(self, name: str, vocabulary: int, options: dict[str, Any]) -> None:
        self.name, self.max_norm = name, options["max_norm"]
        torch.manual_seed(options["seed"])
        sizes = (options[key] for key in ("context", "width", "layers", "heads"))
        self.model = GPT(vocabulary, *sizes).to(getattr(torch, options["dtype"]))
        if dist.is_initialized():
            shard(self.model)
        self.optimizers = optimizers(name, self.model, options["lr"], options["fallback_lr"])
        steps, warmup = options["steps"], max(1, options["steps"] // 10)

        def factor(t: int) -> float:
            return min((t + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, t - warmup) / (steps - warmup)))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self.optimizers]
        self.losses: list[float] = []
        self.whole: list[float] = []  # forward, backward, clipping and the optimizer's step
        self.step: list[float] = []  # the optimizer's step

    def advance(self, x: Tensor, y: Tensor) -> None:
        started = time.perf_counter()
        self.model.zero_grad()
        loss = self.model.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        before = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        after = time.perf_counter()
        for schedule in self.schedules:
            schedule.step()
        self.losses.append(mean(loss))
        self.step.append(after - before)
        self.whole.append(after - started)

    @torch.no_grad()
    def nudge(self, generator: torch.Generator) -> None:
        """Move every weight by one rounding of the step's coarsest arithmetic, up or down."""
        for p in self.model.parameters():
            sign = torch.randint(2, p.shape, generator=generator) * 2 - 1
            coarsest = torch.bfloat16 if parse(self.name)[0].__name__ in ("Muon", "MuonH") else p.dtype
            p.mul_(1 + torch.finfo(coarsest).eps * sign.to(p.dtype))

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> float:
        return mean(self.model.loss(x, y))

    def result(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What --json reports of a run; x and y are the validation batch."""
        step, whole = median(self.step[UNTIMED:]), median(self.whole[UNTIMED:])
        return {
            "optimizer": self.name,
            "losses": self.losses,
            "validation_loss": self.validate(x, y),
            "step_ms": 1e3 * step,
            "step_share": step / whole,
        }


def compare(a: Run, b: Run, nudged: Run) -> dict[str, Any]:
    """Whether two curves differ by no more than rounding can explain.

    Two implementations of one optimizer round differently at every step, and training lets each of these
    differences grow, by an amount that no formula gives. It is measured: `nudged` is run `a` from weights that
    are one rounding off, to bf16 where Muon's iteration has that. Each of n steps brings about one such
    difference, the later ones with less time to grow, so n times the effect of the first bounds the sum. The
    loss's own rounding is the least effect.
    """

    def distance(one: Run, other: Run, steps: int) -> float:
        return max(abs(p - q) for p, q in zip(one.losses[:steps], other.losses[:steps], strict=True))

    n = len(nudged.losses)
    bound = n * max(distance(a, nudged, n), torch.finfo(torch.float32).eps * a.losses[0])
    difference = distance(a, b, n)
    return {
        "steps_compared": n,
        "difference": difference,
        "bound": bound,
        "coincide": difference <= bound,
        "largest_difference": distance(a, b, len(a.losses)),
        "step_time_ratio": median(a.step[UNTIMED:]) / median(b.step[UNTIMED:]),
    }


def show(results: list[dict[str, Any]], comparison: dict[str, Any] | None) -> None:
    table = Table(
        "", *(result["optimizer"] for result in results), title="loss, nats a character", title_justify="left"
    )
    steps = len(results[0]["losses"])
    for step in sorted({round(k * (steps - 1) / 8) for k in range(9)}):
        table.add_row(f"step {step + 1}", *(f"{result['losses'][step]:.6f}" for result in results))
    table.add_row("validation", *(f"{result['validation_loss']:.6f}" for result in results), end_section=True)
    table.add_row("optimizer step, median ms", *(f"{result['step_ms']:.3f}" for result in results))
    table.add_row("its share of a training step", *(f"{result['step_share']:.1%}" for result in results))
    console = Console()
    console.print(table)
    if comparison:
        c = comparison
        a, b = (result["optimizer"] for result in results)
        console.print(f"{a} takes {c['step_time_ratio']:.2f} times as long for its step as {b}.")
        console.print(
            f"Over the first {c['steps_compared']} steps the curves differ by at most {c['difference']:.1e}, where "
            f"rounding explains {c['bound']:.1e}; over all steps by {c['largest_difference']:.1e}."
        )


def plot(results: list[dict[str, Any]], path: str) -> None:
    from matplotlib import pyplot as plt

    for result in results:
        plt.plot(result["losses"], label=f"{result['optimizer']}, {result['step_ms']:.2f} ms a step", alpha=0.7)
    plt.xlabel("step")
    plt.ylabel("loss, nats a character")
    plt.legend()
    plt.savefig(path, dpi=150)


@click.command(context_settings={"show_default": True})
@click.option("--optimizer", default="AdamW", help="NAME of stepladder, or torch.NAME[:fused|:foreach|:forloop].")
@click.option("--compare", "pair", nargs=2, metavar="A B", help="Two implementations of one optimizer, in step.")
@click.option("--lr", type=float, help="Peak learning rate; each optimizer has a default.")
@click.option("--fallback-lr", type=float, default=OTHER_RATE, help="Peak learning rate of AdamW beside Muon.")
@click.option("--steps", type=click.IntRange(min=UNTIMED + 2), default=150)
@click.option("--batch", type=click.IntRange(min=1), default=16)
@click.option("--context", type=click.IntRange(min=1), default=64, help="Characters.")
@click.option("--width", type=click.IntRange(min=1), default=128)
@click.option("--layers", type=click.IntRange(min=1), default=4)
@click.option("--heads", type=click.IntRange(min=1), default=4)
@click.option("--seed", type=int, default=0)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Of the parameters.")
@click.option("--threads", type=click.IntRange(min=1), help="Torch's choice where not given.")
@click.option("--max-norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False), help="Draw the loss curves to this PNG file.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write losses and times to this file.")
def main(
    optimizer: str, pair: tuple[str, str] | None, plot_file: str | None, json_file: str | None, **options: Any
) -> None:
    """Train a small character-level GPT and time the optimizer's step.

    With --compare, the exit code is 1 where the two loss curves differ by more than rounding explains.
    """
    if plot_file and find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if options["width"] % options["heads"]:
        raise click.UsageError(f"--width {options['width']} is no multiple of --heads {options['heads']}")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if options["batch"] % RANKS:
        raise click.UsageError(f"--batch {options['batch']} is no multiple of the {RANKS} processes")
    if pair and RANKS > 1:
        raise click.UsageError("--compare runs in one process, without torchrun")
    if RANKS > 1:
        dist.init_process_group("gloo")
    text = Text()
    runs = [Run(name, text.vocabulary, options) for name in (pair or [optimizer])]
    nudged = Run(pair[0], text.vocabulary, options) if pair else None
    if nudged:
        nudged.nudge(torch.Generator().manual_seed(options["seed"]))

    generator = torch.Generator().manual_seed(options["seed"])
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), disable=RANK > 0) as progress:
        task = progress.add_task("training", total=options["steps"], loss="")
        for step in range(options["steps"]):
            x, y = sample(text.training, options["batch"], options["context"], generator)
            for run in runs:
                run.advance(x.chunk(RANKS)[RANK], y.chunk(RANKS)[RANK])
            if nudged and step < COMPARED:
                nudged.advance(x, y)
            progress.update(task, advance=1, loss=", ".join(f"{run.losses[-1]:.3f}" for run in runs))

    x, y = sample(text.validation, 8 * options["batch"], options["context"], generator)
    results = [run.result(x.chunk(RANKS)[RANK], y.chunk(RANKS)[RANK]) for run in runs]
    comparison = compare(*runs, nudged) if nudged else None
    if RANK == 0:
        show(results, comparison)
        if json_file:
            report = {"settings": options, "runs": results, "comparison": comparison}
            Path(json_file).write_text(json.dumps(report, indent=2) + "\n")
        if plot_file:
            plot(results, plot_file)
    if dist.is_initialized():
        # gloo's threads give the tensors of the last collectives back, which takes the interpreter: one that is
        # ending by then aborts the process. While the ranks wait for the first, they do so.
        dist.barrier()
        dist.destroy_process_group()
    if comparison and not comparison["coincide"]:
        sys.exit("The loss curves do not coincide.")


if __name__ == "__main__":
    main()
