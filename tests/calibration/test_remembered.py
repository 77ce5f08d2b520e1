"""Parts of a decoder block that come before its targets are computed once for each sample."""

import pytest
import torch
from torch import nn

from emp_llm.calibration.activations import Activations
from emp_llm.calibration.remembered import Remembered
from emp_llm.calibration.sample_walk import Call

TARGETS = ["block.mlp.up.weight", "block.mlp.down.weight"]


class Counted(nn.Linear):
    """A linear layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.up, self.down = Counted(), Counted(), Counted()


class Block(nn.Module):
    """Attention, and an MLP whose targets are multiplied by what comes from it.

    Args:
        observe: Called as `ProductObserver` calls it.
        writes: Whether the block writes to the output of its attention.
    """

    def __init__(self, observe=lambda _matrix, _x: None, *, writes=False) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.late = (
            nn.LayerNorm(4),
            Counted(),
            Mlp(),
            Counted(),
        )
        self.observe, self.writes = observe, writes

    def forward(self, x):
        attended = self.attention(self.norm(x))
        h = attended + self.mlp.router(x)
        if self.writes:
            attended.add_(1)
        self.observe((TARGETS[0], 0), h)
        h = self.mlp.up(h)
        self.observe((TARGETS[1], 0), h)
        return self.late(self.mlp.down(h)) + attended

    def counts(self):
        layers = (self.attention, self.mlp.router, self.mlp.up, self.late)
        return [layer.calls for layer in layers]


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run_thrice(block, tmp_path, memory):
    """Run a block three times on two samples; before the last time a target changes."""
    samples = [torch.randn(3, 4) for _ in range(2)]
    activations = Activations(1 << 20, tmp_path)
    outputs = []
    with Remembered("block", block, TARGETS, activations, memory) as remembered:
        block.observe = remembered.observing(lambda _matrix, _x: None)
        for turn in range(3):
            if turn == 2:
                block.mlp.up.weight.mul_(0.5)
            for number, x in enumerate(samples):
                call = Call(number, (x,), {})
                with remembered.run(call, last=turn == 2):
                    outputs.append(block(x))
    assert activations.room == 1 << 20
    assert "forward" not in vars(block.attention)
    block.observe = lambda _matrix, _x: None
    assert torch.equal(outputs[4], block(samples[0]))
    block.mlp.up.weight.mul_(2)
    assert torch.equal(outputs[0], block(samples[0]))
    assert torch.equal(outputs[3], block(samples[1]))


def test_what_comes_before_the_targets_is_computed_once(tmp_path):
    block = Block()
    run_thrice(block, tmp_path, 1 << 20)
    # twice for two samples, and three times by the checks
    assert block.counts() == [2 + 3, 2 + 3, 6 + 3, 6 + 3]


def test_targets_that_are_settled_are_computed_once_more(tmp_path):
    block, x = Block(), torch.randn(3, 4)
    call, activations = Call(0, (x,), {}), Activations(1 << 20, tmp_path)
    with Remembered("block", block, TARGETS, activations, 1 << 20) as remembered:
        block.observe = remembered.observing(lambda _matrix, _x: None)
        with remembered.run(call):
            block(x)
        block.mlp.up.weight.mul_(0.5)
        remembered.changing = frozenset(TARGETS[1:])
        with remembered.run(call):
            block(x)
        block.mlp.down.weight.mul_(2)
        remembered.changing = frozenset()
        with remembered.run(call, last=True):
            output = block(x)
    assert block.counts() == [1, 1, 2, 3]  # attention, router, up, and what comes after down
    assert activations.room == 1 << 20
    assert torch.equal(output, block(x))


def test_an_output_that_was_written_to_is_computed_again_and_no_other(tmp_path):
    block = Block(writes=True)
    run_thrice(block, tmp_path, 1 << 20)
    assert block.counts() == [6 + 3, 2 + 3, 6 + 3, 6 + 3]


@pytest.mark.parametrize(("memory", "kept"), [(0, 0), (48, 1), (96, 2), (97 + 48, 3)])
def test_no_more_is_kept_than_there_is_room_for(tmp_path, memory, kept):
    block = Block()
    run_thrice(block, tmp_path, memory)  # 48 bytes: an output, float32 [3, 4]
    attention, router, *_ = block.counts()
    assert attention + router == 12 - 2 * kept + 6


def test_a_part_that_writes_to_its_input_is_computed_again(tmp_path):
    class Writing(Counted):
        def forward(self, x):
            return super().forward(x.add_(1))

    block = Block()
    block.attention = Writing()
    run_thrice(block, tmp_path, 1 << 20)
    assert block.attention.calls == 6 + 3
