"""What verify says of a folder that shrink wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mixtures import make_mixture
from support.tampering import edit_json

from emp_llm import FormatError, ShrinkOptions, shrink, verify
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.entrypoints.push import check_folder

GATE = "model.layers.1.block_sparse_moe.gate.weight"
UP = "model.layers.1.block_sparse_moe.experts.1.w1.weight"


def written(architecture: str, folder: Path) -> tuple[Path, Path]:
    dense, small = folder / "dense", folder / "small"
    make_mixture(architecture, torch.bfloat16).save_pretrained(dense, max_shard_size=6000)
    (dense / "tokenizer.json").write_text("{}")
    shrink(dense, small, ShrinkOptions(experts=3))
    return dense, small


@pytest.fixture(scope="module")
def mixtral_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return written("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return written("gpt-oss", tmp_path_factory.mktemp("fused"))


@pytest.fixture
def mixtral(mixtral_once: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    dense, small = mixtral_once
    return copytree(dense, tmp_path / "dense"), copytree(small, tmp_path / "small")


@pytest.mark.parametrize("architecture", ["mixtral_once", "fused"])
def test_what_was_written_is_whole_and_what_the_source_gives(request, architecture: str) -> None:
    dense, small = request.getfixturevalue(architecture)
    alone, compared = verify(small), verify(small, against=dense)
    count = sum(len(load_file(path)) for path in small.glob("*.safetensors"))
    assert alone["tensors"] == compared["tensors"] == count
    assert alone["structures"] == {"experts": (3, 6)}
    assert (alone["against"], compared["against"]) == (None, str(dense))
    assert (alone["other_files"], alone["repaired_tensors"]) == ([], 0)


def holder_of(small: Path, name: str) -> Path:
    return next(path for path in small.glob("*.safetensors") if name in load_file(path))


def change_weight(path: Path, name: str) -> None:
    """Change one weight in place, so that the header stays what it is."""
    (entry,) = (entry for entry in read_header(path).tensors if entry.name == name)
    with path.open("r+b") as file:
        file.seek(entry.start + 2 * 5)
        file.write(b"\x12\x34")


def as_if_written(small: Path, name: str) -> None:
    """Let the report have the checksum of what a tensor is now."""
    import xxhash

    path = holder_of(small, name)
    (entry,) = (entry for entry in read_header(path).tensors if entry.name == name)
    digest = xxhash.xxh3_128(path.read_bytes()[entry.start : entry.end]).hexdigest()

    def edit(report: dict) -> None:
        report["tensors"][name]["hash"] = f"xxh3-128:{digest}"

    edit_json(small / "emp_shrink.json", edit)


@pytest.mark.parametrize("name", [GATE, UP])
def test_a_changed_weight_is_found_by_its_checksum_and_against_the_source(mixtral, name) -> None:
    dense, small = mixtral
    change_weight(holder_of(small, name), name)
    with pytest.raises(FormatError, match=f"tensor '{name}' has the hash .* or delete emp_shrink"):
        verify(small)
    as_if_written(small, name)
    assert verify(small)["tensors"]
    with pytest.raises(FormatError, match=rf"'{name}' item \[0, 5\] is .*; in .*dense it is"):
        verify(small, against=dense)


def test_push_checks_it_first_and_allows_edits_beside_the_weights(mixtral) -> None:
    _, small = mixtral
    (small / "tokenizer.json").write_text("[]")
    found = check_folder(small)
    assert found.edited == ("tokenizer.json",)
    assert (small / "emp_shrink.json").relative_to(small) in found.files
    change_weight(holder_of(small, UP), UP)
    with pytest.raises(FormatError, match=f"tensor '{UP}' has the hash"):
        check_folder(small)


def kept(report: dict) -> dict:
    return report["structures"]["experts"]["holders"]["model.layers.1"]


EDITS: dict[str, tuple[Callable[[dict], object], str]] = {
    "others": (lambda report: kept(report).update(kept=sorted({0, 1, 2, 3, 4, 5} -
               set(kept(report)["kept"]))), "in .*dense it is"),
    "too many": (lambda report: kept(report).update(kept=[0, 1, 2, 3]), r"kept is 3, and of .* 4"),
    "none such": (lambda report: kept(report).update(kept=[0, 1, 6]), "no choice of 6"),
    "unordered": (lambda report: kept(report).update(kept=[1, 0, 2]), "no choice of 6"),
    "none of the source": (lambda report: (report["structures"]["experts"].update(number=7),
                           report["config"].update(num_local_experts="7 → 3"),
                           kept(report).update(kept=[0, 1, 6])), "no choice of those"),
    "no holder": (lambda report: report["structures"]["experts"]["holders"].popitem(),
                  "no choice of those"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_a_report_with_another_choice_is_refused(mixtral, edit: str) -> None:
    dense, small = mixtral
    change, said = EDITS[edit]
    edit_json(small / "emp_shrink.json", change)
    with pytest.raises(FormatError, match=said):
        verify(small, against=dense)


def test_another_config_is_refused(mixtral) -> None:
    _, small = mixtral
    edit_json(small / "config.json", lambda config: config.update(num_experts_per_tok=1))
    with pytest.raises(FormatError, match=r"config\.json is not as it was written, by emp_shrink"):
        verify(small)


def test_a_config_that_shrinking_does_not_give_is_refused(mixtral) -> None:
    dense, small = mixtral
    edit_json(dense / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    with pytest.raises(FormatError, match=r"rms_norm_eps in config\.json is .*gives 0\.5"):
        verify(small, against=dense)


def test_a_missing_tensor_is_refused(mixtral) -> None:
    _, small = mixtral
    path = holder_of(small, UP)
    tensors = load_file(path)
    del tensors[UP]
    save_file(tensors, path, {"format": "pt"})
    edit_json(small / "model.safetensors.index.json", lambda index: index["weight_map"].pop(UP))
    with pytest.raises(FormatError, match=f"'{UP}' is in emp_shrink.json and in no shard"):
        verify(small)


def test_a_model_saved_over_it_is_refused(mixtral, tmp_path: Path) -> None:
    _, small = mixtral
    other = copytree(small, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        save_file({name: t + 1 for name, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"or delete emp_shrink\.json if another model was saved"):
        verify(other)


@pytest.mark.parametrize(
    ("key", "value"), [("tensors", []), ("structures", {"experts": 1}), ("files", {"/etc/x": {}})]
)
def test_a_report_of_another_form_is_refused(mixtral, key: str, value: object) -> None:
    _, small = mixtral
    report = json.loads((small / "emp_shrink.json").read_text())
    (small / "emp_shrink.json").write_text(json.dumps({**report, key: value}))
    with pytest.raises(FormatError, match="is not a report that emp-llm wrote"):
        verify(small)
