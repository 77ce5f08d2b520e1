"""Results that are saved beside a model and in its card."""

import json
from pathlib import Path

import pytest
from support.checkpoints import files
from support.word_models import words

import emp_llm
from emp_llm import EvalOptions, OptionError, evaluate
from emp_llm.evaluation.saving import save_results


def test_saved_figures_are_merged_and_the_rest_of_the_folder_stays(
    packed: Path, tmp_path: Path, text: str
) -> None:
    before = files(packed)
    first = evaluate(packed, words(texts=(text,), context=4), against=tmp_path / "dense")
    second = evaluate(packed, EvalOptions(texts=(text,), context=4, protocol="gptq"))
    again = evaluate(packed, EvalOptions(texts=(text,), context=4))

    for found in (first, second, again):
        save_results(packed, found.results())

    results = json.loads((packed / "emp_eval.json").read_text())["results"]
    how = "per token, protocol {}, context 4"
    assert [(one["dataset"]["name"], one["metric"]["name"]) for one in results] == [
        ("short.txt", f"perplexity ({how.format('paper')})"),
        ("short.txt", f"bits_per_byte ({how.format('paper')})"),
        ("words", "acc (0-shot, lm-eval)"),
        ("short.txt", f"perplexity ({how.format('gptq')})"),
        ("short.txt", f"bits_per_byte ({how.format('gptq')})"),
    ]
    assert results[0]["value"] == first.model.texts["short.txt"].perplexity
    assert results[0]["dense_value"] is None  # the last evaluation had nothing to compare with
    assert results[2]["value"] == first.model.tasks["words"].metrics["acc"]
    assert results[2]["stderr"] == first.model.tasks["words"].stderr["acc"]
    card = (packed / "README.md").read_text()
    assert f"| short.txt | perplexity ({how.format('gptq')}) |" in card
    after = files(packed)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"emp_eval.json", "README.md"}
    emp_llm.verify(packed)


def test_figures_are_saved_to_what_emp_llm_wrote_only(known: Path, tmp_path: Path) -> None:
    before = files(known)
    with pytest.raises(OptionError, match="was not written by emp-llm"):
        save_results(known, ())
    with pytest.raises(OptionError, match="is not a model's folder"):
        save_results(tmp_path / "no", ())
    assert files(known) == before


def test_a_card_that_cannot_be_written_leaves_the_old_one(
    packed: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluate(packed, EvalOptions(texts=(text,), context=4))
    card = (packed / "README.md").read_bytes()

    def fail(path: Path, *_rest: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("emp_llm.evaluation.saving.write_card", fail)
    with pytest.raises(emp_llm.OutputError, match="No space left on device"):
        save_results(packed, found.results())
    assert (packed / "README.md").read_bytes() == card
    assert [name for name in files(packed) if name.startswith(".")] == []
