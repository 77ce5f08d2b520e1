"""``emp-llm generate``: what goes to stdout and to stderr, the table, exit statuses."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import typer
from emp_cli.app import app
from emp_cli.generate import _text
from support.processes import start
from support.word_models import known_model, save_words
from typer.testing import CliRunner, Result

from emp_llm import prune
from emp_llm.generation.run import generate_with


def run(*arguments: object, given: str | None = None) -> Result:
    command = ["generate", *map(str, arguments)]
    return CliRunner().invoke(app, command, input=given, catch_exceptions=False)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return save_words(tmp_path / "known", known_model())


@pytest.fixture
def packed(known: Path, tmp_path: Path) -> Path:
    prune(known, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are compared generate in this process, which takes no time to start."""
    monkeypatch.setattr("emp_llm.entrypoints.generate.generate_apart", generate_with)


def test_stdout_has_the_text_alone_and_stderr_the_figures(known: Path) -> None:
    result = run(known, "the sky", "--threads", 1)

    assert (result.exit_code, result.stdout) == (0, "blue\n")
    assert f"{known}: dense, float32 on cpu, 1 thread\n" in result.stderr
    cells = dict(re.findall(r"^ (\S.*?)  +(\S+(?: [kMG]B)?) *$", result.stderr, re.MULTILINE))
    assert (cells["tokens of the prompt"], cells["tokens generated"]) == ("2", "2")
    for name in "loading, s", "first token, s", "prompt, tokens/s", "decoding, tokens/s":
        assert float(cells[name]) > 0
    assert re.fullmatch(r"[\d.]+ [MG]B", cells["peak memory"])
    assert re.fullmatch(r"[\d.]+ [MG]B", cells["resident memory"])


def test_a_text_that_the_models_positions_cut_off_is_told_of(known: Path) -> None:
    """The model has 32."""
    told = "1 of 100 tokens, for the text ends at the model's last position"
    assert f"{known}: {told}\n" in run(known, "the " * 30 + "sky").stderr
    assert "last position" not in run(known, "the sky").stderr


def test_json_is_one_object_with_the_text(known: Path) -> None:
    result = run(known, "the sky", "--json", "--max-new-tokens", 1)

    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert (content["prompt"], content["model"]["text"]) == ("the sky", "blue")
    assert content["model"]["ended"] == "max_new_tokens"
    assert content["seconds"] > 0


@pytest.mark.usefixtures("_here")
def test_two_models_have_two_texts_and_two_columns(known: Path, packed: Path) -> None:
    result = run(packed, "the snow", "--packed", "--against", known)

    assert result.exit_code == 0
    assert result.stdout == (f"{packed} (packed in memory):\nwhite\n\n{known} (dense):\nwhite\n\n")
    lines = result.stderr.splitlines()
    assert [line for line in lines if len(line) > 80 and str(known.parent) not in line] == []
    assert re.search(r"model +against +ratio", result.stderr)
    assert re.search(r"tokens generated +2 +2 *\n", result.stderr)
    assert re.search(r"peak memory +[\d.]+ .B +[\d.]+ .B +\d\.\d\d *\n", result.stderr)
    assert lines[-1] == "both texts are the same, 2 tokens"


@pytest.mark.usefixtures("_here")
def test_it_says_where_texts_part(known: Path, tmp_path: Path) -> None:
    model = known_model()
    head = model.lm_head.weight.data
    head[7], head[8] = head[8].clone(), head[7].clone()  # blue and green
    other = save_words(tmp_path / "other", model)

    result = run(other, "the sky", "--against", known)

    last = result.stderr.splitlines()[-1]
    assert last == "the texts part after 0 tokens: “green”, against “blue”"


def test_a_prompt_is_read_from_stdin(known: Path) -> None:
    assert run(known, "-", given="the coal\n").stdout == "black\n"


def test_a_prompt_from_a_closed_stdin_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(typer.BadParameter, match="is -, and stdin is closed: give the text"):
        _text("-")


def test_what_a_terminal_would_obey_is_escaped(known: Path) -> None:
    for path in known.glob("tokenizer.json"):
        path.write_text(path.read_text().replace('"blue"', r'"\u001b[31mblue"'))
    assert run(known, "the sky").stdout == "\\x1b[31mblue\n"


def test_ctrl_c_ends_it_with_130_and_one_line(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emp_cli.generate._Printer.hear", interrupt)
    result = run(known, "the sky")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["interrupted: run the command again"]


def into_a_closed_pipe(known: Path) -> None:
    """Run the command with nobody reading its stdout."""
    from emp_cli import main

    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = sys.__stdout__
    sys.argv = ["emp-llm", "generate", str(known), "the sky"]
    main()


def test_it_ends_silently_where_nobody_reads_the_text(known: Path, tmp_path: Path) -> None:
    process = start(into_a_closed_pipe, known, output=tmp_path / "stderr")
    process.join(60)
    assert process.exitcode == 141
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["the sky", "--device", "cuda:99"], "OptionError: device is 'cuda:99'"),
        (["the sky", "--chat"], "has no chat template"),
        (["", "--json"], "OptionError: the prompt has no tokens"),
        (["the sky", "--against", "no/such/folder"], "CheckpointError: no/such/folder: there is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_with_1_and_one_line(
    known: Path, arguments: list[str], message: str
) -> None:
    result = run(known, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--threads", "0"], ["--dtype", "int8"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run("model", "the sky", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
