"""verify accepts what was written, and refuses it once any tensor or header has changed."""

import shutil
from pathlib import Path

import pytest
import xxhash
from safetensors.torch import load_file
from support.checkpoints import (
    DOWN,
    UP,
    few_values,
    files,
    gaussian,
    llama_config,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.tampering import edit_json
from support.written_folders import (
    FIRST,
    NORM,
    SECOND,
    F,
    H,
    TinyModel,
    edit_report,
    edit_shard,
    flip_first_bit,
    flip_last_value,
    refusal,
)

from emp_llm import CheckpointError, EmpError, FormatError, PruneOptions, prune, verify


@pytest.mark.parametrize("output_format", ["packed", "dense", "unpacked"])
def test_a_written_folder_is_whole(written: dict[str, Path], output_format: str) -> None:
    found = verify(written[output_format])
    assert (found["tensors"], found["pruned_tensors"], found["rows"]) == (4, 3, H + F + F)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-oss", "mixtral"])
@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_folders_of_other_architectures_are_whole(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, output_format: str
) -> None:
    prune(tiny_model(architecture), tmp_path / "out", PruneOptions(output_format=output_format))
    assert verify(tmp_path / "out")["pruned_tensors"] == len(EXPECTED[architecture].mlp)


def test_verify_changes_nothing(packed: Path) -> None:
    before = files(packed)
    verify(packed)
    assert files(packed) == before


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_every_single_byte_of_the_data_is_checked(
    written: dict[str, Path], tmp_path: Path, output_format: str
) -> None:
    folder = Path(shutil.copytree(written[output_format], tmp_path / "copy"))
    path = folder / FIRST
    data = path.read_bytes()
    passed = []
    for at in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            verify(folder)
            passed.append(at)
        except FormatError:
            pass
    assert passed == []


def test_the_bytes_of_a_header_are_checked(packed: Path) -> None:
    path = packed / FIRST
    data = path.read_bytes()
    passed = []
    for at in range(8, 8 + int.from_bytes(data[:8], "little"), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :])
        try:
            verify(packed)
            passed.append(at)
        except EmpError:
            pass
    assert passed == []


@pytest.mark.parametrize("plane", [DOWN, DOWN + ".emp_rows", DOWN + ".emp_meta", NORM])
def test_the_tensor_with_a_flipped_bit_is_named(packed: Path, plane: str) -> None:
    edit_shard(packed / FIRST, lambda tensors: flip_first_bit(tensors[plane]))
    message = refusal(packed)
    assert FIRST in message
    assert repr(plane.partition(".emp_")[0]) in message


def test_a_mask_that_contradicts_its_row_is_refused_though_the_checksum_is_right(
    packed: Path,
) -> None:
    edit_shard(packed / FIRST, lambda tensors: flip_first_bit(tensors[DOWN]))
    tensors = load_file(packed / FIRST)
    checksum = xxhash.xxh3_128()
    for suffix in ("", ".emp_rows", ".emp_meta"):
        checksum.update(tensors[DOWN + suffix].numpy().tobytes())
    edit_report(packed, "tensors", DOWN, "hash", value=f"xxh3-128:{checksum.hexdigest()}")
    assert "row 0" in refusal(packed)


@pytest.mark.parametrize("name", [DOWN, DOWN + ".emp_rows", DOWN + ".emp_meta", NORM])
def test_a_missing_tensor_is_refused(packed: Path, name: str) -> None:
    edit_shard(packed / FIRST, lambda tensors: tensors.pop(name))
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].pop(name))
    assert name.partition(".emp_")[0] in refusal(packed)


@pytest.mark.parametrize("suffix", ["", ".emp_rows", ".emp_meta"])
def test_a_renamed_plane_is_refused(packed: Path, suffix: str) -> None:
    def rename(tensors: dict) -> None:
        tensors["other" + suffix] = tensors.pop(DOWN + suffix)

    edit_shard(packed / FIRST, rename)
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: rename(content["weight_map"]))
    refusal(packed)


def test_a_tensor_too_many_is_refused(packed: Path) -> None:
    edit_shard(packed / FIRST, lambda tensors: tensors.update(extra=gaussian(2)))
    assert "'extra' is not in emp_report.json" in refusal(packed)


def test_a_missing_shard_is_refused(packed: Path) -> None:
    (packed / FIRST).unlink()
    assert FIRST in refusal(packed, CheckpointError)


def test_a_shard_that_the_index_has_lost_as_well_is_refused(packed: Path) -> None:
    def keep_second(index: dict) -> None:
        index["weight_map"] = {
            name: shard for name, shard in index["weight_map"].items() if shard == SECOND
        }

    (packed / FIRST).unlink()
    edit_json(packed / "model.safetensors.index.json", keep_second)
    assert DOWN in refusal(packed)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_a_truncated_shard_is_refused(
    written: dict[str, Path], tmp_path: Path, output_format: str
) -> None:
    folder = Path(shutil.copytree(written[output_format], tmp_path / "copy"))
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:-1])
    assert FIRST in refusal(folder, CheckpointError)


def test_shards_that_changed_places_are_refused(packed: Path, tmp_path: Path) -> None:
    (packed / FIRST).rename(tmp_path / "first")
    (packed / SECOND).rename(packed / FIRST)
    (tmp_path / "first").rename(packed / SECOND)
    assert "model.safetensors.index.json: says tensor" in refusal(packed)


def test_verify_does_not_depend_on_threads(written: dict[str, Path]) -> None:
    assert verify(written["packed"], threads=1) == verify(written["packed"], threads=5)


def test_a_flipped_bit_in_a_late_block_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 20)
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), {UP: few_values(F, H)})
    prune(source, tmp_path / "out")
    edit_shard(tmp_path / "out" / "model.safetensors", lambda tensors: flip_last_value(tensors[UP]))
    assert UP in refusal(tmp_path / "out")
