"""What the cards of models say that were packed and not pruned."""

from pathlib import Path

import pytest
from support.cards import take_apart
from support.checkpoints import gaussian, llama_config, mlp, write_checkpoint

from emp_llm import PruneOptions, pack, prune, unpack
from emp_llm.report.card.card import write_card

H, F = 64, 1024  # matrices of 128 KiB, large enough to be packed


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = mlp(H, F) | {"model.norm.weight": gaussian(H)}
    return write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)


def test_a_packed_model_is_not_called_pruned(source: Path, tmp_path: Path) -> None:
    totals = pack(source, tmp_path / "packed")["totals"]["model"]
    data, ours, _ = take_apart(tmp_path / "packed" / "README.md")
    assert data["tags"] == ["emp", "emp-llm"]
    assert ours.strip().splitlines()[0] == "# source, packed without loss"
    assert "Nothing was pruned: every weight keeps\nevery bit." in ours
    dense = 3 * H * F * 2 + H * 2
    sizes = f"{totals['bytes_after']:,} bytes instead of {dense:,} "
    assert sizes in ours
    assert "emp-llm pack source --out DIR" in ours
    assert "sparsity" not in ours


def test_unpacked_it_is_an_ordinary_checkpoint_without_zeros(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    data, ours, _ = take_apart(tmp_path / "dense" / "README.md")
    assert data["tags"] == ["emp"]
    assert "This is an ordinary checkpoint: whatever loads" in ours
    assert "bytes instead of" not in ours
    assert "emp-llm prune source --out DIR --targets none --format dense" in ours


def test_without_a_report_its_config_says_so(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed")
    card = tmp_path / "packed" / "README.md"
    write_card(card, card, None, repo_id="user/name")
    data, ours, _ = take_apart(card)
    assert data["tags"] == ["emp", "emp-llm"]
    assert ours.strip().splitlines()[0] == "# Packed without loss"


@pytest.mark.parametrize("rest", ["packed", "plain"])
def test_a_pruned_models_card_says_whether_the_rest_is_smaller(
    source: Path, tmp_path: Path, rest: str
) -> None:
    prune(source, tmp_path / "sparse", PruneOptions(targets="down_proj", rest=rest))
    _, ours, _ = take_apart(tmp_path / "sparse" / "README.md")
    words = "Tensors that were not pruned keep every bit, in fewer bytes."
    assert (words in ours) == (rest == "packed")
