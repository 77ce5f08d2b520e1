"""`emp_llm.compare` and the command: what it measures, what it prints, draws and refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
from emp_cli.app import app
from support.architectures import save_tiny_model
from support.checkpoints import files
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import emp_llm
from emp_llm import CalibrationOptions, OptionError, OutputError, PruneOptions
from emp_llm.comparison.costs import CONTROLS, WITH_DATA, Comparison, Cost, Method
from emp_llm.comparison.plot import check_plot, save_plot
from emp_llm.evaluation.perplexity import Perplexity, perplexity

WORDS = [f"w{number}" for number in range(32)]
TEXT = " ".join(WORDS[number * number % 31] for number in range(90))
BETAS = (0.4, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose weights are large enough for pruning to show, with a tokenizer."""
    path = save_tiny_model(tmp_path_factory.mktemp("model"), "llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    for parameter in model.parameters():
        parameter.data.mul_(8)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    return emp_llm.compare(folder, TEXT, betas=BETAS, context=16, random_runs=2, seed=5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def cost(method: Method, beta: float | None, *perplexities: float) -> Cost:
    """That of half of four weights."""
    runs = tuple(
        Perplexity(
            perplexity=one,
            nats_per_token=1.0,
            bits_per_byte=1.0,
            tokens=2,
            context=2,
            protocol="paper",
        )
        for one in perplexities
    )
    return Cost(method=method, beta=beta, weights=4, kept=2, runs=runs)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)


def measured(folder: Path) -> float:
    """The perplexity of an ordinary checkpoint, in this test's own way."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return perplexity(model, AutoTokenizer.from_pretrained(folder), TEXT, context=16).perplexity


# --- what is measured ----------------------------------------------------------------------------


def test_every_method_is_measured_once_for_each_beta(found: Comparison) -> None:
    assert [(cost.method, cost.beta) for cost in found.costs] == [
        ("dense", None),
        *((method, beta) for beta in BETAS for method in ("emp", *CONTROLS)),
    ]


def test_the_dense_model_is_the_model_as_it_is(found: Comparison, folder: Path) -> None:
    assert found.dense.perplexity == measured(folder)
    assert (found.dense.sparsity, found.dense.deviation) == (0, None)


@pytest.mark.parametrize("beta", BETAS)
def test_emp_is_what_prune_writes(
    found: Comparison, folder: Path, tmp_path: Path, beta: float
) -> None:
    options = PruneOptions(beta=beta, output_format="dense")
    report = emp_llm.prune(folder, tmp_path / "pruned", options)
    cost = found.emp(beta)
    assert cost.perplexity == measured(tmp_path / "pruned")
    assert cost.kept == report["totals"]["targets"]["kept"]
    assert cost.sparsity == pytest.approx(report["totals"]["targets"]["sparsity"], abs=1e-6)


def test_every_control_keeps_as_many_weights_as_emp(found: Comparison) -> None:
    for cost in found.costs[1:]:
        assert (cost.kept, cost.weights) == (found.emp(cost.beta).kept, found.dense.weights)


def test_methods_differ_in_more_than_their_names(found: Comparison) -> None:
    assert len({cost.perplexity for cost in found.costs}) == len(found.costs)


def test_random_runs_have_a_mean_and_a_deviation(found: Comparison) -> None:
    random = [cost for cost in found.costs if cost.method == "random"]
    assert found.settings["seeds"] == [5, 6]
    for cost in random:
        figures = [part.perplexity for part in cost.runs]
        assert len(set(figures)) == 2
        assert (cost.perplexity, cost.deviation) == (mean(figures), stdev(figures))


def test_the_same_seed_gives_the_same_result_and_another_one_another(
    found: Comparison, folder: Path
) -> None:
    again = emp_llm.compare(folder, TEXT, betas=[1.0], context=16, random_runs=2, seed=6)
    first, second = again.costs[-1].runs
    assert first == found.costs[-1].runs[1]
    assert second not in found.costs[-1].runs
    assert again.costs[:-1] == [found.dense, *found.costs[-5:-1]]


def test_no_random_runs_leave_it_out_and_other_targets_are_pruned(folder: Path) -> None:
    found = emp_llm.compare(
        folder, TEXT, betas=[1.0], context=16, random_runs=0, targets="attention", ignore=["q_proj"]
    )
    assert [cost.method for cost in found.costs] == ["dense", "emp", *CONTROLS[:-1]]
    # hidden 16, two heads and one key-value head of 8: k and v [8, 16], o [16, 16], in two layers
    assert found.dense.weights == 2 * (8 * 16 + 8 * 16 + 16 * 16)


def test_the_source_is_left_as_it_was(folder: Path) -> None:
    before = files(folder)
    emp_llm.compare(folder, TEXT, betas=[1.0], context=16, random_runs=0, dtype="float32")
    assert files(folder) == before


def test_with_data_scores_and_repair_are_measured_as_prune_writes_them(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    data = CalibrationOptions(text=str(text), samples=3, length=16, seed=2)
    found = emp_llm.compare(folder, TEXT, betas=[0.4], context=16, random_runs=0, calibration=data)
    assert [cost.method for cost in found.costs[-5:]] == ["pq-index", *WITH_DATA]
    assert {cost.kept for cost in found.costs[1:]} == {found.emp(0.4).kept}
    assert found.settings["calibration"] == {
        "text": "text.txt", "samples": 3, "length": 16, "seed": 2, "sequential": True
    }  # fmt: skip
    fields = {
        "wanda": {"criterion": "wanda", "count_by": "magnitude"},
        "obs-repaired": {"criterion": "obs", "count_by": "magnitude", "repair": "obs"},
    }
    for method, options in fields.items():
        out = tmp_path / method
        options = PruneOptions(beta=0.4, calibration=data, output_format="dense", **options)
        emp_llm.prune(folder, out, options)
        cost = next(cost for cost in found.costs if cost.method == method)
        assert cost.perplexity == measured(out)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": []}, r"betas are \[\]; give one or more"),
        ({"betas": [1.0, 1.0]}, r"betas are \[1.0, 1.0\]; .* each once"),
        ({"betas": [0.0]}, "beta is 0.0"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"random_runs": -1}, "random_runs is -1; give 0 or more"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of auto, "),
        ({"device": "nowhere"}, "device is 'nowhere'"),
        ({"context": 65}, "context is 65; this model has 64 positions"),
        ({"protocol": "mine"}, "protocol is 'mine'"),
        ({"calibration": CalibrationOptions()}, "calibration has no text"),
        ({"calibration": CalibrationOptions(text="no.txt")}, "no.txt: there is no such file"),
        (
            {"calibration": CalibrationOptions(text="no.txt", device="nowhere")},
            "device is 'nowhere'",
        ),
    ],
)
def test_an_option_out_of_its_range_is_one_line(
    folder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        emp_llm.compare(folder, TEXT, **{"context": 16, **options})
    assert "\n" not in str(caught.value)


def test_a_packed_model_is_refused(folder: Path, tmp_path: Path) -> None:
    emp_llm.prune(folder, tmp_path / "packed")
    with pytest.raises(emp_llm.EmpError, match="packed"):
        emp_llm.compare(tmp_path / "packed", TEXT, context=16)


# --- the command ---------------------------------------------------------------------------------


def test_the_table_fits_80_columns_and_says_who_wins(
    folder: Path, text: Path, found: Comparison
) -> None:
    result = run(folder, "--perplexity", text, "--betas", "0.4,1", "--context", 16, "--seed", 5)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if "%" in line]
    controls = ["uniform", "uniform", "PQ", "random"]
    assert [row[0] for row in rows] == ["dense", "0.4", *controls, "1", *controls]
    emp = found.emp(1.0)
    share = f"{100 * (emp.perplexity / found.dense.perplexity - 1):+.2f}%"
    assert rows[6] == ["1", "EMP", f"{emp.sparsity:.2%}", f"{emp.perplexity:,.2f}", share]
    worse = sum(
        cost.perplexity > found.emp(cost.beta).perplexity
        for cost in found.costs
        if cost.method == "magnitude-row"
    )
    assert f"EMP beats uniform rows at {worse} of 2 β" in lines


def test_the_table_shows_what_data_brings(folder: Path, text: Path) -> None:
    result = run(
        folder, "--perplexity", text, "--betas", "0.4", "--context", 16, "--random-runs", 0,
        "--calibration", text, "--samples", 2, "--length", 16,
    )  # fmt: skip
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if "%" in line]
    assert [row[:2] for row in rows[-3:]] == [
        ["obs", rows[1][2]],
        ["EMP,", "repaired"],
        ["obs,", "repaired"],
    ]


def test_perplexities_past_all_use_fit_80_columns(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [
        *(cost("dense", None, 21.2), cost("emp", 0.75, 215.0)),
        *(cost("magnitude-layer", 0.75, 999.0), cost("random", 0.75, 1e5, 9e5)),
    ]
    settings = {"text": "text.txt", "context": 2048, "protocol": "paper"}
    found = Comparison(source={"model": "m", "revision": None}, settings=settings, costs=costs)
    monkeypatch.setattr(emp_llm, "compare", lambda *_, **__: found)
    lines = run("m", "--perplexity", text).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if "50.00%" in line][2:] == [
        ["uniform", "layers", "50.00%", "999.00", "×", "47", "+364.65%"],
        ["random", "50.00%", "500,000", "±", "565,685", "×", "23,585", "×", "2,326"],
    ]


def test_json_has_everything_and_is_alone_on_stdout(
    folder: Path, text: Path, found: Comparison
) -> None:
    result = run(
        folder, "--perplexity", text, "--betas", "0.4,1", "--context", 16, "--seed", 5,
        "--random-runs", 2, "--json",
    )  # fmt: skip
    content = json.loads(result.stdout)
    assert content["settings"]["text"] == "text.txt"
    assert content["source"] == {"model": folder.name, "revision": None}
    assert content["results"] == found.to_dict()["results"]
    last = content["results"][-1]
    assert last["above_emp"] == last["perplexity"] / found.emp(1.0).perplexity - 1
    assert content["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--betas", "one"], 2, "is not a list of numbers"),
        (["--random-runs", "-1"], 2, ""),
        (["--samples", "3"], 2, "goes with --calibration only"),
        (["--plot", "costs.svg"], 1, "OptionError: plot is 'costs.svg'; give the name of a PNG"),
        (["--plot", "no/folder/costs.png"], 1, "OutputError: no/folder/costs.png: there is no"),
        (["--perplexity", "no.txt"], 1, "OptionError: no.txt: there is no such file"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(
    arguments: list[str], status: int, message: str
) -> None:
    result = run("no/such/model", "--perplexity", __file__, *arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('imported:', *sys.modules, file=sys.stderr))\n"
        "from emp_cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    imported = set(done.stderr.partition("imported:")[2].split())
    assert imported & {"torch", "transformers", "numpy", "matplotlib", "datasets"} == set()


# --- the picture ---------------------------------------------------------------------------------


def test_the_picture_is_a_png_and_the_same_each_time(found: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = []
    for name in ("a.png", "b.png"):
        save_plot(found, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0].startswith(b"\x89PNG\r\n\x1a\n")
    assert pictures[0] == pictures[1]


def test_the_command_draws_it(folder: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "costs.png"
    result = run(
        folder, "--perplexity", text, "--betas", 1, "--context", 16, "--random-runs", 0,
        "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_perplexity_past_all_numbers_is_drawn_as_well(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    costs = [cost("dense", None, 5.0), cost("emp", 1.0, 6.0), cost("random", 1.0, math.inf)]
    comparison = Comparison(
        source={"model": "m"}, settings={"text": "t", "context": 2}, costs=costs
    )
    save_plot(comparison, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=r"matplotlib is not installed.*emp-llm\[report\]"):
        check_plot(Path("costs.png"))


def test_a_picture_that_cannot_be_written_is_one_line(found: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OutputError, match=r"taken\.png: cannot be written: Is a directory"):
        save_plot(found, tmp_path / "taken.png")
