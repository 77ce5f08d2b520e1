"""Checkpoints that many tests read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import save_tiny_model
from checkpoints import DOWN, F, H, llama_config, mlp, write_checkpoint

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Folders of tiny models, each made once: (architecture, dtype, sharded) to its path."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def make(
        architecture: str, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = False
    ) -> Path:
        key = (architecture, dtype, sharded)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            size = 8 * 1024 if sharded else "5GB"
            made[key] = save_tiny_model(folder, architecture, dtype=dtype, max_shard_size=size)
        return made[key]

    return make


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkpoint of one file, of this test alone."""
    return write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in two shards."""
    tensors = mlp(H, F)
    shards = {DOWN: tensors.pop(DOWN)}, tensors
    return write_checkpoint(tmp_path / "sharded", llama_config(H, F), *shards)
