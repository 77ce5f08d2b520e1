"""What the packages import is what pyproject.toml declares, and constraints.txt pins each of it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from emp_llm.checkpoint.meta_llama.tokenizer import PACKAGES

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "paper"
SOURCES = (ROOT / "emp_llm", ROOT / "kernels" / "emp_kernels", ROOT / "cli" / "emp_cli", EXAMPLES)
BY_NAME = ("import_module", "need")
OURS = {"emp_llm", "emp_kernels", "emp_cli", *(path.stem for path in EXAMPLES.glob("*.py"))}
HOSTS = {"vllm"}
"""What imports us, and not the other way round."""


def normalized(name: str) -> str:
    """A name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, by a statement or by its name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in BY_NAME:
            yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))


@cache
def imported() -> dict[str, str]:
    """Distributions that are imported, each with a file that does."""
    distributions = packages_distributions()
    found = {}
    for folder in SOURCES:
        for path in sorted(folder.rglob("*.py")):
            for module in imported_modules(path):
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in OURS | HOSTS:
                    (name,) = set(distributions[top])
                    found[normalized(name)] = str(path.relative_to(ROOT))
    return found


def names_of(requirements: list[str]) -> set[str]:
    found = {re.match(r"[\w.-]+(\[[\w,-]+\])?", line)[0] for line in requirements}
    return {normalized(name) for name in found if not name.startswith("emp-llm")}


@cache
def declared() -> dict[str, set[str]]:
    """Distributions by the extra that needs them; those of the package itself under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: names_of(lines) for name, lines in project["optional-dependencies"].items()}
    return {"": names_of(project["dependencies"]), **extras}


# transformers imports these to convert a tokenizer; PACKAGES has them checked before
FOR_TRANSFORMERS = {name for packages in PACKAGES.values() for name in packages}


def test_everything_that_is_imported_is_declared() -> None:
    known = set().union(*(names for extra, names in declared().items() if extra != "test"))
    assert {name: file for name, file in imported().items() if name not in known} == {}


def test_everything_that_is_declared_is_imported() -> None:
    known = set().union(*(names for extra, names in declared().items() if extra != "test"))
    assert known - imported().keys() - FOR_TRANSFORMERS == set()


def test_what_an_extra_brings_is_not_declared_twice() -> None:
    groups = list(declared().values())
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_the_extra_original_has_what_converting_a_tokenizer_takes() -> None:
    assert declared()["original"] == FOR_TRANSFORMERS


@pytest.mark.parametrize("extra", declared())
def test_constraints_pin_everything_that_is_declared(extra: str) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalized(line.partition("==")[0]) for line in lines if "==" in line}
    assert declared()[extra] - pinned == set()
