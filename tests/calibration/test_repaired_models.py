"""What repair does to a model, and that every run of a calibration gives the same bytes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.calibrated import (
    expert_inputs,
    ids_of,
    inputs_of,
    pruned,
    run_on,
    save_model,
    save_text,
)
from support.checkpoints import bits, load
from support.streaming import load_whole

from emp_llm.calibration.input_statistics import Gathering, UnsharedInputsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt", 400)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_model(tmp_path_factory.mktemp(name), name)
        for name in ("llama", "mixtral", "gpt2", "opt")
    }


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_repair_keeps_the_masks_and_brings_outputs_nearer_to_the_dense_ones(
    models: dict[str, Path], text: Path, tmp_path: Path, architecture: str, criterion: str
) -> None:
    folder, ids = models[architecture], ids_of(text)
    options = {"criterion": criterion, "beta": 0.7}
    data = text if criterion == "taylor" else None
    plain = pruned(folder, tmp_path / "plain", data, options=options, sequential=False)
    repaired = pruned(
        folder, tmp_path / "repaired", text, options={**options, "repair": "obs"}, sequential=False
    )
    dense, whole = load(folder), load_whole(architecture, folder)
    inputs = {f"{n}.weight": x for n, x in inputs_of(whole, lambda: run_on(whole, ids)).items()}
    if architecture == "mixtral":
        inputs |= expert_inputs(whole, ids, dense)
    changed = [name for name in dense if bits(dense[name]) != bits(plain[name])]
    assert changed != []
    for name in changed:
        assert torch.equal(plain[name] != 0, repaired[name] != 0), name
        x = inputs.get(name, inputs.get(f"transformer.{name}"))
        assert x is not None
        turned = [
            t[name].T if architecture != "gpt2" else t[name] for t in (dense, plain, repaired)
        ]
        expected, before, after = (x @ weights for weights in turned)
        assert (after - expected).norm() < (before - expected).norm(), name
    assert sorted(set(dense) - set(changed)) == sorted(
        name for name in dense if bits(dense[name]) == bits(repaired[name])
    )


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_swaps_keep_as_many_weights_of_each_row_and_bring_outputs_nearer_still(
    models: dict[str, Path], text: Path, tmp_path: Path, architecture: str
) -> None:
    folder, ids = models[architecture], ids_of(text)
    by = {
        repair: pruned(
            folder,
            tmp_path / repair,
            text,
            options={"beta": 0.7, "repair": repair},
            sequential=False,
        )
        for repair in ("obs", "swaps")
    }
    dense, whole = load(folder), load_whole(architecture, folder)
    inputs = {f"{n}.weight": x for n, x in inputs_of(whole, lambda: run_on(whole, ids)).items()}
    if architecture == "mixtral":
        inputs |= expert_inputs(whole, ids, dense)
    changed = [name for name in dense if bits(dense[name]) != bits(by["obs"][name])]
    assert changed != []
    told = json.loads((tmp_path / "swaps" / "emp_report.json").read_text())["tensors"]
    for name in changed:
        old, new = by["obs"][name], by["swaps"][name]
        assert torch.equal((old != 0).sum(1), (new != 0).sum(1)), name
        x = inputs[name]
        before, after = ((x @ (weights - dense[name]).T).norm() for weights in (old, new))
        assert after < before, name
        size = dense[name].double().abs()
        share = size[new != 0].sum() / size.sum()
        assert told[name]["retained_mass"] == pytest.approx(float(share), rel=1e-5)
        assert share < size[old != 0].sum() / size.sum(), name


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_bias_repair_restores_mean_outputs_by_biases_alone(
    models: dict[str, Path], text: Path, tmp_path: Path, architecture: str
) -> None:
    folder, ids = models[architecture], ids_of(text)
    options = {"criterion": "wanda", "targets": "mlp"}
    plain = pruned(folder, tmp_path / "plain", text, options=options, sequential=False)
    repaired = pruned(
        folder, tmp_path / "repaired", text, options={**options, "repair": "bias"}, sequential=False
    )
    dense, whole = load(folder), load_whole(architecture, folder)
    inputs = {n: x.double() for n, x in inputs_of(whole, lambda: run_on(whole, ids)).items()}
    weights = [name for name in dense if bits(dense[name]) != bits(plain[name])]
    biases = [name for name in dense if bits(plain[name]) != bits(repaired[name])]
    assert biases == [name.replace("weight", "bias") for name in weights]
    for name in weights:
        layer = name.removesuffix(".weight")
        x = inputs.get(layer, inputs.get(f"transformer.{layer}"))
        means = []
        for t in (dense, plain, repaired):
            w = t[name].double() if architecture == "gpt2" else t[name].double().T
            means.append((x @ w + t[f"{layer}.bias"].double()).mean(0))
        assert (means[2] - means[0]).abs().max() < 1e-6
        assert (means[1] - means[0]).abs().max() > 1e-4


def test_inputs_that_turn_out_not_to_be_shared_are_gathered_again_after_samples_have_gone_on(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"targets": "mlp", "repair": "obs"}
    expected = pruned(models["llama"], tmp_path / "expected", text, options=options)
    samples: Counter[Gathering] = Counter()
    own = Gathering.forget_last

    def found_wrong_at_the_second(gathering: Gathering) -> None:
        samples[gathering] += 1
        if gathering._shared and samples[gathering] == 2:
            raise UnsharedInputsError
        own(gathering)

    monkeypatch.setattr(Gathering, "forget_last", found_wrong_at_the_second)
    again = pruned(models["llama"], tmp_path / "again", text, options=options)

    assert all(torch.equal(expected[name] != 0, again[name] != 0) for name in expected)
    first = {name.rpartition("mlp.")[2]: name for name in expected if ".layers.0.mlp." in name}
    for projection in ("gate_proj", "up_proj"):
        name = first[f"{projection}.weight"]
        assert torch.equal(expected[name], again[name])
    # the dense model's inputs of a sample that has gone on are not known any more
    down = first["down_proj.weight"]
    difference = (expected[down] - again[down]).norm() / expected[down].norm()
    assert 0 < difference < 0.5
