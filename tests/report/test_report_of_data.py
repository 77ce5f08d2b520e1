"""What report, card and command tell of masks and weights that came from data."""

import shlex
from pathlib import Path

import pytest
from emp_cli.app import app
from support.cards import pruned_card, take_apart
from support.checkpoints import UP, F, H, files, llama_config, mlp, write_checkpoint
from support.stored_masks import CALIBRATION, given
from support.tampering import agree, edit_json
from typer.testing import CliRunner

from emp_llm import EmpError, PruneOptions, prune, verify
from emp_llm.options import CalibrationOptions
from emp_llm.report.prune_command import prune_words

__all__ = ["given"]

pytestmark = pytest.mark.usefixtures("given")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))


def card_of(source: Path, **options: object) -> str:
    _, ours, _ = take_apart(pruned_card(source, None, **options))
    return ours


def test_the_card_tells_the_score_the_data_and_what_was_changed(source: Path) -> None:
    ours = card_of(source, criterion="wanda", repair="obs", calibration=CALIBRATION)
    assert (
        "In each group of weights the ⌊β · N_eff⌋ weights with the largest `wanda` scores stay, "
        "and the others are zero. The effective number N_eff = (Σs)² / Σs² of a group is computed "
        "from the scores s of its weights.\n\n"
        "- β = 1\n"
        "- groups: rows (all weights into one output neuron)\n"
        "- targets: `mlp` (linear layers outside attention)\n"
        "- calibration: 4 samples of 16 tokens of `some/text` (seed 3); each decoder block was "
        "given the outputs of the pruned blocks before it\n"
        "- repair: the weights that stay were adjusted to restore the outputs of pruned layers "
        "(3 tensors)\n"
        "- ranked by magnitude, since no calibration token reached them: 1 matrix\n\n"
    ) in ours
    assert "Retained mass is the share of all scores that stays." in ours


def test_the_card_tells_whose_effective_number_counts(source: Path) -> None:
    ours = card_of(source, criterion="random", count_by="magnitude")
    assert (
        "weights with the largest `random` scores stay, and the others are zero. The effective "
        "number N_eff = (Σ|w|)² / Σw² of a group is computed from its weights."
    ) in ours
    assert "- calibration" not in ours
    assert "adjusted" not in ours


def test_a_card_of_plain_magnitude_tells_nothing_of_data(source: Path) -> None:
    ours = card_of(source)
    assert "In each group of weights the ⌊β · N_eff⌋ weights of largest magnitude stay" in ours
    assert "N_eff = (Σ|w|)² / Σw² of a group is computed from its weights" in ours
    assert "Retained mass is the share of Σ|w| that stays." in ours
    for word in ("alibrat", "score", "adjusted"):
        assert word not in ours


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"criterion": "random"}, "--criterion random"),
        (
            {"criterion": "random", "calibration": CalibrationOptions(seed=5)},
            "--criterion random --seed 5",
        ),
        (
            {
                "criterion": "wanda",
                "count_by": "magnitude",
                "repair": "obs",
                "calibration": CALIBRATION,
            },
            "--criterion wanda --count-by magnitude --repair obs --calibration some/text "
            "--samples 4 --length 16 --seed 3",
        ),
        (
            {"allocate": "uniform", "repair": "obs", "calibration": CALIBRATION},
            "--allocate uniform --repair obs --calibration some/text --samples 4 --length 16 "
            "--seed 3",
        ),
        (
            {
                "repair": "obs",
                "calibration": CalibrationOptions(text="wikitext2", sequential=False),
            },
            "--repair obs --calibration wikitext2 --length 16 --no-sequential",
        ),
    ],
)
def test_the_command_makes_the_same_weights_again(
    source: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    report = prune(source, tmp_path / "first", PruneOptions(**options))
    command = prune_words(report, out=str(tmp_path / "again"), model=str(source))
    assert shlex.join(command[5:]) == words
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    again, first = files(tmp_path / "again"), files(tmp_path / "first")
    assert again["model.safetensors"] == first["model.safetensors"]
    assert again["README.md"] == first["README.md"]


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("rule", {"count_by": "weight"}),
        ("rule", {"repair": 1}),
        ("rule", {"recover": -1}),
        ("rule", {"allocate": "fairly"}),
        ("tensors", {UP: {"beta": -0.5}}),
        ("rule", {"calibration": {"seed": "x"}}),
        ("rule", {"calibration": {"seed": 1, "hash": 5}}),
        ("calibration", {"without_tokens": [1]}),
        ("tensors", {UP: {"repaired": "yes"}}),
    ],
)
def test_a_report_whose_new_parts_are_of_no_form_is_refused(
    source: Path, tmp_path: Path, part: str, fields: dict[str, object]
) -> None:
    prune(source, tmp_path / "out", PruneOptions(criterion="wanda", calibration=CALIBRATION))

    def damage(report: dict) -> None:
        target = report[part]
        for name, value in fields.items():
            target[name] = {**target[name], **value} if part == "tensors" else value

    edit_json(tmp_path / "out" / "emp_report.json", damage)
    agree(tmp_path / "out")
    with pytest.raises(EmpError, match="is not a report that emp-llm wrote"):
        verify(tmp_path / "out")
