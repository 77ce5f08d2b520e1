"""What model cards say: how to load, how it was made, sizes, figures of an evaluation."""

import json
import math
from pathlib import Path

import pytest
from support.cards import pruned_card, take_apart
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    files,
    gaussian,
    llama_config,
    mlp,
    write_checkpoint,
)
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from emp_llm import CheckpointError, FormatError, prune, unpack
from emp_llm.report.card.card import write_card
from emp_llm.structure.auto_class import auto_class

RESULT = {
    "task": {"type": "text-generation", "name": "Text generation"},
    "dataset": {"type": "Salesforce/wikitext", "name": "WikiText-2"},
    "metric": {"type": "perplexity", "name": "perplexity"},
    "value": 5.61,
    "dense_value": 5.47,
    "stderr": 0.0312,
}


def table_of(section: str, first: str) -> dict[str, list[str]]:
    """The rows of the table whose first column has this header, by what is in that column."""
    lines = section.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


# what it says


def test_a_packed_card_begins_with_what_is_needed_to_load_it(source: Path) -> None:
    _, ours, _ = take_apart(pruned_card(source, None))
    heading, warning = ours.split("\n\n")[:2]
    assert heading == "# source, pruned by Effective Model Pruning"
    assert warning.startswith("> **This checkpoint is packed and needs emp-llm: `pip install ")
    assert "size mismatch" in warning
    code = ours.partition("```python\n")[2].partition("```")[0]
    assert code.splitlines() == [
        "# needs emp-llm: pip install emp-llm",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("path or id of this model")',
    ]
    assert "pip install emp-llm\nemp-llm unpack FOLDER --out DENSE\n" in ours


def test_a_dense_card_says_that_everything_reads_it(source: Path) -> None:
    _, ours, _ = take_apart(pruned_card(source, None, output_format="dense"))
    assert "an ordinary checkpoint with zeros in it" in ours
    assert "emp_llm" not in ours.partition("## How")[0]


def test_the_table_has_a_row_for_each_kind_and_the_totals(tmp_path: Path) -> None:
    tensors = mlp(H, F) | {"model.norm.weight": gaussian(H)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    card = pruned_card(source, None)
    _, ours, _ = take_apart(card)
    table = table_of(ours, "layer")
    report = json.loads((card.parent / "emp_report.json").read_text())
    assert list(table) == [
        "down_proj",
        "gate_proj",
        "up_proj",
        "all targets",
        "not pruned",
        "whole model",
    ]
    total = after = kept = 0
    mass = kept_mass = 0.0
    unpack(card.parent, tmp_path / "dense")
    from support.checkpoints import load

    dense = load(tmp_path / "dense")
    for label, name in (("down_proj", DOWN), ("gate_proj", GATE), ("up_proj", UP)):
        weights, left = H * F, int((dense[name] != 0).sum())
        size = report["tensors"][name]["bytes_after"]
        own_mass = tensors[name].double().abs().sum().item()
        own_kept = dense[name].double().abs().sum().item()
        assert table[label] == [
            "1",
            f"{weights}",
            f"{1 - left / weights:.2%}",
            f"{own_kept / own_mass:.3f}",
            f"{weights * 2}",
            f"{size:,}",
            f"{size / (weights * 2):.3f}",
        ]
        total, after, kept = total + weights, after + size, kept + left
        mass, kept_mass = mass + own_mass, kept_mass + own_kept
    assert table["all targets"][:4] == [
        "3",
        f"{total}",
        f"{1 - kept / total:.2%}",
        f"{kept_mass / mass:.3f}",
    ]
    assert table["whole model"] == [
        "4",
        f"{total + H}",
        f"{(total - kept) / (total + H):.2%}",
        "",
        f"{(total + H) * 2:,}",
        f"{after + H * 2:,}",
        f"{(after + H * 2) / ((total + H) * 2):.3f}",
    ]


def test_the_command_has_the_options_that_are_not_the_default(source: Path) -> None:
    _, ours, _ = take_apart(pruned_card(source, None))
    assert "```\nemp-llm prune source --out DIR\n```" in ours
    options = {"beta": 0.75, "granularity": "layer", "targets": "gate|up", "ignore": ("gate",)}
    _, ours, _ = take_apart(pruned_card(source, None, output_format="dense", **options))
    assert (
        "```\nemp-llm prune source --out DIR --beta 0.75 --granularity layer --targets 'gate|up' "
        "--ignore gate --format dense\n```"
    ) in ours
    assert "- β = 0.75\n- groups: matrices\n- targets: `gate|up` without `gate`\n" in ours


def test_nothing_of_a_name_breaks_the_card(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "odd `name`\n| of it", llama_config(H, F), mlp(H, F))
    _, ours, _ = take_apart(pruned_card(source, None, ignore=("a`|b",)))
    assert ours.startswith("# odd `name` | of it, pruned by")
    assert "Made from `` odd `name` | of it `` with emp-llm" in ours
    assert "without `` a`|b ``" in ours


def test_a_card_does_not_depend_on_the_machine(source: Path, tmp_path: Path) -> None:
    first = pruned_card(source, "---\nb: 1\na: 2\n---\nHi\n").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "source").symlink_to(source)
    prune(tmp_path / "elsewhere" / "source", tmp_path / "elsewhere" / "out", threads=1)
    assert (tmp_path / "elsewhere" / "out" / "README.md").read_bytes() == first
    assert str(tmp_path).encode() not in first


# figures of an evaluation


def evaluated(card: Path, *results: object) -> None:
    (card.parent / "emp_eval.json").write_text(json.dumps({"results": results}))
    report = json.loads((card.parent / "emp_report.json").read_text())
    write_card(card, card, report, repo_id="me/model")


def test_figures_go_into_a_table_and_into_the_metadata(source: Path) -> None:
    card = pruned_card(source, None)
    accuracy = {
        "task": {"type": "multiple-choice", "name": "ARC easy"},
        "dataset": {"type": "allenai/ai2_arc", "name": "ARC | easy"},
        "metric": {"type": "accuracy", "name": "accuracy"},
        "value": 0.5,
        "dense_value": None,
        "stderr": None,
    }
    evaluated(card, RESULT, accuracy)
    fields, ours, _ = take_apart(card)
    assert (
        "| Text generation | WikiText-2 | perplexity | 5.61 ± 0.031 | 5.47 |\n"
        "| ARC easy | ARC \\| easy | accuracy | 0.5 |  |\n"
    ) in ours
    assert fields["model-index"] == [
        {
            "name": "model",
            "results": [
                {
                    "task": RESULT["task"],
                    "dataset": RESULT["dataset"],
                    "metrics": [{"type": "perplexity", "name": "perplexity", "value": 5.61}],
                },
                {
                    "task": accuracy["task"],
                    "dataset": accuracy["dataset"],
                    "metrics": [{"type": "accuracy", "name": "accuracy", "value": 0.5}],
                },
            ],
        }
    ]


def test_new_figures_take_the_place_of_the_old_and_others_stay(source: Path) -> None:
    card = pruned_card(source, None)
    other = RESULT | {"metric": {"type": "bits", "name": "bits per byte"}}
    evaluated(card, RESULT, other)
    evaluated(card, RESULT | {"value": 7.5})
    (index,) = take_apart(card)[0]["model-index"]
    figures = [m["value"] for result in index["results"] for m in result["metrics"]]
    assert sorted(figures) == [5.61, 7.5]
    assert take_apart(card)[1].count("perplexity") == 1


def test_a_folders_own_figures_stay_without_a_file(source: Path) -> None:
    card = pruned_card(source, None)
    evaluated(card, RESULT)
    expected = take_apart(card)[0]["model-index"]
    (card.parent / "emp_eval.json").unlink()
    report = json.loads((card.parent / "emp_report.json").read_text())
    write_card(card, card, report, repo_id="me/model")
    assert take_apart(card)[0]["model-index"] == expected


@pytest.mark.parametrize("index", ["7", "[{name: x}]", "[[]]", "{}"])
def test_figures_of_a_card_that_are_none_give_way(source: Path, index: str) -> None:
    card = pruned_card(source, None)
    card.write_text(card.read_text().replace("---\n", f"---\nmodel-index: {index}\n", 1))
    evaluated(card, RESULT)
    (found,) = take_apart(card)[0]["model-index"]
    assert [result["metrics"][0]["value"] for result in found["results"]] == [5.61]


def test_an_evaluation_is_not_taken_along(source: Path) -> None:
    card = pruned_card(source, None)
    evaluated(card, RESULT)
    unpack(card.parent, source.with_name("unpacked"))
    assert "emp_eval.json" not in files(source.with_name("unpacked"))
    assert "## Evaluation" not in (source.with_name("unpacked") / "README.md").read_text()


MALFORMED = {
    "no results": ({}, "results is None, it must be a list"),
    "an object": ({"results": {}}, "results is {}, it must be a list"),
    "no object": ({"results": [RESULT, 7]}, "results[1] is 7, it must be an object"),
    "no value": ({"results": [RESULT | {"value": None}]}, "results[0].value is None"),
    "a flag": ({"results": [RESULT | {"value": True}]}, "results[0].value is True"),
    "text": ({"results": [RESULT | {"stderr": "5"}]}, "results[0].stderr is '5'"),
    "infinity": ({"results": [RESULT | {"dense_value": math.inf}]}, "dense_value is inf"),
    "no task": ({"results": [RESULT | {"task": "x"}]}, "results[0].task is 'x'"),
    "no name": ({"results": [RESULT | {"metric": {"type": "x"}}]}, "results[0].metric is {"),
    "no type": (
        {"results": [RESULT | {"dataset": {"type": " ", "name": "x"}}]},
        'it must be an object with strings "type" and "name"',
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_evaluation_is_one_error(source: Path, case: str) -> None:
    content, reason = MALFORMED[case]
    card = pruned_card(source, None)
    before = card.read_bytes()
    (card.parent / "emp_eval.json").write_text(json.dumps(content))
    with pytest.raises(FormatError) as caught:
        write_card(card, card, None)
    assert str(caught.value).startswith(f"{card.parent / 'emp_eval.json'}: results")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert card.read_bytes() == before


def test_an_evaluation_that_is_no_json_is_one_error(source: Path) -> None:
    card = pruned_card(source, None)
    (card.parent / "emp_eval.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        write_card(card, card, None)


# classes to load with

ARCHITECTURES = [
    ("llama", "LlamaForCausalLM", "CAUSAL_LM"),
    ("gpt2", "GPT2LMHeadModel", "CAUSAL_LM"),
    ("mixtral", "MixtralForCausalLM", "CAUSAL_LM"),
    ("bert", "BertForMaskedLM", "MASKED_LM"),
    ("bert", "BertForPreTraining", "PRETRAINING"),
    ("bert", "BertForNextSentencePrediction", "NEXT_SENTENCE_PREDICTION"),
    ("roberta", "RobertaForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    ("roberta", "RobertaForTokenClassification", "TOKEN_CLASSIFICATION"),
    ("bert", "BertForQuestionAnswering", "QUESTION_ANSWERING"),
    ("bert", "BertForMultipleChoice", "MULTIPLE_CHOICE"),
    ("vit", "ViTForImageClassification", "IMAGE_CLASSIFICATION"),
    ("t5", "T5ForConditionalGeneration", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("bart", "BartForConditionalGeneration", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("llava", "LlavaForConditionalGeneration", "IMAGE_TEXT_TO_TEXT"),
    ("bert", "BertModel", ""),
    ("llama", "LlamaModel", ""),
]


@pytest.mark.parametrize(("model_type", "architecture", "mapping"), ARCHITECTURES)
def test_the_class_to_load_with_is_one_that_makes_this_architecture(
    model_type: str, architecture: str, mapping: str
) -> None:
    import transformers

    config = AutoConfig.for_model(model_type).to_dict() | {"architectures": [architecture]}
    name = f"MODEL_FOR_{mapping}_MAPPING_NAMES" if mapping else "MODEL_MAPPING_NAMES"
    assert getattr(modeling_auto, name)[model_type] == architecture
    chosen = getattr(transformers, auto_class(config))
    expected = getattr(modeling_auto, name.removesuffix("_NAMES"))
    assert chosen._model_mapping is expected


@pytest.mark.parametrize(
    "architectures", [None, [], "LlamaForCausalLM", [None], ["MyOwnThing"], ["WhisperForX"]]
)
def test_where_the_architecture_does_not_say_it_is_auto_model(architectures: object) -> None:
    assert auto_class({"architectures": architectures}) == "AutoModel"


def test_speech_is_not_taken_for_text() -> None:
    config = AutoConfig.for_model("whisper").to_dict()
    config["architectures"] = ["WhisperForConditionalGeneration"]
    assert auto_class(config) == "AutoModel"
