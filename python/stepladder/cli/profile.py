"""`stepladder profile`: where the time of a step goes, and what the compiled kernels look like."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from stepladder import backends
from stepladder.bench import output
from stepladder.bench.cases import DTYPES
from stepladder.bench.profile.cli import profile_case
from stepladder.bench.profile.report import Case
from stepladder.bench.profile.subjects import ALIASES, KERNELS, NAMES, OPTIMIZERS, default_shapes
from stepladder.bench.shapes import SHAPES, shapes_of
from stepladder.cli import static
from stepladder.cli.cubins import Cubin, MissingError, cuda_cubins, in_parallel, triton_cubins

SOURCES: dict[str, Callable[[str, Path, str], tuple[list[Cubin], str]]] = {
    "cuda": cuda_cubins,
    "triton": triton_cubins,
}
DEFAULT_ARCH = "sm_90a"
# Of the table at least, in characters: in a narrower terminal its lines break, but no figure is cut off.
WIDTH = 150


INPUT = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@dataclass(frozen=True)
class Report:
    """The kernels of one backend for one architecture, or why there are none.

    Attributes:
        backend: cuda or triton.
        arch: Such as sm_90a.
        origin: How the machine code was had.
        kernels: By name.
        reason: Why it was not.
    """

    backend: str
    arch: str
    origin: str | None
    kernels: list[static.Kernel]
    reason: str | None = None


def collect(backend: str, arch: str, wanted: str = "") -> Report:
    """Everything that `stepladder profile --static` shows of a backend and an architecture.

    Raises:
        RuntimeError: A compiler or a disassembler failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            with Console(stderr=True).status(f"{backend}, {arch}: compiling and reading"):
                cubins, origin = SOURCES[backend](arch, Path(directory), wanted)
                found = in_parallel(lambda cubin: static.inspect(cubin, arch, wanted), cubins)
        except MissingError as error:
            return Report(backend, arch, None, [], str(error))
    return Report(backend, arch, origin, sorted((k for part in found for k in part), key=lambda kernel: kernel.name))


def check_arch(context: click.Context, parameter: click.Parameter, archs: tuple[str, ...]) -> tuple[str, ...]:
    for arch in archs:
        try:
            static.multiprocessor(arch)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return archs


def check_shapes(context: click.Context, parameter: click.Parameter, shapes: str | None) -> str | None:
    try:
        if shapes is not None:
            shapes_of(shapes)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return shapes


class Name(click.Choice[str]):
    """What can be profiled, by its name or another one for it."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        chosen: str = super().convert(ALIASES.get(value, value), param, ctx)
        return chosen


@click.command(epilog=f"NAME is an optimizer, {', '.join(OPTIMIZERS)}, or a function: {', '.join(KERNELS)}.")
@click.argument("name", type=Name(NAMES), metavar="[NAME]", required=False)
@click.option("--optimizer", type=Name(NAMES), metavar="NAME", help="The same as NAME, as `stepladder bench` takes it.")
@click.option(
    "--shapes",
    callback=check_shapes,
    metavar="SHAPES",
    help=f"{SHAPES}. [default: gpt2; for what takes minutes on it, gpt2-layer]",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Of the tensors.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to step.")
@click.option(
    "--backend",
    type=click.Choice(backends.NAMES),
    help="Which kernels. [default: the automatic choice; with --static all that are here]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch and of our kernels. [default: torch's choice]")
@click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="For the steps.")
@click.option("--steps", type=click.IntRange(min=1), help="Take so many steps instead.")
@click.option(
    "--trace",
    "trace_file",
    type=output.FILE,
    callback=output.checked,
    help="Write a trace of a few more steps, for Perfetto or Chrome.",
)
@click.option("--ncu", "ncu_file", type=INPUT, help="Show what this CSV of Nsight Compute says beside the rest.")
@click.option(
    "--json", "json_file", type=output.FILE, callback=output.checked, help="Write everything as JSON to this file."
)
@click.option(
    "--bare", is_flag=True, help="Only take --steps steps, between cudaProfilerStart and Stop: for nsys and ncu."
)
@click.option("--static", "static_", is_flag=True, help="The compiled GPU kernels instead; needs no GPU.")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    default=(DEFAULT_ARCH,),
    show_default=True,
    callback=check_arch,
    metavar="ARCH",
    help=f"With --static: {', '.join(f'sm_{number}' for number in static.MULTIPROCESSORS)}. Repeatable.",
)
@click.option(
    "--kernel", "wanted", default="", metavar="SUBSTRING", help="With --static: only kernels whose names contain this."
)
@click.pass_context
def profile(
    context: click.Context,
    name: str | None,
    optimizer: str | None,
    shapes: str | None,
    dtype: str,
    device: str,
    backend: str | None,
    threads: int | None,
    seconds: float,
    steps: int | None,
    trace_file: Path | None,
    ncu_file: Path | None,
    json_file: Path | None,
    bare: bool,
    static_: bool,
    archs: tuple[str, ...],
    wanted: str,
) -> None:
    """Where the time of an optimizer's step, or of a function of stepladder.ops, goes.

    NAME is what to profile. Its kernels are shown with time, rates and their share of what torch's own copies and
    products reach in the same run, beside the time of the host; docs/profile.md says how to read it.

    With --static: registers, memory accesses and occupancy of each GPU kernel, from its machine code. Where that has to
    be compiled first, all kernels of CUDA take a minute, and those of Triton several, which its cache then saves;
    --kernel compiles fewer.
    """
    given = {key for key in context.params if context.get_parameter_source(key) == ParameterSource.COMMANDLINE}
    if static_:
        if others := given - {"static_", "archs", "wanted", "backend", "json_file"}:
            raise click.UsageError(
                f"--static goes with --arch, --kernel, --backend and --json alone, not {_flags(others)}"
            )
        if backend is not None and backend not in SOURCES:
            raise click.UsageError(f"--backend {backend} has no kernels for a GPU, expected {' or '.join(SOURCES)}")
        profile_static(archs, wanted, backend, json_file)
        return
    if others := given & {"archs", "wanted"}:
        raise click.UsageError(f"{_flags(others)} goes with --static alone")
    if bare and (others := given & {"json_file", "trace_file", "ncu_file", "seconds"}):
        raise click.UsageError(f"--bare takes steps and says nothing: {_flags(others)} does not go with it")
    if name and optimizer and name != optimizer:
        raise click.UsageError(f"NAME is {name!r} and --optimizer {optimizer!r}: expected one of them")
    chosen = name or optimizer
    if chosen is None:
        raise click.UsageError(f"nothing to profile: expected a NAME, one of {', '.join(NAMES)}; or --static")
    case = Case(chosen, shapes or default_shapes(chosen), dtype, device, backend, threads)
    profile_case(case, seconds, steps, bare, json_file, trace_file, ncu_file)


def _flags(names: set[str]) -> str:
    """As they are typed."""
    odd = {"archs": "--arch", "wanted": "--kernel", "static_": "--static", "name": "NAME"}
    return " and ".join(sorted(odd.get(name, "--" + name.removesuffix("_file")) for name in names))


def profile_static(archs: tuple[str, ...], wanted: str, backend: str | None, json_file: Path | None) -> None:
    """The kernels as they were compiled.

    Raises:
        click.ClickException: None were found, or a tool failed.
    """
    try:
        reports = [collect(name, arch, wanted) for arch in archs for name in ([backend] if backend else SOURCES)]
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    for report in reports:
        if backend and report.reason is not None:
            raise click.ClickException(f"no kernels of {backend} for {report.arch}: {report.reason}")
    console = Console(width=max(Console().width, WIDTH))
    for report in reports:
        if report.reason is not None:
            console.print(f"{report.backend}, {report.arch}: left out, as {report.reason}.", highlight=False)
        elif report.kernels:
            console.print(table(report), "")
    content = {
        "versions": {"stepladder": metadata.version("stepladder")},
        "reports": [asdict(report) for report in reports],
    }
    if json_file is not None:
        output.replace(json_file, "w", lambda file: json.dump(content, file, indent=2))
    if all(report.reason is not None for report in reports):
        raise click.ClickException("no kernels were found")
    if not any(report.kernels for report in reports):
        raise click.ClickException(f"no kernel's name contains {wanted!r}")


def table(report: Report) -> Table:
    widths = [w for w in static.WIDTHS if w != 32 or any(k.loads[w] + k.stores[w] for k in report.kernels)]
    shown = Table(title=f"{report.backend}, {report.arch}, {report.origin}", title_justify="left")
    by_width = "/".join(map(str, widths))
    shown.add_column("kernel", no_wrap=True)
    headings = ["regis-\nters", "shared\nbytes", "stack\nbytes", "spills", f"loads\n{by_width}", f"stores\n{by_width}"]
    headings += ["threads\n/block", "blocks\n/SM", "warps\n/SM", "occu-\npancy", "limited by"]
    for heading in headings:
        shown.add_column(heading, no_wrap=True, justify="left" if heading == "limited by" else "right")
    for kernel in report.kernels:
        filled = kernel.occupancy
        shown.add_row(
            kernel.name,
            str(kernel.registers),
            str(kernel.shared + kernel.dynamic_shared),
            str(kernel.stack),
            str(kernel.local_loads + kernel.local_stores),
            "/".join(str(kernel.loads[width]) for width in widths),
            "/".join(str(kernel.stores[width]) for width in widths),
            str(kernel.threads),
            str(filled.blocks),
            str(filled.warps),
            f"{filled.percent:.0f} %",
            filled.limited_by,
        )
    return shown
