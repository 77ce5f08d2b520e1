"""Report, configuration and tensors must agree; what is proved without a report."""

import re
import shutil
from pathlib import Path

import pytest
from support.checkpoints import (
    DOWN,
    UP,
)
from support.tampering import edit_json
from support.written_folders import (
    FIRST,
    F,
    H,
    edit_report,
    edit_shard,
    flip_first_bit,
    flip_last_value,
    refusal,
)

from emp_llm import CheckpointError, EmpError, FormatError, verify


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
    ("key", "value"), [("beta", 0.9), ("granularity", "layer"), ("format_version", 1)]
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


@pytest.mark.parametrize("version", [None, 3])
def test_another_version_of_the_format_is_refused_without_a_report(
    packed: Path, version: int | None
) -> None:
    (packed / "emp_report.json").unlink()
    edit = {"format_version": version}
    edit_json(packed / "config.json", lambda config: config["quantization_config"].update(edit))
    assert f"version {version}" in refusal(packed)


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
