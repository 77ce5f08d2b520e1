"""What shrink writes, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import V
from support.calibrated import calibration, expert_inputs, ids_of, save_text, save_tokenizer
from support.checkpoints import bits, files, load, write_checkpoint
from support.mixtures import EXPERTS, make_mixture
from support.streaming import load_whole
from support.tampering import edit_json

from emp_llm import (
    CalibrationOptions,
    CheckpointError,
    EmpError,
    OptionError,
    ShrinkOptions,
    inspect_structures,
    shrink,
)

LAYERS = ("model.layers.0", "model.layers.1")
LEAVES = ("w1", "w2", "w3")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    make_mixture("mixtral", torch.bfloat16).save_pretrained(folder, max_shard_size=6000)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def expert(tensors: dict, layer: str, number: int) -> list[torch.Tensor]:
    name = f"{layer}.block_sparse_moe.experts.{number}"
    return [tensors[f"{name}.{leaf}.weight"] for leaf in LEAVES]


def aimer(matrices: list[torch.Tensor]) -> float:
    weights = torch.cat([matrix.double().reshape(-1) for matrix in matrices])
    return float(weights.abs().mean() / weights.square().mean().sqrt())


def test_the_experts_with_the_lowest_scores_stay_and_all_else_is_the_sources(
    mixtral: Path, tmp_path: Path
) -> None:
    report = shrink(mixtral, tmp_path / "out", ShrinkOptions(experts="34%"))

    dense, small = load(mixtral), load(tmp_path / "out")
    for layer in LAYERS:
        scores = [aimer(expert(dense, layer, e)) for e in range(EXPERTS)]
        kept = sorted(sorted(range(EXPERTS), key=scores.__getitem__)[:4])
        fields = report["structures"]["experts"]["holders"][layer]
        assert fields["kept"] == kept
        assert fields["scores"] == pytest.approx(scores, rel=1e-5)
        assert fields["n_eff"] == pytest.approx(sum(scores) ** 2 / sum(s * s for s in scores), 1e-5)
        for new, old in enumerate(kept):
            assert list(map(bits, expert(small, layer, new))) == list(
                map(bits, expert(dense, layer, old))
            )
        gate = f"{layer}.block_sparse_moe.gate.weight"
        assert bits(small[gate]) == bits(dense[gate][kept])
    others = {name for name in dense if ".block_sparse_moe." not in name}
    assert {name for name in small if ".block_sparse_moe." not in name} == others
    assert all(bits(small[name]) == bits(dense[name]) for name in others)
    assert report["config"] == {"num_local_experts": "6 → 4"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **json.loads((mixtral / "config.json").read_text()),
        "num_local_experts": 4,
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert report == json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    assert report["totals"]["weights_after"] == sum(t.numel() for t in small.values())
    assert report["totals"]["bytes_before"] == sum(t.numel() * 2 for t in dense.values())


def test_the_index_names_what_is_there(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shrink(mixtral, out, ShrinkOptions(experts=2))

    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in load(out).values())


def test_a_shard_of_which_nothing_stays_is_not_written(mixtral: Path, tmp_path: Path) -> None:
    tensors = load(mixtral)
    last = {name: torch.sign(t) for name, t in tensors.items() if f"experts.{EXPERTS - 1}." in name}
    others = {name: t for name, t in tensors.items() if name not in last}
    config = json.loads((mixtral / "config.json").read_text())
    write_checkpoint(tmp_path / "dense", config, others, last)

    shrink(tmp_path / "dense", tmp_path / "out", ShrinkOptions(experts=EXPERTS - 1))

    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors"]
    assert load(tmp_path / "out").keys() == others.keys()


def test_a_process_without_emp_llm_loads_it_and_generates(mixtral: Path, tmp_path: Path) -> None:
    shrink(mixtral, tmp_path / "out", ShrinkOptions(experts=3))
    code = """
import sys
sys.modules.update({name: None for name in ("emp_llm", "emp_kernels")})
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False).shape)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    # where emp-llm is installed, `import torch` would look for it
    alone = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    assert "torch.Size([1, 7])" in done.stdout


def test_what_the_model_has_no_place_for_is_left_out_and_named(
    mixtral: Path, tmp_path: Path
) -> None:
    tensors = {**load(mixtral), "model.layers.2.block_sparse_moe.gate.weight": torch.ones(6, 16)}
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    save_file(tensors, tmp_path / "dense" / "model.safetensors")

    report = shrink(tmp_path / "dense", tmp_path / "out", ShrinkOptions(experts=3))

    assert report["left_out"] == ["model.layers.2.block_sparse_moe.gate.weight"]
    assert "model.layers.2.block_sparse_moe.gate.weight" not in load(tmp_path / "out")


def test_floats_that_json_lacks_stay_as_transformers_writes_them(
    mixtral: Path, tmp_path: Path
) -> None:
    dense, infinite = copytree(mixtral, tmp_path / "dense"), {"__float__": "Infinity"}
    edit_json(dense / "config.json", lambda config: config.update(router_jitter_noise=infinite))
    shrink(dense, tmp_path / "out", ShrinkOptions(experts=3))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["router_jitter_noise"] == infinite


def test_inspect_structures_gives_the_scores_and_writes_nothing(mixtral: Path) -> None:
    before = files(mixtral)
    found = inspect_structures(mixtral)["structures"]["experts"]

    assert (found["number"], found["field"], found["score"]) == (6, "num_local_experts", "aimer")
    tensors = load(mixtral)
    for layer in LAYERS:
        scores = [aimer(expert(tensors, layer, e)) for e in range(EXPERTS)]
        assert found["holders"][layer]["scores"] == pytest.approx(scores, rel=1e-5)
    assert files(mixtral) == before


def refusal(source: Path, out: Path, kind: type[EmpError], experts: int | str) -> str:
    with pytest.raises(kind) as caught:
        shrink(source, out, ShrinkOptions(experts=experts))
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_without_experts_is_refused_and_nothing_is_left(tiny_model, tmp_path: Path) -> None:
    said = refusal(tiny_model("llama"), tmp_path / "out", CheckpointError, 2)
    assert "the model has no experts to choose from (no num_local_experts" in said


@pytest.mark.parametrize(
    ("experts", "said"),
    [(1, "num_experts_per_tok 2: keep at least 2"), (7, "6 experts in each of 2 layers")],
)
def test_an_impossible_number_is_refused_and_nothing_is_left(
    mixtral: Path, tmp_path: Path, experts: int, said: str
) -> None:
    assert said in refusal(mixtral, tmp_path / "out", OptionError, experts)


def test_groups_that_cannot_stay_equal_are_refused_by_their_field(tmp_path: Path) -> None:
    make_mixture("deepseek-v3", torch.bfloat16).save_pretrained(tmp_path / "dense")
    said = refusal(tmp_path / "dense", tmp_path / "out", OptionError, 5)
    assert "cannot be divided into 2 groups of equal size (num_experts_per_tok 2, n_group 2" in said


def test_different_numbers_of_experts_are_refused_by_their_field(
    mixtral: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    for path in mixtral.iterdir():
        (dense / path.name).write_bytes(path.read_bytes())
    edit_json(dense / "config.json", lambda config: config.update(num_local_experts=[6, 6]))
    assert "num_local_experts" in refusal(dense, tmp_path / "out", CheckpointError, 4)


def test_by_reap_the_experts_that_give_the_most_on_data_stay(tmp_path: Path) -> None:
    make_mixture("mixtral", torch.float32).save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense", V)
    text = save_text(tmp_path / "words.txt")
    options = ShrinkOptions(experts=3, score="reap", calibration=calibration(text))

    report = shrink(tmp_path / "dense", tmp_path / "out", options)

    tensors, model = load(tmp_path / "dense"), load_whole("mixtral", tmp_path / "dense")
    inputs = expert_inputs(model, ids_of(text), tensors, EXPERTS)
    for layer in LAYERS:
        start, scores = f"{layer}.block_sparse_moe", []
        for number in range(EXPERTS):
            x_TC, inner_TC = (inputs[f"{start}.experts.{number}.{w}.weight"] for w in ("w1", "w2"))
            powers_TE = (x_TC @ tensors[f"{start}.gate.weight"].T).exp()
            gates_T = powers_TE[:, number] / powers_TE.topk(2).values.sum(dim=1)
            outputs_TC = inner_TC @ tensors[f"{start}.experts.{number}.w2.weight"].T
            scores.append((gates_T * outputs_TC.norm(dim=1)).mean().item())
        fields = report["structures"]["experts"]["holders"][layer]
        assert fields["scores"] == pytest.approx(scores, rel=1e-5)
        assert fields["kept"] == sorted(sorted(range(EXPERTS), key=lambda e: -scores[e])[:3])
    words = ["--score", "reap", "--calibration", "words.txt", "--samples", "4", "--length", "24"]
    assert report["options"] == ["--experts", "3", *words, "--seed", "3"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert load_whole("mixtral", tmp_path / "out").config.num_local_experts == 3


def test_a_score_that_is_not_there_or_lacks_data_is_refused_before_the_model_is_read(
    tmp_path: Path,
) -> None:
    for score, message in (
        ("moon", "score is 'moon'; choose one of aimer, reap, norm, random, or give your own"),
        ("reap", "score 'reap' needs data: give a text to calibrate on .*, or choose aimer"),
    ):
        with pytest.raises(OptionError, match=message):
            shrink(tmp_path / "nothing", tmp_path / "out", ShrinkOptions(experts=3, score=score))
    others = ShrinkOptions(blocks=3, block_score="random", score="moon")
    with pytest.raises(OptionError, match="score is 'moon'"):
        shrink(tmp_path / "nothing", tmp_path / "out", others)
    with pytest.raises(OptionError, match="give its name: 'module:Class'"):
        ShrinkOptions(experts=3, score=object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 3},
        {"experts": 3, "score": "random"},
        {"blocks": 3, "block_score": "random", "score": "reap"},
        {"neurons": "25%", "width_score": "magnitude", "repair": "none"},
    ],
)
def test_data_that_nothing_uses_are_refused_before_the_model_is_read(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    asked = ShrinkOptions(**options, calibration=calibration(tmp_path / "words.txt"))
    with pytest.raises(OptionError, match=r"calibration '.*words.txt' would not be used"):
        shrink(tmp_path / "nothing", tmp_path / "out", asked)


def test_a_device_that_is_not_there_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    data = CalibrationOptions(text="words.txt", device="abacus")
    asked = ShrinkOptions(blocks=3, calibration=data)
    with pytest.raises(OptionError, match="'abacus'"):
        shrink(tmp_path / "nothing", tmp_path / "out", asked)
    with pytest.raises(OptionError, match="'abacus'"):
        inspect_structures(tmp_path / "nothing", score="reap", calibration=data)
