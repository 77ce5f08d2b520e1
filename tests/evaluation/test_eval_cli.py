"""``emp-llm eval``: the table, the JSON, what is saved, exit statuses."""

import json
import re
from pathlib import Path

import pytest
from emp_cli.app import app
from support.word_models import TASKS, TEXT, known_model, save_words
from typer.testing import CliRunner, Result


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)


def rows(table: str) -> dict[str, list[str]]:
    """The numbers of each line by its first two words."""
    found = (line.split() for line in table.splitlines())
    return {" ".join(words[:2]): words[2:] for words in found if len(words) > 2}


def test_json_has_every_figure_under_its_plain_name(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    measured = ["--perplexity", tmp_path / "short.txt", "--context", 4, "--tasks", "words"]
    result = run(packed, "--against", dense, *measured, "--include-path", TASKS, "--json")

    assert result.exit_code == 0
    content = json.loads(result.stdout)
    for side in ("model", "against"):
        text, task = content[side]["texts"]["short.txt"], content[side]["tasks"]["words"]
        assert {"perplexity", "bits_per_byte", "tokens", "context", "protocol"} <= set(text)
        assert {"acc", "acc_stderr", "samples", "num_fewshot"} <= set(task)
    difference = content["difference"]["texts"]["short.txt"]["perplexity"]
    ours, theirs = (
        content[side]["texts"]["short.txt"]["perplexity"] for side in ("model", "against")
    )
    assert difference == ours - theirs
    assert content["seconds"] > 0


def test_the_table_has_both_models_the_difference_and_the_standard_error(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    measured = ["--perplexity", tmp_path / "short.txt", "--context", 4, "--tasks", "words"]
    arguments = [packed, "--against", dense, *measured, "--include-path", TASKS]
    content = json.loads(run(*arguments, "--json").stdout)

    result = run(*arguments)

    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    model, against = content["model"], content["against"]
    for metric in ("perplexity", "bits_per_byte"):
        ours, theirs = (side["texts"]["short.txt"][metric] for side in (model, against))
        expected = [f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:+.4f}"]
        assert rows(result.stdout)[f"short.txt {metric}"] == expected
    ours, theirs = (side["tasks"]["words"] for side in (model, against))
    assert rows(result.stdout)["words acc"] == [
        f"{ours['acc']:.4f}",
        f"{ours['acc_stderr']:.4f}",
        f"{theirs['acc']:.4f}",
        f"{theirs['acc_stderr']:.4f}",
        f"{ours['acc'] - theirs['acc']:+.4f}",
    ]
    assert "perplexity of short.txt 12 tokens\ntasks 11 answers\n" in result.stderr


def test_a_task_of_yaml_and_json_gives_the_accuracy_worked_out_by_hand(tmp_path: Path) -> None:
    """Three of five: see `word_models.SAYS`. Its standard error is √(0.6 · 0.4 / 4)."""
    known = save_words(tmp_path / "known", known_model())

    result = run(known, "--tasks", "words", "--include-path", TASKS, "--batch-size", "auto")

    assert result.exit_code == 0
    assert rows(result.stdout)["words acc"] == ["0.6000", "0.2449"]


def test_one_model_has_a_table_without_differences(dense: Path, tmp_path: Path) -> None:
    result = run(dense, "--perplexity", tmp_path / "short.txt", "--context", 4)
    assert re.search(r"data +metric +value *\n", result.stdout)
    assert "\nprotocol paper, context 4, float32\n" in result.stdout
    assert "difference" not in result.stdout


def test_tables_of_long_names_fit_80_columns(
    packed: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"a long name of {'a ' * 20}text.txt"
    (tmp_path / name).write_text(TEXT)
    measured = ["--perplexity", name, "--context", 4, "--protocol", "gptq"]
    for arguments in ([packed, "--against", dense], [packed]):
        result = run(*arguments, *measured)
        assert result.exit_code == 0
        assert [line for line in result.stdout.splitlines() if len(line) > 80] == []


def test_save_adds_to_the_folder_and_its_card(packed: Path, dense: Path, tmp_path: Path) -> None:
    measured = ["--perplexity", tmp_path / "short.txt", "--context", 4]
    result = run(packed, "--against", dense, *measured, "--save", "--json")

    assert result.exit_code == 0
    content = json.loads(result.stdout)
    saved = json.loads((packed / "emp_eval.json").read_text())["results"]
    assert [one["value"] for one in saved] == [
        content["model"]["texts"]["short.txt"][metric] for metric in ("perplexity", "bits_per_byte")
    ]
    assert [one["dense_value"] for one in saved] == [
        content["against"]["texts"]["short.txt"][metric]
        for metric in ("perplexity", "bits_per_byte")
    ]
    card = (packed / "README.md").read_text()
    value, dense_value = saved[0]["value"], saved[0]["dense_value"]
    assert f"(per token, protocol paper, context 4) | {value:.6g} | {dense_value:.6g} |" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--perplexity", "no.txt"], "OptionError: no.txt: there is no such file"),
        ([], "HubError: wikitext2 cannot be fetched"),
        (["--tasks", "wodrs", "--include-path", "."], "the nearest are words"),
        (["--perplexity", "words.yaml", "--device", "cuda:99"], "OptionError: device is 'cuda:99'"),
        (["--perplexity", "words.yaml", "--save"], "was not written by emp-llm"),
        (["--perplexity", "words.yaml"], "context is 2048; this model has 32 positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_with_1_and_one_line(
    dense: Path, arguments: list[str], message: str
) -> None:
    result = run(dense, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--batch-size", "many"], ["--batch-size", "0"], ["--limit", "0"], ["--protocol", "wanda"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run("model", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
