"""Every kernel for GPUs compiles for real GPUs, fits them, and keeps what it works on in registers.

What is compiled is what the functions that launch kernels ask for: see `compiled_kernels`.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import emp_kernels.gpu
import pytest
from support import compiled_kernels
from support.compiled_kernels import Compiled

pytestmark = pytest.mark.slow

LEAST_SHARED_MEMORY = 99 * 1024
"""Bytes that a program may have on the smallest GPUs that the kernels are for: sm_86 and sm_89."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    cache = tmp_path_factory.mktemp("triton")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", compiled_kernels.__file__],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def kernels_that_are_there() -> set[str]:
    """Functions that ask which program they are; the others are parts of them."""
    found = set()
    for module in pkgutil.iter_modules(emp_kernels.gpu.__path__):
        there = importlib.import_module(f"emp_kernels.gpu.{module.name}")
        source = Path(there.__file__).read_text()
        for part in source.split("\n@triton.jit")[1:]:
            if "tl.program_id" in part:
                found.add(part.partition("def ")[2].partition("(")[0])
    return found


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell(compiled: list[Compiled]) -> None:
    there = kernels_that_are_there()
    assert len(there) > 4
    for capability in (80, 90, 100):
        assert {one.kernel for one in compiled if one.capability == capability} == there


def test_every_kernel_fits_the_shared_memory_of_any_gpu_that_it_is_for(
    compiled: list[Compiled],
) -> None:
    assert max(one.shared for one in compiled) > 0
    assert [one for one in compiled if one.shared > LEAST_SHARED_MEMORY] == []


def test_no_kernel_spills_registers(compiled: list[Compiled]) -> None:
    binaries = [one for one in compiled if one.usage]
    if not binaries:
        pytest.skip("Triton came without cuobjdump")
    assert {one.kernel for one in binaries} == kernels_that_are_there()
    assert min(one.usage["registers"] for one in binaries) > 16
    assert [one for one in binaries if one.usage["spills"]] == []


def test_what_other_rows_publish_is_read_anew_each_time(compiled: list[Compiled]) -> None:
    """Otherwise a program that waits for it would wait for ever."""
    packs = [one for one in compiled if one.kernel == "pack_kernel"]
    writing = [one for one in packs if one.constants["EMIT"] == "True"]
    assert len(writing) == 6
    for one in writing:
        assert "ld.volatile.global.b64" in one.loads


def test_what_other_rows_publish_is_read_by_one_thread_each(compiled: list[Compiled]) -> None:
    """Two threads could read two states of one row: see `emp_kernels.gpu.look_back`."""
    packs = [one for one in compiled if one.kernel == "pack_kernel"]
    assert {one.warps for one in packs} == {1, 8}
    assert [one for one in packs if int(one.constants["LOOK_BACK"]) < 32 * one.warps] == []
