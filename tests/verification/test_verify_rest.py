"""Verify proves every byte of tensors packed without being pruned, alone and by the source."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import bits, files, load, write_checkpoint
from support.tampering import edit_json
from support.wide_models import EMBED, HEAD, REST_CONFIG, Q, with_odd_values, with_rest

from emp_llm import FormatError, PruneOptions, prune, verify

Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = with_rest() | {Q: with_odd_values(with_rest()[Q])}
    return write_checkpoint(tmp_path_factory.mktemp("rest") / "source", REST_CONFIG, tensors)


@pytest.fixture(scope="module")
def written(source: Path) -> dict[str, Path]:
    made = {}
    for name, options in (("pruned", {}), ("lossless", {"targets": "none"})):
        made[name] = source.parent / name
        prune(source, made[name], PruneOptions(**options))
    return made


@pytest.fixture(params=["pruned", "lossless"])
def folder(request: pytest.FixtureRequest, written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[request.param], tmp_path / "folder"))


def change(folder: Path, edit: Change) -> None:
    tensors = load(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, **options: Path) -> str:
    """The line of the error: the file, and what is wrong."""
    with pytest.raises(FormatError) as caught:
        verify(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.safetensors: ")
    return message


def flipped(name: str, byte: int) -> Change:
    """Flip one bit of a plane."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(torch.uint8)[byte] ^= 1

    return edit


def test_what_is_written_is_whole_with_a_report_and_without(folder: Path, source: Path) -> None:
    before = files(folder)
    assert verify(folder)["tensors"] == 8
    assert verify(folder, against=source, threads=3)["tensors"] == 8
    assert files(folder) == before
    (folder / "emp_report.json").unlink()
    assert not verify(folder)["hashes"]
    assert verify(folder, against=source)["against"] == str(source)


def test_a_flipped_bit_of_a_record_is_found_by_its_hash(folder: Path) -> None:
    change(folder, flipped(EMBED, 100))
    message = refusal(folder)
    assert f"tensor {EMBED!r} has the hash xxh3-128:" in message
    assert "download, prune or pack it again" in message


DAMAGE: dict[str, tuple[Change, str]] = {
    "table": (flipped(EMBED + ".emp_rows", 0), "is damaged: "),
    "padding": (flipped(EMBED, -1), f"the padding of {EMBED!r} is not zero"),
    "meta": (flipped(EMBED + ".emp_meta", 9), "is not that of a packed tensor"),
    "shorter": (lambda t: t.update({EMBED: t[EMBED][:-16].clone()}), "its records have"),
    "a plane gone": (lambda t: t.pop(EMBED + ".emp_rows"), "lacks its plane"),
}


@pytest.mark.parametrize("report", [True, False], ids=["report", "no report"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plane_is_named(folder: Path, damage: str, report: bool) -> None:
    edit, said = DAMAGE[damage]
    change(folder, edit)
    if not report:
        (folder / "emp_report.json").unlink()
    message = refusal(folder)
    assert repr(EMBED) in message
    assert said in message
    assert message.endswith((" again", "it again"))


@pytest.mark.parametrize("report", [True, False], ids=["report", "no report"])
@pytest.mark.parametrize(("name", "place"), [(EMBED, (300, 7)), (Q, (0, 0)), (HEAD, (511, 63))])
def test_a_weight_that_is_not_the_sources_is_named_with_both_values(
    folder: Path, source: Path, tmp_path: Path, name: str, place: tuple[int, int], report: bool
) -> None:
    tensors = load(source)
    was = bits(tensors[name][place].clone())[2][::-1].hex()
    tensors[name].view(torch.int16)[place] ^= 1
    now = bits(tensors[name][place].clone())[2][::-1].hex()
    other = write_checkpoint(tmp_path / "other", REST_CONFIG, tensors)
    if not report:
        (folder / "emp_report.json").unlink()
    message = refusal(folder, against=other)
    row, column = place
    assert f"tensor {name!r} item [{row}, {column}] is " in message
    assert f"(0x{was}); in {other} it is " in message
    assert f"(0x{now}): prune or pack it again, or give the source that it was made from" in message


def test_another_weight_is_found_though_report_and_planes_agree_on_it(
    source: Path, tmp_path: Path
) -> None:
    tensors = load(source)
    tensors[EMBED][5, 6] = 9.0
    forged = write_checkpoint(tmp_path / "forged", REST_CONFIG, tensors)
    prune(forged, tmp_path / "out")
    verify(tmp_path / "out", against=forged)
    message = refusal(tmp_path / "out", against=source)
    assert f"tensor {EMBED!r} item [5, 6] is 9 (0x4110); in {source} it is " in message


def test_a_source_of_another_dtype_is_named(
    written: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    tensors = load(source)
    tensors[EMBED] = tensors[EMBED].half()
    other = write_checkpoint(tmp_path / "other", REST_CONFIG, tensors)
    message = refusal(written["lossless"], against=other)
    assert f"tensor {EMBED!r} is BF16 [512, 64], in {other} it is F16 [512, 64]" in message


@pytest.mark.parametrize("field", ["kept", "bytes_before", "bytes_after", "dtype", "pruned"])
def test_an_edited_figure_of_the_report_is_found(folder: Path, field: str) -> None:
    def edit(report: dict) -> None:
        fields = report["tensors"][EMBED]
        fields[field] = {"dtype": "F16", "pruned": True}.get(field, 1)

    edit_json(folder / "emp_report.json", edit)
    with pytest.raises(FormatError) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_a_packed_tensor_stored_plainly_is_not_what_was_written(folder: Path, source: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in (".emp_rows", ".emp_meta"):
            del tensors[EMBED + suffix]
        tensors[EMBED] = load_file(source / "model.safetensors")[EMBED]

    change(folder, edit)
    assert f"tensor {EMBED!r} has bytes_after = 65536" in refusal(folder)
    (folder / "emp_report.json").unlink()
    assert verify(folder, against=source)["tensors"] == 8  # the same weights all the same
