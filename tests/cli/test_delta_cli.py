"""The option --base, and what the commands print of a delta, in 80 columns."""

import json
from pathlib import Path

import pytest
from emp_cli.app import app
from support.checkpoints import load
from support.tuned import tune
from support.wide_models import WideModel
from typer.testing import CliRunner, Result


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


@pytest.fixture
def folder(wide_model: WideModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(wide_model("llama"))
    tune(tmp_path / "base", tmp_path / "tuned", changed="mlp")
    return tmp_path


def test_the_commands_on_a_delta(folder: Path) -> None:
    result = run("prune", "tuned", "--out", "delta", "--base", "base")
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    (said,) = (line for line in result.stdout.splitlines() if "a delta to base" in line)
    assert said.endswith("are as in the base, and not stored")
    nbytes = [sum(t.nbytes for t in load(folder / name).values()) for name in ("tuned", "delta")]
    (whole,) = (line for line in result.stdout.splitlines() if "whole model: " in line)
    sizes = f"{nbytes[0] / 1000:.3g} kB → {nbytes[1] / 1000:.3g} kB ({nbytes[1] / nbytes[0]:.3f})"
    assert whole.startswith(f"whole model: {sizes}, ")
    assert whole.endswith(" stored weights are zero")
    assert "Magnitude alone" not in result.stdout
    card = (folder / "delta" / "README.md").read_text()
    assert "packed and needs its base and emp-llm" in card
    assert "| the delta |" in card
    assert "bytes) that are as in the base, bit for bit" in card
    assert "emp-llm prune tuned --out DIR --base" in card
    config = json.loads((folder / "delta" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "emp_delta"
    assert "whole" in run("verify", "delta", "--against", "tuned").stdout
    assert run("unpack", "delta", "--out", "whole").exit_code == 0
    assert run("report", "delta").exit_code == 0
    refused = run("diff", "delta", "tuned")
    assert refused.exit_code == 1
    assert "delta: is a delta, whose tensors are differences" in refused.stderr
