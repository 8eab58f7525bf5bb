"""Earlier results: of `stepladder bench --json`, or pytest-benchmark's of bench/test_optimizers.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepladder.bench.cases import CASES
from stepladder.bench.measurement import OURS, OWN, RIVAL, SCALE, Contender, Measurement, from_dict, merged
from stepladder.bench.report import FORMAT
from stepladder.bench.rivals import ADAMW
from stepladder.bench.roofline import CEILINGS
from stepladder.bench.shapes import elements, shapes_of


@dataclass
class Run:
    """What was measured at one time.

    Attributes:
        machine: Facts, as `report.machine` has them.
        cases: What was measured.
        ceilings: As `roofline.ceilings` has them; empty where they were not measured.
    """

    machine: dict[str, Any]
    cases: list[Measurement] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)


def read(path: Path) -> Run:
    """What a file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is of another kind, or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("it is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if isinstance(values, dict) and values.get("format") == FORMAT:
        return _ours(values)
    if isinstance(values, dict) and isinstance(values.get("benchmarks"), list) and "machine_info" in values:
        return _pytest_benchmark(values)
    raise ValueError("it is neither what `stepladder bench --json` nor what pytest-benchmark writes")


def _ours(values: Mapping[str, Any]) -> Run:
    machine, cases, ceilings = values.get("machine"), values.get("cases"), values.get("ceilings", {})
    if not isinstance(machine, dict) or not isinstance(cases, list) or not isinstance(ceilings, dict):
        raise ValueError("it lacks the machine or the cases that `stepladder bench --json` writes")
    try:
        ceilings = {name: float(ceilings[name]) for name in CEILINGS} if ceilings else {}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its ceilings lack one of {', '.join(CEILINGS)}, or it is no number") from error
    if not all(0.0 < ceiling < math.inf for ceiling in ceilings.values()):
        raise ValueError(f"its ceilings must be above 0, and are {ceilings}")
    return Run(machine, merged(from_dict(case) for case in cases), ceilings)


def _pytest_benchmark(values: Mapping[str, Any]) -> Run:
    """Its contenders did not take turns; rounds are put side by side all the same, the last ones left out."""
    found: dict[tuple[str, str, str], Measurement] = {}
    for benchmark in values["benchmarks"]:
        try:
            params = benchmark["params"]
            case, shapes, dtype = params["optimizer"], params["shapes"], params["dtype"]
            ms = [1e3 * float(seconds) for seconds in benchmark["stats"]["data"]]
            sizes = shapes_of(shapes)
            key = (case, shapes, dtype)
            contender = params["contender"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{_name(benchmark)} is no benchmark of bench/test_optimizers.py") from error
        if case not in CASES or not ms or min(ms) <= 0.0:
            raise ValueError(f"{_name(benchmark)} is no benchmark of bench/test_optimizers.py")
        role = OWN if contender == OURS else SCALE if contender == ADAMW else RIVAL
        measurement = found.setdefault(key, Measurement("optimizer", *key, len(sizes), elements(sizes)))
        measurement.contenders[contender] = Contender(role, [ms])
    for measurement in found.values():
        contenders = measurement.contenders
        rounds = min(len(c.ms[0]) for c in contenders.values())
        for contender in contenders.values():
            contender.ms = [contender.ms[0][:rounds]]
        # Ours first, as everywhere.
        measurement.contenders = dict(sorted(contenders.items(), key=lambda item: item[1].role != OWN))
    info = values["machine_info"]
    cpu = info.get("cpu", {}) if isinstance(info, dict) else {}
    facts = {"date": str(values.get("datetime", "")), "device": str(cpu.get("brand_raw", "an unknown processor"))}
    facts["python"] = str(info.get("python_version", "")) if isinstance(info, dict) else ""
    return Run(facts, list(found.values()))


def _name(benchmark: Any) -> str:
    return str(benchmark.get("fullname", "one")) if isinstance(benchmark, dict) else repr(benchmark)[:60]
