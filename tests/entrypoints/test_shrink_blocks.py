"""What shrink writes with fewer decoder blocks, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrated import calibration, ids_of, save_model, save_text
from support.checkpoints import bits, files, load
from support.mixtures import EXPERTS
from support.streaming import load_whole
from torch.nn.functional import cosine_similarity

from emp_llm import CheckpointError, EmpError, OptionError, ShrinkOptions, shrink, verify

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, LISTED = 5, "model.layers"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    types = ["full_attention", *["sliding_attention"] * 4]
    sizes = {"num_hidden_layers": BLOCKS, "sliding_window": 4, "layer_types": types}
    return save_model(folder, "gemma3", max_shard_size=9000, **sizes)


def influence(source: Path, text: Path) -> list[float]:
    """1 - cosine of input and output of each block, by plain torch."""
    model, found = load_whole("gemma3", source), list[float]()
    for block in model.model.layers:
        block.register_forward_hook(
            lambda _, args, output: found.append(
                1 - cosine_similarity(args[0].double(), output.double(), dim=-1).mean().item()
            )
        )
    with torch.no_grad():
        model(ids_of(text), use_cache=False)
    return found


def test_blocks_of_little_influence_are_left_out_and_the_others_are_numbered_anew(
    gemma: Path, text: Path, tmp_path: Path
) -> None:
    out, asked = tmp_path / "out", calibration(text)
    report = shrink(gemma, out, ShrinkOptions(blocks=3, calibration=asked))

    scores = influence(gemma, text)
    goes = sorted(range(BLOCKS), key=scores.__getitem__)[:2]
    kept = [block for block in range(BLOCKS) if block not in goes]
    fields = report["structures"]["blocks"]
    assert fields["holders"][LISTED]["kept"] == kept
    assert fields["holders"][LISTED]["scores"] == pytest.approx(scores, rel=1e-3)
    assert (fields["field"], fields["number"], fields["kept"]) == ("num_hidden_layers", BLOCKS, 3)
    assert report["options"][:4] == ["--blocks", "3", "--calibration", "words.txt"]
    assert report["calibration"]["samples"] == asked.samples

    dense, small = load(gemma), load(out)
    for new, old in enumerate(kept):
        of_old = {n: t for n, t in dense.items() if n.startswith(f"{LISTED}.{old}.")}
        for name, tensor in of_old.items():
            renamed = name.replace(f".{old}.", f".{new}.", 1)
            assert bits(small.pop(renamed)) == bits(tensor)
    assert all(bits(small.pop(n)) == bits(t) for n, t in dense.items() if LISTED not in n)
    assert not small

    before, after = (json.loads((f / "config.json").read_text()) for f in (gemma, out))
    types = [before["layer_types"][block] for block in kept]
    assert after == {**before, "num_hidden_layers": 3, "layer_types": types}
    assert verify(out, against=gemma)["structures"] == {"blocks": (3, BLOCKS)}


def test_as_few_blocks_stay_as_the_loss_allows(gemma: Path, text: Path, tmp_path: Path) -> None:
    options = ShrinkOptions(
        blocks="auto", max_loss_increase=1e6, block_score="loss", calibration=calibration(text)
    )
    report = shrink(gemma, tmp_path / "out", options)
    fields = report["structures"]["blocks"]
    assert fields["kept"] == 1
    assert [one["number"] for one in fields["tried"]] == [None, 4, 3, 2, 1]
    assert report == json.loads((tmp_path / "out" / "emp_shrink.json").read_text())
    words = ["--blocks", "auto", "--max-loss-increase", "1000000.0", "--block-score", "loss"]
    assert report["options"][:6] == words


def test_as_few_experts_stay_as_the_loss_allows(text: Path, tmp_path: Path) -> None:
    sizes = {"num_local_experts": EXPERTS}
    source = save_model(tmp_path / "mixtral", "mixtral", **sizes)
    options = ShrinkOptions(experts="auto", max_loss_increase=1e6, calibration=calibration(text))
    fields = shrink(source, tmp_path / "out", options)["structures"]["experts"]
    assert fields["kept"] == 2  # what the router picks
    assert [one["number"] for one in fields["tried"]] == [None, 4, 3, 2]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"blocks": BLOCKS}, "5 of them are to stay, but the model has 5 blocks"),
        ({"blocks": 9}, "9 of them are to stay, but the model has 5 blocks (num_hidden_layers)"),
        ({"blocks": 3, "experts": 2}, "the model has no experts to choose from"),
    ],
)
def test_what_the_model_cannot_have_is_refused_and_nothing_is_left(
    gemma: Path, tmp_path: Path, options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(EmpError, match=r"^[^\n]*$") as refused:
        shrink(gemma, tmp_path / "out", ShrinkOptions(block_score="random", **options))
    assert fault in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_config_that_cannot_say_what_is_left_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "jamba", "jamba", num_hidden_layers=6)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="attn_layer_period 2") as refused:
        shrink(source, tmp_path / "out", ShrinkOptions(blocks=3, block_score="random"))
    assert "\n" not in str(refused.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "nothing is to become fewer"),
        ({"blocks": 0}, "blocks is 0: "),
        ({"blocks": "25%"}, "blocks is '25%': give how many stay, such as 6 or 'auto'"),
        ({"blocks": 3}, "block score 'influence' needs data"),
        ({"blocks": 3, "block_score": "best"}, "choose one of influence, loss, random"),
        ({"experts": 3, "block_score": "best"}, "block score is 'best'; choose one of influence"),
        ({"experts": 3, "width_score": "best"}, "width score is 'best'; choose one of activation"),
        ({"experts": 3, "repair": "best"}, "repair is 'best'; choose one of obs, none"),
        ({"experts": 3, "multiple": 0}, "multiple is 0; "),
        ({"kv_heads": 2}, "neurons and kv heads are chosen and repaired by data"),
        ({"kv_heads": "x"}, "kv heads is 'x': give how many stay, such as 6, the share that is"),
        ({"blocks": "auto"}, "blocks is auto: give the max loss increase too"),
        ({"blocks": "auto", "experts": "auto", "max_loss_increase": 1}, "blocks and experts are"),
        ({"blocks": "auto", "max_loss_increase": 1}, "auto needs data"),
        ({"blocks": "auto", "max_loss_increase": 0}, "max loss increase is 0; "),
        ({"blocks": "auto", "max_loss_increase": "5"}, "max loss increase is '5'; "),
        ({"experts": 2, "max_loss_increase": 1}, "max loss increase bounds a search"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(OptionError, match=r"^[^\n]*$") as refused:
        ShrinkOptions(**options)
    assert fault in str(refused.value)
