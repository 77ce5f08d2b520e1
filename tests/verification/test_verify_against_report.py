"""verify --against compares all beside the weights, too, and refuses what is no source."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    files,
    gaussian,
    llama_config,
    write_checkpoint,
)
from support.compared_folders import (
    FORMATS,
    NORM,
    F,
    H,
    refusal,
    source_with_ties,
    weights_with_ties,
)
from support.hub_server import HubServer
from support.tampering import agree, edit_json

from emp_llm import (
    CheckpointError,
    EmpError,
    OptionError,
    PruneOptions,
    prune,
    verify,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_with_ties(tmp_path / "source")


@pytest.fixture(params=FORMATS)
def written(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    """The source pruned with the paper's rule."""
    prune(source, tmp_path / "out", PruneOptions(output_format=request.param))
    return tmp_path / "out"


@pytest.mark.parametrize(
    "field",
    ["n_eff_min", "n_eff_mean", "n_eff_max", "n_eff_fraction_mean", "retained_mass"],
)
def test_another_figure_in_the_report_is_found(written: Path, source: Path, field: str) -> None:
    def edit(report: dict) -> None:
        report["tensors"][UP][field] *= 1.00001

    edit_json(written / "emp_report.json", edit)
    assert verify(written)["hashes"]
    message = refusal(written, source)
    assert repr(UP) in message
    assert field in message


@pytest.mark.parametrize("field", ["n_eff_fraction_mean", "retained_mass", "retained_mass_bound"])
def test_another_total_in_the_report_is_found(written: Path, source: Path, field: str) -> None:
    def edit(report: dict) -> None:
        report["totals"]["targets"][field] *= 1.00001

    edit_json(written / "emp_report.json", edit)
    assert f"{field} of targets" in refusal(written, source)


@pytest.mark.parametrize(("field", "value"), [("beta", 0.8), ("granularity", "layer")])
def test_another_rule_than_the_one_it_was_pruned_by_is_found(
    written: Path, source: Path, field: str, value: object
) -> None:
    change_rule(written, **{field: value})
    assert verify(written)["hashes"]
    assert "row 0" in refusal(written, source)


def change_rule(folder: Path, **fields: object) -> None:
    edit_json(folder / "emp_report.json", lambda report: report["rule"].update(fields))
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        edit_json(
            folder / "config.json", lambda config: config["quantization_config"].update(fields)
        )
    agree(folder)


def test_a_target_that_was_left_alone_is_found(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out", PruneOptions(ignore=("up_proj",)))
    assert verify(tmp_path / "out", against=source)["pruned_tensors"] == 2
    change_rule(tmp_path / "out", ignore=[])
    assert f"{UP!r} is not pruned, by the rule it is" in refusal(tmp_path / "out", source)


def test_a_tensor_that_should_have_been_left_alone_is_found(written: Path, source: Path) -> None:
    change_rule(written, ignore=["up_proj"])
    assert f"{UP!r} is pruned, by the rule it is not" in refusal(written, source)


@pytest.mark.parametrize(
    "rule", [{"repair": "x"}, {"count_by": 1}, {"beta": "1"}, {"beta": -1.0}, {"ignore": ["("]}]
)
def test_a_rule_that_cannot_be_derived_is_refused(
    written: Path, source: Path, rule: dict[str, object]
) -> None:
    change_rule(written, **rule)
    assert "rule" in refusal(written, source)


def test_a_tensor_that_only_the_source_has_is_found(written: Path, tmp_path: Path) -> None:
    more = weights_with_ties() | {"model.layers.0.input_layernorm.weight": gaussian(H)}
    other = write_checkpoint(tmp_path / "other", llama_config(H, F), more)
    assert "lacks tensor 'model.layers.0.input_layernorm.weight'" in refusal(written, other)


def test_a_tensor_that_only_the_folder_has_is_found(written: Path, tmp_path: Path) -> None:
    fewer = weights_with_ties()
    del fewer[NORM]
    other = write_checkpoint(tmp_path / "other", llama_config(H, F), fewer)
    assert f"{NORM!r} is not in {other}" in refusal(written, other)


def test_a_source_of_another_dtype_is_found(written: Path, tmp_path: Path) -> None:
    tensors = weights_with_ties(torch.float32)
    other = write_checkpoint(tmp_path / "other", llama_config(H, F), tensors)
    assert "is BF16 [12, 20], in" in refusal(written, other)


def test_a_config_that_is_not_the_sources_is_found(written: Path, source: Path) -> None:
    edit_json(written / "config.json", lambda config: config.update(rope_theta=5))
    agree(written)
    assert verify(written)["hashes"]
    assert "rope_theta in config.json is 5, in" in refusal(written, source)


def test_a_small_file_that_is_not_the_sources_is_found(written: Path, source: Path) -> None:
    (written / "tokenizer.json").write_text('{"a": 1}')
    agree(written)
    assert verify(written)["hashes"]
    assert "tokenizer.json is not that of" in refusal(written, source)
    (written / "tokenizer.json").unlink()
    agree(written)
    assert "tokenizer.json is missing" in refusal(written, source)


def test_a_small_file_that_the_source_does_not_have_is_found(written: Path, source: Path) -> None:
    (written / "generation_config.json").write_text("{}")
    assert verify(written, against=source)["other_files"] == ["generation_config.json"]
    agree(written)
    assert "generation_config.json is not in" in refusal(written, source)


def test_a_zero_is_not_taken_for_false(written: Path, source: Path) -> None:
    edit_json(written / "config.json", lambda config: config.update(tie_word_embeddings=0))
    agree(written)
    assert "tie_word_embeddings in config.json is 0, in" in refusal(written, source)


def test_a_source_of_torch_save_is_compared(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "torch"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(llama_config(H, F)))
    (other / "tokenizer.json").write_text("{}")
    torch.save(weights_with_ties(), other / "pytorch_model.bin")
    assert verify(written, against=other)["pruned_tensors"] == 3
    torch.save(weights_with_ties() | {UP: gaussian(F, H)}, other / "pytorch_model.bin")
    assert repr(UP) in refusal(written, other)


def test_a_pruned_source_is_refused_as_a_source(written: Path) -> None:
    refusal(written, written, EmpError)


def test_a_source_that_is_not_there_is_refused(written: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(written, tmp_path / "nothing" / "there", CheckpointError)


def test_a_source_with_nan_is_refused(written: Path, tmp_path: Path) -> None:
    tensors = weights_with_ties()
    tensors[DOWN][4, 2] = float("nan")
    other = write_checkpoint(tmp_path / "other", llama_config(H, F), tensors)
    (other / "tokenizer.json").write_text("{}")
    assert f"{DOWN!r} row 4 holds NaN" in refusal(written, other, CheckpointError)


def test_a_source_on_the_hub_is_fetched_and_compared(
    hub: HubServer, written: Path, source: Path
) -> None:
    hub.commit("me/model", files(source))
    assert verify(written, against="me/model")["against"] == "me/model"
    changed = weights_with_ties()
    changed[GATE][2, 2] *= 2
    other = shutil.copytree(source, source.parent / "other")
    shutil.rmtree(other)
    write_checkpoint(other, llama_config(H, F), changed)
    hub.commit("me/other", files(other) | {"tokenizer.json": b"{}"})
    assert repr(GATE) in refusal(written, "me/other")


def test_a_revision_needs_a_source_on_the_hub(written: Path, source: Path) -> None:
    with pytest.raises(OptionError, match="give against as well"):
        verify(written, revision="main")
    with pytest.raises(OptionError, match="is a local folder"):
        verify(written, against=source, revision="main")
