"""Runs the model's own forward on all samples at once, stopping at each unit.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.

Each sample's forward runs in a thread of its own, which stops when the model calls a unit. Once all
samples wait at a unit, it is worked on: only then must it be in memory. Between units the model's
own code runs, so position embeddings, attention masks, routing and whatever else a model computes
reach each unit as they always do; no architecture has to be known here. Python cannot suspend a
call deep inside other calls, but a thread can wait there.

The threads take turns, so the order of all computation is fixed: exactly one of them, or the thread
that walks, runs at a time.
"""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.activations import Activations, tensors_of
from emp_llm.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

__all__ = ["Call", "Walk"]


class Call:
    """A model's call of a unit for one sample, which waits there.

    Attributes:
        sample: The sample's number.
        args: Positional arguments of the call.
        kwargs: Its keyword arguments.
    """

    def __init__(self, sample: int, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.sample = sample
        self.args = args
        self.kwargs = kwargs


class _StoppedError(BaseException):
    """The walk is over. No `Exception`, so no model's code catches it."""


class _Runner:
    """The thread of one sample; it runs only while the walking thread waits for it.

    Args:
        sample: The sample's number.
        work: Runs the model on it.
        gradients: Whether the work is recorded for gradients.

    Attributes:
        call: The call at which it waits; None before the first and after the last one.
        unit: The unit of that call.
        result: What `work` returned, once it is done.
        failure: What `work` raised.
        done: Whether it has ended.
    """

    def __init__(self, sample: int, work: Callable[[], object], *, gradients: bool) -> None:
        self.sample = sample
        self.call: Call | None = None
        self.unit = ""
        self.result: object = None
        self.failure: BaseException | None = None
        self.done = False
        self._work = work
        self._gradients = gradients
        self._output: object = None
        # two queues pass the turn: `_go` to this sample, `_came` back to the walking thread. They
        # are written in C: Ctrl-C inside a semaphore, which is not, can lose the turn for ever
        self._go: SimpleQueue[None] = SimpleQueue()
        self._came: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name=f"sample-{sample}", daemon=True)

    def proceed(self, output: object = None) -> None:
        """Let it run to its next unit, or to its end.

        Args:
            output: The output of the unit that it waits at.
        """
        self._output = output
        self.call = None
        if self._thread.ident is None:  # not started yet
            try:
                self._thread.start()
            except RuntimeError as error:
                raise OptionError(
                    f"calibration: no thread can be started for sample {self.sample} ({error}), "
                    "and each sample needs one: give fewer samples"
                ) from error
        else:
            self._go.put(None)
        self._came.get()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Have it end where it waits, or, if it runs, at the next unit."""
        self._stopping = True
        self._go.put(None)

    def join(self) -> None:
        """Wait until it has ended."""
        if self._thread.is_alive():
            self._thread.join()
        self._output = self.call = None

    def arrive(self, unit: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Wait at a unit and return its output; called by the runner's own thread."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self.unit, self.call = unit, Call(self.sample, args, kwargs)
        del args, kwargs  # this frame waits: what it holds could not be freed meanwhile
        self._came.put(None)
        self._go.get()
        if self._stopping:
            raise _StoppedError
        output, self._output = self._output, None
        return output

    def _run(self) -> None:
        _here.runner = self
        # OpenMP keeps a pool of threads for each thread that has computed on several cores, and
        # hundreds of samples would keep hundreds of pools: up to its first unit, a sample has one
        torch.set_num_threads(1)
        try:
            with torch.set_grad_enabled(self._gradients):
                self.result = self._work()
        except _StoppedError:
            pass
        except BaseException as failure:  # `proceed` raises it in the walking thread
            self.failure = failure
        torch.set_num_threads(self._threads)
        self.done = True
        self._came.put(None)


_here = threading.local()
"""``runner``: in the thread of a sample, its runner."""


class Walk:
    """All samples on their way through a model.

    A context manager: leaving it ends all threads and restores the units' own forwards.

    Args:
        units: The modules to stop at, by name.
        outside: The modules that run between them, whose buffers and caches all samples share.
        forward: Runs the model on the sample with this number.
        samples: How many samples there are.
        activations: Holds the arguments of calls that wait.
        gradients: Whether what runs between units is recorded for gradients.

    Attributes:
        activations: Holds the arguments of calls that wait.
    """

    def __init__(
        self,
        units: dict[str, nn.Module],
        outside: Sequence[nn.Module],
        forward: Callable[[int], object],
        samples: int,
        activations: Activations,
        *,
        gradients: bool = False,
    ) -> None:
        self._units = units
        self._outside = outside
        self.activations = activations
        self._runners = [
            _Runner(sample, functools.partial(forward, sample), gradients=gradients)
            for sample in range(samples)
        ]
        self._forwards = {name: unit.forward for name, unit in units.items()}

    def __enter__(self) -> Walk:
        for name, unit in self._units.items():
            unit.forward = self._stop_at(name)
        return self

    def __exit__(self, *_error: object) -> None:
        # all are stopped before any is joined: after an error, a sample may still be running
        try:
            for runner in self._runners:
                runner.stop()
            for runner in self._runners:
                runner.join()
        finally:
            for unit in self._units.values():
                del unit.forward  # of the instance: the class still has its own

    def results(self) -> list[object]:
        """What `forward` returned for each sample, once there are no more stops."""
        return [runner.result for runner in self._runners]

    def stops(self) -> Iterator[tuple[str, list[Call]]]:
        """The units that samples come to, each with the calls of all samples, which wait there.

        `pass_on` has to be called for each of them before the next unit is asked for.

        Raises:
            CheckpointError: If not all samples come to the same unit.
        """
        # one after the other: a sample's activations are put away before the next one starts
        for runner in self._runners:
            runner.proceed()
            self._has_come(runner)
        while waiting := [runner for runner in self._runners if not runner.done]:
            names = {runner.unit for runner in waiting}
            if len(names) > 1 or len(waiting) < len(self._runners):
                raise CheckpointError(
                    f"samples reach different layers at a time ({', '.join(sorted(names))}): "
                    "calibrate with a single sample"
                )
            yield names.pop(), [runner.call for runner in waiting if runner.call is not None]

    def pass_on(self, call: Call, output: object) -> None:
        """Let a sample go on with the output of its unit."""
        call.args, call.kwargs = (
            (),
            {},
        )  # the inputs are no longer needed, the caller may hold the call
        self._runners[call.sample].proceed(output)

    @contextmanager
    def present(self, call: Call) -> Iterator[None]:
        """Within this ``with`` statement, a sample's activations are in memory."""
        runner = self._runners[call.sample]
        self.activations.bring_back(runner)
        try:
            yield
        finally:
            if runner.call is call:
                self._put_away(runner)
            else:  # it was passed on
                self._has_come(runner)

    def own_forward(self, unit: str) -> Callable[..., object]:
        """The forward of a unit itself, which does not stop."""
        return self._forwards[unit]

    def _has_come(self, runner: _Runner) -> None:
        """Put away what a sample has brought to a unit."""
        # found anew each time: models fill caches, such as rotary tables, as they run
        self.activations.exempt(_held(self._outside))
        self._put_away(runner)

    def _put_away(self, runner: _Runner) -> None:
        if runner.call is not None:
            tensors = tensors_of(runner.call.args, runner.call.kwargs)
            # such as a tensor that a model makes on the device of a weight, and passes to layers
            if any(tensor.is_meta for tensor in tensors):
                raise CheckpointError(
                    f"{runner.unit}: the model makes data on the device of weights that are not in "
                    "memory then, so it cannot be calibrated: use the criterion magnitude"
                )
            self.activations.put_away(runner, tensors)

    def _stop_at(self, unit: str) -> Callable[..., object]:
        # the signature stays visible: models look at it to choose what they pass
        @functools.wraps(self._forwards[unit])
        def forward(*args: object, **kwargs: object) -> object:
            runner: _Runner = _here.runner  # only the threads of samples run the model
            return runner.arrive(unit, args, kwargs)

        return forward


def _held(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The tensors that modules hold: parameters, buffers, and caches in any other attribute."""
    kept = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
        or (isinstance(value, list | tuple | dict) and len(value) > 0)
    ]
    return [tensor for tensor in tensors_of(kept) if not tensor.is_meta]
