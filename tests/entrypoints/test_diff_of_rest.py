"""Tensors packed without being pruned, compared with the same ones stored in any other way."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import bits, load, write_checkpoint
from support.wide_models import (
    EMBED,
    REST_CONFIG,
    WideModel,
    with_odd_values,
    with_rest,
)

from emp_llm import PruneOptions, diff, prune

WAYS = {
    "whole": {"targets": "none"},
    "mlp": {},
    "mlp, plain rest": {"rest": "plain"},
    "attention": {"targets": "attention"},
    "mlp, dense": {"output_format": "dense"},
    "attention, dense": {"targets": "attention", "output_format": "dense"},
}
SAME = {"mlp": "mlp, dense", "mlp, plain rest": "mlp, dense", "attention": "attention, dense"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("a", "b"), list(combinations(WAYS, 2)))
def test_each_way_of_storing_is_compared_with_each_other_one(
    wide_model: WideModel, wide_packed: WideModel, architecture: str, a: str, b: str
) -> None:
    plain = {}
    for side in (a, b):
        twin = SAME.get(side, side)
        source = twin == "whole"
        folder = wide_model(architecture) if source else wide_packed(architecture, **WAYS[twin])
        plain[side] = load(folder)
    found = diff(wide_packed(architecture, **WAYS[a]), wide_packed(architecture, **WAYS[b]))
    assert found["other_kind"] == {}
    assert found["only_in_a"] == found["only_in_b"] == []
    for name, counts in found["tensors"].items():
        kept_a, kept_b = ((plain[side][name] != 0).numpy() for side in (a, b))
        expected = (int(kept_a.sum()), int(kept_b.sum()), int(np.sum(kept_a & kept_b)))
        assert (counts["kept_a"], counts["kept_b"], counts["kept_both"]) == expected
        assert bool(counts["same"]) == (bits(plain[a][name]) == bits(plain[b][name]))
    assert found["same_weights"] == (SAME.get(a, a) == SAME.get(b, b))


@pytest.mark.parametrize("ways", [("whole", "source"), ("source", "whole"), ("whole", "mlp")])
def test_a_changed_weight_and_odd_values_are_counted(
    tmp_path: Path, ways: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 1 << 13)
    tensors = with_rest() | {EMBED: with_odd_values(with_rest()[EMBED])}
    folders = []
    for number, way in enumerate(ways):
        if number:
            tensors[EMBED][300, 7] += 2
            tensors[EMBED][0, 1] = 1.0  # it was infinite
            tensors[EMBED][2, 2] = 0.0  # it was -0.0
        source = write_checkpoint(tmp_path / f"{number}", REST_CONFIG, tensors)
        folders.append(source)
        if way != "source":
            folders[-1] = tmp_path / f"{number} packed"
            prune(source, folders[-1], PruneOptions(**WAYS[way]))
    counts = diff(*folders)["tensors"][EMBED]
    assert (counts["changed"], counts["not_finite"], counts["zero_signs"]) == (2, 1, 1)
    assert counts["largest_change"] == pytest.approx(2, abs=0.02)
    assert counts["weights"] == torch.Size([512, 64]).numel()
