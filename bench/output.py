"""Files that commands write: what they need is looked at first, and they are replaced whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import click

# What each kind of file, and a comparison, needs beyond the package's own dependencies, and the extra that has it.
NEEDS = {"png": ("matplotlib", "plot"), "html": ("plotly", "plot"), "base": ("scipy", "bench")}


def refuse_without(kind: str) -> None:
    """Refuse a kind of file, or a comparison, that needs a package which is not installed."""
    package, extra = NEEDS.get(kind, (None, ""))
    if package and find_spec(package) is None:
        raise click.BadParameter(f"needs {package}, which is not installed: pip install 'stepladder[{extra}]'")


def can_be_written(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Refuse a file that could not be written, before hours of work."""
    if file is None:
        return None
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise click.BadParameter(f"'{file}' cannot be written: {error.strerror}") from error
    refuse_without(str(parameter.name).removesuffix("_file"))
    return file


def option(flag: str, text: str) -> Callable[[Any], Any]:
    """An option that takes the name of a file to write; the parameter is `<flag>_file`."""
    kind = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option(flag, f"{flag.strip('-')}_file", type=kind, callback=can_be_written, help=text)


def replace(path: Path, mode: str, write: Callable[[IO[Any]], None]) -> None:
    """Write a file beside `path` and then put it there, so that a failure leaves what there was.

    Raises:
        click.ClickException: It cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        raise click.ClickException(f"'{path}' cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
