"""The command shrink, and inspect --structures: what they print."""

import json
from pathlib import Path

import pytest
import torch
from support.architectures import V
from support.calibrated import save_model, save_text, save_tokenizer
from support.mixtures import make_mixture
from support.tampering import edit_json
from typer.testing import CliRunner

from emp_llm import inspect_structures

runner = CliRunner()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    make_mixture("mixtral", torch.bfloat16).save_pretrained(folder)
    return folder


def run(*arguments: object, status: int = 0) -> str:
    from emp_cli.app import app

    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout


def test_a_line_for_each_layer_says_what_has_gone(mixtral: Path, tmp_path: Path) -> None:
    text = run("shrink", mixtral, "--out", tmp_path / "out", "--experts", "50%")

    report = json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    for layer, holder in report["structures"]["experts"]["holders"].items():
        gone = ", ".join(str(e) for e in range(6) if e not in holder["kept"])
        line = next(line for line in text.splitlines() if layer in line)
        assert line.split()[:2] == [layer, "6"]
        assert line.rstrip().endswith(f"{holder['n_eff']:.2f}   {gone}")
    assert "experts by aimer, 3 of 6 stay" in text
    assert "config.json: num_local_experts 6 → 3" in text
    whole = "whole model: 33.3 kB → 19.3 kB (0.579), 9.65 k of 16.7 k weights are left"
    assert {whole, "every weight that stays keeps every bit"} <= set(text.splitlines())
    assert max(map(len, text.split(f"{tmp_path}/")[0].splitlines())) <= 80


def test_a_table_of_many_neurons_says_how_many_have_gone(tmp_path: Path) -> None:
    source = save_model(tmp_path / "llama", "llama", intermediate_size=1536)
    asked = ("--neurons", "10%", "--width-score", "magnitude", "--repair", "none")
    text = run("shrink", source, "--out", tmp_path / "out", *asked)
    lines = text.split("config.json")[0].splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [line for line in lines if "model.layers.0" in line]
    assert line.split()[1] == "1536"
    assert line.rstrip().endswith("128 of them")


def test_neurons_of_blocks_that_have_gone_are_not_shown(tmp_path: Path) -> None:
    source = save_model(tmp_path / "llama", "llama", num_hidden_layers=4)
    asked = ("--blocks", 2, "--block-score", "random", "--neurons", "50%", "--multiple", 2)
    widths = ("--width-score", "magnitude", "--repair", "none")
    text = run("shrink", source, "--out", tmp_path / "out", *asked, *widths)
    report = json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    kept = report["structures"]["blocks"]["holders"]["model.layers"]["kept"]
    shown = [line.split()[0] for line in text.splitlines() if "model.layers." in line]
    assert [name.split(".")[2] for name in shown] == [f"{block}" for block in kept]


def test_of_long_lists_of_the_config_their_lengths_are_shown(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"] * 5
    sizes = {"num_hidden_layers": 10, "layer_types": types}
    source = save_model(tmp_path / "gemma", "gemma2", **sizes)
    asked = ("--blocks", 8, "--block-score", "random")
    text = run("shrink", source, "--out", tmp_path / "out", *asked)
    assert "config.json: layer_types 10 items → 8 items" in text.splitlines()
    report = json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert report["config"]["layer_types"] == f"{types} → {written}"
    assert run("verify", tmp_path / "out", "--against", source)


def test_of_a_source_that_was_pruned_before_the_rule_is_told(mixtral: Path, tmp_path: Path) -> None:
    pruned, small, smaller = (tmp_path / name for name in ("pruned", "small", "smaller"))
    run("prune", mixtral, "--out", pruned, "--format", "dense", "--beta", 0.5)
    told = run("shrink", pruned, "--out", small, "--experts", 4).splitlines()
    assert "the source was pruned before: β = 0.5, row groups" in told
    run("shrink", small, "--out", smaller, "--experts", 3)

    rule = json.loads((pruned / "emp_report.json").read_text())["rule"]
    for folder, source in ((small, pruned), (smaller, small)):
        report = json.loads((folder / "emp_shrink.json").read_text())
        assert report["source_rule"] == rule
        assert "The source was pruned before, by β = 0.5" in (folder / "README.md").read_text()
        assert not (folder / "emp_report.json").exists()
        run("verify", folder, "--against", source)
    edit_json(small / "emp_shrink.json", lambda fields: fields["source_rule"].update(beta=2.0))
    run("verify", small, "--against", pruned, status=1)


def test_packing_without_loss_is_no_pruning_before(mixtral: Path, tmp_path: Path) -> None:
    run("pack", mixtral, "--out", tmp_path / "packed")
    run("unpack", tmp_path / "packed", "--out", tmp_path / "dense")
    told = run("shrink", tmp_path / "dense", "--out", tmp_path / "out", "--experts", 4)
    assert "pruned before" not in told


def test_a_report_tells_how_a_model_became_smaller(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = run("shrink", mixtral, "--out", out, "--experts", 4).splitlines()
    assert run("report", out).splitlines() == [line for line in told if "written in" not in line]
    fields = json.loads((out / "emp_shrink.json").read_text())
    assert fields.items() <= json.loads(run("report", out, "--json")).items()
    run("report", out, "--html", tmp_path / "page.html", status=2)
    run("prune", out, "--out", tmp_path / "pruned", "--targets", "mlp")
    assert "row groups" in run("report", tmp_path / "pruned")


@pytest.mark.parametrize(
    "option", [("--beta", "2"), ("--target-sparsity", "0.5"), ("--html", "a"), ("--png", "a")]
)
def test_options_of_pruning_do_not_go_with_structures(mixtral: Path, option: tuple[str]) -> None:
    run("inspect", mixtral, "--structures", *option, status=2)


def test_a_table_says_what_was_tried_to_keep_few_blocks(tmp_path: Path) -> None:
    source = save_model(tmp_path / "llama", "llama", num_hidden_layers=3)
    text = save_text(tmp_path / "words.txt")
    asked = ("--blocks", "auto", "--max-loss-increase", 1e6, "--block-score", "loss")
    data = ("--calibration", text, "--samples", 2, "--length", 16)
    shown = run("shrink", source, "--out", tmp_path / "out", *asked, *data)

    report = json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    tried = report["structures"]["blocks"]["tried"]
    assert "tried on words.txt, to stay within +1000000%" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["all", f"{tried[0]['loss']:.4f}", f"{tried[0]['perplexity']:.2f}"] in lines
    above = f"{tried[2]['loss'] / tried[0]['loss'] - 1:+.2%}"
    last, gone = tried[2], f"{tried[2]['gone']}"
    assert ["1", f"{last['loss']:.4f}", above, f"{last['perplexity']:.2f}", gone] in lines
    assert "blocks by loss, 1 of 3 stay" in shown
    assert "config.json: num_hidden_layers 3 → 1" in shown
    assert "calibrated on words.txt: 2 × 16 tokens, seed 0" in shown.splitlines()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "chosen by `loss`, on 2 samples of 16 tokens of `words.txt` (seed 0)." in card


def test_json_is_the_report_without_tensors(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = json.loads(run("shrink", mixtral, "--out", out, "--experts", 4, "--json"))

    report = json.loads((out / "emp_shrink.json").read_text())
    del report["tensors"]
    assert shown.pop("seconds") > 0
    assert shown.pop("peak_memory_bytes") > 0
    assert shown == {"out": str(out), **report}


def test_without_an_amount_it_is_wrong_usage(mixtral: Path, tmp_path: Path) -> None:
    run("shrink", mixtral, "--out", tmp_path / "out", status=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "option", "goes_with"),
    [
        ("--experts 3 --block-score random", "--block-score", "--blocks"),
        ("--blocks 1 --block-score random --score nosuch", "--score", "--experts"),
        ("--experts 3 --width-score obs", "--width-score", "--neurons and --kv-heads"),
        ("--blocks 1 --block-score random --repair none", "--repair", "--neurons and --kv-heads"),
        ("--kv-heads 2 --multiple 8", "--multiple", "--neurons"),
        ("--experts 3 --seed 1", "--seed", "--calibration or a random score"),
        ("--experts 3 --device cpu", "--device", "--calibration"),
        ("--experts 3 --samples 4", "--samples", "--calibration"),
    ],
)
def test_an_option_that_would_change_nothing_is_wrong_usage(
    mixtral: Path, tmp_path: Path, asked: str, option: str, goes_with: str
) -> None:
    from emp_cli.app import app

    result = runner.invoke(
        app, ["shrink", str(mixtral), "--out", str(tmp_path / "out"), *asked.split()]
    )
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert f"Invalid value for {option}: goes with {goes_with} only" in said
    assert not (tmp_path / "out").exists()


def test_a_seed_goes_with_random_scores(mixtral: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        asked = ("--experts", 3, "--score", "random", "--seed", seed)
        run("shrink", mixtral, "--out", tmp_path / f"{seed}", *asked)
    first, second = (json.loads((tmp_path / f / "emp_shrink.json").read_text()) for f in "12")
    assert first["structures"] != second["structures"]


def test_inspect_structures_shows_the_effective_number_of_each_layers_scores(
    mixtral: Path,
) -> None:
    text = run("inspect", mixtral, "--structures")
    shown = json.loads(run("inspect", mixtral, "--structures", "--json"))

    found = inspect_structures(mixtral)
    assert shown["structures"] == found["structures"]
    for layer, holder in found["structures"]["experts"]["holders"].items():
        line = next(line for line in text.splitlines() if layer in line)
        scores = sorted(holder["scores"])
        expected = [scores[0], scores[3], scores[5]]
        assert line.split()[2:5] == [f"{score:.4g}" for score in expected]
        assert line.split()[5] == f"{holder['n_eff']:.2f}"


def test_inspect_structures_takes_a_score_and_data(mixtral: Path, tmp_path: Path) -> None:
    save_tokenizer(mixtral, V)
    text = save_text(tmp_path / "words.txt")
    data = ("--calibration", text, "--samples", 4, "--length", 24)
    shown = json.loads(run("inspect", mixtral, "--structures", "--score", "reap", *data, "--json"))
    run("shrink", mixtral, "--out", tmp_path / "out", "--experts", 4, "--score", "reap", *data)
    written = json.loads((tmp_path / "out" / "emp_shrink.json").read_text())

    assert shown["structures"]["experts"]["score"] == "reap"
    for layer, holder in shown["structures"]["experts"]["holders"].items():
        of_shrink = written["structures"]["experts"]["holders"][layer]
        assert holder["scores"] == of_shrink["scores"]
        best = sorted(range(6), key=lambda e: -holder["scores"][e])[:4]
        assert of_shrink["kept"] == sorted(best)
    run("inspect", mixtral, "--score", "reap", status=2)
    run("inspect", mixtral, *data, status=2)


def test_verify_says_what_stays_and_whether_it_is_the_sources(
    mixtral: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("shrink", mixtral, "--out", out, "--experts", 4)
    tensors = len(json.loads((out / "emp_shrink.json").read_text())["tensors"])

    alone, compared = run("verify", out), run("verify", out, "--against", mixtral)

    assert alone.startswith(f"{out}: whole. {tensors} tensors (")
    assert "have the hashes of the report; 4 of 6 experts stay" in alone
    assert f"{out}: whole, and what shrinking {mixtral} gives. {tensors} tensors (" in compared
    assert "are, bit for bit, what stays of the source's; 4 of 6 experts stay" in compared
