"""Compiled kernels do not outlive the sources they were made from."""

import os
from pathlib import Path

import pytest
from emp_kernels.cpu import drop_stale_code


def put(path: Path, modified: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (modified, modified))
    return path


def test_code_that_is_older_than_any_source_is_dropped(tmp_path: Path) -> None:
    put(tmp_path / "pack.py", 100)
    put(tmp_path / "select.py", 300)  # called by pack: its change must recompile pack as well
    index = put(tmp_path / "__pycache__" / "pack.kernel-1.py311.nbi", 200)
    code = put(tmp_path / "__pycache__" / "pack.kernel-1.py311.1.nbc", 200)
    drop_stale_code(tmp_path)
    assert not index.exists()
    assert not code.exists()


def test_code_that_is_newer_than_all_sources_stays(tmp_path: Path) -> None:
    put(tmp_path / "pack.py", 100)
    code = put(tmp_path / "__pycache__" / "pack.kernel-1.py311.1.nbc", 200)
    bytecode = put(tmp_path / "__pycache__" / "pack.cpython-311.pyc", 50)
    drop_stale_code(tmp_path)
    assert code.exists()
    assert bytecode.exists()


def test_code_that_another_process_drops_first_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "pack.py", 300)
    codes = [put(tmp_path / "__pycache__" / f"pack.{i}.nbc", 200) for i in range(3)]
    stat = Path.stat

    def stat_late(path: Path, **options: bool) -> os.stat_result:
        if path == codes[1]:
            path.unlink()
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_late)
    drop_stale_code(tmp_path)
    monkeypatch.undo()
    assert not any(code.exists() for code in codes)
