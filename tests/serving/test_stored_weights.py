"""The weights of a packed checkpoint, as a server's model takes them one after the other."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    Tensors,
    differing,
    gaussian,
    llama_config,
    mlp,
    pruned_by_rule,
    write_checkpoint,
)
from support.written_folders import edit_shard, flip_first_bit

from emp_llm import CheckpointError, FormatError, prune
from emp_llm.resident.weight import PackedWeight
from emp_llm.serving.stored_weights import check_folder, packed_shards, stored_weights

HIDDEN, INNER = 192, 256
EMBED, NORM, COUNT = "model.embed_tokens.weight", "model.norm.weight", "model.steps"
PLAIN = {NORM, COUNT}
FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
PLANES = ("", ".emp_rows", ".emp_meta")


@pytest.fixture(scope="module")
def source() -> Tensors:
    """Targets, a matrix that is packed whole, and tensors that are not packed."""
    words = gaussian(256, HIDDEN, seed=4)
    return {
        **mlp(HIDDEN, INNER),
        EMBED: words,
        NORM: gaussian(HIDDEN, seed=5),
        COUNT: torch.tensor(7),
    }


@pytest.fixture(scope="module")
def folder(source: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, pruned and packed, in two shards."""
    tmp_path = tmp_path_factory.mktemp("serving")
    first = {name: source[name] for name in (EMBED, NORM, GATE)}
    second = {name: source[name] for name in (COUNT, UP, DOWN)}
    config = {**llama_config(HIDDEN, INNER), "vocab_size": 256}
    write_checkpoint(tmp_path / "dense", config, first, second)
    prune(tmp_path / "dense", tmp_path / "sparse")
    return tmp_path / "sparse"


def weights_of(folder: Path, *, keep_packed: bool = False) -> Tensors:
    shards = packed_shards(sorted(folder.glob("*.safetensors")))
    return dict(stored_weights(shards, keep_packed=keep_packed))


def test_they_are_those_of_the_pruned_model(folder: Path, source: Tensors) -> None:
    expected = pruned_by_rule(source, [DOWN, GATE, UP], beta=1, granularity="row")

    assert differing(weights_of(folder), expected) == []


def test_they_stay_packed_if_they_are_to(folder: Path) -> None:
    kept = weights_of(folder, keep_packed=True)

    assert {name for name, it in kept.items() if not isinstance(it, PackedWeight)} == PLAIN
    whole = {n: it.unpacked() if isinstance(it, PackedWeight) else it for n, it in kept.items()}
    assert differing(whole, weights_of(folder)) == []


def test_files_without_packed_tensors_are_left_to_the_server(folder: Path) -> None:
    assert packed_shards((folder.parent / "dense").glob("*.safetensors")) == []


def cut_off(folder: Path) -> str:
    os.truncate(folder / FIRST, 1000)
    return FIRST


def take_away(folder: Path) -> str:
    (folder / SECOND).unlink()
    return SECOND


def take_out(folder: Path) -> str:
    edit_shard(folder / SECOND, lambda tensors: [tensors.pop(UP + it) for it in PLANES])
    return UP


def take_apart(folder: Path) -> str:
    edit_shard(folder / SECOND, lambda tensors: tensors.pop(UP + ".emp_rows"))
    return UP


DAMAGES = [cut_off, take_away, take_out, take_apart]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_headers_show_is_refused_before_a_server_starts(
    damage: Callable[[Path], str], folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    named = damage(copy)

    for load in (check_folder, weights_of):  # the latter alone is called for models of the Hub
        with pytest.raises((CheckpointError, FormatError), match=re.escape(named)) as caught:
            load(copy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep_packed", [False, True])
def test_a_damaged_record_is_refused_when_it_is_its_turn(
    keep_packed: bool, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_shard(copy / SECOND, lambda tensors: flip_first_bit(tensors[UP]))
    shards = packed_shards(sorted(copy.glob("*.safetensors")))
    given = []
    taken = (given.append(name) for name, _ in stored_weights(shards, keep_packed=keep_packed))

    with pytest.raises(FormatError, match=f"{SECOND}: packed tensor '{UP}' is damaged: row 0: "):
        list(taken)

    assert EMBED in given
    assert UP not in given
    check_folder(copy)  # which reads no records
