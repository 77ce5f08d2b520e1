"""Which blocks stay, by each score, and how few when a bound on the loss decides."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibrated import calibration, ids_of, save_model, save_text
from support.streaming import load_whole
from torch.nn.functional import cosine_similarity, cross_entropy

from emp_llm import OptionError
from emp_llm.calibration.session import Session
from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrink_options import BlockScore
from emp_llm.shrinking import block_removal
from emp_llm.shrinking.block_choice import choose_blocks
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.measuring import Measuring
from emp_llm.shrinking.plan import ShrinkPlan

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS, HOLDER = 5, "model.layers"


class Llama:
    """A tiny Llama whose blocks differ in how much they do."""

    def __init__(self, folder: Path) -> None:
        source = save_model(folder / "llama", "llama", num_hidden_layers=BLOCKS)
        (path,) = source.glob("*.safetensors")
        scales = dict(zip("01234", (18.0, 8.0, 14.0, 6.0, 16.0), strict=True))
        tensors = {
            name: tensor * scales[name.split(".")[2]] if name.startswith(HOLDER) else tensor * 20
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
        self.folder, self.text = folder, save_text(folder / "words.txt")
        found = find_source(source, progress=SharedProgress(Silent()))
        self.plan = ShrinkPlan.make(found, found.open_checkpoint(), ["blocks"])

    def choose(
        self, score: BlockScore, store: Path, **options: Any
    ) -> tuple[Choice, dict[int | None, float]]:
        """The choice, and the losses that were found by the number of blocks."""
        with MaskStore(store) as notes:
            asked = calibration(self.text)
            measuring = Measuring(self.plan, asked, SharedProgress(Silent()), notes)
            choice = choose_blocks(measuring, self.plan.structures["blocks"], score, **options)
        self.gone = [one["gone"] for one in choice.tried if "gone" in one]
        return choice, {one["number"]: one["loss"] for one in choice.tried}

    def loss(self, kept: tuple[int, ...]) -> float:
        """The loss of the whole model with only these blocks, by plain torch."""
        model, ids = load_whole("llama", self.folder / "llama"), ids_of(self.text)
        model.model.layers = torch.nn.ModuleList(model.model.layers[block] for block in kept)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    def influence(self) -> list[float]:
        """1 - cosine of each block's input and output."""
        model = load_whole("llama", self.folder / "llama")
        with torch.no_grad():
            states = model(ids_of(self.text), output_hidden_states=True, use_cache=False)
        hidden = [*states.hidden_states[:-1]]
        last: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _, __, output: last.append(output))
        with torch.no_grad():
            model(ids_of(self.text), use_cache=False)
        pairs = pairwise([*hidden, last[0]])
        return [1 - cosine_similarity(x, y, dim=-1).mean().item() for x, y in pairs]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("llama"))


def without(*goes: int) -> tuple[int, ...]:
    return tuple(block for block in range(BLOCKS) if block not in goes)


def test_blocks_of_the_least_influence_go(llama: Llama, tmp_path: Path) -> None:
    choice, losses = llama.choose("influence", tmp_path, number=3)
    expected = llama.influence()
    assert choice.scores[HOLDER] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert choice.kept == {HOLDER: without(*np.argsort(expected)[:2].tolist())}
    assert not losses


def test_blocks_go_one_by_one_by_the_loss_without_them(llama: Llama, tmp_path: Path) -> None:
    choice, losses = llama.choose("loss", tmp_path, number=3)
    dense, alone = llama.loss(without()), [llama.loss(without(one)) for one in range(BLOCKS)]
    first = int(np.argmin(alone))
    pairs = {one: llama.loss(without(first, one)) for one in without(first)}
    second = min(pairs, key=pairs.__getitem__)
    assert choice.kept == {HOLDER: without(first, second)}
    assert llama.gone == [first, second]
    assert choice.scores[HOLDER] == pytest.approx([loss - dense for loss in alone], abs=1e-4)
    assert losses == pytest.approx({None: dense, 4: alone[first], 3: pairs[second]}, rel=1e-5)


@pytest.mark.parametrize("score", ["influence", "loss", "random"])
def test_as_few_blocks_stay_as_the_bound_on_the_loss_allows(
    llama: Llama, tmp_path: Path, score: BlockScore
) -> None:
    dense, wanted = llama.loss(without()), 0.0
    for number in (4, 3):
        some, _ = llama.choose(score, tmp_path / f"{number}", number=number)
        wanted = max(wanted, llama.loss(some.kept[HOLDER]))
    increase = 100 * abs(wanted / dense - 1) + 1e-3
    most = dense * (1 + increase / 100)
    choice, losses = llama.choose(score, tmp_path / "few", increase=increase)
    kept = choice.kept[HOLDER]
    assert losses[None] == pytest.approx(dense, rel=1e-5)
    assert losses[len(kept)] == pytest.approx(llama.loss(kept), rel=1e-5)
    assert losses[len(kept)] <= most
    assert len(kept) == 1 or losses[len(kept) - 1] > most


@pytest.mark.parametrize("score", ["influence", "loss"])
def test_a_bound_that_lets_none_go_is_refused_with_what_the_loss_would_be(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: BlockScore
) -> None:
    # where a block may go or not, the loss of this model falls
    losses = iter([2.0] if score == "influence" else [])
    monkeypatch.setattr(Measuring, "loss", lambda *_: next(losses, 2.5))
    monkeypatch.setattr(block_removal, "losses_without", lambda _s, _b, sets: [1e9] * len(sets))
    with pytest.raises(OptionError, match=r"^blocks: none can go if .* by 3 per cent: with 4 it"):
        llama.choose(score, tmp_path, increase=3.0)


@pytest.mark.parametrize(
    ("score", "asked"), [("loss", {"number": 3}), ("influence", {"increase": 50.0})]
)
def test_an_interrupted_choice_goes_on_with_what_was_measured(
    llama: Llama,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    score: BlockScore,
    asked: dict[str, Any],
) -> None:
    whole = llama.choose(score, tmp_path / "whole", **asked)
    walks = 0
    first_walk = Session.walk

    def walk(session: Session, **options: Any) -> Any:
        nonlocal walks
        walks += 1
        if walks == 3:
            raise KeyboardInterrupt
        return first_walk(session, **options)

    monkeypatch.setattr(Session, "walk", walk)
    with pytest.raises(KeyboardInterrupt):
        llama.choose(score, tmp_path / "parts", **asked)
    assert llama.choose(score, tmp_path / "parts", **asked) == whole
    monkeypatch.setattr(Session, "walk", None)  # all is measured
    assert llama.choose(score, tmp_path / "parts", **asked) == whole


def test_a_choice_at_random_is_that_of_its_seed(llama: Llama, tmp_path: Path) -> None:
    drawn = np.random.PCG64(4).random_raw(BLOCKS)
    choice, _ = llama.choose("random", tmp_path, number=2, seed=4)
    assert choice == Choice(
        kind="blocks",
        kept={HOLDER: tuple(sorted(np.argsort(drawn)[-2:].tolist()))},
        score="random",
    )
