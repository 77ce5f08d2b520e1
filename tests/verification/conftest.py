"""The folders that verify is tried on."""

import shutil
from pathlib import Path

import pytest
from support.checkpoints import (
    DOWN,
    gaussian,
    llama_config,
    mlp,
    write_checkpoint,
)
from support.written_folders import NORM, F, H

from emp_llm import PruneOptions, prune, unpack


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sharded checkpoint pruned to each format; DOWN and NORM in the first shard."""
    folder = tmp_path_factory.mktemp("verification")
    tensors = mlp(H, F)
    shards = {DOWN: tensors.pop(DOWN), NORM: gaussian(H)}, tensors
    source = write_checkpoint(folder / "source", llama_config(H, F), *shards)
    (source / "tokenizer.json").write_text('{"vocabulary": ["a"]}')
    (source / "README.md").write_text("# A card")
    for output_format in ("packed", "dense"):
        prune(source, folder / output_format, PruneOptions(output_format=output_format))
    unpack(folder / "packed", folder / "unpacked")
    return {name: folder / name for name in ("source", "packed", "dense", "unpacked")}


@pytest.fixture
def packed(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["packed"], tmp_path / "packed"))


@pytest.fixture
def dense(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["dense"], tmp_path / "dense"))
