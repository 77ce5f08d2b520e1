"""Shards of the Hub are pruned as they arrive, to the same bytes as those of a folder.

The server and the reads of the source wait for each other where a test is about what happens at
the same time; what waits in vain fails the test.
"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.arriving import SHARDS, arrived, before_first_read, wait_for, weights
from support.checkpoints import F, H, files, llama_config, mlp, write_checkpoint
from support.hub_server import HubServer

from emp_llm import CheckpointError, PruneOptions, inspect, prune, unpack
from emp_llm.output.output_folder import STAGING_NAME

# At the same time


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_a_shard_is_pruned_before_the_next_one_is_sent(
    hub: HubServer, model: str, tmp_path: Path, granularity: str
) -> None:
    seen: list[bool] = []

    def hold_back(name: str) -> None:
        if name in SHARDS[1:]:
            before = SHARDS[SHARDS.index(name) - 1]
            seen.append(wait_for((tmp_path / "out" / STAGING_NAME / before).exists))

    hub.on_download = hold_back
    prune(model, tmp_path / "out", PruneOptions(granularity=granularity))
    assert seen == [True, True, True]


def test_shards_are_downloaded_while_the_first_one_is_pruned(
    model: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    before_first_read(monkeypatch, lambda: seen.append(wait_for(lambda: arrived(cache) == SHARDS)))
    prune(model, tmp_path / "out")
    assert seen == [True]


def test_a_packed_shard_is_unpacked_before_the_next_one_is_sent(
    hub: HubServer, local: Path, tmp_path: Path
) -> None:
    prune(local, tmp_path / "packed")
    hub.commit("me/packed", files(tmp_path / "packed"))
    seen: list[bool] = []

    def hold_back(name: str) -> None:
        if name == SHARDS[1]:
            seen.append(wait_for((tmp_path / "out" / STAGING_NAME / SHARDS[0]).exists))

    hub.on_download = hold_back
    unpack("me/packed", tmp_path / "out")
    assert seen == [True]
    unpack(tmp_path / "packed", tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


# The same as from a folder


@pytest.mark.parametrize("output_format", ["packed", "dense"])
@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
def test_a_model_of_the_hub_is_pruned_to_the_same_bytes_as_a_folder(
    hub: HubServer, model: str, local: Path, tmp_path: Path, granularity: str, output_format: str
) -> None:
    options = PruneOptions(granularity=granularity, output_format=output_format)
    found = prune(model, tmp_path / "out", options)
    expected = prune(local, tmp_path / "expected", options)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert found["tensors"] == expected["tensors"]
    assert hub.downloads_in_order()[-4:] == SHARDS


def test_a_model_of_one_file_is_pruned_to_the_same_bytes(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    hub.commit("me/single", files(source))
    prune("me/single", tmp_path / "out", discard_source=True)
    prune(source, tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_inspecting_downloads_only_shards_with_targets_where_that_is_asked_for(
    hub: HubServer, model: str, local: Path
) -> None:
    options = PruneOptions(targets=r"layers\.(1|2)\..*up_proj")
    found = inspect(model, options, download=True)
    assert [name for name in hub.downloads() if name in SHARDS] == SHARDS[1:3]
    assert found["tensors"] == inspect(local, options)["tensors"]


def test_decisions_are_made_before_any_data_is_fetched(
    hub: HubServer, model: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="nothing to prune"):
        prune(model, tmp_path / "out", PruneOptions(targets="lm_head"))
    assert [name for name in hub.downloads() if name in SHARDS] == []
    assert hub.looked_into() == SHARDS


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_long_header_is_read_from_servers_with_and_without_ranges(
    hub: HubServer, tmp_path: Path, knows_ranges: bool
) -> None:
    many = {f"a.rather.long.name.of.a.small.tensor.{i}": torch.zeros(1) for i in range(2500)}
    folder = write_checkpoint(tmp_path / "local", llama_config(H, F), mlp(H, F) | many)
    hub.commit("me/model", files(folder))
    hub.knows_ranges = knows_ranges
    report = prune("me/model", tmp_path / "out")
    assert len(report["tensors"]) == 2503
    prune(folder, tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


# Progress


class Told:
    """Progress as it was told, by one thread at a time."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done: list[int] = []
        self.telling = threading.Lock()

    def begin(self, stage: str, total: int) -> None:
        with self.alone():
            self.stages.append((stage, total))
            self.done.append(0)

    def advance(self, nbytes: int) -> None:
        with self.alone():
            self.done[-1] += nbytes

    def alone(self) -> threading.Lock:
        assert not self.telling.locked()
        return self.telling


@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
def test_a_stage_counts_what_is_fetched_and_what_is_pruned(
    model: str, local: Path, tmp_path: Path, granularity: str
) -> None:
    to_fetch = sum(len(files(local)[name]) for name in SHARDS)
    targets = 4 * 3 * H * F * 2  # bf16
    nbytes = targets + 4 * 400_000
    told = Told()
    prune(model, tmp_path / "out", PruneOptions(granularity=granularity), progress=told)
    assert (
        told.stages
        == {
            "row": [("fetching and pruning", to_fetch + nbytes)],
            "layer": [("fetching and pruning", to_fetch + nbytes + 2 * targets)],
            "model": [("fetching and selecting", to_fetch + 2 * targets), ("pruning", nbytes)],
        }[granularity]
    )
    assert told.done == [total for _, total in told.stages]


def test_a_folder_has_nothing_to_fetch(local: Path, tmp_path: Path) -> None:
    told = Told()
    prune(local, tmp_path / "out", progress=told)
    assert told.stages == [("pruning", 4 * 3 * H * F * 2 + 4 * 400_000)]
    assert told.done == [total for _, total in told.stages]


def test_a_folder_brings_nothing_along_that_only_the_hub_or_the_structure_needs(
    local: Path,
) -> None:
    program = (
        "import sys, emp_llm; emp_llm.inspect(sys.argv[1]); "
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, local]
    assert subprocess.check_output(command, text=True) == "set()\n"
