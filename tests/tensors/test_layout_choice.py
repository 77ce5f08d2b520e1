"""What layout a target is packed in: the smallest, and never at the price of a bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from emp_kernels.numbers import F32
from emp_kernels.rows import Given, PerRow
from safetensors.torch import load_file, save_file

from emp_llm import PruneOptions, inspect, prune, unpack
from emp_llm.tensors.geometry import Geometry
from emp_llm.tensors.layout_choice import choose_layout

NAME = "model.layers.0.mlp.up_proj.weight"
COLUMNS = 4096


@pytest.fixture
def model(tmp_path: Path, tiny_model) -> Path:
    """A tiny Llama whose one target is a matrix of Gaussian rows as long as a real model's."""
    folder = tmp_path / "source"
    folder.mkdir()
    config = (tiny_model("llama") / "config.json").read_text()
    (folder / "config.json").write_text(config)
    return folder


def gaussian(rows: int = 64, scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, COLUMNS, generator=generator).mul_(scale).to(torch.bfloat16)


def write(folder: Path, weights: torch.Tensor) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": COLUMNS, "head_dim": 8, "intermediate_size": len(weights)}
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    save_file({NAME: weights}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def meta(folder: Path) -> list[int]:
    return load_file(folder / "model.safetensors")[NAME + ".emp_meta"].tolist()


def test_gaussian_weights_get_windows_of_three_binades(model: Path, tmp_path: Path) -> None:
    prune(write(model, gaussian()), tmp_path / "out")
    dropped, radix, align = meta(tmp_path / "out")[2:5]
    assert (dropped, radix, align) == (0, 3, 16)


def test_gaussian_weights_take_less_than_046_of_their_bytes(model: Path) -> None:
    report = inspect(write(model, gaussian(256)))
    assert report["tensors"][NAME]["bytes_after"] < 0.46 * 256 * COLUMNS * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_were_bfloat16_pack_as_small_as_bfloat16(
    model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    # float16 cannot hold the smallest of them, but these are pruned
    was = gaussian()
    prune(write(model, was), tmp_path / "bf16")
    prune(write(model, was.to(dtype)), tmp_path / "wide")
    records = [
        load_file(tmp_path / name / "model.safetensors")[NAME].numel() for name in ("bf16", "wide")
    ]
    assert meta(tmp_path / "wide")[2] == {torch.float16: 3, torch.float32: 16}[dtype]
    # an escape takes the whole weight, of two bytes more in float32
    assert records[1] == pytest.approx(records[0], rel=0.002)


def test_kept_weights_with_bits_that_others_lack_stay_exact(model: Path, tmp_path: Path) -> None:
    weights = gaussian().to(torch.float32)
    odd = torch.tensor([0.75 + 2.0**-23, -1.5 - 2.0**-22, 0.1])
    weights[3, 5], weights[3, 6], weights[60, 4095] = odd
    prune(write(model, weights), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    pruned = load_file(tmp_path / "dense" / "model.safetensors")[NAME]
    assert meta(tmp_path / "packed")[2] == 16
    found = torch.stack([pruned[3, 5], pruned[3, 6], pruned[60, 4095]])
    assert torch.equal(found, odd)
    kept = pruned != 0
    assert torch.equal(pruned[kept], weights[kept])


@pytest.mark.parametrize(("beta", "radix"), [(0.4, 2), (1.0, 3), (1.5, 6)])
def test_the_window_is_as_wide_as_what_is_kept(
    model: Path, tmp_path: Path, beta: float, radix: int
) -> None:
    # at β = 0.4 a quarter is kept, from 1.15 σ on: two binades reach 4.6 σ
    prune(write(model, gaussian()), tmp_path / "out", PruneOptions(beta=beta))
    assert meta(tmp_path / "out")[3] == radix


def test_short_rows_are_not_padded(tmp_path: Path, tiny_model) -> None:
    prune(tiny_model("llama"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[NAME + ".emp_meta"][4] == 1


def test_all_rows_decide_alike_on_any_number_of_threads(model: Path, tmp_path: Path) -> None:
    source = write(model, gaussian(600))
    for threads in (1, 3):
        prune(source, tmp_path / str(threads), threads=threads)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "3")]
    assert files[0] == files[1]


def test_the_layout_of_given_masks_is_chosen_for_the_weights_that_stay() -> None:
    # every other weight is a small one that a bfloat16 holds; the largest need all of float32
    bits = np.random.default_rng(0).integers(0x3F800000, 0x3FFFFFFF, (9, 64), np.uint32)
    bits[:, ::2] = (bits[:, ::2] >> 16 << 16) - 0x08000000
    small = np.zeros((9, 64), bool)
    small[:, ::2] = True
    geometry = Geometry(number_format=F32, shape=(9, 64))
    by_mask = Given(np.packbits(small, axis=1, bitorder="little"))
    assert choose_layout(bits, geometry, by_mask).dropped_bits == 16
    assert choose_layout(bits, geometry, PerRow(0.5)).dropped_bits == 0
