"""Runs whose kernels work on a GPU write the bytes of those on the CPU.

Rows are few: Triton's interpreter, which stands in for a GPU, takes 50 ms for each.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emp_kernels.gpu_workspace import DeviceWorkspace
from support.checkpoints import DOWN, GATE, UP, few_values, files, llama_config, write_checkpoint

from emp_llm import FormatError, PruneOptions, prune, unpack

H, F = 4, 6

Used = list[torch.device]
Same = Callable[..., None]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    """The devices that kernels run on, each time they do."""
    devices: Used = []
    active = DeviceWorkspace.active

    def noted(self: DeviceWorkspace) -> object:
        devices.append(self.device)
        return active(self)

    monkeypatch.setattr(DeviceWorkspace, "active", noted)
    return devices


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A checkpoint of three formats, in two shards, with many equal weights."""
    first = {DOWN: few_values(H, F), GATE: few_values(F, H, dtype=torch.float16)}
    second = {UP: few_values(F, H, dtype=torch.float32)}
    return write_checkpoint(tmp_path / "mixed", llama_config(H, F), first, second)


@pytest.fixture
def same(tmp_path: Path, used: Used) -> Same:
    """Prunes a checkpoint on the CPU and on a GPU, and compares all bytes."""

    def check(source: Path, options: PruneOptions, threads: int | None = None) -> None:
        prune(source, tmp_path / "cpu", options, device="cpu")
        assert used == []
        prune(source, tmp_path / "gpu", options, device="cuda", threads=threads)
        shards = list(source.glob("*.safetensors"))
        assert len(used) > len(shards)  # each has a tensor; and once to see that kernels run
        assert files(tmp_path / "gpu") == files(tmp_path / "cpu")

    return check


@pytest.mark.parametrize(
    ("granularity", "output_format", "threads"),
    [("row", "packed", 1), ("row", "dense", 3), ("model", "packed", None)],
)
def test_pruning_on_a_gpu_writes_the_same_bytes(
    mixed: Path, same: Same, granularity: str, output_format: str, threads: int | None
) -> None:
    options = PruneOptions(granularity=granularity, output_format=output_format, beta=0.9)
    same(mixed, options, threads)


def test_the_beta_for_a_sparsity_found_on_a_gpu_is_the_same(mixed: Path, same: Same) -> None:
    same(mixed, PruneOptions(granularity="layer", target_sparsity=0.42), 3)


def test_rows_that_are_columns_of_the_file_are_the_same_from_a_gpu(
    tmp_path: Path, same: Same
) -> None:
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 8,
        "n_positions": 8,
        "n_layer": 1,
        "n_head": 1,
        "n_embd": H,
        "n_inner": F,
    }
    tensors = {"transformer.h.0.mlp.c_fc.weight": few_values(H, F)}
    same(write_checkpoint(tmp_path / "gpt2", config, tensors), PruneOptions())


def test_fused_experts_are_the_same_from_a_gpu(tmp_path: Path, same: Same) -> None:
    config = llama_config(H, F) | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size_mlp": F,
        "num_local_experts": 2,
        "moe_layers": [0],
    }
    tensors = {"model.layers.0.feed_forward.experts.down_proj": few_values(2, F, H)}
    source = write_checkpoint(tmp_path / "llama4", config, tensors)
    same(source, PruneOptions(output_format="dense"), 3)


@pytest.mark.parametrize("threads", [1, 3])
def test_unpacking_on_a_gpu_writes_the_same_bytes(
    mixed: Path, tmp_path: Path, used: Used, threads: int
) -> None:
    prune(mixed, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "cpu", device="cpu")
    assert used == []
    unpack(tmp_path / "packed", tmp_path / "gpu", device="cuda", threads=threads)
    assert len(used) > 3  # each of the tensors, and once to see that kernels run
    assert files(tmp_path / "gpu") == files(tmp_path / "cpu")


def test_a_damaged_row_is_told_alike_from_a_gpu(mixed: Path, tmp_path: Path) -> None:
    prune(mixed, tmp_path / "packed")
    path = tmp_path / "packed" / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + length])[DOWN]["data_offsets"]
    content[8 + length + start] ^= 1  # whether the first weight stays
    path.write_bytes(content)
    errors = []
    for device in ("cpu", "cuda"):
        with pytest.raises(FormatError, match="row 0: ") as caught:
            unpack(tmp_path / "packed", tmp_path / "out", device=device)
        errors.append(str(caught.value))
        assert not (tmp_path / "out").exists()
    assert errors[0] == errors[1]
