"""Fewer blocks, neurons and heads: each row is measured of what `shrink` would write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_cli.app import app
from support.calibrated import calibration, save_text, save_tokenizer
from support.mixtures import make_mixture
from support.widths import GROUPS, HEADS, NEURONS, SIZE, make
from typer.testing import CliRunner

from emp_llm import (
    CalibrationOptions,
    CheckpointError,
    EvalOptions,
    OptionError,
    ShrinkOptions,
    compare_structures,
    evaluate,
    shrink,
)
from emp_llm.comparison.bench import Bench
from emp_llm.comparison.structures_costs import StructuresComparison
from emp_llm.comparison.ways import Ways
from emp_llm.shrinking import block_choice
from emp_llm.shrinking.choice import KindName

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = " ".join(f"w{number * number % 31}" for number in range(90))
BLOCKS, HIDDEN = 3, 24
WAYS: Mapping[str, dict[str, Any]] = {
    "influence": {"block_score": "influence"},
    "loss": {"block_score": "loss"},
    "activation-repaired": {"width_score": "activation", "repair": "obs"},
    "obs-repaired": {"width_score": "obs", "repair": "obs"},
    "activation": {"width_score": "activation", "repair": "none"},
    "magnitude": {"width_score": "magnitude", "repair": "none"},
}


class Source:
    """A tiny Llama with texts, and what its smaller models cost by `shrink` and `evaluate`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "dense"
        model = make("llama", num_hidden_layers=BLOCKS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:  # so that the choice makes a difference
                    parameter.mul_(3 + 2 * ("layers.1" in name))
        model.save_pretrained(self.model)
        save_tokenizer(self.model, 32)
        self.words = save_text(folder / "words.txt")
        self.text = folder / "text.txt"
        self.text.write_text(TEXT)

    def compare(self, data: bool = True, **asked: Any) -> StructuresComparison:
        asked = {"context": 16, "dtype": "float32", "random_runs": 0, "seed": 5, **asked}
        given = calibration(self.words) if data else None
        return compare_structures(self.model, TEXT, calibration=given, **asked)

    def perplexity(self, out: Path, data: CalibrationOptions | None = None, **asked: Any) -> float:
        shrink(self.model, out, ShrinkOptions(calibration=data, **asked), threads=1)
        options = EvalOptions(texts=(str(self.text),), context=16, dtype="float32")
        return evaluate(out, options).model.texts["text.txt"].perplexity

    def by(self, out: Path, score: str, **amount: Any) -> float:
        data = None if score == "magnitude" else calibration(self.words)
        return self.perplexity(out, data, **WAYS[score], **amount)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("source"))


def perplexities(found: StructuresComparison) -> dict[tuple[str, int], float]:
    return {cost.key: cost.perplexity for cost in found.costs if cost.score != "dense"}


def test_blocks_are_those_that_shrink_keeps_and_go_one_by_one_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [1, 2]  # the second is what the first has measured on its way
    steps = []
    remove_next = block_choice.remove_next

    def counted(*asked: Any) -> Any:
        steps.append(asked)
        return remove_next(*asked)

    with monkeypatch.context() as patch:
        patch.setattr(block_choice, "remove_next", counted)
        found = source.compare(blocks=numbers)
    assert len(steps) == BLOCKS - 1
    expected = {
        (score, number): source.by(tmp_path / f"{score}{number}", score, blocks=number)
        for number in numbers
        for score in ("influence", "loss")
    }
    assert perplexities(found) == pytest.approx(expected, rel=1e-9)
    assert [*perplexities(found)] == [*expected]
    assert len(set(expected.values())) > 2
    queries, keys = HEADS * SIZE, GROUPS * SIZE
    attention = 2 * queries * HIDDEN + 2 * keys * HIDDEN + queries + 2 * keys + HIDDEN
    mlp, norms = 3 * NEURONS * HIDDEN + 2 * NEURONS + HIDDEN, 2 * HIDDEN
    gone = {cost.kept: found.dense.weights - cost.weights for cost in found.costs}
    assert gone == {left: (BLOCKS - left) * (attention + mlp + norms) for left in (3, 2, 1)}


def test_neurons_are_those_that_shrink_keeps_and_repairs(source: Source, tmp_path: Path) -> None:
    scores = ["activation-repaired", "activation", "magnitude"]
    found = source.compare(neurons=["40%"], multiple=8, scores=scores, random_runs=2)
    expected = {
        (score, 24): source.by(tmp_path / score, score, neurons="40%", multiple=8)
        for score in scores
    }
    at_random = {"neurons": 24, "multiple": 8, "width_score": "random", "repair": "none"}
    expected_run = source.perplexity(tmp_path / "6", CalibrationOptions(seed=6), **at_random)
    first, second = (run.perplexity for run in found.costs[-1].runs)
    assert second == pytest.approx(expected_run, rel=1e-9)
    assert first != second
    expected["random", 24] = (first + second) / 2
    assert perplexities(found) == pytest.approx(expected, rel=1e-9)
    assert len(set(expected.values())) == 4
    gone = BLOCKS * 16 * (3 * HIDDEN + 2)  # rows with their biases, and columns
    assert {found.dense.weights - cost.weights for cost in found.costs[1:]} == {gone}
    assert found.random(24) == found.costs[-1]


def test_key_value_heads_are_those_that_shrink_keeps_and_repairs(
    source: Source, tmp_path: Path
) -> None:
    found = source.compare(kv_heads=["67%"], scores=["obs-repaired"])
    expected = source.by(tmp_path / "out", "obs-repaired", kv_heads=1)
    assert perplexities(found) == pytest.approx({("obs-repaired", 1): expected}, rel=1e-9)
    # rows and biases of a key and a value head and two query heads, and columns that read these
    of_head = 4 * SIZE * (HIDDEN + 1) + 2 * SIZE * HIDDEN
    assert found.dense.weights - found.costs[1].weights == BLOCKS * (GROUPS - 1) * of_head


def test_without_data_only_what_needs_none_is_compared(source: Source, tmp_path: Path) -> None:
    found = source.compare(data=False, blocks=[2], random_runs=1)
    seeded = CalibrationOptions(seed=5)
    expected = source.perplexity(tmp_path / "out", seeded, blocks=2, block_score="random")
    assert perplexities(found) == pytest.approx({("random", 2): expected}, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "by_data", "without"),
    [
        ("experts", ("reap", "aimer", "norm"), ("aimer", "norm")),
        ("blocks", ("influence", "loss"), ()),
        (
            "neurons",
            ("activation-repaired", "obs-repaired", "activation", "magnitude"),
            ("magnitude",),
        ),
    ],
)
def test_by_default_all_scores_that_the_data_allow_are_compared(
    kind: KindName, by_data: tuple[str, ...], without: tuple[str, ...]
) -> None:
    data = CalibrationOptions(text="wikitext2")
    assert Ways.of(kind, None, [0], 64, data).scores == by_data
    assert Ways.of(kind, None, [0], 64, None).scores == without


def test_an_interrupted_comparison_goes_on_from_its_rows(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {
        "neurons": [24, 16],
        "multiple": 8,
        "save": tmp_path / "rows.json",
        "data": False,
        "random_runs": 1,
    }
    measure, labels = Bench.measure, []

    def interrupted(bench: Bench, label: str, **given: Any) -> Any:
        labels.append(label)
        if len(labels) == 4:
            raise KeyboardInterrupt
        return measure(bench, label, **given)

    monkeypatch.setattr(Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        source.compare(**asked)
    note = f"3 rows are kept in {tmp_path / 'rows.json'}: the same command goes on from there"
    assert caught.value.__notes__ == [note]
    again = source.compare(**asked)
    assert (again.taken, len(again.costs)) == (3, 5)
    assert labels[4] == "magnitude, 16 neurons"
    with pytest.raises(OptionError, match="multiple was 8, is 4"):
        source.compare(**{**asked, "multiple": 4})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "none of these are given: give one of experts, blocks, neurons and kv heads"),
        ({"blocks": [3], "kv_heads": [2]}, "blocks and kv heads are given: give one of experts"),
        ({"blocks": []}, r"blocks are \[\]; give a list of one or more"),
        ({"blocks": ["n_eff"]}, "blocks: n_eff is an amount of experts only: give how many stay"),
        ({"kv_heads": ["n_eff"]}, "kv heads: n_eff is an amount of experts only"),
        ({"blocks": ["25%"]}, "blocks is '25%': give how many stay, such as 6"),
        ({"blocks": ["auto"]}, "blocks is 'auto': give how many stay, such as 6"),
        ({"blocks": [2, 9]}, "blocks: 9 of them are to stay, but the model has 3 blocks"),
        ({"neurons": [30], "multiple": 8}, "neurons: 30 is no multiple of 8"),
        ({"neurons": [32], "multiple": 0}, "multiple is 0; give a whole number"),
        ({"kv_heads": [2], "scores": ["obs"]}, "score is 'obs'; .*activation-repaired"),
        ({"blocks": [3], "scores": ["random"]}, "scores: random is compared anyway, random_runs"),
        (
            {"neurons": [32], "scores": ["magnitude"]},
            "words.txt' would not be used by magnitude: leave",
        ),
        ({"blocks": [3], "data": False}, "blocks are ranked by data: give a text"),
        ({"blocks": [3], "scores": ["loss"], "data": False}, "block score 'loss' needs data"),
        ({"neurons": [32], "scores": ["activation"], "data": False}, "chosen and repaired by data"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_is_measured(
    source: Source, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Bench, "measure")
    with pytest.raises(OptionError, match=message) as caught:
        source.compare(**asked)
    assert "\n" not in str(caught.value)


def test_structures_that_a_model_cannot_lose_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Bench, "measure")
    make_mixture("mixtral", torch.float32).save_pretrained(tmp_path / "mixture")
    save_tokenizer(tmp_path / "mixture", 32)
    with pytest.raises(CheckpointError, match=r"neurons of dense MLPs only: choose --experts"):
        compare_structures(tmp_path / "mixture", TEXT, neurons=[8])
    # 5 of 6 heads do not divide 24 hidden values
    sizes = {"num_key_value_heads": 6, "num_attention_heads": 6, "head_dim": 4}
    make("llama", **sizes).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama", 32)
    with pytest.raises(CheckpointError, match="hidden") as caught:
        compare_structures(tmp_path / "llama", TEXT, kv_heads=[5])
    assert "\n" not in str(caught.value)


def run(*words: object, status: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done.stdout, done.stderr


def test_the_command_prints_a_table_of_80_columns(source: Source) -> None:
    words = ["compare", source.model, "--perplexity", source.text, "--context", 16]
    data = ["--calibration", source.words, "--samples", 2, "--length", 16]
    asked = ["--neurons", "24", "--multiple", 8, "--random-runs", 2]
    stdout, _ = run(*words, *asked, *data, "--scores", "activation-repaired, magnitude")
    lines = [line.rstrip() for line in stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    table = [line for line in lines if "%" in line or "×" in line]
    assert [line.split()[:2] for line in table[:1]] == [["24", "activation,"]]
    assert lines[lines.index(table[0]) + 1].split() == ["repaired"]
    assert [line.split()[0] for line in table[1:]] == ["magnitude", "random"]
    assert any(line.split()[:2] == ["neurons", "score"] for line in lines)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--blocks", "3", "--kv-heads", "2"), "go one at a time"),
        (("--blocks", "3", "--multiple", "8"), "goes with --neurons only"),
        (("--scores", "loss"), "goes with --experts, --blocks, --neurons or"),
        (("--kv-heads", "2", "--plot", "a.png"), "goes without --betas, --targets"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    source: Source, asked: tuple[str, ...], told: str
) -> None:
    _, stderr = run("compare", source.model, "--perplexity", source.text, *asked, status=2)
    assert told in " ".join(stderr.split())
