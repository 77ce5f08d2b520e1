"""A model whose weights stay packed is used as any other: it generates, is adapted and moved."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.checkpoints import differing, load
from support.loading import load_model, logits
from support.wide_models import WideModel

from emp_llm import EmpConfig, KeepSparsity, OptionError, SparsityHold, densify, merge_adapter
from emp_llm.resident.weight import PackedWeight

KEPT = EmpConfig(keep_packed=True)
PEFT_ASKS_AS_OLD_VERSIONS_DID = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def kept(wide_packed: WideModel) -> Callable[..., Any]:
    def make(architecture: str = "llama", **options: Any) -> Any:
        folder = wide_packed(architecture)
        return load_model(architecture, folder, quantization_config=KEPT, **options)

    return make


def packed_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict().items()
    return {name: it.unpacked() for name, it in state if isinstance(it, PackedWeight)}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 0.03 * expected.abs().max()
    assert (found.float() - expected.float()).abs().max() <= limit


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral", "t5"])
def test_it_generates(kept: Callable[..., Any], wide_packed: WideModel, architecture: str) -> None:
    model, dense = kept(architecture), load_model(architecture, wide_packed(architecture))
    tokens = torch.tensor([[4, 9, 14, 19], [0, 0, 5, 6]])
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"cache_implementation": "static"}]
    for way in ways:
        asked = {
            "input_ids": tokens,
            "attention_mask": (tokens != 0).long(),
            "do_sample": False,
            "max_new_tokens": 3,
            "min_new_tokens": 3,
            "pad_token_id": 0,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        found, expected = (it.generate(**asked, **way) for it in (model, dense))
        assert found.sequences.shape == expected.sequences.shape
        assert_near(found.logits[0], expected.logits[0])


@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral"])
def test_it_is_placed_by_a_device_map_and_copied(
    kept: Callable[..., Any], architecture: str
) -> None:
    model = kept(architecture, device_map="auto")
    twin = copy.deepcopy(kept(architecture))
    for other in (model, twin):
        assert differing(packed_state(other), packed_state(kept(architecture))) == []
        assert_near(logits(other), logits(kept(architecture)))


def test_what_is_offloaded_to_the_disk_is_dense(
    kept: Callable[..., Any], wide_packed: WideModel, tmp_path: Path
) -> None:
    model = kept(
        "llama-tied", device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert_near(logits(model), logits(load_model("llama-tied", wide_packed("llama-tied"))))


def test_its_state_is_loaded_again(kept: Callable[..., Any]) -> None:
    model, other = kept(), kept()
    state = model.state_dict()
    other.load_state_dict(state)
    dense = densify(kept())
    dense.load_state_dict(state)
    assert differing(packed_state(other), packed_state(model)) == []
    assert torch.equal(logits(dense), logits(densify(other)))


def test_its_vocabulary_is_resized_once_it_is_dense(kept: Callable[..., Any]) -> None:
    model = kept()
    rows = model.config.vocab_size + 8
    with pytest.raises(OptionError, match="cannot be changed"):
        model.resize_token_embeddings(rows)
    assert densify(kept()).resize_token_embeddings(rows).weight.shape[0] == rows


@PEFT_ASKS_AS_OLD_VERSIONS_DID
@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_adapters_on_top_of_it_are_trained(
    kept: Callable[..., Any], architecture: str, targets: list[str]
) -> None:
    model = kept(architecture)
    before = packed_state(model)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=targets, r=4, fan_in_fan_out=architecture == "gpt2")
    adapted = get_peft_model(model, lora)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer, tokens, losses = torch.optim.Adam(trained, lr=0.1), torch.arange(8)[None], []
    for _ in range(8):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in packed_state(adapted).items()
    }
    assert differing(after, before) == []
    with pytest.raises(OptionError, match=r"stays packed in memory.*densify"):
        merge_adapter(adapted)


def test_zeros_are_not_held_where_they_cannot_be_lost(kept: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="leave the holding of zeros out, or call"):
        SparsityHold(kept())
    with pytest.raises(OptionError, match="leave the holding of zeros out, or call"):
        KeepSparsity().on_init_end(model=kept())
    with pytest.raises(OptionError, match="cannot be trained: train adapters on top"):
        kept().requires_grad_(True)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    "architecture", ["llama-tied", pytest.param("mixtral", marks=pytest.mark.slow)]
)
def test_it_compiles(kept: Callable[..., Any], architecture: str) -> None:
    torch._dynamo.reset()
    model = kept(architecture)
    compiled = torch.compile(model, backend="aot_eager")
    assert_near(logits(compiled), logits(model))


def test_it_is_cast_as_the_dense_model_is(
    kept: Callable[..., Any], wide_packed: WideModel, tmp_path: Path
) -> None:
    model, dense = kept().half(), load_model("llama", wide_packed("llama")).half()
    assert model.dtype == torch.float16
    model.save_pretrained(tmp_path / "kept")
    dense.save_pretrained(tmp_path / "dense")
    assert differing(load(tmp_path / "kept"), load(tmp_path / "dense")) == []
