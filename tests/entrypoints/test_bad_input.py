"""A bad input is one clear line, and leaves no folder behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    gaussian,
    llama_config,
    mlp,
    refusal,
    write_checkpoint,
)

from emp_llm import CheckpointError, EmpConfig, OptionError, PruneOptions, compare, prune, unpack

TinyModel = Callable[..., Path]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Options


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf"), -0.0])
def test_beta_must_be_finite_and_positive(beta: float) -> None:
    with pytest.raises(OptionError, match="beta is"):
        PruneOptions(beta=beta)


def test_targets_must_be_a_regular_expression() -> None:
    with pytest.raises(OptionError, match=r"targets '\(' is not a regular expression"):
        PruneOptions(targets="(")


@pytest.mark.parametrize("pattern", ["(" * 20_000, "a{99999999999999999999}"], ids=["deep", "long"])
def test_a_regular_expression_that_python_cannot_hold_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match="is not a regular expression"):
        PruneOptions(targets=pattern)


def test_ignore_must_be_regular_expressions() -> None:
    with pytest.raises(OptionError, match=r"ignore '\['"):
        PruneOptions(ignore=("fine", "["))


def test_a_single_string_is_one_regular_expression_not_its_letters() -> None:
    assert PruneOptions(ignore="down_proj").ignore == ("down_proj",)
    assert PruneOptions(ignore=["q", "k"]).ignore == ("q", "k")
    assert EmpConfig(ignore="down_proj").options().ignore == ("down_proj",)


@pytest.mark.parametrize("value", [3, None, [3], b"up"], ids=repr)
@pytest.mark.parametrize("make", [PruneOptions, EmpConfig])
def test_what_is_no_string_is_no_regular_expression(make: Callable[..., object], value) -> None:
    with pytest.raises(OptionError, match=r"ignore is .*; give a regular expression as a string"):
        make(ignore=value)


@pytest.mark.parametrize("make", [PruneOptions, EmpConfig])
def test_targets_is_one_regular_expression(make: Callable[..., object]) -> None:
    with pytest.raises(OptionError, match=r"targets is \['up', 'down'\]; give a regular"):
        make(targets=["up", "down"])


@pytest.mark.parametrize("threads", [0, -1])
def test_there_is_one_thread_at_least(source: Path, tmp_path: Path, threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads is {threads}; give 1 or more"):
        prune(source, tmp_path / "out", threads=threads)
    assert not (tmp_path / "out").exists()


def test_targets_that_match_nothing_are_refused_with_examples_of_what_there_is(
    source: Path, tmp_path: Path
) -> None:
    message = refusal(source, tmp_path / "out", targets="no_such_layer")
    assert "no_such_layer" in message
    assert "mlp.up_proj.weight" in message


@pytest.mark.parametrize("betas", ["0.5", 1.0])
def test_compare_takes_a_list_of_betas(source: Path, betas: object) -> None:
    with pytest.raises(OptionError, match=r"betas is .*; give a list of numbers, such as \[1\.0\]"):
        compare(source, "text", betas=betas)


# The source


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere", tmp_path / "out")


def test_a_folder_without_a_config_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    assert "config.json" in refusal(source, tmp_path / "out")


def test_a_folder_without_weights_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(source, tmp_path / "out")


def test_an_index_that_names_a_missing_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    (sharded / SECOND).unlink()
    assert SECOND in refusal(sharded, tmp_path / "out")


def test_an_index_that_lists_a_tensor_that_the_model_needs_and_no_shard_has_is_refused(
    sharded: Path, tmp_path: Path
) -> None:
    norm = "model.norm.weight"
    edit_json(sharded / INDEX, weight_map={DOWN: FIRST, UP: SECOND, GATE: SECOND, norm: FIRST})
    assert refusal(sharded, tmp_path / "out") == (
        f"{sharded}: {FIRST} lacks tensor '{norm}', which the index lists and LlamaForCausalLM "
        "needs (1 missing): fetch that file again or, if it is published so, ask its makers for a "
        "complete one"
    )


def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path, tmp_path: Path) -> None:
    shutil.copy(sharded / SECOND, tmp_path / SECOND)
    outside = f"../{SECOND}"
    edit_json(sharded / INDEX, weight_map={DOWN: FIRST, UP: outside})
    assert outside in refusal(sharded, tmp_path / "out")


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(source: Path, tmp_path: Path, left: int) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:left])
    assert "model.safetensors" in refusal(source, tmp_path / "out")


def test_overlapping_tensors_are_refused(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[GATE]["data_offsets"] = header[UP]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    assert "model.safetensors" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_a_target_that_is_not_finite_is_named_with_its_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output_format: str,
    granularity: str,
    value: float,
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 3 * H * 2)
    tensors = mlp(H, F)
    tensors[GATE][17, 5] = value
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    out = tmp_path / "out"
    message = refusal(source, out, granularity=granularity, output_format=output_format)
    assert f"{GATE!r} row 17 holds NaN or infinity" in message


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_the_row_of_a_transposed_tensor_is_a_column_of_the_file(
    tiny_model: TinyModel, tmp_path: Path, granularity: str
) -> None:
    from safetensors.torch import load_file

    source = Path(shutil.copytree(tiny_model("gpt-oss"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][2, 1, 5] = float("nan")  # expert 2 of [4, in, 16]: neuron 5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    message = refusal(source, tmp_path / "out", granularity=granularity)
    assert f"{name!r} row {2 * 16 + 5} holds" in message


def test_what_is_not_finite_outside_the_targets_is_copied(tmp_path: Path) -> None:
    tensors = mlp(H, F) | {"model.norm.weight": torch.full((H,), float("nan"))}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    prune(source, tmp_path / "out")


def test_a_quantized_model_is_refused(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_a_target_of_another_dtype_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = mlp(H, F) | {UP: gaussian(F, H).to(dtype)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    message = refusal(source, tmp_path / "out")
    assert UP in message
    assert "--ignore" in message


def test_a_packed_folder_is_not_pruned_again(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "packed")
    assert "emp" in refusal(tmp_path / "packed", tmp_path / "out")


def test_a_dense_folder_is_not_unpacked(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"))
    with pytest.raises(CheckpointError, match="is not packed by emp-llm"):
        unpack(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [UP + ".emp_rows", UP + ".emp_meta", "other.emp_meta"])
def test_a_tensor_with_the_name_of_a_plane_is_refused(tmp_path: Path, name: str) -> None:
    tensors = mlp(H, F) | {name: gaussian(2)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    assert name in refusal(source, tmp_path / "out")
