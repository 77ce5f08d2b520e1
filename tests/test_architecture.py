"""Imports run one way, every module can be imported first, and every folder draws its own floor."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "emp_llm": ROOT / "emp_llm",
    "emp_kernels": ROOT / "kernels" / "emp_kernels",
    "emp_cli": ROOT / "cli" / "emp_cli",
}


def module_name(path: Path, package: str) -> str:
    parts = path.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {
        module_name(path, package): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }


@cache
def imports() -> dict[str, frozenset[str]]:
    """The modules of ours that each module names in an import, wherever in it that stands."""
    known = modules()
    found: dict[str, frozenset[str]] = {}
    for module, path in known.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are written with their whole path"
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in known else str(node.module) for name in whole}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[module] = frozenset(named & known.keys() - {module})
    return found


@cache
def floors() -> list[str]:
    """The floors as docs/architecture.md lists them, from the top down."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^```floors\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.split()[0] for line in listed.splitlines()]


def floor_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "emp_llm" else parts[0]


def circles(graph: dict[str, frozenset[str]]) -> list[str]:
    """What is left once everything that imports nothing that is left has been taken away."""
    left = dict(graph)
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    return sorted(left)


def test_a_circle_is_found() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b"), "d": frozenset()}

    assert circles(graph) == ["a", "b", "c"]  # a reaches the circle, d does not


def test_every_module_stands_on_one_floor_and_every_floor_has_one() -> None:
    assert {floor_of(module) for module in modules()} == set(floors())
    assert len(set(floors())) == len(floors())


def test_no_import_runs_up() -> None:
    height = {floor: number for number, floor in enumerate(reversed(floors()))}

    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if height[floor_of(other)] > height[floor_of(module)]
    ]

    assert upward == []


def test_no_imports_close_a_circle() -> None:
    assert circles(imports()) == []


def test_no_two_test_files_have_one_name() -> None:
    """pytest would collect only the first of them."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]

    assert len(names) == len(set(names)) > 0


def test_no_file_is_longer_than_400_lines() -> None:
    """A longer one has two reasons to exist: split it."""
    others = ("tests", "benchmarks", "demo", "examples")
    own = [*PACKAGES.values(), *(ROOT / name for name in others)]
    lines = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for folder in own
        for path in folder.rglob("*.py")
    }

    assert lines
    assert {path: count for path, count in lines.items() if count > 400} == {}


IMPORT_EACH = """
import importlib, json, os, sys
# what most of them import, so that it is read once; not the module that our hook waits for
import accelerate, numba, scipy.optimize, sympy, tokenizers, torch, torch._dynamo
import torch.distributed.tensor, transformers.utils
assert "transformers.modeling_utils" not in sys.modules and "emp_llm" not in sys.modules
failed = {}
for module in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            importlib.import_module(module)
            os.write(write, b"imported")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        if (said := answer.read()) != "imported":
            failed[module] = said
    os.waitpid(child, 0)
json.dump(failed, sys.stdout)
"""


HOSTED = {"emp_llm.serving.vllm_config", "emp_llm.serving.vllm_layers"}
"""Modules that only vLLM imports, which is not installed here."""


@pytest.mark.slow
def test_every_module_can_be_the_first_that_is_imported() -> None:
    """Each in a process that has none of ours: a circle that closes at run time would show."""
    own = [m for m in modules() if m not in HOSTED and not m.endswith("__main__")]

    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH],
        input=json.dumps(own),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},  # import torch alone
    )

    assert json.loads(done.stdout) == {}


def drawn(folder: Path) -> list[str]:
    """The files and folders that the docstring of a folder's __init__ lists, in its order."""
    docstring = ast.get_docstring(
        ast.parse((folder / "__init__.py").read_text("utf-8")), clean=False
    )
    return re.findall(r"^ {0,4}(\w+/?)  +\S", docstring or "", re.MULTILINE)


FOLDERS = sorted(
    str(path.parent.relative_to(ROOT))
    for folder in PACKAGES.values()
    for path in folder.rglob("__init__.py")
    if path.parent != PACKAGES["emp_llm"]
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_lists_what_it_holds_and_each_after_what_it_imports(folder: str) -> None:
    path = ROOT / folder
    held = {file.stem for file in path.glob("*.py")} - {"__init__", "__main__"}
    held |= {f"{file.parent.name}/" for file in path.glob("*/__init__.py")}
    listed = drawn(path)
    assert sorted(listed) == sorted(held)
    (package,) = (p for p, root in PACKAGES.items() if path.is_relative_to(root))
    base = module_name(path / "__init__.py", package)

    def entry(module: str) -> str:
        rest = module.removeprefix(f"{base}.").split(".")
        return rest[0] if f"{rest[0]}/" not in listed else f"{rest[0]}/"

    late = [
        f"{entry(module)} before {entry(other)}, which it imports"
        for module, others in imports().items()
        for other in others
        if module.startswith(f"{base}.") and other.startswith(f"{base}.")
        if entry(module) != entry(other)
        if entry(module) in listed and entry(other) in listed  # not __main__
        if listed.index(entry(module)) < listed.index(entry(other))
    ]
    assert late == []
