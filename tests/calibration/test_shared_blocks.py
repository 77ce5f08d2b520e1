"""Weights that a model uses several times are scored on the inputs of all uses.

Zamba and Zamba2 tie the blocks of attention of several layers, and Zamba2 has an adapter for each
use; ALBERT runs one layer again and again. In Gemma 4, the last layers read the keys and values of
earlier ones. Expected values come from the model run whole.
"""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.architectures import F, H, V
from support.calibrated import (
    calibration,
    divergence,
    gradients_of,
    ids_of,
    is_linear,
    opened,
    pruned,
    run_on,
    save_text,
    save_tokenizer,
)
from support.checkpoints import files, load
from torch import nn
from transformers import PreTrainedModel

from emp_llm import PruneOptions, keep_mask, prune
from emp_llm.calibration.criteria import Criterion
from emp_llm.calibration.repair import LeastSquares, repair_obs
from emp_llm.calibration.sensitivity import divergences, parts_of
from emp_llm.calibration.sinks import MaskSink
from emp_llm.calibration.statistics import Statistics

pytestmark = pytest.mark.usefixtures("one_thread")

_COMMON = {"vocab_size": V, "hidden_size": H, "intermediate_size": F, "num_attention_heads": 2}
_ZAMBA = {
    **_COMMON,
    "max_position_embeddings": 64,
    "mamba_d_state": 4,
    "mamba_dt_rank": 2,
    "n_mamba_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "zamba": (
        "ZambaForCausalLM",
        "ZambaConfig",
        {**_ZAMBA, "num_hidden_layers": 4, "layers_block_type": ["hybrid", "mamba"] * 2},
    ),
    # blocks A, B and A again: that is what num_mem_blocks means
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **_ZAMBA,
            "num_hidden_layers": 3,
            "layers_block_type": ["hybrid"] * 3,
            "hybrid_layer_ids": [0, 1, 2],
            "num_mem_blocks": 2,
            "adapter_rank": 4,
            "use_shared_attention_adapter": True,
            "use_shared_mlp_adapter": True,
            "mamba_headdim": 16,
            "chunk_size": 8,
        },
    ),
    "albert": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**_COMMON, "embedding_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 64},
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": V,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
    ),
    "hrm": (
        "HrmTextForCausalLM",
        "HrmTextConfig",
        {
            **_COMMON,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "num_layers_per_stack": 1,
            "max_position_embeddings": 64,
        },
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in MODELS}


def save(folder: Path, name: str) -> Path:
    """A tiny model, in float32, with a tokenizer."""
    model_class, config_class, arguments = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return save_tokenizer(folder, V)


def whole(name: str, folder: Path) -> PreTrainedModel:
    loader: Any = getattr(transformers, MODELS[name][0])
    model: PreTrainedModel = loader.from_pretrained(folder)
    return model.eval()


def all_inputs(
    model: PreTrainedModel, ids: torch.Tensor, own: Callable[[str], bool] = lambda _: True
) -> dict[int, torch.Tensor]:
    """What each weight is multiplied by, wherever it is used, [T, C] by its id.

    Args:
        model: The model, whole.
        ids: The samples.
        own: Whether a linear layer of this name counts.
    """
    found: dict[int, list[torch.Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if is_linear(module) and own(name):

                def keep(layer: Any, args: Any) -> None:
                    x = args[0].detach().reshape(-1, args[0].shape[-1])
                    found.setdefault(id(layer.weight), []).append(x)

                stack.callback(module.register_forward_pre_hook(keep).remove)
        run_on(model, ids)
    return {key: torch.cat(parts).double() for key, parts in found.items()}


KNOWN: dict[str, Statistics] = {}


class Everything(Criterion):
    """Remembers the statistics that it gets."""

    needs = frozenset({"norms", "means", "hessian"})

    def scores(self, weight_RC, found):
        KNOWN[found.tensor] = found
        return weight_RC.abs()


@pytest.mark.parametrize(
    ("name", "twice", "memory"),
    [("zamba", 7, 8 << 30), ("zamba2", 6, 0), ("albert", 0, 8 << 30)],
)
def test_statistics_are_those_of_all_uses(
    models: dict[str, Path], text: Path, tmp_path: Path, name: str, twice: int, memory: int
) -> None:
    KNOWN.clear()
    options = {"criterion": f"{__name__}:Everything"}
    more = {"sequential": False, "activation_memory": memory}
    pruned(models[name], tmp_path / "out", text, options=options, **more)
    ids = ids_of(text)
    model = whole(name, models[name])
    inputs = all_inputs(model, ids)
    counts = []
    for tensor, known in KNOWN.items():
        x = inputs[id(model.get_parameter(tensor))]
        assert known.tokens == len(x), tensor
        assert known.norms_C is not None
        assert known.means_C is not None
        assert known.hessian_CC is not None
        assert torch.allclose(known.norms_C, x.norm(dim=0), rtol=1e-6, atol=1e-9), tensor
        assert torch.allclose(known.means_C, x.mean(dim=0), rtol=1e-4, atol=1e-6), tensor
        hessian = x.T @ x
        assert (known.hessian_CC - hessian).abs().max() < 1e-5 * hessian.abs().max(), tensor
        counts.append(known.tokens // ids.numel())
    assert len(counts) > twice
    assert counts.count(2) == twice
    if name == "albert":
        assert counts == [3] * 6


# of HRM's tensors: the parameters that they become, in the checkpoint's order
_PARTS = {"gqkv_proj": "gate q k v", "o_proj": "o", "gate_up_proj": "gate up", "down_proj": "down"}


def parameters_of(tensor: str) -> list[str]:
    *path, stored, leaf = tensor.replace(".attn.", ".self_attn.").split(".")
    parts = _PARTS.get(stored, "").split()
    return [".".join([*path, f"{part}_proj", leaf]) for part in parts] or [tensor]


@pytest.mark.parametrize(("name", "targets"), [("zamba2", 45), ("gemma4", 32), ("hrm", 8)])
def test_gradients_are_those_of_all_uses_of_what_is_shared_and_of_all_parts(
    models: dict[str, Path], text: Path, tmp_path: Path, name: str, targets: int
) -> None:
    left = pruned(models[name], tmp_path / "out", text, options={"criterion": "taylor"})
    model, dense = whole(name, models[name]), load(models[name])
    found = gradients_of(model, ids_of(text))
    changed = [tensor for tensor in dense if not torch.equal(dense[tensor], left[tensor])]
    assert len(changed) == targets
    for tensor in changed:
        parts = parameters_of(tensor) if name == "hrm" else [tensor]
        weights = torch.cat([model.get_parameter(part) for part in parts]).detach()
        assert torch.equal(dense[tensor], weights)
        scores = (weights.double() * torch.cat([found[part] for part in parts])).abs().float()
        assert torch.equal(left[tensor] != 0, keep_mask(scores)), tensor


def is_shared(name: str) -> bool:
    return ".shared_transf." in name


def prune_by_inputs(model: PreTrainedModel, ids: torch.Tensor, own: Callable[[str], bool]) -> None:
    """Prune some layers by Wanda's scores, on the inputs that they have all together."""
    layers = {name: part for name, part in model.named_modules() if is_linear(part) and own(name)}
    for key, x in all_inputs(model, ids, own).items():
        for layer in layers.values():
            if id(layer.weight) == key:
                weights = layer.weight.data
                keep = keep_mask((weights.double().abs() * x.norm(dim=0)).float())
                weights.mul_(keep)
                break


def test_a_block_that_is_used_again_stays_dense_until_its_last_use(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    left = pruned(models["zamba"], tmp_path / "out", text, options={"criterion": "wanda"})
    model, ids = whole("zamba", models["zamba"]), ids_of(text)
    # layers 0 and 2 have the shared block; layer 0, which the checkpoint has it in, waits with it
    prune_by_inputs(model, ids, lambda name: ".layers.1." in name)
    first = deepcopy(model)
    prune_by_inputs(first, ids, lambda name: is_shared(name) or ".layers.0." in name)
    # from here on, the second use is pruned, while the outputs of the first one were dense
    model.model.layers[2].shared_transf = first.model.layers[2].shared_transf
    prune_by_inputs(model, ids, lambda name: ".layers.2." in name and not is_shared(name))
    prune_by_inputs(model, ids, lambda name: ".layers.3." in name)
    for tensor, found in left.items():
        source = first if ".layers.0." in tensor else model
        assert torch.equal(found, source.state_dict()[tensor]), tensor


@pytest.mark.parametrize(("criterion", "repair"), [("wanda", "none"), ("magnitude", "obs")])
def test_a_run_that_stops_after_a_last_use_goes_on_to_the_same_bytes(
    models: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    criterion: str,
    repair: str,
) -> None:
    options = PruneOptions(criterion=criterion, repair=repair, calibration=calibration(text))
    prune(models["zamba"], tmp_path / "expected", options)
    process, done = MaskSink.process, []

    def interrupted(sink: MaskSink, unit: str, *more: Any) -> None:
        if done and done[-1] == "model.layers.0":
            raise KeyboardInterrupt
        process(sink, unit, *more)
        done.append(unit)

    with monkeypatch.context() as patch:
        patch.setattr(MaskSink, "process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(models["zamba"], tmp_path / "out", options)
    assert set(done) == {"model.layers.0", "model.layers.1"}
    prune(models["zamba"], tmp_path / "out", options)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize("name", ["zamba2", "gemma4"])
def test_a_part_that_is_used_again_matters_as_much_as_all_its_uses(
    models: dict[str, Path], text: Path, tmp_path: Path, name: str
) -> None:
    with opened(models[name], text, tmp_path, "all-linear") as session:
        found = divergences(session, parts_of(session.targets), lambda _, tensor: tensor * 0.5)
    dense = whole(name, models[name])
    for part, value in found.items():
        changed = deepcopy(dense)
        for tensor in part.names:
            # tied weights are tied in the copy as well
            changed.get_parameter(tensor).data.mul_(0.5)
        assert value == pytest.approx(divergence(dense, changed, ids_of(text)), rel=1e-3), part


def test_a_repair_restores_the_outputs_of_all_uses(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = {"criterion": "magnitude", "repair": "obs", "targets": "shared_transf"}
    left = pruned(models["zamba"], tmp_path / "out", text, options=options)
    model, dense = whole("zamba", models["zamba"]), load(models["zamba"])
    inputs = all_inputs(model, ids_of(text), is_shared)
    changed = [tensor for tensor in dense if not torch.equal(dense[tensor], left[tensor])]
    assert len(changed) == 7
    for tensor in changed:
        x, weights = inputs[id(model.get_parameter(tensor))], dense[tensor]
        keep = keep_mask(weights.abs())
        # nothing else is pruned, and the block is dense as long as it is used: x is the dense input
        squares = LeastSquares.of(weights, (x.T @ x).float(), tokens=len(x))
        expected = repair_obs(squares, keep)
        assert (left[tensor] - expected).abs().max() < 0.01 * weights.abs().max(), tensor
