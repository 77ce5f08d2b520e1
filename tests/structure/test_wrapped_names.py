"""Names that a wrapper has changed are told by that wrapper, and how to get rid of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.architectures import read_tensors

from emp_llm.errors import CheckpointError
from emp_llm.structure.targets import decide_targets


def refusal(folder: Path, rename: Callable[[str], str]) -> str:
    tensors = {rename(name): kind for name, kind in read_tensors(folder).items()}
    with pytest.raises(CheckpointError) as caught:
        decide_targets(folder, tensors)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    return message


def in_blocks(part: str) -> Callable[[str], str]:
    """Puts a part of a name behind the index of the decoder block."""
    return lambda name: name.replace("layers.0.", f"layers.0.{part}").replace(
        "layers.1.", f"layers.1.{part}"
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("_orig_mod.", "'_orig_mod.', which torch.compile adds"),
        ("module.", "'module.', which DataParallel, DistributedDataParallel or DeepSpeed adds"),
        ("_forward_module.", "'_forward_module.', which Lightning Fabric adds"),
    ],
)
def test_the_wrapper_of_a_whole_model_is_named(
    architecture: str, prefix: str, says: str, tiny_model
) -> None:
    folder = tiny_model(architecture)
    count = len(read_tensors(folder))
    message = refusal(folder, lambda name: prefix + name)
    assert f"{count} of {count} tensors have no place in" in message
    assert f"their names hold {says}: save the model that is inside" in message


def test_nested_wrappers_are_all_named(tiny_model) -> None:
    message = refusal(tiny_model("llama"), lambda name: f"_orig_mod.module.{name}")
    assert "'_orig_mod.', which torch.compile adds" in message
    assert "'module.', which DataParallel" in message


@pytest.mark.parametrize(
    ("part", "who"),
    [
        ("_orig_mod.", "torch.compile"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("_checkpoint_wrapped_module.", "activation checkpointing"),
    ],
)
def test_wrappers_of_decoder_blocks_are_named(part: str, who: str, tiny_model) -> None:
    message = refusal(tiny_model("llama"), in_blocks(part))
    assert f"'{part}', which {who} adds" in message
    assert "18 of 21 tensors" in message  # 9 in each of 2 blocks, 3 outside of them


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("up_proj.", "up_proj.base_layer."),
        lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."),
    ],
)
def test_names_inside_a_peft_model_are_to_be_merged(rename, tiny_model) -> None:
    message = refusal(tiny_model("llama"), rename)
    assert "is a name inside a PEFT model: merge the adapter first (merge_and_unload)" in message


def test_the_flattened_parameters_of_fsdp_are_to_be_saved_whole(tiny_model) -> None:
    folder = tiny_model("llama")
    tensors = {name: kind for name, kind in read_tensors(folder).items() if "layers.1." not in name}
    tensors["model.layers.1._fsdp_wrapped_module._flat_param"] = ("BF16", (1888,))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\..*full state dict"):
        decide_targets(folder, tensors)


@pytest.mark.parametrize("prefix", ["net.", "policy.net.", "trainer.student.net."])
def test_any_other_prefix_is_named(prefix: str, tiny_model) -> None:
    message = refusal(tiny_model("llama"), lambda name: prefix + name)
    assert (
        f"their names begin with '{prefix}', which a trainer or a larger model puts before"
        in message
    )


def test_names_of_another_library_are_said_to_be_that(tiny_model) -> None:
    message = refusal(tiny_model("llama"), lambda name: name.replace(".", "_"))
    assert "21 of 21 tensors have no place in LlamaForCausalLM, such as 'lm_head_weight'" in message
    assert "another library's names" in message


def test_what_the_model_has_no_place_for_beside_all_that_it_needs_is_no_matter(tiny_model) -> None:
    folder = tiny_model("llama")
    tensors = read_tensors(folder)
    more = {f"module.{name}": kind for name, kind in tensors.items()}
    adapter = {"model.layers.0.mlp.up_proj.lora_A.weight": ("BF16", (2, 16))}
    assert decide_targets(folder, tensors | more | adapter)
