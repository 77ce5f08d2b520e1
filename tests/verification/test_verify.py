"""verify accepts what was written, and refuses it once anything in it has changed."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    DOWN,
    UP,
    few_values,
    files,
    gaussian,
    llama_config,
    mlp,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.tampering import agree, edit_json

from emp_llm import CheckpointError, EmpError, FormatError, PruneOptions, prune, unpack, verify

TinyModel = Callable[..., Path]

H, F = 8, 6
NORM = "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sharded checkpoint pruned to each format; DOWN and NORM in the first shard."""
    folder = tmp_path_factory.mktemp("verification")
    tensors = mlp(H, F)
    shards = {DOWN: tensors.pop(DOWN), NORM: gaussian(H)}, tensors
    source = write_checkpoint(folder / "source", llama_config(H, F), *shards)
    (source / "tokenizer.json").write_text('{"vocabulary": ["a"]}')
    (source / "README.md").write_text("# A card")
    for output_format in ("packed", "dense"):
        prune(source, folder / output_format, PruneOptions(output_format=output_format))
    unpack(folder / "packed", folder / "unpacked")
    return {name: folder / name for name in ("source", "packed", "dense", "unpacked")}


@pytest.fixture
def packed(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["packed"], tmp_path / "packed"))


@pytest.fixture
def dense(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["dense"], tmp_path / "dense"))


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


def flip_first_bit(tensor) -> None:
    import torch

    tensor.view(torch.uint8)[0] ^= 1


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
    refusal(packed, CheckpointError)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kept", 1),
        ("sparsity", 0.1),
        ("rows", 1),
        ("weights", 1),
        ("bytes_after", 1),
        ("shape", [F, H, 1]),
        ("dtype", "F16"),
        ("hash", "xxh3-128:00000000000000000000000000000000"),
    ],
)
def test_an_edited_count_of_a_tensor_is_refused(
    written: dict[str, Path], tmp_path: Path, output_format: str, field: str, value: object
) -> None:
    folder = Path(shutil.copytree(written[output_format], tmp_path / "copy"))
    edit_report(folder, "tensors", UP, field, value=value)
    assert UP in refusal(folder)


@pytest.mark.parametrize("part", ["targets", "model"])
@pytest.mark.parametrize("field", ["tensors", "weights", "kept", "bytes_before", "bytes_after"])
def test_an_edited_total_is_refused(packed: Path, part: str, field: str) -> None:
    edit_report(packed, "totals", part, field, value=1)
    refusal(packed)


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 0.9), ("granularity", "layer"), ("format_version", 2)]
)
def test_a_config_that_tells_of_another_rule_is_refused(
    packed: Path, key: str, value: object
) -> None:
    edit = {key: value}
    edit_json(packed / "config.json", lambda config: config["quantization_config"].update(edit))
    assert "quantization_config" in refusal(packed)


def test_a_packed_folder_whose_config_does_not_say_so_is_refused(packed: Path) -> None:
    edit_json(packed / "config.json", lambda config: config.pop("quantization_config"))
    assert "quantization_config" in refusal(packed)


def test_a_dense_folder_whose_config_says_packed_is_refused(dense: Path) -> None:
    packed_config = {"quantization_config": {"quant_method": "emp"}}
    edit_json(dense / "config.json", lambda config: config.update(packed_config))
    assert "quantization_config" in refusal(dense)


def test_an_ordinary_folder_without_a_report_is_refused(written: dict[str, Path]) -> None:
    assert "has no emp_report.json and is not packed" in refusal(written["source"], CheckpointError)


def test_a_packed_folder_without_a_report_is_proved_in_structure(
    written: dict[str, Path], packed: Path
) -> None:
    (packed / "emp_report.json").unlink()
    found, whole = verify(packed), verify(written["packed"])
    assert not found["hashes"]
    assert whole["hashes"]
    figures = ("tensors", "pruned_tensors", "rows", "kept", "bytes", "other_files")
    assert [found[name] for name in figures] == [whole[name] for name in figures]
    assert verify(packed, against=written["source"])["against"] == str(written["source"])


def test_a_broken_row_is_found_without_a_report(packed: Path) -> None:
    (packed / "emp_report.json").unlink()
    edit_shard(packed / FIRST, lambda tensors: flip_first_bit(tensors[DOWN]))
    assert "row 0" in refusal(packed)


def test_a_changed_value_is_found_without_a_report_by_the_source(
    written: dict[str, Path], packed: Path
) -> None:
    (packed / "emp_report.json").unlink()
    edit_shard(packed / FIRST, lambda tensors: flip_last_value(tensors[DOWN]))
    assert not verify(packed)["hashes"]
    with pytest.raises(FormatError, match=re.escape(repr(DOWN))):
        verify(packed, against=written["source"])


def test_a_folder_that_is_packed_by_its_config_alone_is_refused(dense: Path) -> None:
    (dense / "emp_report.json").unlink()
    config = {"quantization_config": {"quant_method": "emp", "format_version": 1}}
    edit_json(dense / "config.json", lambda content: content.update(config))
    assert "is packed by config.json, but no tensor of it is" in refusal(dense)


@pytest.mark.parametrize("version", [None, 2])
def test_another_version_of_the_format_is_refused_without_a_report(
    packed: Path, version: int | None
) -> None:
    (packed / "emp_report.json").unlink()
    edit = {"format_version": version}
    edit_json(packed / "config.json", lambda config: config["quantization_config"].update(edit))
    assert f"version {version}" in refusal(packed)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_small_file_that_changed_is_named(packed: Path, name: str) -> None:
    data = (packed / name).read_bytes()
    (packed / name).write_bytes(data.replace(b"a", b"e", 1))
    assert f"{name} is not as it was written" in refusal(packed)


def test_a_small_file_that_is_missing_is_named(packed: Path) -> None:
    (packed / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(packed)


def test_card_and_evaluation_may_be_written_again_and_other_files_are_told(packed: Path) -> None:
    (packed / "README.md").write_text("# Another card")
    (packed / "emp_eval.json").write_text("{}")
    (packed / "notes").mkdir()
    (packed / "notes" / "a.txt").write_text("mine")
    (packed / "checkpoint-5").mkdir()
    (packed / "checkpoint-5" / "model.safetensors").write_bytes(b"of a training")
    (packed / ".cache").mkdir()
    (packed / ".cache" / "b.txt").write_text("hidden")
    others = ["checkpoint-5/model.safetensors", "notes/a.txt"]
    assert verify(packed)["other_files"] == others


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.bak.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "other.safetensors.index.json",
    ],
)
def test_weights_that_are_no_part_of_the_checkpoint_are_refused(packed: Path, name: str) -> None:
    (packed / name).write_bytes(b"weights")
    assert f"{name} is no part of the checkpoint" in refusal(packed)


@pytest.mark.parametrize("report", [True, False])
def test_an_index_that_lacks_a_tensor_is_refused(packed: Path, report: bool) -> None:
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].pop(NORM))
    if report:
        agree(packed)
    else:
        (packed / "emp_report.json").unlink()
    assert f"says tensor {NORM!r} is in None; it is in {FIRST}" in refusal(packed)


def test_an_index_with_another_size_is_refused(packed: Path) -> None:
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["metadata"].update(total_size=5))
    agree(packed)
    assert "total_size is 5, the tensors have" in refusal(packed)


def test_an_index_with_other_metadata_is_refused(packed: Path) -> None:
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["metadata"].update(more="x"))
    assert "model.safetensors.index.json has" in refusal(packed)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_another_header_with_the_same_tensors_is_refused(
    written: dict[str, Path], tmp_path: Path, output_format: str
) -> None:
    folder = Path(shutil.copytree(written[output_format], tmp_path / "copy"))
    with safe_open(folder / SECOND, "pt") as shard:
        metadata = shard.metadata()
    save_file(load_file(folder / SECOND), folder / SECOND, {**(metadata or {}), "format": "tf"})
    assert f"{SECOND} has" in refusal(folder)


def test_what_a_run_that_did_not_end_has_left_is_told(packed: Path) -> None:
    (packed / ".emp-llm-unfinished").mkdir()
    (packed / ".emp-llm-unfinished" / ".model.safetensors.unfinished").write_bytes(b"half")
    assert verify(packed)["unfinished_run"]


def test_a_run_that_did_not_end_is_no_folder(packed: Path) -> None:
    (packed / ".emp-llm-unfinished").mkdir()
    (packed / "config.json").unlink()
    assert "holds nothing but an unfinished run" in refusal(packed, CheckpointError)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "packed"}', "{" * 99, '{"format": "packed", "tot']
)
def test_a_report_that_is_none_is_refused(packed: Path, text: str) -> None:
    (packed / "emp_report.json").write_text(text)
    refusal(packed, EmpError)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("tensors", UP), {}),
        (("tensors", UP), None),
        (("tensors",), []),
        (("tensors", UP, "sparsity"), None),
        (("tensors", UP, "n_eff_mean"), None),
        (("files",), {"config.json": {}}),
        (("files",), None),
        (("totals",), {}),
        (("rule",), None),
    ],
)
def test_a_report_with_parts_that_are_none_is_refused(
    packed: Path, keys: tuple[str, ...], value: object
) -> None:
    edit_report(packed, *keys, value=value)
    refusal(packed)


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


def flip_last_value(records) -> None:
    last = int(records.nonzero()[-1])
    records[last] ^= 1
