"""Wrong usage: exit status 2, and one short message that says what may have been meant."""

import shlex

import pytest
from emp_cli.usage import run


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr of a command that is wrong usage."""
    assert run(shlex.split(command)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    return lines


@pytest.mark.parametrize(
    ("command", "said", "helped_by"),
    [
        ("prnue", "No such command 'prnue'. Did you mean 'prune'?", "emp-llm"),
        ("evaluate x", "No such command 'evaluate'. Did you mean 'eval'?", "emp-llm"),
        ("xyzzy", "No such command 'xyzzy'.", "emp-llm"),
        ("--helpp", "No such option '--helpp'. Did you mean '--help'?", "emp-llm"),
        ("prune x --out y --bta 1", "'--bta'. Did you mean '--beta'?", "emp-llm prune"),
        ("prune x --out y --xyzzy", "No such option '--xyzzy'.", "emp-llm prune"),
        ("prune x --out y --granularity rows", "Did you mean 'row'?", "emp-llm prune"),
        ("prune x --out y --format pakced", "Did you mean 'packed'?", "emp-llm prune"),
        ("eval x --dtype float61", "Did you mean 'float16'?", "emp-llm eval"),
        ("prune x --out y --repair all", "'all' is not one of 'none', 'obs',", "emp-llm prune"),
    ],
)
def test_what_was_meant_is_suggested(
    command: str, said: str, helped_by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *message, last = refused(command, capsys)
    assert message[0].startswith("Error: ")
    assert said in " ".join(message)
    assert last == f"Run '{helped_by} --help' for its options."


def test_nothing_is_suggested_for_a_choice_that_comes_close_to_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "Did you mean" not in " ".join(refused("prune x --out y --granularity qqq", capsys))


@pytest.mark.parametrize(
    ("command", "said", "completed"),
    [
        ("prune m", "Missing option '--out'.", "prune m --out ./sparse"),
        ("prune 'my model' --beta=1", "option '--out'", "prune 'my model' --beta=1 --out ./sparse"),
        ("prune m --out", "Option '--out' requires an argument.", "prune m --out ./sparse"),
        (
            "prune",
            "Missing argument 'MODEL'.",
            "prune meta-llama/Llama-2-7b-hf --out ./sparse",
        ),
        ("shrink m --experts=6", "option '--out'.", "shrink m --experts=6 --out ./sparse"),
        ("push f", "Missing argument 'REPO'.", "push f USER/NAME"),
        ("diff", "Missing argument 'A'.", "diff ./sparse ./dense"),
        ("generate m", "Missing argument 'PROMPT'.", "generate m 'The sky is'"),
        ("compare m", "Missing option '--perplexity'.", "compare m --perplexity wikitext2"),
    ],
)
def test_a_command_that_lacks_something_is_shown_completed(
    command: str, said: str, completed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message, example = refused(command, capsys)
    assert said in message
    assert example == f"For example: emp-llm {completed}"


def test_shrink_without_an_amount_is_not_completed(capsys: pytest.CaptureFixture[str]) -> None:
    message, last = refused("shrink m", capsys)
    assert message == "Error: Missing option '--out'."
    assert last == "Run 'emp-llm shrink --help' for its options."


def test_control_characters_of_an_argument_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "\x1b" not in "".join(refused("'pru\x1b[31mne'", capsys))


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    captured = capsys.readouterr()
    assert "inspect" in captured.out + captured.err
