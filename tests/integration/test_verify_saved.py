"""verify and diff of folders that save_pretrained wrote, which have no report."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.loading import load_model

from emp_llm import EmpConfig, FormatError, diff, verify

TinyModel = Callable[..., Path]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_what_was_pruned_while_loading_is_what_the_source_gives(
    tiny_model: TinyModel, pruned_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    source = tiny_model(architecture)
    model = load_model(architecture, source, quantization_config=EmpConfig())
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    found = verify(tmp_path, against=source)
    written = verify(pruned_model(architecture))
    assert not found["hashes"]
    assert [found[name] for name in ("rows", "kept")] == [written[n] for n in ("rows", "kept")]
    assert diff(tmp_path, pruned_model(architecture))["totals"]["same_masks"] == found["tensors"]


def test_a_weight_that_changed_since_is_found_by_the_source(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    model = load_model("llama", source, quantization_config=EmpConfig())
    weight = model.model.layers[0].mlp.up_proj.weight
    row, column = weight.nonzero()[4].tolist()
    with torch.no_grad():
        weight[row, column] *= 2
    model.save_pretrained(tmp_path)
    assert verify(tmp_path)["kept"] > 0
    with pytest.raises(FormatError, match=f"up_proj.weight' row {row} column {column} is"):
        verify(tmp_path, against=source)
