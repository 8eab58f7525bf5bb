"""The example, run as a user runs it, on a model small enough for a test; and the documents' code and links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "train_charlm.py"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TINY = {"steps": 30, "batch": 4, "context": 16, "width": 32, "layers": 2, "heads": 2, "threads": 1}


def run(tmp_path, *arguments):
    """The finished process, and what it wrote as JSON."""
    report = tmp_path / "report.json"
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, EXAMPLE, *sizes, "--json", report, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    return process, json.loads(report.read_text()) if report.exists() else None


def test_training(tmp_path):
    process, report = run(tmp_path, "--optimizer", "Lion", "--lr", "3e-3", "--dtype", "bfloat16")
    assert process.returncode == 0, process.stderr
    assert report["comparison"] is None
    (lion,) = report["runs"]
    assert lion["optimizer"] == "Lion"
    assert len(lion["losses"]) == 30
    # From all characters alike, ln(about 100) = 4.6, to less than 3.9 without the validation text being seen.
    assert 4.4 < lion["losses"][0] < 4.9
    assert lion["validation_loss"] < 3.9
    assert lion["step_ms"] > 0
    assert 0 < lion["step_share"] < 1


def test_curves_of_one_optimizer_coincide(tmp_path):
    process, report = run(tmp_path, "--compare", "torch.AdamW:fused", "AdamW")
    assert process.returncode == 0, process.stderr
    comparison = report["comparison"]
    assert comparison["coincide"]
    assert comparison["steps_compared"] == 20
    assert comparison["difference"] <= comparison["bound"] < 1e-3
    theirs, ours = report["runs"]
    assert [theirs["optimizer"], ours["optimizer"]] == ["torch.AdamW:fused", "AdamW"]
    assert theirs["losses"][0] == ours["losses"][0]
    assert ours["validation_loss"] < 3.9
    assert "times as long" in process.stdout


def test_curves_of_two_optimizers_do_not(tmp_path):
    """Adam and AdamW differ here in a decay of 0.01 only, which is enough to be found."""
    process, report = run(tmp_path, "--compare", "AdamW", "torch.Adam")
    assert process.returncode == 1
    assert "do not coincide" in process.stderr
    assert not report["comparison"]["coincide"]


def test_unknown_optimizer(tmp_path):
    process, report = run(tmp_path, "--optimizer", "torch.Lion")
    assert process.returncode == 2
    assert "'torch.Lion' is none of" in process.stderr
    assert report is None


@pytest.mark.parametrize("name", ["README.md", "docs/migration.md"])
def test_code_in_documents(name):
    """A document's blocks run one after another, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    files = [link.partition("#")[0] for link in links if "://" not in link]
    assert [file for file in files if not (document.parent / file).exists()] == []
