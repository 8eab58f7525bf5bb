"""Reads what Nsight Compute says of kernels: the CSV of `ncu --csv`, its pages raw and details."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# In units of nanoseconds, bytes, and bytes a second; of old and new versions. Percentages and counts have none.
UNITS = {
    **{unit: factor for names, factor in (
        (("second", "s"), 1e9), (("msecond", "ms"), 1e6), (("usecond", "us"), 1e3), (("nsecond", "ns"), 1.0)
    ) for unit in names},
    **{f"{prefix}byte{rate}": factor
       for prefix, factor in (("", 1.0), ("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
       for rate in ("", "/second", "/s")},
}  # fmt: skip
TIME, BYTES, RATE, PERCENT, COUNT = "time", "bytes", "rate", "percent", "count"
# Names on the pages raw and details, and what kind of figure is meant: some names on the latter have two.
METRICS: dict[str, tuple[tuple[str, str], ...]] = {
    "time": (("gpu__time_duration.sum", TIME), ("gpu__time_duration.avg", TIME), ("Duration", TIME)),
    "bytes": (("dram__bytes.sum", BYTES),),
    "bytes_read": (("dram__bytes_read.sum", BYTES),),
    "bytes_written": (("dram__bytes_write.sum", BYTES),),
    "rate": (("dram__bytes.sum.per_second", RATE), ("Memory Throughput", RATE)),
    "memory_percent": (
        ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", PERCENT),
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", PERCENT),
        ("DRAM Throughput", PERCENT),
    ),
    "sm_percent": (
        ("sm__throughput.avg.pct_of_peak_sustained_elapsed", PERCENT),
        ("Compute (SM) Throughput", PERCENT),
        ("SM [%]", PERCENT),
    ),
    "occupancy": (("sm__warps_active.avg.pct_of_peak_sustained_active", PERCENT), ("Achieved Occupancy", PERCENT)),
    "registers": (("launch__registers_per_thread", COUNT), ("Registers Per Thread", COUNT)),
}


@dataclass(frozen=True)
class Measured:
    """What ncu measured of a kernel, in the mean over its launches; None where the file does not say.

    Attributes:
        launches: How many of them.
        ms: Of one.
        gb_per_s: Of device memory, read and written.
        memory_percent: Of the peak of its bandwidth.
        sm_percent: Of the peak of the multiprocessors.
        occupancy: Warps that were resident, of those that could be, in percent.
        registers: Of a thread.
    """

    launches: int
    ms: float | None
    gb_per_s: float | None
    memory_percent: float | None
    sm_percent: float | None
    occupancy: float | None
    registers: float | None


def short_name(function: str) -> str:
    """A kernel's name without types, namespaces and arguments."""
    name = function.removeprefix("void ").strip()
    while (plain := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = plain
    return name.split("::")[-1].strip()


def read(lines: Iterable[str]) -> dict[str, Measured]:
    """What a file says of each kernel, by its short name, in the order of their first launches.

    Raises:
        ValueError: It is no CSV of ncu's, or has no metric that is known here.
    """
    rows = list(csv.reader(line for line in lines if not line.startswith("==")))
    start = next((index for index, row in enumerate(rows) if "Kernel Name" in row), None)
    if start is None:
        raise ValueError(
            "no CSV of ncu's pages raw or details: it has no header with a column 'Kernel Name' (ncu --csv --page raw)"
        )
    header, body = rows[start], [row for row in rows[start + 1 :] if row]
    launches = (_details if "Metric Name" in header else _raw)(header, body)
    if not any(values for _, values in launches):
        known = ", ".join(name for names in METRICS.values() for name, _ in names)
        raise ValueError(f"none of the metrics in it is known here, expected some of {known}")
    kernels: dict[str, list[dict[str, float]]] = defaultdict(list)
    for function, values in launches:
        kernels[short_name(function)].append(values)
    return {name: _measured(values) for name, values in kernels.items()}


def _value(text: str, unit: str, kind: str) -> float | None:
    """A number in the units above; None where it is none, or of another kind."""
    unit = unit.strip()
    scale = UNITS.get(unit)
    if kind in (TIME, BYTES, RATE):
        is_rate, is_bytes = "/" in unit, "byte" in unit
        if scale is None or (kind == TIME) == is_bytes or (kind == RATE) != is_rate:
            return None
    elif (unit == "%") != (kind == PERCENT):
        return None
    try:
        return float(re.sub(r"[,'\s]", "", text)) * (scale or 1.0)
    except ValueError:
        return None


def _wanted(find: Callable[[str], Iterable[tuple[str, str]]]) -> dict[str, float]:
    """The figures of a launch; `find`: values and units that stand under a name."""
    found = {}
    for figure, names in METRICS.items():
        values = [value for name, kind in names for text, unit in find(name)
                  if (value := _value(text, unit, kind)) is not None]  # fmt: skip
        if values:
            found[figure] = values[0]
    return found


def _raw(header: list[str], body: list[list[str]]) -> list[tuple[str, dict[str, float]]]:
    """A row for each launch, behind one of units."""
    kernel = header.index("Kernel Name")
    if not body or len(body[0]) <= kernel or body[0][kernel]:
        raise ValueError("the row of units is missing below the header: it is no CSV of ncu's page raw")
    units, launches = body[0], []
    columns = {name: index for index, name in enumerate(header)}
    for row in body[1:]:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} columns, expected the {len(header)} of the header: {row[:3]}")

        def find(name: str, row: list[str] = row) -> Iterable[tuple[str, str]]:
            return [(row[columns[name]], units[columns[name]])] if name in columns else []

        launches.append((row[kernel], _wanted(find)))
    return launches


def _details(header: list[str], body: list[list[str]]) -> list[tuple[str, dict[str, float]]]:
    """A row for each metric of each launch."""
    columns = {name: index for index, name in enumerate(header)}
    if missing := {"ID", "Metric Unit", "Metric Value"} - set(columns):
        raise ValueError(f"the header lacks {', '.join(map(repr, sorted(missing)))}: ncu --csv --page details has them")
    found: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    last = max(columns[name] for name in ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"))
    for row in body:
        if len(row) <= last:
            raise ValueError(f"a row has {len(row)} columns, expected at least {last + 1}: {row[:3]}")
        launch = row[columns["ID"]], row[columns["Kernel Name"]]
        value = row[columns["Metric Value"]], row[columns["Metric Unit"]]
        found[launch][row[columns["Metric Name"]]].append(value)
    return [(function, _wanted(lambda name, own=own: own.get(name, ()))) for (_, function), own in found.items()]  # type: ignore[misc]


def _measured(launches: list[dict[str, float]]) -> Measured:
    def mean(figure: str) -> float | None:
        values = [launch[figure] for launch in launches if figure in launch]
        return sum(values) / len(values) if values else None

    ns, moved, rate = mean("time"), mean("bytes"), mean("rate")
    read_only, written = mean("bytes_read"), mean("bytes_written")
    if moved is None and read_only is not None and written is not None:
        moved = read_only + written
    speed = moved / ns if moved is not None and ns else None if rate is None else rate / 1e9
    percents = mean("memory_percent"), mean("sm_percent"), mean("occupancy")
    return Measured(len(launches), None if ns is None else ns / 1e6, speed, *percents, mean("registers"))
