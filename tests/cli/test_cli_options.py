"""Options of the command line that find β and take scores from data: what goes with what."""

import json
import shlex
from pathlib import Path

import pytest
from emp_cli.app import app
from emp_cli.tables import found_lines, search_table
from support.checkpoints import files
from typer.testing import CliRunner, Result

from emp_llm import OptionError, PruneOptions, inspect, prune
from emp_llm.calibration.option_checks import check_options
from emp_llm.options import CalibrationOptions

PRUNE = ("prune", "model", "--out", "out")


def run(*arguments: object) -> Result:
    """Run a command in this process; what no command foresees is raised."""
    return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    "arguments",
    [
        "--beta much",
        "--beta auto",
        "--max-loss-increase 1",
        "--beta 0.5 --max-loss-increase 1",
        "--beta 1 --target-sparsity 0.5",
        "--beta auto --max-loss-increase 1 --target-sparsity 0.5",
        "--target-sparsity half",
        "--count-by weights",
        "--repair all",
        "--samples 4",
        "--length 16",
        "--no-sequential",
        "--seed 1",
        "--calibration wikitext2 --samples 0",
        "--calibration wikitext2 --length 1",
        "--calibration wikitext2 --seed -1",
        "--calibration wikitext2 --recover -1",
        "--preset worst",
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(arguments: str) -> None:
    result = run(*PRUNE, *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("beta", ["", "--beta 0.5"])
def test_the_option_that_lacks_its_companion_is_the_one_that_is_named(beta: str) -> None:
    assert "--max-loss-increase: goes with --beta auto only" in " ".join(
        run(*PRUNE, *beta.split(), "--max-loss-increase", "1").stderr.split()
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--target-sparsity 0", "target_sparsity is 0.0"),
        ("--target-sparsity 1", "target_sparsity is 1.0"),
        ("--target-sparsity -0.5", "target_sparsity is -0.5"),
        ("--target-sparsity nan", "target_sparsity is nan"),
        ("--beta auto --max-loss-increase nan", "max_loss_increase is nan"),
        ("--beta auto --max-loss-increase 0", "max_loss_increase is 0.0"),
        ("--beta auto --max-loss-increase 1", "max_loss_increase, for which β is searched"),
        ("--criterion wanda", "criterion 'wanda' needs data: give a text"),
        ("--criterion obs --seed 1", "criterion 'obs' needs data: give a text"),
        ("--repair bias", "repair 'bias' needs data: give a text"),
        ("--repair obs --criterion random", "repair 'obs' needs data: give a text"),
        ("--criterion wander", "criterion is 'wander'; choose one of magnitude, wanda,"),
        ("--criterion no_such_module:Mine", "no_such_module cannot be imported"),
        ("--calibration wikitext2 --preset paper", "calibration 'wikitext2' would not be used"),
        ("--calibration wikitext2 --repair none", "calibration 'wikitext2' would not be used"),
        ("--preset repaired", "criterion 'obs' needs data: give a text"),
        ("--recover 3", "recover needs data: give a text"),
        ("--recover 40000", "recover is 40000; it is for how many steps to train: give a whole"),
        ("--calibration wikitext2 --criterion random", "'wikitext2' would not be used"),
        ("--calibration wikitext2 --criterion wanda --device tpu", "device"),
        (
            "--calibration wikitext2 --criterion wanda --target-sparsity 0.5",
            "(sequential=False), or --count-by magnitude",
        ),
        ("--calibration c4 --criterion ria --granularity model", "give --no-sequential"),
        ("--calibration c4 --repair swaps --granularity model", "'model' needs all of them"),
        ("--calibration c4 --repair swaps --criterion taylor", "'taylor' needs all of them"),
        (
            "--calibration c4 --repair swaps --criterion wanda --target-sparsity 0.5"
            " --no-sequential --count-by criterion",
            "--repair obs, or give --count-by magnitude",
        ),
        ("--allocate loss", "allocate 'loss' needs data: give a text"),
        ("--allocate uniform --granularity model", "granularity 'model' has one group"),
        ("--allocate uniform --criterion random", "give --count-by magnitude"),
        (
            "--allocate uniform --calibration c4 --beta auto --max-loss-increase 1",
            "give a β or a target sparsity",
        ),
        (
            "--allocate loss --calibration c4 --criterion taylor --count-by magnitude",
            "needs gradients: choose another criterion",
        ),
        ("--allocate loss --targets none", "allocate is 'loss', but targets is 'none'"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_line(arguments: str, told: str) -> None:
    result = run(*PRUNE, *arguments.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("OptionError: ")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr


@pytest.mark.parametrize(
    ("options", "sequential"),
    [
        ({"criterion": "wanda", "target_sparsity": 0.5}, False),
        ({"criterion": "wanda", "target_sparsity": 0.5, "count_by": "magnitude"}, True),
        ({"criterion": "ria", "granularity": "model"}, False),
        ({"criterion": "taylor", "granularity": "model"}, True),
        ({"repair": "obs", "granularity": "model"}, True),
        ({"repair": "obs", "target_sparsity": 0.5}, True),
        ({"max_loss_increase": 1.0}, True),
        ({"criterion": "obs", "repair": "bias"}, True),
        ({"criterion": "obs", "repair": "swaps", "granularity": "layer"}, True),
        ({"repair": "swaps", "target_sparsity": 0.5}, True),
        ({"allocate": "loss", "target_sparsity": 0.5}, True),
        ({"allocate": "uniform", "criterion": "taylor", "count_by": "magnitude"}, True),
    ],
)
def test_what_can_be_done_with_data_is_let_pass(
    options: dict[str, object], sequential: bool
) -> None:
    calibration = CalibrationOptions(text="wikitext2", sequential=sequential, device="cpu")
    check_options(PruneOptions(calibration=calibration, **options))


@pytest.mark.parametrize(
    "calibration", [None, CalibrationOptions(seed=3)], ids=["without a seed", "with a seed"]
)
def test_random_scores_need_no_data(calibration: CalibrationOptions | None) -> None:
    check_options(PruneOptions(criterion="random", target_sparsity=0.5, calibration=calibration))


def test_every_option_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def taken(
        _model: str, _out: Path, options: PruneOptions, *, device: str, **_others: object
    ) -> None:
        asked["options"], asked["device"] = options, device
        raise OptionError("enough")

    monkeypatch.setattr("emp_llm.prune", taken)
    run(
        *(*PRUNE, "--beta", "auto", "--max-loss-increase", "1.5", "--criterion", "wanda"),
        *("--count-by", "magnitude", "--repair", "bias", "--calibration", "c4", "--samples", "9"),
        *("--recover", "7"),
        *("--length", "64", "--seed", "5", "--no-sequential", "--device", "cpu"),
    )
    calibration = CalibrationOptions(
        text="c4", samples=9, length=64, seed=5, sequential=False, device="cpu"
    )
    assert asked["device"] == "cpu"
    assert asked["options"] == PruneOptions(
        max_loss_increase=1.5,
        criterion="wanda",
        count_by="magnitude",
        repair="bias",
        recover=7,
        calibration=calibration,
    )


REPAIRED = {"criterion": "obs", "count_by": "magnitude", "repair": "obs"}
BEST = {**REPAIRED, "repair": "swaps", "recover": 100}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--preset paper", {}),
        ("--calibration c4", REPAIRED),
        ("--calibration c4 --preset repaired", REPAIRED),
        ("--calibration c4 --preset best", BEST),
        ("--calibration c4 --preset best --recover 9", {**BEST, "recover": 9}),
        ("--calibration c4 --preset repaired --repair bias", {**REPAIRED, "repair": "bias"}),
        ("--calibration c4 --preset best --recover 0", {**BEST, "recover": 0}),
        ("--calibration c4 --criterion wanda", {"criterion": "wanda"}),
        ("--calibration c4 --recover 9", {"recover": 9}),
        ("--calibration c4 --allocate loss", {**REPAIRED, "allocate": "loss"}),
        ("--calibration c4 --beta auto --max-loss-increase 1", {"max_loss_increase": 1.0}),
    ],
)
def test_presets_stand_for_options_that_single_ones_override(
    monkeypatch: pytest.MonkeyPatch, arguments: str, expected: dict[str, object]
) -> None:
    asked: dict[str, PruneOptions] = {}
    monkeypatch.setattr("emp_llm.prune", lambda _model, _out, options, **_: asked.update(o=options))
    with pytest.raises(TypeError):  # no report to be shown
        run(*PRUNE, *arguments.split())
    calibration = CalibrationOptions(text="c4") if "c4" in arguments else None
    assert asked["o"] == PruneOptions(calibration=calibration, **expected)


def test_pruning_by_magnitude_says_what_it_costs_and_names_the_command_that_repairs(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = run("prune", source, "--out", out, "--beta", 0.8).stdout
    _, _, hint = told.partition("\nMagnitude alone costs")
    command = hint.partition("To repair:\n")[2].replace(" \\\n", " ")
    words = ["emp-llm", "prune", str(source), "--out", str(out), "--beta", "0.8"]
    assert shlex.split(command) == [*words, "--calibration", "wikitext2", "--overwrite"]


@pytest.mark.parametrize("arguments", ["--criterion random", "--targets none", "--json"])
def test_there_is_no_such_hint_where_it_would_not_help(
    source: Path, tmp_path: Path, arguments: str
) -> None:
    result = run("prune", source, "--out", tmp_path / "out", *arguments.split())
    assert (result.exit_code, "To repair" in result.stdout) == (0, False)


def test_a_seed_alone_goes_with_random_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr("emp_llm.prune", lambda _model, _out, options, **_: asked.update(o=options))
    with pytest.raises(TypeError):  # no report to be shown
        run(*PRUNE, "--criterion", "random", "--seed", "3")
    assert asked["o"].calibration == CalibrationOptions(seed=3)


@pytest.mark.parametrize("command", ["prune", "inspect"])
def test_the_beta_that_was_found_is_told_with_what_stays(
    source: Path, tmp_path: Path, command: str
) -> None:
    out = ["--out", tmp_path / "out"] if command == "prune" else []
    report = prune(source, tmp_path / "expected", PruneOptions(target_sparsity=0.4))
    result = run(command, source, *out, "--target-sparsity", 0.4)
    assert result.exit_code == 0
    beta = repr(report["rule"]["beta"])
    assert f"found: --beta {beta}, with which 432 of 720 weights stay\n" in result.stdout
    assert "finding β" in result.stderr
    again = run("prune", source, "--out", tmp_path / "again", "--beta", beta)
    assert again.exit_code == 0
    written = files(tmp_path / "again")
    assert {n for n, content in files(tmp_path / "expected").items() if written[n] != content} == {
        "emp_report.json"
    }


def test_json_holds_what_was_sought_and_found(source: Path, tmp_path: Path) -> None:
    result = run("prune", source, "--out", tmp_path / "out", "--target-sparsity", 0.4, "--json")
    content = json.loads(result.stdout)
    assert content["target_sparsity"] == 0.4
    assert content["totals"]["targets"]["kept"] == 432
    shown = run("report", tmp_path / "out").stdout
    assert f"found: --beta {content['rule']['beta']!r}, with which 432 of 720 weights stay" in shown


def test_a_report_tells_what_was_tried_and_which_data_were_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = {
        "rule": {
            "beta": 0.875,
            "repair": "obs",
            "recover": 100,
            "calibration": {
                "text": "c4",
                "samples": 9,
                "length": 64,
                "seed": 5,
                "sequential": True,
            },
        },
        "search": [
            {"beta": None, "loss": 3.25, "perplexity": 25.79},
            {"beta": 0.875, "loss": 3.5, "perplexity": 1233.5},
        ],
        "search_data": {"text": "train.txt"},
        "max_loss_increase": 8.0,
        "calibration": {"without_tokens": ["a", "b"]},
        "totals": {"targets": {"kept": 1234, "weights": 5678}},
    }
    assert found_lines(report) == [
        "found: --beta 0.875, with which 1,234 of 5,678 weights stay",
        "calibrated on c4: 9 × 64 tokens, seed 5, sequential",
        "repaired: the weights that stay have changed",
        "recovered: 100 steps trained the weights that stay, norms and biases",
        "ranked by magnitude, for no token reached them: 2 matrices",
    ]
    search_table(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dense", "3.2500", "25.79"] in lines
    assert ["0.875", "3.5000", "+7.69%", "1,233.50"] in lines
    assert ["tried", "on", "train.txt,", "to", "stay", "within", "+8%"] in lines


def test_inspect_searches_for_no_loss(source: Path) -> None:
    with pytest.raises(OptionError, match="inspect runs no model"):
        inspect(source, PruneOptions(max_loss_increase=1.0))
