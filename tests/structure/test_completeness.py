"""What a checkpoint lacks: a fault where the model needs it, a notice where a head is to come."""

from pathlib import Path

import pytest
from support.architectures import ARCHITECTURES, read_tensors, with_config

from emp_llm.errors import CheckpointError
from emp_llm.structure.targets import Decisions, decide_all, decide_targets

LISTED_IN = "model-00001-of-00002.safetensors"


def look(folder: Path, *without: str, absent: tuple[str, ...] = ()) -> Decisions:
    """Decide on a checkpoint without tensors whose names hold one of these parts."""
    tensors = {
        name: kind
        for name, kind in read_tensors(folder).items()
        if not any(part in name for part in without)
    }
    listed = dict.fromkeys(absent, LISTED_IN)
    return decide_all(folder, tensors, targets="mlp", ignore=(), absent=listed)


def refusal(folder: Path, *without: str, absent: tuple[str, ...] = ()) -> str:
    with pytest.raises(CheckpointError) as caught:
        look(folder, *without, absent=absent)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_missing_in_what_transformers_saves(architecture: str, tiny_model) -> None:
    assert look(tiny_model(architecture)).missing == []


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        ("llama-tied", "lm_head.weight"),
        ("t5", "encoder.embed_tokens.weight"),
        ("bert", "cls.predictions.decoder.weight"),
    ],
)
def test_a_listed_name_that_is_tied_to_another_is_not_needed(
    architecture: str, tied: str, tiny_model
) -> None:
    assert look(tiny_model(architecture), absent=(tied,)).missing == []


def test_of_two_tied_tensors_either_will_do(tiny_model) -> None:
    folder = tiny_model("llama-tied")
    tensors = read_tensors(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    found = decide_all(
        folder,
        tensors,
        targets="mlp",
        ignore=(),
        absent={"model.embed_tokens.weight": LISTED_IN},
    )
    assert found.missing == []


@pytest.mark.parametrize(
    "unused",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.embed_tokens.position_ids", "other"],
)
def test_a_listed_name_that_the_model_has_no_place_for_is_not_needed(
    unused: str, tiny_model
) -> None:
    assert look(tiny_model("llama"), absent=(unused,)).missing == []


@pytest.mark.parametrize(
    "needed", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_listed_tensor_that_the_model_needs_is_named_with_its_file(
    needed: str, tiny_model
) -> None:
    folder = tiny_model("llama")
    assert refusal(folder, needed, absent=(needed,)).startswith(
        f"{folder}: {LISTED_IN} lacks tensor '{needed}', which the index lists and "
        "LlamaForCausalLM needs (1 missing)"
    )


def test_a_listed_expert_that_is_merged_when_loaded_is_needed(tiny_model) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    message = refusal(tiny_model("mixtral"), ".1.block_sparse_moe.experts.", absent=(name,))
    assert f"lacks tensor '{name}'" in message


@pytest.mark.parametrize(
    ("part", "count"), [(".1.mlp.up_proj", 1), (".1.self_attn.k_proj", 1), ("layers.1.", 7)]
)
def test_a_layer_that_other_blocks_have_is_named(part: str, count: int, tiny_model) -> None:
    folder = tiny_model("llama")
    message = refusal(folder, part)
    assert f"({count} missing), which other blocks have" in message
    assert message.startswith(f"{folder}: no tensor gives 'model.layers.1.")


@pytest.mark.parametrize(
    ("architecture", "part", "says"),
    [
        ("mixtral", ".1.block_sparse_moe.experts.2.w2", "3 tensors give 'model.layers.1.mlp."),
        ("qwen3-moe", ".0.mlp.experts.3.up_proj", "7 tensors give 'model.layers.0.mlp."),
    ],
)
def test_an_expert_that_other_blocks_have_is_missed(
    architecture: str, part: str, says: str, tiny_model
) -> None:
    message = refusal(tiny_model(architecture), part)
    assert says in message
    assert "in another block: the checkpoint is incomplete" in message


def test_a_config_with_more_blocks_than_were_saved_is_refused(tiny_model, tmp_path) -> None:
    folder = with_config(tmp_path, tiny_model("llama"), num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"'model.layers.2.*more blocks than were saved"):
        decide_targets(folder, read_tensors(tiny_model("llama")))


def test_layers_of_another_architecture_are_named_beside_what_they_stand_for(tiny_model) -> None:
    tensors = read_tensors(tiny_model("phi3"))  # it has qkv_proj where a Llama has three layers
    with pytest.raises(CheckpointError) as caught:
        decide_targets(tiny_model("llama"), tensors, targets="all-linear")
    assert (
        "LlamaForCausalLM has no place for 'model.layers.0.mlp.gate_up_proj.weight', and no tensor "
        "gives its 'model.layers.0.self_attn.q_proj.weight'"
    ) in str(caught.value)


def test_a_part_of_a_model_is_to_be_called_by_its_class(tiny_model, tmp_path) -> None:
    folder = tiny_model("t5")
    assert refusal(folder, "decoder.block.", "decoder.final") == (
        f"{folder}: no tensor belongs to the blocks 'decoder.block.*' of "
        "T5ForConditionalGeneration: save all of the model or, if it is a part, name the part's "
        "class under architectures in config.json"
    )
    part = with_config(tmp_path, folder, architectures=["T5EncoderModel"])
    tensors = {n: kind for n, kind in read_tensors(folder).items() if "decoder." not in n}
    assert decide_all(part, tensors, targets="mlp", ignore=()).missing == []


def test_a_head_that_is_still_to_be_trained_is_a_notice(tiny_model, tmp_path) -> None:
    folder = with_config(
        tmp_path, tiny_model("llama"), architectures=["LlamaForSequenceClassification"]
    )
    found = decide_all(folder, read_tensors(tiny_model("llama")), targets="mlp", ignore=())
    assert found.missing == ["score.weight"]


def test_a_norm_that_is_missing_is_a_notice(tiny_model) -> None:
    assert look(tiny_model("llama"), "model.norm").missing == ["model.norm.weight"]
