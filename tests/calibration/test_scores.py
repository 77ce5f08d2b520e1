"""What is kept by each score, against a few lines of plain torch on the model run whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.calibrated import (
    SEED,
    expert_inputs,
    gradients_of,
    ids_of,
    inputs_of,
    pruned,
    run_on,
    save_model,
    save_text,
)
from support.checkpoints import Tensors, load
from support.streaming import load_whole

import emp_llm
from emp_llm.calibration.criteria import Criterion
from emp_llm.calibration.statistics import Statistics
from emp_llm.selection.ranking import random_keys

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("llama", "mixtral", "gpt2", "opt")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(tmp_path_factory.mktemp(name), name) for name in NAMES}


class Found:
    """All that is known of one matrix: weights [R, C], inputs [T, C] and gradients [R, C]."""

    def __init__(self, name: str, w: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
        self.name = name
        self.w, self.x, self.g = w.double(), x.double(), g.double()


def wanda(found: Found) -> torch.Tensor:
    return found.w.abs() * found.x.norm(dim=0)


def ria(found: Found) -> torch.Tensor:
    size = found.w.abs()
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    return relative * found.x.norm(dim=0).sqrt()


def taylor(found: Found) -> torch.Tensor:
    return (found.w * found.g).abs()


def obs(found: Found) -> torch.Tensor:
    hessian = found.x.T @ found.x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    worth = 1 / damped.inverse().diagonal()
    return found.w**2 * torch.where(hessian.diagonal() == 0, 0.0, worth)  # inputs that never are


def magnitude(found: Found) -> torch.Tensor:
    return found.w.abs()


def random(found: Found) -> torch.Tensor:
    rows, columns = found.w.shape
    keys = [random_keys(SEED, found.name, row, columns) >> 8 for row in range(rows)]
    return torch.tensor([[int(key) for key in row] for row in keys], dtype=torch.float64)


SCORES: dict[str, Callable[[Found], torch.Tensor]] = {
    one.__name__: one for one in (wanda, ria, taylor, obs, magnitude, random)
}


def found_of(architecture: str, folder: Path, ids: torch.Tensor) -> list[Found]:
    """The statistics of each matrix that is pruned, from the whole dense model."""
    tensors, whole = load(folder), load_whole(architecture, folder)
    inputs = {f"{n}.weight": x for n, x in inputs_of(whole, lambda: run_on(whole, ids)).items()}
    if architecture == "mixtral":
        inputs |= expert_inputs(whole, ids, tensors)
    gradients = gradients_of(whole, ids)
    for number in range(2 if architecture == "mixtral" else 0):
        start = f"model.layers.{number}"
        both = gradients[f"{start}.mlp.experts.gate_up_proj"]
        down = gradients[f"{start}.mlp.experts.down_proj"]
        for expert in range(4):
            at = f"{start}.block_sparse_moe.experts.{expert}"
            first, third = both[expert].chunk(2)
            gradients |= {f"{at}.w1.weight": first, f"{at}.w3.weight": third}
            gradients[f"{at}.w2.weight"] = down[expert]
    found = []
    for name, x in inputs.items():
        own = name if name in tensors else name.removeprefix("transformer.")
        if "head" in name or ".gate.weight" in name:
            continue
        turned = (lambda t: t.T) if architecture == "gpt2" else (lambda t: t)
        found.append(Found(own, turned(tensors[own]), x, turned(gradients[name])))
    return found


def kept(architecture: str, tensors: Tensors, found: Found) -> torch.Tensor:
    left = tensors[found.name] != 0
    return left.T if architecture == "gpt2" else left


@pytest.mark.parametrize(
    ("architecture", "granularity"),
    [*((name, "row") for name in NAMES), ("llama", "layer"), ("gpt2", "layer")],
)
def test_the_weights_that_stay_are_those_of_plain_torch_on_the_whole_dense_model(
    models: dict[str, Path], text: Path, tmp_path: Path, architecture: str, granularity: str
) -> None:
    everything = found_of(architecture, models[architecture], ids_of(text))
    for criterion, score in SCORES.items():
        options = {"criterion": criterion, "granularity": granularity, "beta": 0.8}
        data = None if criterion in ("magnitude", "random") else text
        source, out = models[architecture], tmp_path / criterion
        left = pruned(source, out, data, options=options, sequential=False)
        for found in everything:
            dims = -1 if granularity == "row" else (-2, -1)
            expected = emp_llm.keep_mask(score(found).float(), beta=0.8, dim=dims)
            assert torch.equal(kept(architecture, left, found), expected), (criterion, found.name)
    assert len(everything) == {"llama": 14, "mixtral": 32, "gpt2": 8, "opt": 12}[architecture]


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_a_decoder_block_is_pruned_by_the_outputs_of_the_pruned_ones_before_it(
    models: dict[str, Path], text: Path, tmp_path: Path, granularity: str
) -> None:
    folder, ids = models["llama"], ids_of(text)
    options = {"criterion": "wanda", "granularity": granularity}
    left = pruned(folder, tmp_path / "out", text, options=options)
    whole = load_whole("llama", folder)
    for number in range(2):
        inputs = inputs_of(whole, lambda: run_on(whole, ids))
        for name, x in inputs.items():
            if f".layers.{number}." in name:
                weights = whole.get_parameter(f"{name}.weight").data
                scores = (weights.double().abs() * x.double().norm(dim=0)).float()
                dims = -1 if granularity == "row" else (-2, -1)
                weights.mul_(emp_llm.keep_mask(scores, dim=dims))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(left[name], tensor), name


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_weights_of_all_matrices_are_ranked_together(
    models: dict[str, Path], text: Path, tmp_path: Path, criterion: str
) -> None:
    everything = found_of("llama", models["llama"], ids_of(text))
    options = {"criterion": criterion, "granularity": "model", "targets": "all-linear"}
    left = pruned(models["llama"], tmp_path / "out", text, options=options, sequential=False)
    scores = [SCORES[criterion](found).float().reshape(-1) for found in everything]
    expected = emp_llm.keep_mask(torch.cat(scores))
    found = [kept("llama", left, one).reshape(-1) for one in everything]
    assert torch.equal(torch.cat(found), expected)


def test_magnitudes_say_how_many_stay_and_another_score_which_ones(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = {"criterion": "wanda", "count_by": "magnitude"}
    left = pruned(models["llama"], tmp_path / "out", text, options=options, sequential=False)
    for found in found_of("llama", models["llama"], ids_of(text)):
        counts = emp_llm.keep_mask(found.w.abs().float()).sum(dim=1)
        order = wanda(found).float().argsort(dim=1, descending=True, stable=True)
        for row, (count, places) in enumerate(zip(counts, order, strict=True)):
            stay = torch.zeros(found.w.shape[1], dtype=torch.bool)
            stay[places[:count]] = True
            assert torch.equal(kept("llama", left, found)[row], stay)


KNOWN: dict[tuple[str, int], Statistics] = {}


class Everything(Criterion):
    """Remembers the statistics that it gets."""

    needs = frozenset({"norms", "means", "hessian"})

    def scores(self, weight_RC, found):
        KNOWN[found.tensor, found.matrix] = found
        return weight_RC.abs()


@pytest.mark.parametrize("architecture", NAMES)
def test_statistics_are_those_of_hooks_on_the_whole_model(
    models: dict[str, Path], text: Path, tmp_path: Path, architecture: str
) -> None:
    KNOWN.clear()
    options = {"criterion": f"{__name__}:Everything"}
    pruned(models[architecture], tmp_path / "out", text, options=options, sequential=False)
    everything = found_of(architecture, models[architecture], ids_of(text))
    assert {(one.name, 0) for one in everything} == KNOWN.keys()
    for one in everything:
        known = KNOWN[one.name, 0]
        assert known.tokens == len(one.x)
        assert known.norms_C is not None
        assert known.means_C is not None
        assert known.hessian_CC is not None
        # sums of float64 in another order; what experts give between is float32 in another order
        bound = (1e-6 if ".w2." in one.name else 1e-12) * one.x.norm()
        assert (known.norms_C - one.x.norm(dim=0)).abs().max() < bound
        assert (known.means_C - one.x.mean(dim=0)).abs().max() < bound
        hessian = one.x.T @ one.x
        assert (known.hessian_CC - hessian).abs().max() < 1e-6 * hessian.abs().max()


def test_an_expert_that_no_token_reaches_is_ranked_by_magnitude_and_told_of(
    text: Path, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "mixtral", "mixtral")
    tensors = load(folder)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    norm = "model.layers.0.post_attention_layernorm.weight"
    tensors[norm].zero_()  # the router is given zeros, and takes the first two
    tensors[norm][0] = 1
    tensors["model.embed_tokens.weight"][:, 0] = 1
    tensors[gate][:, 0] = torch.tensor([2.0, 1.0, 0.0, -1.0]) * 10
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    left = pruned(folder, tmp_path / "out", text, options={"criterion": "wanda"})
    report = json.loads((tmp_path / "out" / "emp_report.json").read_text())
    expected = [
        f"model.layers.0.block_sparse_moe.experts.{expert}.w{leaf}.weight"
        for expert in (2, 3)
        for leaf in (1, 2, 3)
    ]
    reported = report["calibration"]["without_tokens"]
    assert [name for name in reported if "layers.0" in name] == expected
    for name in expected:
        assert torch.equal(left[name] != 0, emp_llm.keep_mask(tensors[name].abs()))


def test_gradients_too_small_for_float16_are_found(text: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", "llama", dtype=torch.float16)
    left = pruned(folder, tmp_path / "out", text, options={"criterion": "taylor"})
    whole = load_whole("llama", folder).float()
    for name, gradient in gradients_of(whole, ids_of(text)).items():
        if name.endswith("_proj.weight"):
            scores = (whole.get_parameter(name).detach() * gradient).abs()
            share = ((left[name] != 0) == emp_llm.keep_mask(scores)).float().mean().item()
            assert share > 0.95, name
