"""Checkpoints that many tests read and none writes to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import save_tiny_model

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
