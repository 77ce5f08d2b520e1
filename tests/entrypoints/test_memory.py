"""Memory does not grow with the model."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from support.architectures import save_tiny_model
from support.tuned import tune

from emp_llm import PruneOptions, diff, inspect, prune, unpack, verify


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
    # 180 matrices: 90 MB if each kept the counts of the one bin that its threshold lies in
    source = save_tiny_model(tmp_path / "source", "llama", dtype=dtype, num_hidden_layers=60)
    options = PruneOptions(granularity="layer")
    inspect(source, options, threads=1)  # whatever is made once
    assert traced_peak(inspect, source, options, threads=1) < 30e6


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of a few large tensors."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1}
    return save_tiny_model(folder, "llama", **sizes)


TARGET_BYTES = 3 * 1024 * 8192 * 2


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (
        "tensors.geometry.ROW_BLOCK_BYTES",
        "files.direct_file.CHUNK_BYTES",
        "pruning.copy_job.COPY_BYTES",
        "deltas.survey.COPY_BYTES",
        "verification.tensor_checks.COPY_BYTES",
        "verification.weight_differences.COPY_BYTES",
    ):
        monkeypatch.setattr(f"emp_llm.{place}", 1 << 18)


@pytest.mark.usefixtures("small_blocks")
def test_a_tensor_of_many_blocks_is_pruned_in_the_memory_of_a_few(
    tmp_path: Path, wide: Path
) -> None:
    assert (wide / "model.safetensors").stat().st_size > TARGET_BYTES
    prune(wide, tmp_path / "warm", threads=2)
    peak = traced_peak(prune, wide, tmp_path / "out", threads=2)
    assert peak < TARGET_BYTES / 5
    assert np.array_equal(
        np.fromfile(tmp_path / "warm" / "model.safetensors", np.uint8),
        np.fromfile(tmp_path / "out" / "model.safetensors", np.uint8),
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("granularity", ["row", "model"])
def test_a_folder_is_compared_with_its_source_in_the_memory_of_a_few_blocks(
    tmp_path: Path, wide: Path, granularity: str
) -> None:
    prune(wide, tmp_path / "out", PruneOptions(granularity=granularity))
    found = verify(tmp_path / "out", against=wide, threads=2)  # whatever is made once
    assert found["kept"] > TARGET_BYTES / 4
    peak = traced_peak(verify, tmp_path / "out", against=wide, threads=2)
    assert peak < TARGET_BYTES / 5


@pytest.mark.usefixtures("small_blocks")
def test_differences_are_pruned_and_added_in_the_memory_of_a_few_blocks(
    tmp_path: Path, wide: Path
) -> None:
    tuned = tune(wide, tmp_path / "tuned", changed="mlp")
    given = {"base": wide, "threads": 2}
    prune(tuned, tmp_path / "delta", **given)  # whatever is made once
    unpack(tmp_path / "delta", tmp_path / "whole", threads=2)
    assert traced_peak(prune, tuned, tmp_path / "again", **given) < TARGET_BYTES / 5
    peak = traced_peak(unpack, tmp_path / "delta", tmp_path / "whole again", threads=2)
    assert peak < TARGET_BYTES / 5


@pytest.mark.usefixtures("small_blocks")
def test_two_checkpoints_are_compared_in_the_memory_of_a_few_blocks(
    tmp_path: Path, wide: Path
) -> None:
    prune(wide, tmp_path / "out")
    assert not diff(tmp_path / "out", wide, threads=2)["same_weights"]
    assert traced_peak(diff, tmp_path / "out", wide, threads=2) < TARGET_BYTES / 5
