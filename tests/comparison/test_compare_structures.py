"""Fewer experts, by scores and at random, against the dense model with the others masked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from emp_cli.app import app
from support.architectures import V
from support.calibrated import calibration, save_text, save_tokenizer
from support.mixtures import make_mixture, routed_among
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from emp_llm import ExpertCriterion, OptionError, compare_structures
from emp_llm.comparison.structures_costs import StructuresComparison
from emp_llm.evaluation.perplexity import perplexity
from emp_llm.shrinking.expert_criteria import BlockExperts

TEXT = " ".join(f"w{number * number % 31}" for number in range(90))
OPTIONS: dict[str, Any] = {"context": 16, "random_runs": 0, "dtype": "float32"}


class Given(ExpertCriterion):
    """Scores that are easy to work with: N_eff is 16 / 4.5 and 16 / 6, so that 4 of 6 stay."""

    of_block: Mapping[str, tuple[float, ...]] = {
        "model.layers.0": (1.0, 1.0, 0.0, 0.5, 1.5, 0.0),
        "model.layers.1": (0.0, 0.0, 1.0, 1.0, 2.0, 0.0),
    }

    def scores(self, experts: BlockExperts) -> npt.ArrayLike:
        return self.of_block[experts.block]


GIVEN = f"{__name__}:Given"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("mixture")
    model = make_mixture("mixtral", torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "experts" in name:  # so that the choice makes a difference
                tensor.mul_(torch.linspace(5, 50, len(tensor)).reshape(-1, 1, 1))
    model.save_pretrained(folder)
    return save_tokenizer(folder, V), model


def masked(dense: tuple[Path, PreTrainedModel], *kept: tuple[int, ...]) -> float:
    """The perplexity of the dense model whose router knows these experts of each layer alone."""
    folder, model = dense
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with routed_among(model, dict(enumerate(kept))):
        return perplexity(model, tokenizer, TEXT, context=16).perplexity


def rows(found: StructuresComparison) -> list[tuple[str, int]]:
    return [cost.key for cost in found.costs]


def test_each_row_is_the_dense_model_with_the_other_experts_masked(
    dense: tuple[Path, PreTrainedModel],
) -> None:
    found = compare_structures(dense[0], TEXT, experts=[3, "n_eff"], scores=[GIVEN], **OPTIONS)
    assert rows(found) == [("dense", 6), (GIVEN, 3), (GIVEN, 4)]
    expected = [
        masked(dense, tuple(range(6)), tuple(range(6))),
        masked(dense, (0, 1, 4), (2, 3, 4)),
        masked(dense, (0, 1, 3, 4), (0, 2, 3, 4)),
    ]
    assert [cost.perplexity for cost in found.costs] == pytest.approx(expected, rel=1e-6)
    gone = [3 * cost.weights for cost in found.costs]
    assert gone[0] - gone[1] == pytest.approx((gone[0] - gone[2]) * 3 / 2)
    assert found.costs[1].above(found.dense) == pytest.approx(expected[1] / expected[0] - 1)


def test_as_many_are_chosen_at_random_once_for_each_seed(
    dense: tuple[Path, PreTrainedModel],
) -> None:
    asked = {**OPTIONS, "random_runs": 2, "scores": ["norm"]}
    found = compare_structures(dense[0], TEXT, experts=["50%"], seed=4, **asked)
    assert rows(found) == [("dense", 6), ("norm", 3), ("random", 3)]
    first, second = found.costs[2].runs
    assert first != second
    again = compare_structures(dense[0], TEXT, experts=[3], seed=5, **asked)
    assert again.costs[2].runs[0] == second
    # the norm is that of the largest: experts are scaled in order
    assert found.costs[1].perplexity == pytest.approx(masked(dense, (3, 4, 5), (3, 4, 5)))
    assert found.random(3) == found.costs[2]
    assert found.random(4) is None


def test_with_data_reap_leads_and_a_saved_comparison_goes_on(
    dense: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    text, saved = save_text(tmp_path / "words.txt"), tmp_path / "rows.json"
    asked = {**OPTIONS, "calibration": calibration(text), "save": saved}
    found = compare_structures(dense[0], TEXT, experts=[4], **asked)
    assert rows(found) == [("dense", 6), ("reap", 4), ("aimer", 4), ("norm", 4)]
    content = json.loads(saved.read_text())
    del content["results"][2:]
    saved.write_text(json.dumps(content))
    again = compare_structures(dense[0], TEXT, experts=[4], **asked)
    assert (found.taken, again.taken) == (0, 2)
    assert again.to_dict() == found.to_dict()
    with pytest.raises(OptionError, match=r"differs from this one \(.*experts"):
        compare_structures(dense[0], TEXT, experts=[3], **asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": []}, r"experts are \[\]; give a list of one or more, such as \[6\]"),
        ({"experts": "6"}, r"experts are '6'; give a list of one or more"),
        ({"experts": [6]}, "6 of them are to stay, but the model has 6 experts"),
        ({"experts": [1]}, "1 of them are too few for num_experts_per_tok 2"),
        ({"experts": ["half"]}, "experts is 'half': give how many stay"),
        ({"experts": ["n_eff"], "scores": ["aimer"]}, "effective number of 6.00, so that all 6"),
        ({"experts": [4], "scores": []}, r"scores are \[\]; give a list"),
        ({"experts": [4], "scores": ["reap"]}, "score 'reap' needs data"),
        ({"experts": [4], "scores": ["moon"]}, "score is 'moon'; choose one of aimer, reap"),
        ({"experts": [4], "random_runs": -1}, "random_runs is -1; give 0 or more"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    dense: tuple[Path, PreTrainedModel], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        compare_structures(dense[0], TEXT, **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)


def test_the_command_prints_a_table(dense: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["compare", str(dense[0]), "--perplexity", str(text), "--context", "16"]
    done = CliRunner().invoke(app, [*words, "--experts", "3", "--random-runs", "2"])
    assert done.exit_code == 0
    table = [line.split() for line in done.stdout.splitlines() if "%" in line]
    assert [line[:2] for line in table[:1]] == [["3", "aimer"]]
    assert [line[0] for line in table[1:]] == ["norm", "random"]
    wrong = CliRunner().invoke(app, [*words, "--experts", "3", "--betas", "1"])
    assert wrong.exit_code == 2
    assert "goes without --betas" in wrong.stderr
