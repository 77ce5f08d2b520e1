"""Model cards: what of the source's is kept, what is said of the pruning, and that it stays one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import DOWN, GATE, UP, F, H, files, gaussian, llama_config, mlp, write_checkpoint
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from emp_llm import CheckpointError, FormatError, PruneOptions, prune, unpack
from emp_llm.card import write_card
from emp_llm.loading import auto_class

BEGIN, END = "<!-- emp-llm -->\n", "<!-- /emp-llm -->\n"

RESULT = {
    "task": {"type": "text-generation", "name": "Text generation"},
    "dataset": {"type": "Salesforce/wikitext", "name": "WikiText-2"},
    "metric": {"type": "perplexity", "name": "perplexity"},
    "value": 5.61,
    "dense_value": 5.47,
    "stderr": 0.0312,
}


def take_apart(card: Path) -> tuple[dict[str, Any], str, str]:
    """Metadata, our section and the rest."""
    data = card.read_bytes()
    assert b"\r" not in data
    opening, front, text = data.decode().split("---\n", 2)
    assert opening == ""
    before, _, after = text.partition(BEGIN)
    ours, _, rest = after.partition(END)
    assert before == "\n"
    return yaml.safe_load(front), ours, rest


def pruned_card(source: Path, card: str | bytes | None, **options: Any) -> Path:
    """The card of a source that has this one."""
    if card is not None:
        (source / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    out = source.with_name(f"out {len(list(source.parent.iterdir()))}")
    prune(source, out, PruneOptions(**options))
    return out / "README.md"


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


# metadata


def test_a_source_without_a_card_gets_one(source: Path) -> None:
    fields, ours, rest = take_apart(pruned_card(source, None))
    tags = ["emp", "pruned", "sparse", "emp-llm"]
    assert fields == {"library_name": "transformers", "tags": tags}
    assert ours.startswith("# source, pruned by Effective Model Pruning\n")
    assert rest == ""


def test_metadata_of_the_source_is_kept(source: Path) -> None:
    front = {
        "license": "other",
        "license_name": "llama2",
        "license_link": "LICENSE.txt",
        "language": ["en", "de"],
        "tags": ["llama", "chat"],
        "datasets": ["wikitext"],
        "pipeline_tag": "text-generation",
        "extra_gated_prompt": "Line one\n\n  Line two: *yes*\n",
        "widget": [{"text": "Hello — 你好 😀"}],
        "my own key": {"nested": [1, 2.5, True, "true"]},
        "base_model": "somebody/base",
        "base_model_relation": "finetune",
        "co2_eq_emissions": 1.5,
    }
    text = yaml.dump(front, sort_keys=False, allow_unicode=True)
    fields, _, rest = take_apart(pruned_card(source, f"---\n{text}---\n# A model\n\nIt talks.\n"))
    tags = ["llama", "chat", "emp", "pruned", "sparse", "emp-llm"]
    assert fields == front | {"tags": tags, "library_name": "transformers"}
    assert list(fields)[: len(front)] == list(front)
    assert rest == "\n# A model\n\nIt talks.\n"


@pytest.mark.parametrize("language", ["no", "[en, no, on, y]", "\n- no\n- yes"])
def test_norwegian_is_not_false(source: Path, language: str) -> None:
    fields, _, _ = take_apart(pruned_card(source, f"---\nlanguage: {language}\n---\n"))
    found = fields["language"]
    assert "no" in found
    assert all(isinstance(part, str) for part in found)


def test_booleans_of_metadata_stay_booleans(source: Path) -> None:
    card = "---\ninference: false\nx: True\ny: truely\nz: 'false'\n---\n"
    fields, _, _ = take_apart(pruned_card(source, card))
    assert (fields["inference"], fields["x"]) == (False, True)
    assert (fields["y"], fields["z"]) == ("truely", "false")


@pytest.mark.parametrize("tags", ["llama", "[llama]", "[emp, llama, sparse, emp-llm, llama]"])
def test_tags_are_there_once(source: Path, tags: str) -> None:
    fields, _, _ = take_apart(pruned_card(source, f"---\ntags: {tags}\n---\n"))
    assert fields["tags"] == ["llama", "emp", "pruned", "sparse", "emp-llm"]


def test_a_dense_model_is_not_tagged_with_the_package_that_it_does_not_need(source: Path) -> None:
    card = "---\ntags: [emp-llm]\n---\n"
    fields, _, _ = take_apart(pruned_card(source, card, output_format="dense"))
    assert fields["tags"] == ["emp", "pruned", "sparse"]


def report_from_the_hub(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "emp_report.json").read_text())
    return report | {"source": {"model": "meta-llama/Llama-2-7b-hf", "revision": "0" * 40}}


def test_the_base_model_is_a_source_of_the_hub(source: Path) -> None:
    card = pruned_card(source, "---\nbase_model: older/one\nbase_model_relation: merge\n---\nHi\n")
    write_card(card, source / "README.md", report_from_the_hub(card.parent))
    fields, ours, _ = take_apart(card)
    assert fields["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert "base_model_relation" not in fields
    assert f"From `meta-llama/Llama-2-7b-hf` at `{'0' * 40}`" in ours
    assert f"emp-llm prune meta-llama/Llama-2-7b-hf --out DIR --revision {'0' * 40}\n" in ours


def test_figures_of_the_source_are_not_those_of_the_pruned_model(source: Path) -> None:
    index = [{"name": "x", "results": [{"metrics": [{"type": "acc", "value": 1}]}]}]
    front = yaml.dump({"license": "mit", "model-index": index})
    fields, _, _ = take_apart(pruned_card(source, f"---\n{front}---\n"))
    assert "model-index" not in fields
    assert fields["license"] == "mit"


# cards that are not as they should be


@pytest.mark.parametrize(
    "card",
    [
        b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mod\xc3\xa8le\n\nIt talks.\n",
        b"---\r\nlicense: mit\r\n---\r\n# Mod\xc3\xa8le\r\n\r\nIt talks.\r\n",
        b"---\nlicense: mit\n---\n# Mod\xe8le\n\nIt talks.\n",
        b"\n\n---  \nlicense: mit\n---  \n\n\n# Mod\xc3\xa8le\n\nIt talks.\n\n\n",
        b"---\nlicense: mit\n---\n# Mod\xc3\xa8le\n\nIt talks.",
    ],
    ids=["byte order mark", "CRLF", "latin-1", "spaces", "no last line end"],
)
def test_a_card_in_any_encoding_keeps_metadata_and_text(source: Path, card: bytes) -> None:
    fields, _, rest = take_apart(pruned_card(source, card))
    assert fields["license"] == "mit"
    assert rest == "\n# Modèle\n\nIt talks.\n"


@pytest.mark.parametrize(
    "text",
    ["# A model\n", "Some text\n---\nmore: text\n---\n", "    code\n\ntext\n", "-- no metadata\n"],
)
def test_a_card_without_metadata_keeps_its_text(source: Path, text: str) -> None:
    fields, _, rest = take_apart(pruned_card(source, text))
    assert fields.keys() == {"library_name", "tags"}
    assert rest == f"\n{text}"


@pytest.mark.parametrize("front", ["", "\n", "# a comment\n"])
def test_empty_metadata_is_none(source: Path, front: str) -> None:
    fields, _, rest = take_apart(pruned_card(source, f"---\n{front}---\n# A model\n\n---\nend\n"))
    assert fields.keys() == {"library_name", "tags"}
    assert rest == "\n# A model\n\n---\nend\n"


UNREADABLE = [
    "license: [mit",
    "license: mit\n  tags: x\n",
    "just words",
    "- a\n- list",
    "when: 2024-99-99",
    "when: !!timestamp no",
    "flag: !!bool perhaps",
    "object: !!python/object:os.system {}",
    "? [a, b]\n: c",
    "self: 1",
    "ignore_metadata_errors: true",
    "eval_results: yes it has",
    "text: ```\n\t- x",
]


@pytest.mark.parametrize("front", UNREADABLE)
def test_metadata_that_cannot_be_read_goes_on_as_text(source: Path, front: str) -> None:
    card = pruned_card(source, f"---\n{front}\n---\n# A model\n")
    fields, _, rest = take_apart(card)
    assert fields.keys() == {"library_name", "tags"}
    fence = "````" if "```" in front else "```"
    quoted = f"{fence}yaml\n{front}\n{fence}\n"
    assert rest == (f"\nThe metadata of this card could not be read:\n\n{quoted}\n# A model\n")


# one section, the same bytes


def test_pruning_again_does_not_pile_up_sections(source: Path) -> None:
    card = pruned_card(source, "---\nlicense: mit\n---\n# A model\n", output_format="dense")
    again = pruned_card(card.parent, None, beta=0.5)
    fields, ours, rest = take_apart(again)
    assert fields["tags"] == ["emp", "pruned", "sparse", "emp-llm"]
    assert again.read_text().count(BEGIN) == 1
    assert "β = 0.5" in ours
    assert rest == "\n# A model\n"


@pytest.mark.parametrize("text", ["# A model\n", "", "---\nlicense: [mit\n---\n# A model\n"])
def test_writing_a_card_again_changes_nothing(source: Path, text: str) -> None:
    card = pruned_card(source, text)
    before = card.read_bytes()
    write_card(card, card, json.loads((card.parent / "emp_report.json").read_text()))
    assert card.read_bytes() == before


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_an_unpacked_folder_has_the_card_of_a_dense_one(source: Path, granularity: str) -> None:
    text = "---\ntags: [x]\nlanguage: no\nbase_model: a/b\nmodel-index: 7\n---\n# A model\n"
    packed = pruned_card(source, text, granularity=granularity)
    dense = pruned_card(source, text, granularity=granularity, output_format="dense")
    unpack(packed.parent, source.with_name("unpacked"))
    assert (source.with_name("unpacked") / "README.md").read_bytes() == dense.read_bytes()


def test_an_unpacked_folder_without_a_report_has_the_sources_card(source: Path) -> None:
    packed = pruned_card(source, "---\nlicense: mit\n---\n# A model\n").parent
    (packed / "emp_report.json").unlink()
    unpack(packed, source.with_name("unpacked"))
    text = (source.with_name("unpacked") / "README.md").read_text()
    assert BEGIN not in text
    assert text.endswith("---\n\n# A model\n")


def test_text_around_our_section_stays(source: Path) -> None:
    card = pruned_card(source, "# A model\n")
    text = card.read_text()
    card.write_text(text.replace(BEGIN, f"Mine.\n\n{BEGIN}").replace("# A model", "# My model"))
    write_card(card, card, json.loads((card.parent / "emp_report.json").read_text()))
    _, _, rest = take_apart(card)
    assert rest == "\nMine.\n\n# My model\n"


# what it says


def test_a_packed_card_begins_with_what_is_needed_to_load_it(source: Path) -> None:
    _, ours, _ = take_apart(pruned_card(source, None))
    heading, warning = ours.split("\n\n")[:2]
    assert heading == "# source, pruned by Effective Model Pruning"
    assert warning.startswith("> **This checkpoint is packed and needs `import emp_llm`.**")
    assert "size\n> mismatch" in warning
    code = ours.partition("```python\n")[2].partition("```")[0]
    assert code.splitlines() == [
        "import emp_llm  # registers the packed format",
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
    assert list(table) == ["down_proj", "gate_proj", "up_proj", "all targets", "whole model"]
    total = after = kept = 0
    mass = kept_mass = 0.0
    unpack(card.parent, tmp_path / "dense")
    from checkpoints import load

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
    assert "β = 0.75, a group is a layer, the targets are `gate|up` without `gate`." in ours


def test_nothing_of_a_name_breaks_the_card(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "odd `name`\n| of it", llama_config(H, F), mlp(H, F))
    _, ours, _ = take_apart(pruned_card(source, None, ignore=("a`|b",)))
    assert ours.startswith("# odd `name` | of it, pruned by")
    assert "From `` odd `name` | of it `` by emp-llm" in ours
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
