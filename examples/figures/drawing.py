"""What the figures share: the command line, colours, and the caption below the picture."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

COLORS = {
    "gradient": "#7f7f7f",
    "SGD": "#7f7f7f",
    "momentum": "#1f77b4",
    "Adam": "#e8710a",
    "AdamW": "#9467bd",
    "SignSGD": "#8c564b",
    "Lion": "#bc9a00",
    "Muon": "#00897b",
    "Shampoo": "#c99700",
    "MuonH": "#d62728",
}
# Inches that a line of the caption takes, and characters that fit into an inch.
LINE, CHARACTERS = 0.19, 13.5


def picture(draw: Callable[[FigureBase], None], caption: str, size: tuple[float, float], kind: str = "png") -> bytes:
    """The picture and its caption below it, as a file of this kind.

    Args:
        draw: Draws into a part of a figure.
        caption: Stands below, and in a PNG's description too.
        size: Width and height of the part without the caption, in inches.
        kind: A format of matplotlib's, such as "png".
    """
    # A Figure by itself needs no display, whatever MPLBACKEND says.
    from matplotlib.figure import Figure

    width, height = size
    text = textwrap.fill(caption, int(width * CHARACTERS))
    below = LINE * (text.count("\n") + 1.6)
    figure = Figure(figsize=(width, height + below), layout="constrained")
    above, under = figure.subfigures(2, 1, height_ratios=(height, below))
    draw(above)
    under.text(0.015, 0.92, text, va="top", fontsize=9.5, linespacing=1.35)
    file = BytesIO()
    figure.savefig(file, format=kind, dpi=130, metadata={"Description": caption} if kind == "png" else None)
    return file.getvalue()


def command(
    measure: Callable[[], Any],
    draw: Callable[[FigureBase, Any], None],
    caption: Callable[[Any], str],
    size: tuple[float, float] = (11.0, 4.0),
) -> click.Command:
    """A figure's command line: measures, draws, says what was measured.

    Args:
        measure: Runs the optimizers.
        draw: Draws what they did.
        caption: Says it in numbers.
        size: Of the picture without its caption, in inches.
    """

    @click.command(context_settings={"help_option_names": ["-h", "--help"]})
    @click.option(
        "--output",
        required=True,
        type=click.Path(dir_okay=False, path_type=Path),
        help="The picture to write; its suffix chooses the format: png, svg, pdf.",
    )
    def figure(output: Path) -> None:
        """Run the optimizers, draw what they did, and print the caption."""
        kind = output.suffix[1:].lower()
        if kind not in ("png", "svg", "pdf"):
            raise click.BadParameter(f"{str(output)!r} ends neither in .png, .svg nor .pdf", param_hint="--output")
        if not output.parent.is_dir():
            raise click.BadParameter(f"there is no directory {str(output.parent)!r}", param_hint="--output")
        measured = measure()
        text = caption(measured)
        try:
            content = picture(lambda part: draw(part, measured), text, size, kind)
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{error.name} is missing: pip install 'stepladder[plot]'") from None
        try:
            output.write_bytes(content)
        except OSError as error:
            raise click.ClickException(f"cannot write {str(output)!r}: {error.strerror}") from None
        click.echo(text)

    return figure
