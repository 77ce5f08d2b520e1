"""Compiled kernels do not outlive the sources they were made from."""

import importlib
import os
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emp_kernels import cpu
from emp_kernels.cpu import code_cache
from numba.core.caching import CacheImpl, InTreeCacheLocator
from numba.core.dispatcher import Dispatcher

INNER = """
import numba

@numba.njit
def step(x):
    return x + {}
"""
OUTER = """
import numba
from inner import step

@numba.njit(cache=True)
def call(x):
    return step(x) * 10
"""

Load = Callable[[int], Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a kernel, as a new process does; a step of it in another file adds so much."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def loaded(added: int) -> Any:
        inner, outer = tmp_path / "inner.py", tmp_path / "outer.py"
        inner.write_text(INNER.format(added))
        outer.write_text(OUTER)
        for path in (inner, outer):
            os.utime(path, (1000, 1000))  # some installers keep the times of an archive
        code_cache._used_folder.cache_clear()
        monkeypatch.setattr(CacheImpl, "_locator_classes", [InTreeCacheLocator])
        code_cache.keep_apart(tmp_path, [inner, outer])
        for module in ("inner", "outer"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module("outer").call

    return loaded


def test_a_change_of_another_file_is_seen_and_old_code_is_found_again(load: Load) -> None:
    assert load(1)(0) == 10
    assert load(2)(0) == 20
    again = load(1)
    assert again(0) == 10
    assert again.stats.cache_hits


def test_code_of_other_sources_is_removed_when_nobody_has_used_it_for_a_day(
    load: Load, tmp_path: Path
) -> None:
    old, new = (tmp_path / "__pycache__" / f"kernels-{name}" for name in ("old", "new"))
    unrelated = tmp_path / "__pycache__" / "other"
    for folder in (old, new, unrelated):
        folder.mkdir(parents=True)
        (folder / "code.nbc").write_bytes(b"")
    for folder in (old, unrelated):
        os.utime(folder, (time.time() - 2 * 86400,) * 2)
    load(1)
    assert not old.exists()
    assert new.exists()
    assert unrelated.exists()


def test_where_nothing_can_be_written_to_code_lasts_as_long_as_the_process(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InTreeCacheLocator, "from_function", lambda *_: None)
    kernel = load(3)
    assert kernel(0) == 30
    assert list(Path(code_cache._temporary_folder().name).glob("kernels-*/outer.call-*.nbc"))
    assert not (tmp_path / "__pycache__").exists()


def kernels_in(values: Any) -> Iterator[Dispatcher]:
    """All kernels among values, and among those that they were made with."""
    for value in values:
        if isinstance(value, Dispatcher):
            yield value
            yield from kernels_in(cell.cell_contents for cell in value.py_func.__closure__ or ())


def test_no_two_kernels_have_the_same_name() -> None:
    """Else code that two processes compiled could be taken for the same by a third."""
    found = set()
    for module in pkgutil.iter_modules(cpu.__path__, "emp_kernels.cpu."):
        found |= set(kernels_in(vars(importlib.import_module(module.name)).values()))
    names = Counter((one.py_func.__module__, one.py_func.__qualname__) for one in found)
    assert len(names) > 100
    assert {name for name, count in names.items() if count > 1} == set()
