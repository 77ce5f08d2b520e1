"""A checkpoint of four shards on a Hub, and what tests of their arrival ask about.

The fixtures that make it are in conftest.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import F, H, Tensors, files, gaussian, mlp

SHARDS = [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]

_PATIENCE = 120
"""Seconds; kernels may have to be compiled meanwhile."""


def layer(number: int) -> Tensors:
    """One layer of a Llama, with 400 kB beside it that are not pruned."""
    names = {name.replace(".0.", f".{number}."): tensor for name, tensor in mlp(H, F).items()}
    noise = gaussian(100_000, dtype=torch.float32, seed=number)
    return {name: tensor + number / 8 for name, tensor in names.items()} | {f"a.{number}": noise}


def arrived(cache: Path) -> list[str]:
    """The shards that are in the cache now, whatever else is going on."""
    return sorted(path.name for path in cache.glob("snapshots/*/*.safetensors") if path.exists())


def in_cache(cache: Path) -> list[str]:
    """The shards that are in the cache; there must be a blob of each, and no other large file."""
    blobs = [blob for blob in cache.glob("blobs/*") if blob.stat().st_size > 300_000]
    assert [blob for blob in blobs if blob.suffix == ".incomplete"] == []
    assert len(blobs) == len(arrived(cache))
    return arrived(cache)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until something is so; False if it takes too long."""
    for _ in range(_PATIENCE * 100):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False


def before_first_read(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something when data of a shard is about to be read for the first time."""
    preadv, first = os.preadv, threading.Lock()

    def read(*args):
        if first.acquire(blocking=False):
            action()
        return preadv(*args)

    monkeypatch.setattr("os.preadv", read)


def weights(folder: Path) -> dict[str, bytes]:
    """What pruning wrote, but for what names the source."""
    return {
        name: content
        for name, content in files(folder).items()
        if name not in ("README.md", "emp_report.json")
    }
