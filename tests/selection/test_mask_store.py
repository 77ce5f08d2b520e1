"""Masks on disk: what was written of a unit is read back, or the unit is not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emp_llm.report.tensor_statistics import Group
from emp_llm.selection.mask_store import MaskStore

RNG = np.random.default_rng(0)
MASK = RNG.integers(0, 256, (7, 3), np.uint8)
STATS = RNG.random((7, 3))
WEIGHTS = RNG.integers(0, 1 << 16, (7, 21), np.uint16)


def write(folder: Path, key: str = "layers.0") -> None:
    with MaskStore(folder) as store, store.writer(key) as writer:
        writer.add("plain", MASK, STATS)
        writer.add("stack", MASK[:4], STATS[:4], [Group(3.0, 84, 9.0)], WEIGHTS[:4])
        writer.add("stack", MASK[4:], STATS[4:], [Group(2.0, 63, 8.0)])
        writer.replace("bias", b"\x01\x02\x03")
        writer.note("without_tokens", [["stack", 1]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "masks"


def test_what_was_written_is_read_back_in_any_stretch_of_rows(folder: Path) -> None:
    write(folder)
    with MaskStore(folder) as store:
        assert store.has("layers.0")
        assert store.names == ["plain", "stack"]
        for name in store.names:
            assert store.rows(name) == 7
            for first in range(7):
                for stop in range(first, 8):
                    np.testing.assert_array_equal(
                        store.read_mask(name, first, stop), MASK[first:stop]
                    )
                    np.testing.assert_array_equal(store.stats(name, first, stop), STATS[first:stop])
        found = store.weights("stack", 1, 4)
        assert found is not None
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, WEIGHTS[1:4])
        assert store.weights("stack", 4, 7) is None
        assert store.weights("plain", 0, 7) is None
        assert store.is_repaired("stack")
        assert not store.is_repaired("plain")
        assert store.groups("stack") == (Group(3.0, 84, 9.0), Group(2.0, 63, 8.0))
        assert store.groups("plain") == ()
        assert store.replaced_names == ["bias"]
        assert store.replaced("bias") == b"\x01\x02\x03"
        assert store.replaced("plain") is None


def test_notes_of_units_are_joined_and_those_of_the_run_kept(folder: Path) -> None:
    write(folder, "layers.1")
    with MaskStore(folder) as store:
        store.note("calibration", {"hash": "x"})
        with store.writer("layers.0") as writer:
            writer.note("without_tokens", [["other", 0]])
    with MaskStore(folder) as store:
        assert store.notes == {
            "calibration": {"hash": "x"},
            "without_tokens": [["other", 0], ["stack", 1]],
        }


def test_a_unit_whose_writing_failed_is_not_there(folder: Path) -> None:
    write(folder)
    with MaskStore(folder) as store:
        with pytest.raises(ValueError, match="rows"), store.writer("layers.0") as writer:
            writer.add("plain", MASK, STATS[1:])
        assert not store.has("layers.0")
        assert store.names == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("offset", [0, 30, -1])
def test_a_unit_whose_data_are_damaged_is_not_there_and_can_be_written_again(
    folder: Path, offset: int
) -> None:
    write(folder)
    (path,) = folder.glob("*.data")
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with MaskStore(folder) as store:
        assert not store.has("layers.0")
        assert store.names == []
    write(folder)
    with MaskStore(folder) as store:
        assert store.has("layers.0")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"key": "layers.0"}'])
def test_a_unit_whose_index_is_damaged_is_not_there(folder: Path, damage: bytes) -> None:
    write(folder)
    (path,) = folder.glob("*.json")
    path.write_bytes(damage)
    with MaskStore(folder) as store:
        assert not store.has("layers.0")


def test_a_unit_whose_data_are_cut_short_is_not_there(folder: Path) -> None:
    write(folder)
    (path,) = folder.glob("*.data")
    os.truncate(path, path.stat().st_size - 1)
    with MaskStore(folder) as store:
        assert not store.has("layers.0")


def test_a_unit_is_there_whole_or_not_at_all_whenever_the_writer_is_killed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def before(step: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            seen.append(tmp_path / f"killed {len(seen)}")
            shutil.copytree(folder, seen[-1])
            return step(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", before(os.fsync))
        patch.setattr(Path, "replace", before(Path.replace))
        write(folder)
    found = []
    for left in [*seen, folder]:
        with MaskStore(left) as store:
            found.append(store.has("layers.0"))
            assert store.names == (["plain", "stack"] if found[-1] else [])
        write(left)
        with MaskStore(left) as store:
            assert store.has("layers.0")
    assert found[:3] == [False] * 3  # its data and its index go to disk, and the index is named
    assert found[3:] == [True] * (len(found) - 3)


def test_masks_and_statistics_of_other_rows_are_refused(folder: Path) -> None:
    with MaskStore(folder) as store, store.writer("x") as writer:
        for mask, stats, weights in (
            (MASK, STATS[1:], None),
            (MASK, STATS, WEIGHTS[1:]),
            (MASK, STATS, WEIGHTS[:, :16]),
        ):
            with pytest.raises(ValueError, match="not of the same rows"):
                writer.add("w", mask, stats, weights=weights)
