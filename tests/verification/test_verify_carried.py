"""Weights of other modules are verified as those of the model are: all there, and the source's."""

import json
import shutil
from pathlib import Path

import pytest
from support.checkpoints import F, H, files, llama_config, mlp, write_checkpoint
from support.hub_server import HubServer

from emp_llm import FormatError, prune, verify

DENSE, ADAPTER = "2_Dense/model.safetensors", "adapter_model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))
    (folder / "2_Dense").mkdir()
    (folder / DENSE).write_bytes(b"a dense layer")
    (folder / ADAPTER).write_bytes(b"an adapter")
    return folder


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    prune(source, tmp_path / "packed")
    return tmp_path / "packed"


def refusal(folder: Path, against: Path | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        verify(folder, against=against)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_weights_beside_its_own_is_whole(packed: Path, source: Path) -> None:
    assert verify(packed)["other_files"] == []
    assert verify(packed, against=source)["other_files"] == []


@pytest.mark.parametrize("name", [DENSE, ADAPTER])
def test_a_file_that_is_missing_or_changed_is_named(packed: Path, name: str) -> None:
    data = (packed / name).read_bytes()
    (packed / name).unlink()
    assert f"{name} is missing, by emp_report.json; take it from the source" in refusal(packed)
    (packed / name).write_bytes(data[:-1] + b"?")
    assert f"{name} is not as it was written" in refusal(packed)


@pytest.mark.parametrize("name", [DENSE, ADAPTER])
def test_a_file_that_is_not_the_sources_is_named(packed: Path, source: Path, name: str) -> None:
    (source / name).write_bytes(b"of a later version")
    assert f"{name} is not that of {source}" in refusal(packed, source)


def test_a_folder_that_was_written_without_a_needed_file_is_refused(
    packed: Path, source: Path
) -> None:
    """As releases wrote it that took every file of weights for a copy of the model's."""
    shutil.rmtree(packed / "2_Dense")
    report = json.loads((packed / "emp_report.json").read_text())
    for field in ("carried", "left_behind"):
        del report[field]
    del report["files"][DENSE]
    (packed / "emp_report.json").write_text(json.dumps(report))
    verify(packed)
    assert f"{DENSE} is missing, a file of {source}" in refusal(packed, source)


def test_a_copy_of_the_weights_in_the_source_is_not_missed(packed: Path, source: Path) -> None:
    (source / "tf_model.h5").write_bytes(b"the same")
    verify(packed, against=source)


def test_from_the_hub_what_is_needed_is_fetched_and_compared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        hub.commit("me/model", files(source) | {"pytorch_model.bin": b"12345"})
        report = prune("me/model", tmp_path / "out")
        verify(tmp_path / "out", against="me/model")
        assert "pytorch_model.bin" not in hub.downloads()
    assert (tmp_path / "out" / DENSE).read_bytes() == b"a dense layer"
    assert report["carried"] == {"files": 2, "bytes": 13 + 10}
    assert [(entry["path"], entry["bytes"]) for entry in report["left_behind"]] == [
        ("pytorch_model.bin", 5)
    ]
