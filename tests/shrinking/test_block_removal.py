"""Blocks removed one by one: the loss rises the least each time, and few are tried again."""

from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from support.calibrated import opened, save_model, save_text

from emp_llm.shrinking import block_removal
from emp_llm.shrinking.block_removal import Removed, remove_next
from emp_llm.shrinking.block_walk import Blocks, losses_without, measure_blocks

NUMBER = 12
BLOCKS = Blocks(
    names=tuple(f"layers.{number}" for number in range(NUMBER)),
    influence=(0.1,) * NUMBER,
    extras=(None,) * NUMBER,
    loss=2.0,
)


class Losses:
    """Losses that rise with each block and each pair of blocks that go, so that rises only grow."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._alone, self._pairs = generator.random(NUMBER), generator.random((NUMBER, NUMBER)) / 9
        self.tried = 0

    def __call__(self, some: Collection[int]) -> float:
        pairs = sum(self._pairs[pair] for pair in combinations(sorted(some), 2))
        return float(2 + sum(self._alone[one] for one in some) + pairs)

    def of_names(self, _session: object, _blocks: object, sets: Sequence[set[str]]) -> list[float]:
        self.tried += len(sets)
        return [self({BLOCKS.names.index(name) for name in names}) for names in sets]


@pytest.mark.parametrize("seed", range(5))
def test_few_blocks_are_tried_again_to_find_the_one_that_trying_all_would(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    losses = Losses(seed)
    monkeypatch.setattr(block_removal, "losses_without", losses.of_names)
    removed, expected = Removed(), list[int]()
    for _ in range(6):
        removed = remove_next(None, BLOCKS, removed)
        left = set(range(NUMBER)) - {*expected}
        expected.append(min(left, key=lambda one: losses({*expected, one})))
        assert removed.numbers == tuple(expected)
        assert removed.losses[-1] == losses(expected)
    assert removed.alone == pytest.approx([losses([one]) - 2 for one in range(NUMBER)])
    assert losses.tried < NUMBER + 5 * 8  # trying all would take 57


def test_each_loss_is_that_of_the_model_without_the_blocks_that_went(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=4)
    text, removed = save_text(tmp_path / "words.txt"), Removed()
    with opened(source, text, tmp_path, "none") as session:
        blocks = measure_blocks(session)
        for _ in range(2):
            removed = remove_next(session, blocks, removed)
        without = [{blocks.names[one]} for one in range(4)]
        first, second = removed.numbers
        alone = losses_without(session, blocks, without)
        (both,) = losses_without(session, blocks, [without[first] | without[second]])
    assert alone[first] == min(alone)
    assert removed.losses == pytest.approx((min(alone), both), rel=1e-6)
