"""Files that commands write: what they need is looked at first, and they are replaced whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import click

# What each kind of file, and a comparison, needs beyond the package's own dependencies, and the extra that has it.
NEEDS = {"png": ("matplotlib", "plot"), "html": ("plotly", "plot"), "base": ("scipy", "bench")}

FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


def refuse_without(kind: str) -> None:
    """Refuse a kind of file, or a comparison, that needs a package which is not installed."""
    package, extra = NEEDS.get(kind, (None, ""))
    if package and find_spec(package) is None:
        raise click.BadParameter(f"needs {package}, which is not installed: pip install 'stepladder[{extra}]'")


def check_writable(file: Path, flag: str | None = None) -> None:
    """Refuse a file that could not be written, before hours of work.

    Raises:
        click.BadParameter: It could not; said of the option `flag`, or of the one that is being read.
    """
    try:
        # It is written beside its place first: a name that is longer by some characters must be possible.
        with nullcontext() if _is_special(file) else tempfile.NamedTemporaryFile(prefix=file.name, dir=file.parent):
            pass
    except OSError as error:
        raise click.BadParameter(f"'{file}' cannot be written: {error.strerror}", param_hint=flag) from error


def _is_special(file: Path) -> bool:
    """Whether it is a device or a pipe, as /dev/null: it is written to, and never replaced."""
    return file.exists() and not file.is_file()


def checked(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """A callback that refuses a file which could not be written, before anything is measured."""
    if file is not None:
        check_writable(file)
        refuse_without(str(parameter.name).removesuffix("_file"))
    return file


def option(flag: str, text: str) -> Callable[[Any], Any]:
    """An option that takes the name of a file to write; the parameter is `<flag>_file`."""
    return click.option(flag, f"{flag.strip('-')}_file", type=FILE, callback=checked, help=text)


def replace(path: Path, mode: str, write: Callable[[IO[Any]], None]) -> None:
    """Write a file beside `path` and then put it there, so that a failure leaves what there was.

    Raises:
        click.ClickException: It cannot be written.
    """
    special = _is_special(path)
    # A link stays one.
    whole = path if special else path.resolve()
    part = whole if special else whole.with_name(f"{whole.name}.part")
    try:
        with part.open(mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as file:
            write(file)
        if not special:
            part.replace(whole)
    except OSError as error:
        raise click.ClickException(f"'{path}' cannot be written: {error.strerror}") from error
    finally:
        if not special:
            with suppress(OSError):
                part.unlink(missing_ok=True)
