"""`stepladder bench --base` of git revisions: how they are built, and whether what was slowed on purpose is flagged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from stepladder.bench import base
from stepladder.bench.compare import SAME, SLOWER, compare
from stepladder.bench.measure import Settings
from stepladder.bench.measurement import merged
from stepladder.bench.processes import Spec, in_turns

ROOT = Path(__file__).parents[1]
SETS = ("1000x768", "400x4096")
# Superfluous work that takes 15 % of each step of AdamW.
SLOWED = """

_plain = AdamW.step


def _step(self, closure=None):
    from time import perf_counter

    begin = perf_counter()
    loss = _plain(self, closure)
    end = perf_counter()
    while perf_counter() < end + 0.15 * (end - begin):
        pass
    return loss


AdamW.step = _step
"""


def git(directory, *arguments):
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", directory, *author, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A project of this name with one commit."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "stepladder"\nversion = "0"\n')
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_revision_is_a_commit_of_this_project(repository, tmp_path_factory):
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "v0")
    for revision in ("HEAD", "v0", commit[:10]):
        assert base.commit_of(revision, repository) == commit
    for revision in ("v1", "--help", "", "HEAD~1"):
        with pytest.raises(base.Failure, match="git knows no such revision"):
            base.commit_of(revision, repository)
    (repository / "pyproject.toml").write_text('[project]\nname = "other"\n')
    git(repository, "commit", "--quiet", "-am", "another")
    with pytest.raises(base.Failure, match="is not stepladder's"):
        base.commit_of("HEAD", repository)
    with pytest.raises(base.Failure, match="not a git repository"):
        base.commit_of("HEAD", tmp_path_factory.mktemp("elsewhere"))


def test_a_revision_that_does_not_build_leaves_nothing(repository):
    (repository / "setup.py").write_text("raise SystemExit('on purpose')")
    (repository / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "none"\n')
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "broken")
    with pytest.raises(base.Failure, match="it does not build:"), base.built("HEAD", repository):
        pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_what_was_slowed_is_flagged_and_equal_builds_are_not(tmp_path):
    """Measures; wants a machine to itself."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, clone], check=True)
    plain = git(clone, "rev-parse", "HEAD")
    with (clone / "python" / "stepladder" / "optim" / "adamw.py").open("a") as file:
        file.write(SLOWED)
    git(clone, "commit", "--quiet", "-am", "slowed")
    slowed = git(clone, "rev-parse", "HEAD")
    specs = [Spec(rule, shapes, "fp32", ("foreach", "fused")) for shapes in SETS for rule in ("adamw", "lion")]
    with base.built(plain, clone) as before, base.built(slowed, clone) as after:
        for _ in range(5):
            assert {change.verdict for change in changes(specs, before, None)} == {SAME}
        verdicts = {(change.case, change.shapes): change.verdict for change in changes(specs, before, after)}
    assert verdicts == {
        (rule, shapes): SLOWER if rule == "adamw" else SAME for rule in ("adamw", "lion") for shapes in SETS
    }


def changes(specs, before, now):
    """Of eight processes of either build; None is this one."""
    found = {"before": [], "now": []}
    builds = {"before": before, "now": now}
    for name, measured in in_turns(specs, Settings(0.25), 8, len(os.sched_getaffinity(0)), builds, lambda spec: None):
        found[name].append(measured)
    return compare(merged(found["before"]), merged(found["now"]))
