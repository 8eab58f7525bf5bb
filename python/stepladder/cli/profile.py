"""`stepladder profile`: what the compiled kernels look like."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

import click
from rich.console import Console
from rich.table import Table

from stepladder.cli import static
from stepladder.cli.cubins import Cubin, MissingError, cuda_cubins, in_parallel, triton_cubins

SOURCES: dict[str, Callable[[str, Path, str], tuple[list[Cubin], str]]] = {
    "cuda": cuda_cubins,
    "triton": triton_cubins,
}
DEFAULT_ARCH = "sm_90a"
# Of the table at least, in characters: in a narrower terminal its lines break, but no figure is cut off.
WIDTH = 150


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


@click.command()
@click.option("--static", "static_", is_flag=True, help="From the compiled kernels alone; needs no GPU.")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    default=(DEFAULT_ARCH,),
    show_default=True,
    callback=check_arch,
    metavar="ARCH",
    help=f"Architecture: {', '.join(f'sm_{number}' for number in static.MULTIPROCESSORS)}. Repeatable.",
)
@click.option("--kernel", "wanted", default="", metavar="SUBSTRING", help="Only kernels whose names contain this.")
@click.option("--backend", type=click.Choice(list(SOURCES)), help="Only this one's. [default: all that are here]")
@click.option("--json", "json_file", type=click.File("w", atomic=True), help="Write the same as JSON to this file.")
def profile(static_: bool, archs: tuple[str, ...], wanted: str, backend: str | None, json_file: TextIO | None) -> None:
    """Registers, memory accesses and occupancy of each GPU kernel, from its machine code.

    Where that has to be compiled first, all kernels of CUDA take a minute, and those of Triton several, which its cache
    then saves; --kernel compiles fewer.
    """
    if not static_:
        raise click.UsageError("this release profiles compiled kernels only: stepladder profile --static")
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
    if json_file:
        versions = {"stepladder": metadata.version("stepladder")}
        json.dump({"versions": versions, "reports": [asdict(report) for report in reports]}, json_file, indent=2)
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
