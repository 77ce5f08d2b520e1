"""Written folders: their parts changed, and what verify says of them then."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.tampering import edit_json

from emp_llm import EmpError, FormatError, verify

TinyModel = Callable[..., Path]

H, F = 8, 6
NORM = "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_report(folder: Path, *keys: str, value: object) -> None:
    def edit(report: dict) -> None:
        for key in keys[:-1]:
            report = report[key]
        assert report[keys[-1]] != value
        report[keys[-1]] = value

    edit_json(folder / "emp_report.json", edit)


def edit_shard(path: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def refusal(folder: Path, kind: type[EmpError] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip_first_bit(tensor) -> None:
    import torch

    tensor.view(torch.uint8)[0] ^= 1


def flip_last_value(records) -> None:
    last = int(records.nonzero()[-1])
    records[last] ^= 1
