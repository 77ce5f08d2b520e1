"""What a model has that can become fewer, and what its scores count as, against plain torch."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from emp_cli.app import app
from support.calibrated import calibration, ids_of, inputs_of, run_on, save_text, save_tokenizer
from support.mixtures import make_mixture
from support.widths import GROUPS, NEURONS, make
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from emp_llm import inspect_structures
from emp_llm.entrypoints.structures import KindFields
from emp_llm.shrinking.choice import KindName

pytestmark = pytest.mark.usefixtures("one_thread")

READERS: Mapping[KindName, tuple[str, int]] = {
    "neurons": ("mlp.down_proj", NEURONS),
    "kv heads": ("self_attn.o_proj", GROUPS),
}
LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make("llama").save_pretrained(folder)
    return save_tokenizer(folder, 32)


def effective(scores: torch.Tensor) -> float:
    return float(scores.sum() ** 2 / scores.square().sum())


def counted(fields: KindFields) -> tuple[str, int, list[str]]:
    return fields["field"], fields["number"], list(fields["holders"])


def test_without_data_it_is_what_there_is_and_why_there_is_no_more(llama: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    found = inspect_structures(llama)
    assert {kind: counted(fields) for kind, fields in found["structures"].items()} == {
        "blocks": ("num_hidden_layers", 2, ["model.layers"]),
        "neurons": ("intermediate_size", NEURONS, [*LAYERS]),
        "kv heads": ("num_key_value_heads", GROUPS, [*LAYERS]),
    }
    for fields in found["structures"].values():
        assert fields.keys() == {"field", "number", "holders"}
        assert not any(fields["holders"].values())
    assert found["refused"].keys() == {"experts"}
    assert "the model has no experts" in found["refused"]["experts"]
    assert "calibration" not in found
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


def test_with_data_blocks_neurons_and_heads_have_scores(llama: Path, text: Path) -> None:
    found = inspect_structures(llama, calibration=calibration(text))
    model, ids = make("llama"), ids_of(text)
    inputs = inputs_of(model, lambda: run_on(model, ids))
    expected: dict[KindName, dict[str, float]] = {"neurons": {}, "kv heads": {}}
    for layer in LAYERS:
        for kind, (name, number) in READERS.items():
            weight_RC = model.get_submodule(f"{layer}.{name}").weight.detach().double()
            parts = inputs[f"{layer}.{name}"].double().chunk(number, dim=1)
            columns = weight_RC.chunk(number, dim=1)
            norms = [(x @ w.T).norm() for x, w in zip(parts, columns, strict=True)]
            expected[kind][layer] = effective(torch.stack(norms))
    for kind, by_layer in expected.items():
        fields = found["structures"][kind]
        assert fields["score"] == "activation"
        assert fields["holders"] == {
            layer: {"n_eff": pytest.approx(n_eff, rel=1e-4)} for layer, n_eff in by_layer.items()
        }
        assert fields["n_eff"] == pytest.approx(sum(by_layer.values()) / 2, rel=1e-4)

    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    # the last state is that behind the norm
    first = 1 - cosine_similarity(*next(pairwise(states)), dim=-1).mean()
    blocks = found["structures"]["blocks"]
    scores = blocks["holders"]["model.layers"]["scores"]
    assert blocks["score"] == "influence"
    assert scores[0] == pytest.approx(first.item(), rel=1e-4)
    assert blocks["n_eff"] == pytest.approx(effective(torch.tensor(scores)), rel=1e-4)
    assert found["calibration"]["text"] == text.name


def test_of_a_mixture_experts_are_scored_and_its_neurons_are_not(
    tmp_path: Path, text: Path
) -> None:
    make_mixture("mixtral", torch.float32).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 32)
    found = inspect_structures(tmp_path, score="reap", calibration=calibration(text))
    assert found["structures"].keys() == {"blocks", "experts"}
    experts = found["structures"]["experts"]
    assert experts["score"] == "reap"
    n_effs = [effective(torch.tensor(one["scores"])) for one in experts["holders"].values()]
    assert experts["n_eff"] == pytest.approx(sum(n_effs) / len(n_effs), rel=1e-4)
    assert "choose --experts" in found["refused"]["neurons"]
    assert "num_key_value_heads is 1" in found["refused"]["kv heads"]


def test_what_a_config_cannot_say_is_told_beside_what_it_can(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path)
    found = inspect_structures(tmp_path)
    assert found["structures"].keys() == {"blocks", "neurons"}
    assert counted(found["structures"]["neurons"])[:2] == ("n_inner", NEURONS)
    assert "head_dim" in found["refused"]["kv heads"]


def test_the_command_prints_tables_of_80_columns(llama: Path, text: Path) -> None:
    words = ["inspect", str(llama), "--structures", "--calibration", str(text)]
    done = CliRunner().invoke(app, [*words, "--samples", "4", "--length", "24", "--seed", "3"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    found = inspect_structures(llama, calibration=calibration(text))["structures"]
    assert ["neurons", "intermediate_size", "each", "of", "2", "layers", "40"] in lines
    assert ["blocks", "num_hidden_layers", "the", "model", "2"] in lines
    for kind in READERS:
        fields = found[kind]
        for layer in LAYERS:
            n_eff = f"{fields['holders'][layer]['n_eff']:.2f}"
            assert [layer, str(fields["number"]), n_eff] in lines
        assert ["mean", f"{fields['n_eff']:.2f}"] in lines
    tables = done.stdout.partition("calibrated on")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "experts cannot become fewer: config.json: the model has no experts" in done.stdout
