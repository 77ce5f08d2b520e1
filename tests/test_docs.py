"""The pages are true where a machine can tell: links, paths, command lines and Python snippets."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from emp_cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_OF_OURS = re.compile(r"(?:emp_llm|kernels|cli|tests|benchmarks|docs|demo|examples)/[\w./-]*")
_USAGE_ERROR = typer.BadParameter.__base__  # click's, whichever click typer brings
_LAUNCHERS = re.compile(r"^(?:srun |torchrun [^|]*?-m emp_cli )?(?:emp-llm )?")


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def fenced(page: Path, *languages: str) -> list[str]:
    """The code blocks in one of these languages."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def spans(page: Path) -> list[str]:
    """The inline code of a page, table cells included."""
    return [span.replace(r"\|", "|") for span in _SPAN.findall(prose(page))]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower())
    return kept.strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def shown_commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every command line of ours in a code block, without the program's name."""
    for code in fenced(page, "", "bash", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            text = line.removeprefix("$ ").partition("    # ")[0]
            start = _LAUNCHERS.match(text)
            if start is not None and start[0]:
                yield shlex.split(text[start.end() :])


@cache
def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)


@cache
def options() -> frozenset[str]:
    parameters = [p for command in commands().values() for p in command.params]
    return frozenset(option for p in parameters for option in p.opts if option.startswith("--"))


def check_command(arguments: list[str], *, whole: bool = True) -> None:
    """Fail unless a command line parses: its verb, its options and their values.

    Text may name a command with one of its options, not `whole`: there nothing is required.
    """
    verb, *rest = arguments
    assert verb in commands(), f"there is no command {verb}"
    try:
        commands()[verb].make_context(verb, rest)
    except _USAGE_ERROR as error:
        if type(error).__name__ == "MissingParameter" and not whole:
            return
        pytest.fail(f"emp-llm {shlex.join(arguments)}: {error.format_message()}")


@by_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in map("".join, _LINK.findall(prose(page))):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            lost.append(link)

    assert lost == []


@by_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    words = (word for span in spans(page) for word in span.split())
    named = [word for word in words if _OF_OURS.fullmatch(word)]
    if page.name == "CHANGELOG.md":
        named = []  # what it tells of may have moved since

    assert [path for path in named if not (ROOT / path).exists()] == []


@by_page
def test_every_command_line_parses(page: Path) -> None:
    for arguments in shown_commands(page):
        check_command(arguments)
    for span in spans(page):
        program, *arguments = shlex.split(span) if span.startswith("emp-llm ") else [""]
        if program and "…" not in arguments:
            check_command(arguments, whole=False)


@by_page
def test_every_option_that_is_named_exists(page: Path) -> None:
    named = [word for span in spans(page) if span.startswith("--") for word in span.split()]
    foreign = {"--multi_gpu", "--cpus-per-task"}  # accelerate's, Slurm's

    assert {word for word in named if word.startswith("--")} - options() - foreign == set()


@by_page
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert named <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


@by_page
def test_every_python_snippet_compiles(page: Path) -> None:
    for code in fenced(page, "python"):
        compile(code, page.name, "exec")


def test_commands_are_found_and_wrong_ones_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\n$ emp-llm prune M --out D\nsrun emp-llm prune M --out D --betta 1\n```\n")

    right, wrong = shown_commands(page)

    check_command(right)
    with pytest.raises(pytest.fail.Exception, match="--betta"):
        check_command(wrong)
