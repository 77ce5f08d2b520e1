"""A model that is streamed, one decoder block at a time, computes what it computes whole."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.streaming import SAMPLES, inputs_of, load_whole, streamed, tokens, walk_through

from emp_llm.calibration.sample_walk import Call, Walk
from emp_llm.calibration.streamed_model import StreamedModel

pytestmark = pytest.mark.usefixtures("one_thread")


TinyModel = Callable[..., Path]


def twice(model: StreamedModel, walk: Walk, unit: str, calls: list[Call]) -> None:
    """Let all samples pass a unit, once without going on and once going on."""
    others = tuple(f"{other}." for other in model.units if other != unit)
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        assert parameter.is_meta or not name.startswith(others), name
    for call in calls:
        with walk.present(call):
            walk.own_forward(unit)(*call.args, **call.kwargs)
    for call in calls:
        with walk.present(call):
            walk.pass_on(call, walk.own_forward(unit)(*call.args, **call.kwargs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_model_gives_the_logits_of_the_whole_one_to_the_bit(
    tiny_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    folder, ids = tiny_model(architecture, torch.float32), tokens()
    whole = load_whole(architecture, folder)

    def logits(model: Any, sample: int) -> torch.Tensor:
        found = model(**inputs_of(whole, ids[sample : sample + 1]), use_cache=False).logits
        assert isinstance(found, torch.Tensor)
        return found

    with streamed(folder) as model:
        found = walk_through(model, tmp_path, lambda sample: logits(model.model, sample), twice)
        assert all(
            parameter.is_meta
            for unit in model.units
            for parameter in model.module(unit).parameters()
        )
    with torch.no_grad():
        expected = [logits(whole, sample) for sample in range(SAMPLES)]
    assert torch.equal(torch.cat(found), torch.cat(expected))


INTERRUPTED = """
import sys, threading
from pathlib import Path
import torch
from torch import nn
from emp_llm.calibration import sample_walk
from emp_llm.calibration.activations import Activations

class Unit(nn.Module):
    def forward(self, x):
        return x

units = {"first": Unit(), "second": Unit()}

def forward(_sample):
    x = torch.zeros(1)
    for unit in units.values():
        x = unit(x)

def walked(number):
    # two samples; at the line with this number, of those that pass the turn, Ctrl-C comes
    lines = 0
    def trace(frame, event, _arg):
        nonlocal lines
        passing = sample_walk._Runner.proceed.__code__
        inside = frame.f_code is passing or frame.f_code.co_filename == threading.__file__
        lines += inside and event == "line"
        if inside and event == "line" and lines == number:
            raise KeyboardInterrupt
        return trace if inside else None
    try:
        with sample_walk.Walk(units, [], forward, 2, Activations(1 << 20, Path("."))) as walk:
            for unit, calls in walk.stops():
                if unit == "first":
                    sys.settrace(trace)
                for call in calls:
                    walk.pass_on(call, call.args[0])
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False

number = 1
while walked(number):
    number += 1
assert number > 10, number
assert threading.active_count() == 1
"""


def test_ctrl_c_ends_a_walk_wherever_it_comes():
    # in a process of its own: a turn that is lost is waited for without end
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], timeout=60, check=False)
    assert done.returncode == 0
