"""Measurements as a PNG, and as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from stepladder.bench import report
from stepladder.bench.compare import FASTER, SLOWER, UNKNOWN, Change
from stepladder.bench.files import Run
from stepladder.bench.measurement import MEASURE, OURS, OWN, SCALE, Measurement

PAGE = Path(__file__).with_name("page.html")
# Of contenders: ours first, then in the order in which they come.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c00", "#7f7f7f", "#8c564b", "#b22222")
VERDICTS = {SLOWER: "#d62728", FASTER: "#2ca02c", UNKNOWN: "#bbbbbb"}
NEUTRAL = "#555555"
# Of plots, in CSS pixels: of a row of bars, and of what stands around them.
ROW, MARGIN = 20, 90


def colors(cases: Iterable[Measurement]) -> dict[str, str]:
    """One for each contender, the same in all plots."""
    names = dict.fromkeys([OURS, *(name for case in cases for name in case.contenders)])
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def by_shapes(cases: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The cases of each shape set that have anything to show beside ours."""
    found: dict[str, list[Measurement]] = {}
    for case in cases:
        if case.ratios:
            found.setdefault(case.shapes, []).append(case)
    return found


def write_png(file: IO[bytes], run: Run) -> None:
    """How many times longer the others take, a plot for each shape set."""
    from matplotlib.figure import Figure

    sets, color = by_shapes(run.cases), colors(run.cases)
    bars = [sum(len(case.ratios) + 1 for case in cases) for cases in sets.values()] or [1]
    figure = Figure(figsize=(10, 1.5 + sum(0.24 * n + 0.9 for n in bars)), layout="constrained")
    axes = figure.subplots(len(bars), 1, squeeze=False, height_ratios=[n + 2 for n in bars])[:, 0]
    if not sets:
        axes[0].text(0.5, 0.5, "nothing was measured beside ours", ha="center", transform=axes[0].transAxes)
        axes[0].set_axis_off()
    for axis, cases in zip(axes, sets.values(), strict=False):
        ticks, row = {}, 0
        for case in cases:
            ticks[row] = f"{case.case} {case.dtype}"
            for name, ratio in case.ratios.items():
                axis.barh(row, ratio.median - 1.0, left=1.0, color=color[name], alpha=_opacity(case, name))
                axis.plot([ratio.p20, ratio.p80], [row, row], color="#222", linewidth=1)
                axis.annotate(
                    f"{name} {ratio.median:.3g}",
                    (max(ratio.p80, ratio.median), row),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
                row += 1
            row += 1
        axis.axvline(1.0, color="#222", linestyle="--", linewidth=1)
        axis.set_title(report.title(cases[0]), loc="left", fontsize="medium")
        axis.set_yticks(list(ticks), list(ticks.values()), fontsize="small")
        axis.set(ylim=(row - 0.5, -1), xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.25)
    axes[-1].set_xlabel("how many times longer than stepladder's step; lines from the quantile 0.2 to 0.8")
    figure.suptitle(f"{report.header(run.machine)} · {run.machine.get('date', '')}", fontsize="small", wrap=True)
    figure.savefig(file, format="png", dpi=130)


def _opacity(case: Measurement, name: str) -> float:
    """Other rules are paler: no race is run against them."""
    return 0.4 if case.contenders[name].role == SCALE else 1.0


def write_html(file: IO[str], run: Run, changes: Sequence[Change] = ()) -> None:
    """Plots and tables; the plotting library is in the page."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    color = colors(run.cases)
    shapes = list(dict.fromkeys(case.shapes for case in run.cases))
    page = template.render(
        header=report.header(run.machine),
        machine=run.machine,
        ceilings=run.ceilings,
        speedups=[(report.title(cases[0]), _html(_speedups(cases, color))) for cases in by_shapes(run.cases).values()],
        roofline=_html(_roofline(run)) if _points(run.cases) else "",
        memory=_html(_memory(run.cases)) if _stateful(run.cases) else "",
        bandwidth=_html(_bandwidth(run.cases, color)) if any(case.share for case in run.cases) else "",
        comparison=_html(_comparison(changes)) if any(change.change is not None for change in changes) else "",
        changes=[_change(change) for change in changes],
        summary=report.summary(changes),
        intervals=report.INTERVALS,
        tables=[_table([case for case in run.cases if case.shapes == name]) for name in shapes],
        red=[f"{case.label}: the check is RED: {case.red}" for case in run.cases if case.red],
        remarks=report.remarks(run.cases),
        legend=report.LEGEND,
        plotly=get_plotlyjs(),
    )
    file.write(page)


def _html(figure: Any) -> str:
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        default_width="100%",
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return text


def _figure(traces: Sequence[Any], height: int, **layout: Any) -> Any:
    from plotly.graph_objects import Figure

    margin = {"t": 30, "r": 10, "b": 50, "l": 10}
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0}
    shared = {"template": "plotly_white", "height": height, "margin": margin, "legend": legend}
    figure = Figure(traces, shared | layout)
    return figure.update_yaxes(automargin=True)


def _speedups(cases: Sequence[Measurement], color: Mapping[str, str]) -> Any:
    from plotly.graph_objects import Bar

    traces = []
    for name in dict.fromkeys(name for case in cases for name in case.ratios):
        having = [case for case in cases if name in case.ratios]
        ratios = [case.ratios[name] for case in having]
        spread = {
            "type": "data",
            "array": [ratio.p80 - ratio.median for ratio in ratios],
            "arrayminus": [ratio.median - ratio.p20 for ratio in ratios],
            "thickness": 1,
            "width": 2,
        }
        traces.append(
            Bar(
                name=name,
                orientation="h",
                y=[f"{case.case} {case.dtype}" for case in having],
                # From 1 on, to the right where ours is faster.
                base=1.0,
                x=[ratio.median - 1.0 for ratio in ratios],
                error_x=spread,
                text=[f"{ratio.median:.3g}" for ratio in ratios],
                textposition="inside",
                insidetextanchor="start",
                marker={"color": color[name], "opacity": [_opacity(case, name) for case in having]},
                hovertemplate="%{y}, %{fullData.name}: %{text} times as long<extra></extra>",
            )
        )
    ends = [end for case in cases for ratio in case.ratios.values() for end in ratio]
    narrow = max(*ends, 1.0) < 100.0 * min(*ends, 1.0)
    figure = _figure(
        traces,
        MARGIN + 40 + ROW * sum(len(case.ratios) + 1 for case in cases),
        xaxis={"type": "log", "title": {"text": "× ours"}, "dtick": "D2" if narrow else 1},
        yaxis={"autorange": "reversed"},
    )
    return figure.add_vline(1.0, line={"dash": "dash", "width": 1})


def _points(cases: Iterable[Measurement]) -> list[tuple[Measurement, str]]:
    """Cases and contenders of which both bytes and operations are counted."""
    return [(m, name) for m in cases for name, c in m.contenders.items() if c.moved and c.flops]


def _roofline(run: Run) -> Any:
    from plotly.graph_objects import Scatter

    points = _points(run.cases)
    traces = []
    for group, symbol in ((OWN, "circle"), ("others", "x-thin-open")):
        chosen = [(m, name) for m, name in points if (m.contenders[name].role == OWN) == (group == OWN)]
        own = [m.contenders[name] for m, name in chosen]
        traces.append(
            Scatter(
                name="ours" if group == OWN else group,
                mode="markers",
                x=[c.flops / c.moved for c in own if c.flops and c.moved],
                y=[c.gflops for c in own],
                text=[f"{name}, {m.label}" for m, name in chosen],
                marker={"symbol": symbol, "size": 8, "color": COLORS[0] if group == OWN else COLORS[3]},
                hovertemplate="%{text}<br>%{x:.3g} operations a byte, %{y:.4g} GFLOP/s<extra></extra>",
            )
        )
    if run.ceilings:
        bandwidth, rate = run.ceilings["gb_per_s"], run.ceilings["gflops"]
        knee = rate / bandwidth
        intensities = [c.flops / c.moved for m, name in points if (c := m.contenders[name]).flops and c.moved]
        x = [min(*intensities, knee) / 2, knee, max(*intensities, knee) * 2]
        roof = {"name": f"{bandwidth:.3g} GB/s, {rate:.4g} GFLOP/s", "x": x, "y": [bandwidth * x[0], rate, rate]}
        traces.append(Scatter(mode="lines", line={"color": "#222", "width": 1}, hoverinfo="skip", **roof))
    return _figure(
        traces,
        420,
        xaxis={"type": "log", "title": {"text": "operations a byte"}, "dtick": 1},
        yaxis={"type": "log", "title": {"text": "GFLOP/s"}, "dtick": 1},
    )


def _stateful(cases: Iterable[Measurement]) -> dict[str, float]:
    """Bytes of our state for each element, by optimizer and dtype."""
    found = {}
    for case in cases:
        if case.kind == "optimizer" and case.ours is not None:
            size = case.contenders[case.ours].state_bytes
            if size is not None:
                found.setdefault(f"{case.case} {case.dtype}", size / case.elements)
    return found


def _memory(cases: Iterable[Measurement]) -> Any:
    from plotly.graph_objects import Bar

    sizes = _stateful(cases)
    bar = Bar(
        orientation="h",
        y=list(sizes),
        x=list(sizes.values()),
        text=[f"{size:.3g}" for size in sizes.values()],
        marker={"color": COLORS[0]},
        hovertemplate="%{y}: %{x:.4g} bytes an element<extra></extra>",
    )
    return _figure(
        [bar],
        MARGIN + ROW * len(sizes),
        xaxis={"title": {"text": "bytes of state for each element"}},
        yaxis={"autorange": "reversed"},
    )


def _bandwidth(cases: Iterable[Measurement], color: Mapping[str, str]) -> Any:
    """GB/s of ours and of the yardstick beside it."""
    from plotly.graph_objects import Bar

    having = [case for case in cases if case.share]
    labels = [case.label for case in having]
    ours = [case.contenders[case.ours].gb_per_s for case in having if case.ours]
    yardsticks = [next((n, c) for n, c in case.contenders.items() if c.role == MEASURE) for case in having]
    hover = "%{y}, %{fullData.name}: %{x:.4g} GB/s<extra></extra>"
    shared = {"orientation": "h", "y": labels, "hovertemplate": hover}
    texts = [f"{case.share:.0%}" for case in having]
    traces = [
        Bar(name="ours, and its share", x=ours, text=texts, marker={"color": color[OURS]}, **shared),
        Bar(name=yardsticks[0][0], x=[c.gb_per_s for _, c in yardsticks], marker={"color": "#bbb"}, **shared),
    ]
    return _figure(
        traces,
        MARGIN + 40 + 2 * ROW * len(having),
        xaxis={"title": {"text": "GB/s of what must be moved"}},
        yaxis={"autorange": "reversed"},
    )


def _comparison(changes: Sequence[Change]) -> Any:
    from plotly.graph_objects import Scatter

    known = [change for change in changes if change.change is not None]
    percents = [100.0 * (change.change or 0.0) for change in known]

    def reach(change: Change, end: float | None) -> float:
        return 0.0 if end is None else 100.0 * abs(end - (change.change or 0.0))

    spread = {
        "type": "data",
        "array": [reach(change, change.high) for change in known],
        "arrayminus": [reach(change, change.low) for change in known],
        "color": NEUTRAL,
        "thickness": 1,
    }
    dots = Scatter(
        mode="markers",
        x=percents,
        y=[_label(change) for change in known],
        error_x=spread,
        marker={"size": 9, "color": [VERDICTS.get(change.verdict, NEUTRAL) for change in known]},
        hovertemplate="%{y}: %{x:+.2f} %<extra></extra>",
    )
    figure = _figure(
        [dots],
        MARGIN + ROW * len(known),
        xaxis={"title": {"text": "% more time"}},
        yaxis={"autorange": "reversed"},
    )
    return figure.add_vline(0.0, line={"dash": "dash", "width": 1})


def _label(change: Change) -> str:
    label = f"{change.case} {change.dtype} {change.shapes}"
    return label if change.contender == OURS else f"{label}, {change.contender}"


def _change(change: Change) -> list[str]:
    verdict = change.reason or change.verdict
    return [_label(change), report.percent(change.change), report.interval(change), verdict]


# Of the page's tables: heading, column of the CSV file, and its figures after the point; None keeps it as it is.
_COLUMNS: Sequence[tuple[str, str]] = (
    ("what", "case"),
    ("dtype", "dtype"),
    ("contender", "contender"),
    ("ms", "ms_median"),
    ("20 %", "ms_p20"),
    ("80 %", "ms_p80"),
    ("host ms", "host_ms"),
    ("× ours", "ratio_median"),
    ("20 %", "ratio_p20"),
    ("80 %", "ratio_p80"),
    ("GB/s", "gb_per_s"),
    ("share", "share"),
    ("GFLOP/s", "gflops"),
    ("state, MiB", "state_bytes"),
    ("error", "error"),
    ("rounds", "rounds"),
    ("check", "check"),
)


def _table(cases: Sequence[Measurement]) -> dict[str, Any]:
    """The rows of the CSV file of one shape set, without its empty columns."""
    rows = [row for case in cases for row in report.csv_rows(case)]
    columns = [(title, key) for title, key in _COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    cells = [[_cell(key, row.get(key)) for _, key in columns] for row in rows]
    return {"title": report.title(cases[0]), "columns": [title for title, _ in columns], "rows": cells}


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "state_bytes":
        return f"{value / 2**20:.3g}"
    if key == "share":
        return f"{value:.0%}"
    if isinstance(value, float):
        return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
