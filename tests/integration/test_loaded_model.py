"""A model that was pruned while it was loaded, or unpacked, is an ordinary one from then on."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import V
from support.checkpoints import differing, load
from support.expected_targets import EXPECTED
from support.loading import load_model, logits, state
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import emp_llm
from emp_llm import EmpConfig, OptionError

TinyModel = Callable[..., Path]
PACKED = {name + suffix for name in EXPECTED["llama"].mlp for suffix in ("", ".emp_rows")}
PEFT_ASKS_AS_OLD_VERSIONS_DID = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture(params=["pruned", "unpacked"])
def loaded(request: pytest.FixtureRequest, tiny_model: TinyModel, pruned_model: TinyModel) -> Any:
    """Loads a model pruned, in one way or the other."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
        if request.param == "unpacked":
            return load_model(architecture, pruned_model(architecture, dtype))
        source = tiny_model(architecture, dtype)
        return load_model(architecture, source, quantization_config=EmpConfig())

    return make


@pytest.fixture
def plain(pruned_model: TinyModel) -> Any:
    """Loads the same from a plain checkpoint."""

    def make(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
        return load_model(architecture, pruned_model(architecture, dtype, output_format="dense"))

    return make


def is_packed(folder: Path) -> bool:
    held = load(folder)
    return {name for name in held if held[name].dtype == torch.uint8} == PACKED


def assert_same(found: Any, expected: Any) -> None:
    assert differing(state(found), state(expected)) == []
    assert torch.equal(logits(found), logits(expected))


def test_transformers_does_not_take_it_for_a_quantized_one(loaded: Any, plain: Any) -> None:
    model, expected = loaded(), plain()
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "quantization_method")
    assert not getattr(model.config, "_is_quantized", False)
    attributes = vars(model).keys() - {"_weight_conversions"}
    assert attributes - {"is_quantized"} == vars(expected).keys() - {"_weight_conversions"}
    assert {type(part) for part in model.modules()} == {type(part) for part in expected.modules()}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.to("cpu", dtype=torch.bfloat16),
        lambda model: model.train().eval(),
        lambda model: model.requires_grad_(False),
        copy.deepcopy,
    ],
    ids=["half", "bfloat16", "double", "to", "to device and dtype", "train", "freeze", "deepcopy"],
)
def test_it_is_cast_moved_and_copied_as_any_other(loaded: Any, plain: Any, change: Any) -> None:
    assert_same(change(loaded()), change(plain()))


def test_it_is_moved_to_the_meta_device_and_made_anew(loaded: Any) -> None:
    model = loaded().to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.to_empty(device="cpu").parameters())


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt-oss"])
def test_a_copy_is_its_own_and_still_saves_itself_packed(
    loaded: Any, tmp_path: Path, architecture: str
) -> None:
    model = loaded(architecture)
    before = state(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert differing(state(model), before) == []
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "model")
    assert differing(load(tmp_path / "copy"), load(tmp_path / "model")) == []


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt-oss"])
def test_a_pickled_model_is_the_same_and_still_saves_itself_packed(
    loaded: Any, tmp_path: Path, architecture: str
) -> None:
    model = loaded(architecture)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(again, model)
    assert_same(pickle.loads(pickle.dumps(model)), model)  # noqa: S301 (written one line ago)
    again.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "model")
    assert differing(load(tmp_path / "again"), load(tmp_path / "model")) == []


def test_its_state_dict_loads_into_a_fresh_model_and_back(loaded: Any) -> None:
    model = loaded()
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert fresh.load_state_dict(model.state_dict()).missing_keys == []
    assert_same(fresh.eval(), model)
    assert model.load_state_dict(fresh.state_dict()).missing_keys == []


def test_a_fresh_model_of_its_config_is_dense_and_saves_itself_plainly(
    loaded: Any, tmp_path: Path
) -> None:
    fresh = AutoModelForCausalLM.from_config(loaded().config)
    assert all((fresh.get_parameter(name) != 0).all() for name in EXPECTED["llama"].mlp)
    fresh.save_pretrained(tmp_path)
    assert not any(tensor.dtype == torch.uint8 for tensor in load(tmp_path).values())
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), fresh.eval())


def test_it_compiles(loaded: Any, plain: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loaded(), backend="eager")
    assert torch.equal(logits(compiled), logits(plain()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "t5"])
def test_it_generates(loaded: Any, plain: Any, architecture: str) -> None:
    tokens = torch.tensor([[4, 9, 14, 19]])
    texts = [
        model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
        for model in (loaded(architecture), plain(architecture))
    ]
    assert texts[0].tolist() == texts[1].tolist()


def test_gradients_reach_pruned_weights_as_they_do_any_other(loaded: Any, plain: Any) -> None:
    tokens = torch.arange(8)[None]
    gradients = []
    for model in (loaded(), plain()):
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({name: it.grad for name, it in model.named_parameters()})
    assert differing(*gradients) == []
    name = EXPECTED["llama"].mlp[0]
    assert (gradients[0][name][model.get_parameter(name) == 0] != 0).any()


def test_its_embeddings_can_be_resized_and_saved(loaded: Any, tmp_path: Path) -> None:
    model = loaded("llama-tied")
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    model.save_pretrained(tmp_path)
    again = load_model("llama-tied", tmp_path)
    assert again.get_input_embeddings().weight.shape[0] == V + 3
    assert differing(state(again), state(model)) == []


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) + index).remainder(V)
        return {"input_ids": tokens, "labels": tokens}


# torch says so of its data loader where there is no accelerator
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_trains_it_and_saves_it_packed(loaded: Any, tmp_path: Path) -> None:
    model = loaded()
    before = state(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Tokens())
    trainer.train()
    assert differing(state(model), before) != []
    trainer.save_model(str(tmp_path / "saved"))
    assert is_packed(tmp_path / "saved")
    assert differing(state(load_model("llama", tmp_path / "saved")), state(model)) == []


@PEFT_ASKS_AS_OLD_VERSIONS_DID
def test_lora_is_put_on_top_trained_saved_and_loaded(loaded: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = loaded()
    frozen = state(base)
    expected = logits(base)
    adapted = get_peft_model(base, LoraConfig(target_modules=["up_proj", "q_proj"], r=2))
    assert torch.equal(logits(adapted), expected)  # B starts at zero
    tokens = torch.arange(8)[None]
    optimizer = torch.optim.SGD([it for it in adapted.parameters() if it.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert not torch.equal(logits(adapted), expected)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not any(".emp_" in name for name in load(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(loaded(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))
    left = again.unload()
    assert differing(state(left), frozen) == []
    left.save_pretrained(tmp_path / "saved")
    assert is_packed(tmp_path / "saved")


def test_an_adapter_is_loaded_by_transformers_itself(loaded: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = loaded()
    model.add_adapter(LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert not any(".emp_" in name for name in load(tmp_path / "adapter"))
    again = loaded()
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


@PEFT_ASKS_AS_OLD_VERSIONS_DID
def test_a_merged_adapter_is_saved_packed(loaded: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
    merged = get_peft_model(loaded(), lora).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert is_packed(tmp_path)
    assert_same(load_model("llama", tmp_path), merged)


# Its dense twin


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss"])
def test_densify_makes_a_model_pruned_while_loaded_save_itself_plainly(
    loaded: Any, plain: Any, tmp_path: Path, architecture: str
) -> None:
    model = emp_llm.densify(loaded(architecture))
    model.save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    plain(architecture).save_pretrained(tmp_path / "plain", max_shard_size="4KB")
    assert differing(load(tmp_path / "saved"), load(tmp_path / "plain")) == []
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert not any(".emp_" in path.read_text() for path in (tmp_path / "saved").glob("*.json"))
    assert_same(load_model(architecture, tmp_path / "saved"), plain(architecture))


def test_a_dense_twin_of_a_copy_leaves_the_model_packed(loaded: Any, tmp_path: Path) -> None:
    model = loaded()
    emp_llm.densify(copy.deepcopy(model)).save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "packed")
    assert not is_packed(tmp_path / "dense")
    assert is_packed(tmp_path / "packed")


def test_densify_of_an_ordinary_model_is_refused(loaded: Any, plain: Any) -> None:
    twin = emp_llm.densify(loaded())
    for model in (plain(), twin):
        with pytest.raises(OptionError, match="neither loaded from a packed checkpoint nor pruned"):
            emp_llm.densify(model)


def test_weights_that_became_nan_are_refused_with_what_to_do(loaded: Any, tmp_path: Path) -> None:
    model = loaded()
    name = EXPECTED["llama"].mlp[0]
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = float("nan")
    with pytest.raises(emp_llm.OutputError) as caught:
        model.save_pretrained(tmp_path / "saved")
    assert str(caught.value).startswith(f"{name!r} holds NaN or infinity")
    assert "densify" in str(caught.value)
    emp_llm.densify(model).save_pretrained(tmp_path / "dense")
    assert load(tmp_path / "dense")[name][1, 2].isnan()
