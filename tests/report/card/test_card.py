"""Model cards: what of the source's is kept, what is said of the pruning, and that it stays one."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cards import BEGIN, pruned_card, take_apart

from emp_llm import unpack
from emp_llm.report.card.card import write_card

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
    assert f"Made from `meta-llama/Llama-2-7b-hf` at `{'0' * 40}`" in ours
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
    pytest.param("note: " + "x" * 2_000_000, id="two megabytes"),
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
