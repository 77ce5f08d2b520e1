"""A model whose weights stay packed in a GPU's memory; all here needs one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import differing, load
from support.loading import load_model, logits
from support.wide_models import WideModel

from emp_llm import EmpConfig, densify
from emp_llm.resident.weight import PackedWeight

KEPT = EmpConfig(keep_packed=True)

pytestmark = pytest.mark.gpu

architectures = pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])


@pytest.fixture
def kept(wide_packed: WideModel) -> Callable[..., Any]:
    def make(architecture: str, **options: Any) -> Any:
        folder = wide_packed(architecture)
        return load_model(architecture, folder, quantization_config=KEPT, **options)

    return make


def packed(model: torch.nn.Module) -> dict[str, PackedWeight]:
    return {name: it for name, it in model.named_parameters() if isinstance(it, PackedWeight)}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 0.03 * expected.abs().max()
    assert (found.float() - expected.float()).abs().max() <= limit


def said(model: Any) -> torch.Tensor:
    """Its logits for two prompts, of which one is padded."""
    tokens = torch.tensor([[4, 9, 14, 19], [0, 0, 5, 6]], device=model.device)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
    return found.cpu()


@architectures
def test_it_is_loaded_to_a_gpu_and_stays_packed(
    kept: Callable[..., Any], wide_packed: WideModel, architecture: str, tmp_path: Path
) -> None:
    on_cpu, model = kept(architecture), kept(architecture, device_map="cuda")
    assert packed(model).keys() == packed(on_cpu).keys()
    assert {it.device.type for it in model.parameters()} == {"cuda"}
    assert any(it.content.planes[0].is_whole for it in packed(model).values())
    dense = load_model(architecture, wide_packed(architecture), device_map="cuda")
    assert_near(said(model), said(dense))
    assert_near(said(model), said(on_cpu))
    assert_near(said(on_cpu.to("cuda")), said(dense))
    model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(wide_packed(architecture))) == []
    back = model.to("cpu")
    assert torch.equal(logits(back), logits(kept(architecture)))
    assert torch.equal(said(densify(kept(architecture, device_map="cuda"))), said(dense))


@architectures
def test_a_dense_checkpoint_is_pruned_on_the_way_to_a_gpu(
    kept: Callable[..., Any], wide_model: WideModel, architecture: str
) -> None:
    folder = wide_model(architecture)
    model = load_model(architecture, folder, quantization_config=KEPT, device_map="cuda")
    again = kept(architecture)
    assert packed(model).keys() == packed(again).keys()
    for name, weight in packed(model).items():
        assert torch.equal(weight.unpacked().cpu(), packed(again)[name].unpacked())


def test_it_takes_the_memory_of_its_planes(
    kept: Callable[..., Any], wide_packed: WideModel
) -> None:
    taken = []
    for make in (
        lambda: kept("llama-tied", device_map="cuda"),
        lambda: load_model("llama-tied", wide_packed("llama-tied"), device_map="cuda"),
    ):
        before = torch.cuda.memory_allocated()
        model = make()
        taken.append(torch.cuda.memory_allocated() - before)
        del model
    assert taken[0] < 0.9 * taken[1]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    "way",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "static cache, compiled"],
)
def test_it_generates(
    kept: Callable[..., Any], wide_packed: WideModel, way: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    model = kept("llama-tied", device_map="cuda")
    dense = load_model("llama-tied", wide_packed("llama-tied"), device_map="cuda")
    tokens = torch.tensor([[4, 9, 14, 19], [0, 0, 5, 6]], device="cuda")
    asked = {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found, expected = (it.generate(**asked, **way) for it in (model, dense))
    assert found.sequences.shape == expected.sequences.shape
    assert_near(found.logits[0], expected.logits[0])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_is_compiled_to_graphs(kept: Callable[..., Any], mode: str) -> None:
    torch._dynamo.reset()
    model = kept("llama-tied", device_map="cuda")
    expected = said(model)
    model.forward = torch.compile(model.forward, mode=mode)
    for _ in range(4):  # the third time a graph is replayed
        assert_near(said(model), expected)


def test_a_step_has_the_cpu_wait_for_nothing(kept: Callable[..., Any]) -> None:
    model = kept("llama-tied", device_map="cuda")
    tokens = torch.tensor([[4, 9, 14, 19]], device="cuda")
    places = torch.arange(4, device="cuda")[None]
    asked = {"input_ids": tokens, "position_ids": places, "use_cache": False}
    with torch.no_grad():
        expected = model(**asked).logits
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = model(**asked).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
