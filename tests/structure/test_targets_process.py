"""Targets decided in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.architectures import read_tensors
from support.expected_targets import LLAMA

from emp_llm.errors import CheckpointError
from emp_llm.structure.targets import decide_targets
from emp_llm.structure.targets_process import TargetsQuestion


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tiny_model) -> None:
    """Transformers is as if it had not been imported here, which making a model does."""
    for architecture in ("llama", "gpt2", "mixtral"):
        tiny_model(architecture)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)


def ask(folder: Path, **options: object) -> TargetsQuestion:
    question = {"targets": "mlp", "ignore": [], **options}
    return TargetsQuestion(folder, read_tensors(folder), **question)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_another_process_decides_as_this_one_does_without_triton(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, tiny_model
) -> None:
    (tmp_path / "triton.py").write_text("raise SystemExit('it was imported')")
    folder = tiny_model(architecture)
    with monkeypatch.context() as before:
        before.syspath_prepend(tmp_path)
        question = ask(folder, targets="all-linear", ignore=["down"])
    with question:
        assert question._asked._process is not None
        decisions = question.answer().tensors
    expected = decide_targets(folder, read_tensors(folder), targets="all-linear", ignore=["down"])
    assert decisions == expected
    assert list(decisions) == list(expected)


def test_where_transformers_is_imported_no_process_is_started(tiny_model) -> None:
    import transformers  # noqa: F401

    with ask(tiny_model("llama")) as question:
        assert question._asked._process is None
        decisions = question.answer().tensors
    assert {name for name, it in decisions.items() if it.prune} == set(LLAMA.mlp)


@pytest.mark.usefixtures("apart")
def test_an_error_comes_back_as_it_was_raised(tiny_model) -> None:
    folder = tiny_model("llama")
    with pytest.raises(CheckpointError) as here:
        decide_targets(folder, read_tensors(folder), targets="nothing")
    with ask(folder, targets="nothing") as question, pytest.raises(CheckpointError) as there:
        question.answer()
    assert str(there.value) == str(here.value)


@pytest.mark.usefixtures("apart")
def test_a_bug_in_the_process_is_shown_with_its_traceback(tiny_model) -> None:
    folder = tiny_model("llama")
    with (
        TargetsQuestion(folder, {"x": ("BF16",)}, targets="mlp", ignore=[]) as question,
        pytest.raises(RuntimeError, match="Traceback"),
    ):
        question.answer()


@pytest.mark.usefixtures("apart")
def test_leaving_ends_the_process(tiny_model) -> None:
    with ask(tiny_model("llama")) as question:
        process = question._asked._process
        assert process is not None
    assert process.poll() is not None


def test_a_prune_imports_no_torch(tiny_model, tmp_path: Path) -> None:
    code = (
        "import sys, emp_llm; emp_llm.prune(sys.argv[1], sys.argv[2]); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    arguments = [sys.executable, "-c", code, str(tiny_model("llama")), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_nothing_in_the_working_folder_is_run(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemExit('this code must not run')")
    emp_llm = Path(sys.executable).with_name("emp-llm")
    arguments = [emp_llm, "prune", tiny_model("llama"), "--out", "out"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
