"""`stepladder info`: versions, processor, threads, and each backend with yes, or no and why."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from rich.console import Console
from rich.table import Table

from stepladder import _C, backends
from stepladder.newton_schulz import TORCH, matrix_unit


def processor() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def optional_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Everything that `stepladder info` shows, ready for JSON."""
    devices, no_device = _C.cuda()
    isas = _C.isas()
    probe = torch.zeros(1)
    return {
        "versions": {
            "stepladder": metadata.version("stepladder"),
            "torch": torch.__version__,
            "triton": optional_version("triton"),
            "python": sys.version.split()[0],
            "compiler": _C.compiler,
            "cuda_compiler": _C.cuda_version or None,
            "torch_cuda": torch.version.cuda,
        },
        "cpu": {
            "name": processor(),
            "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "kernels": isas[0],
            "kernels_available": isas,
            "matrix_unit": matrix_unit(),
            "matrix_units_available": [*_C.matrix_units(), TORCH],
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": {"torch": torch.get_num_threads(), "openmp_runtime": _C.openmp_runtime()},
        "cuda": {"devices": devices, "reason": no_device or None},
        "pointers": "dlpack exchange table" if hasattr(probe, "__dlpack_c_exchange_api__") else "python attributes",
        "backends": [
            {
                "name": backend.name,
                "device_types": list(backend.device_types) or ["any"],
                "available": (reason := backend.missing()) is None,
                "reason": reason,
            }
            for backend in backends.TABLE
        ],
        "automatic_choice": {kind: backends.choose(None, kind) for kind in device_types()},
    }


def device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@click.command()
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the same as JSON to this file.")
def info(json_file: str | None) -> None:
    """Versions, processor, threads, and which backends can run."""
    facts = collect()
    if json_file:
        Path(json_file).write_text(json.dumps(facts, indent=2) + "\n")
    console = Console()
    for title in ("versions", "cpu", "threads"):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for key, value in facts[title].items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(key.replace("_", " "), shown)
        console.print(table, "")
    table = Table(title="backends, in the order of the automatic choice", title_justify="left")
    for column in ("backend", "serves", "available", "why not"):
        table.add_column(column)
    for row in facts["backends"]:
        table.add_row(
            row["name"], ", ".join(row["device_types"]), "yes" if row["available"] else "no", row["reason"] or ""
        )
    console.print(table)
    for kind, name in facts["automatic_choice"].items():
        console.print(f"Parameters on {kind} are stepped by [bold]{name}[/bold].")
