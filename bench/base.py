"""What `--base` compares with: an earlier file, or the build of a git revision."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "stepladder"
# Of what a failed build said, in lines.
LAST_LINES = 12


class Failure(Exception):
    """A revision cannot be had or built."""


def commit_of(revision: str, directory: Path) -> str:
    """The commit that a revision means in the repository around a directory, which must be this project's.

    Raises:
        Failure: There is no git, no such revision, or another project.
    """
    commit = _git(directory, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    text = _git(directory, "show", f"{commit}:pyproject.toml")
    if f'name = "{PACKAGE}"' not in text:
        raise Failure(f"the repository around {directory} is not {PACKAGE}'s")
    return commit


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", directory, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise Failure(f"git cannot be run: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Failure(said[-1] if said else "git knows no such revision")
    return done.stdout.strip()


@contextmanager
def built(commit: str, directory: Path) -> Iterator[Path]:
    """A directory with the build of a commit, measured by the harness of this version; both are gone afterwards.

    Args:
        commit: As of `commit_of`.
        directory: In the repository.

    Raises:
        Failure: It does not build.
    """
    # What is interrupted may still be writing there.
    with TemporaryDirectory(prefix=f"{PACKAGE}-{commit[:12]}-", ignore_cleanup_errors=True) as temporary:
        source, site = Path(temporary) / "source", Path(temporary) / "site"
        _git(directory, "worktree", "add", "--detach", str(source), commit)
        try:
            _install(source, site)
            shutil.rmtree(source / "build", ignore_errors=True)
        finally:
            _git(directory, "worktree", "remove", "--force", str(source))
        harness = site / PACKAGE / "bench"
        shutil.rmtree(harness, ignore_errors=True)
        shutil.copytree(Path(__file__).parent, harness, ignore=shutil.ignore_patterns("__pycache__"))
        yield site


def _install(source: Path, site: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-deps",
        "--target",
        site,
        source,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-LAST_LINES:])
        raise Failure(f"it does not build:\n{last}")
