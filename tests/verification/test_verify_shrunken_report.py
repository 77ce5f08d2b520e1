"""What verify believes of the report of a smaller model: no more than it can check."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import xxhash
from safetensors.torch import load_file, save_file
from support.calibrated import calibration, save_text, save_tokenizer
from support.tampering import edit_json
from support.widths import make

from emp_llm import FormatError, ShrinkOptions, shrink, verify

DOWN, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "up"))
OUT, QUERY = (f"model.layers.0.self_attn.{name}_proj.weight" for name in ("o", "q"))
BIAS, NORM = "model.layers.1.mlp.down_proj.bias", "model.norm.weight"

Edit = Callable[[dict], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two smaller ones: `repaired`, and `cut` without repair."""
    folder = tmp_path_factory.mktemp("widths")
    make("llama").save_pretrained(folder / "dense")
    save_tokenizer(folder / "dense", 32)
    text = save_text(folder / "words.txt")
    for name, repair in (("repaired", "obs"), ("cut", "none")):
        asked = ShrinkOptions(
            neurons=24, kv_heads=2, multiple=8, repair=repair, calibration=calibration(text)
        )
        shrink(folder / "dense", folder / name, asked, threads=1)
    return folder


@pytest.fixture
def small(written: Path, tmp_path: Path) -> Path:
    return copytree(written / "repaired", tmp_path / "small")


@pytest.fixture
def dense(written: Path) -> Path:
    return written / "dense"


def change_as_if_repaired(small: Path, name: str) -> None:
    """Change a tensor, and have the report call it repaired."""
    path = small / "model.safetensors"
    tensors = load_file(path)
    tensors[name] += 1
    save_file(tensors, path, {"format": "pt"})
    digest = xxhash.xxh3_128_hexdigest(tensors[name].numpy().tobytes())
    fields = {"hash": f"xxh3-128:{digest}", "repaired": True}
    edit_json(small / "emp_shrink.json", lambda report: report["tensors"][name].update(fields))


def refusal(small: Path, against: Path | None = None) -> str:
    with pytest.raises(FormatError) as error:
        verify(small, against=against)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [DOWN, OUT])
def test_what_reads_neurons_or_heads_that_went_may_have_any_value_if_it_is_repaired(
    small: Path, dense: Path, name: str
) -> None:
    change_as_if_repaired(small, name)
    found = verify(small, against=dense)
    assert found["repaired_tensors"] == 4
    assert found["structures"] == {"neurons": (24, 40), "kv heads": (2, 3)}


@pytest.mark.parametrize("name", [UP, QUERY])
def test_no_other_matrix_can_be_called_repaired(small: Path, dense: Path, name: str) -> None:
    change_as_if_repaired(small, name)
    assert verify(small)["repaired_tensors"] == 5
    found = refusal(small, dense)
    assert f"'{name}' is repaired by the report, and reads no neurons or kv heads" in found


@pytest.mark.parametrize("name", [BIAS, NORM])
def test_what_is_no_matrix_cannot_be_called_repaired_even_without_the_source(
    small: Path, name: str
) -> None:
    change_as_if_repaired(small, name)
    assert f"'{name}' is repaired by the report, and by its options it cannot" in refusal(small)


def test_nothing_can_be_called_repaired_where_the_options_repair_nothing(
    written: Path, tmp_path: Path
) -> None:
    small = copytree(written / "cut", tmp_path / "small")
    assert verify(small, against=written / "dense")["repaired_tensors"] == 0
    change_as_if_repaired(small, DOWN)
    assert f"'{DOWN}' is repaired by the report, and by its options it cannot" in refusal(small)


def structure(**fields: object) -> Edit:
    return lambda report: report["structures"]["neurons"].update(fields)


def config(**fields: str) -> Edit:
    return lambda report: report["config"].update(fields)


def totals(**fields: object) -> Edit:
    return lambda report: report["totals"].update(fields)


def both(*edits: Edit) -> Edit:
    return lambda report: [edit(report) for edit in edits]


SEEN_ALONE: dict[str, tuple[Edit, str]] = {
    "kept": (structure(kept=23), "structures.neurons.kept is 23, and of model.layers.0 24 stay"),
    "number": (structure(number=41), "number is 41, and config.intermediate_size 40 → 24"),
    "too few": (structure(number=7), "no choice of 7"),
    "field": (structure(field="vocab_size"), "kept is 24, and 'vocab_size' in config.json 32"),
    "another of 24": (structure(field="hidden_size"), "'hidden_size', and config has no change"),
    "no field": (structure(field="width"), "'width' in config.json None"),
    "a kind": (lambda report: report["structures"].update(tails=report["structures"]["neurons"]),
               "structures has 'tails'"),
    "change": (config(intermediate_size="1 → 2"), "config.intermediate_size is '1 → 2', in config"),
    "a change more": (config(widths="1 → 2"), "in config.json it is not there"),
    "no change": (lambda report: report["config"].pop("intermediate_size"), "has no change"),
    "tensors": (totals(tensors_after=1), "totals.tensors_after is 1, by its tensors it is"),
    "weights": (totals(weights_after=1), "totals.weights_after is 1, by its tensors it is"),
    "bytes": (totals(bytes_after=1), "totals.bytes_after is 1, by its tensors it is"),
    "ratio": (totals(bytes_ratio=0.5), "totals.bytes_ratio is 0.5, by its tensors it is"),
}  # fmt: skip


@pytest.mark.parametrize("edit", SEEN_ALONE)
def test_numbers_that_do_not_agree_with_what_is_beside_the_report_are_refused(
    small: Path, edit: str
) -> None:
    change, said = SEEN_ALONE[edit]
    edit_json(small / "emp_shrink.json", change)
    assert said in refusal(small)


def the_ratio(report: dict) -> None:
    sizes = report["totals"]
    sizes["bytes_before"] *= 2
    sizes["bytes_ratio"] = float(f"{sizes['bytes_after'] / sizes['bytes_before']:.6g}")


SEEN_AGAINST: dict[str, tuple[Edit, str]] = {
    "number": (both(structure(number=41), config(intermediate_size="41 → 24")),
               "config.intermediate_size is '41 → 24', by "),
    "no change": (config(intermediate_size="None → 24"), "it is '40 → 24'"),
    "a change more": (config(hidden_size="1 → 24"), "config.hidden_size is '1 → 24', by "),
    "tensors": (totals(tensors_before=1), "totals.tensors_before is 1, by "),
    "weights": (totals(weights_before=1), "totals.weights_before is 1, by "),
    "bytes": (the_ratio, "totals.bytes_before is "),
    "left out": (lambda report: report["left_out"].append("head"), "left_out is ['head'], by "),
    "source": (lambda report: report["tensors"][UP].update(source=DOWN), f"{UP}.source is"),
}  # fmt: skip


@pytest.mark.parametrize("edit", SEEN_AGAINST)
def test_numbers_that_are_not_the_source_s_are_refused_against_it(
    small: Path, dense: Path, edit: str
) -> None:
    change, said = SEEN_AGAINST[edit]
    edit_json(small / "emp_shrink.json", change)
    assert verify(small)["hashes"]
    assert said in refusal(small, dense)
