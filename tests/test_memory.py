"""Memory does not grow with the model."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import save_tiny_model

from emp_llm import PruneOptions, inspect, prune


def traced_peak(function, *arguments, **options) -> int:
    tracemalloc.start()
    try:
        function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thousands_of_groups_are_searched_without_their_histograms(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    # 300 matrices: 150 MB if each kept the counts of the one bin that its threshold lies in
    source = save_tiny_model(tmp_path / "source", "llama", dtype=dtype, num_hidden_layers=100)
    options = PruneOptions(granularity="layer")
    inspect(source, options, threads=1)  # whatever is made once
    assert traced_peak(inspect, source, options, threads=1) < 30e6


def test_a_tensor_of_many_blocks_is_pruned_in_the_memory_of_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.geometry.BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr("emp_llm.disk_file.CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr("emp_llm.prune_steps.COPY_BYTES", 1 << 18)
    source = save_tiny_model(
        tmp_path / "source", "llama", hidden_size=1024, intermediate_size=8192, num_hidden_layers=1
    )
    target_bytes = 3 * 1024 * 8192 * 2
    assert (source / "model.safetensors").stat().st_size > target_bytes
    prune(source, tmp_path / "warm", threads=2)
    peak = traced_peak(prune, source, tmp_path / "out", threads=2)
    assert peak < target_bytes / 5
    assert np.array_equal(
        np.fromfile(tmp_path / "warm" / "model.safetensors", np.uint8),
        np.fromfile(tmp_path / "out" / "model.safetensors", np.uint8),
    )
