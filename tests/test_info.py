"""`stepladder info`, the table of backends, and what happens where one cannot run."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import stepladder as sl
from stepladder import backends
from stepladder.cli import main


def param() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p


def test_info(tmp_path):
    file = tmp_path / "info.json"
    result = CliRunner().invoke(main, ["info", "--json", str(file)])
    assert result.exit_code == 0, result.output
    facts = json.loads(file.read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["cpu"]["kernels"] in facts["cpu"]["kernels_available"]
    assert facts["cpu"]["matrix_unit"] in facts["cpu"]["matrix_units_available"]
    assert [row["name"] for row in facts["backends"]] == list(backends.NAMES)
    for row in facts["backends"]:
        assert row["available"] == (row["reason"] is None)
        assert row["name"] in result.output
    assert facts["automatic_choice"]["cpu"] == "cpu"


def test_help_names_every_command():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for command in main.commands:
        assert command in result.output
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_is_refused_in_the_constructor(name):
    reason = next(b for b in backends.TABLE if b.name == name).missing()
    if reason is None:
        pytest.skip(f"{name} can run here")
    with pytest.raises(RuntimeError, match=rf"backend='{name}' cannot run: {reason}"):
        sl.AdamW([param()], backend=name)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='gpu' is unknown, expected None or one of 'cuda'"):
        sl.AdamW([param()], backend="gpu")


def test_cpu_backend_refuses_other_devices():
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="backend='cpu' serves parameters on cpu, got a parameter on meta"):
        sl.SGD([p], backend="cpu").step()


def test_landing_on_the_reference_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="no kernels can step parameters on meta"):
        assert backends.choose(None, "meta") == "reference"
    assert backends.choose(None, "meta") == "reference"
    assert backends.choose("reference", "cpu") == "reference"
