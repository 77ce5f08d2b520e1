"""The model's own forward over all samples, block by block.

Each sample's forward runs in a thread of its own, which stops when it comes to a block. Once all
samples wait at a block, the block is visited: only then need it be in memory. It is the model's own
code that runs between blocks, so position embeddings, masks, routing and whatever else a model
computes reach each block as they always do. One thread runs at a time.
"""

from __future__ import annotations

import functools
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from emp_llm.calibration.activations import Activations, tensors_of
from emp_llm.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

__all__ = ["Call", "Walk"]


class Call:
    """One sample that waits at a block.

    Attributes:
        sample: Its number.
        args: What the model calls the block with, by position.
        kwargs: What it calls it with by name.
    """

    def __init__(self, sample: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.sample = sample
        self.args = args
        self.kwargs = kwargs


class _StoppedError(BaseException):
    """The walk is over; nothing that a model catches."""


class _Runner:
    """The thread of one sample: it runs while the walk waits for it, and the other way round."""

    def __init__(self, sample: int, work: Callable[[], Any], *, gradients: bool) -> None:
        self.sample = sample
        self.call: Call | None = None
        self.block = ""
        self.result: Any = None
        self.failure: BaseException | None = None
        self.done = False
        self._work = work
        self._gradients = gradients
        self._outcome: Any = None
        self._go = threading.Semaphore(0)
        self._came = threading.Semaphore(0)
        self._stopping = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name=f"sample-{sample}", daemon=True)

    def proceed(self, outcome: Any = None) -> None:  # noqa: ANN401 (what a block gives)
        """Let it run to its next block, or to its end.

        Args:
            outcome: What the block that it waits at has given.
        """
        self._outcome = outcome
        self.call = None
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise OptionError(
                    f"calibration: there is no thread for sample {self.sample} ({error}): each one "
                    "waits in a thread of its own; give fewer samples"
                ) from error
        else:
            self._go.release()
        self._came.acquire()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Have it end where it waits, or, if it runs, at the next block."""
        self._stopping = True
        self._go.release()

    def join(self) -> None:
        """Wait until it has ended."""
        if self._thread.ident is not None:
            self._thread.join()
        self._outcome = self.call = None

    def arrive(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Wait at a block; returns what it gives. Called by its own thread."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        self.block, self.call = block, Call(self.sample, args, kwargs)
        del args, kwargs
        self._came.release()
        self._go.acquire()
        if self._stopping:
            raise _StoppedError
        outcome, self._outcome = self._outcome, None
        return outcome

    def _run(self) -> None:
        _here.runner = self
        # on several cores, each thread that waits would keep as many others of OpenMP's waiting
        torch.set_num_threads(1)
        try:
            with torch.set_grad_enabled(self._gradients):
                self.result = self._work()
        except _StoppedError:
            pass
        except BaseException as failure:  # proceed raises it again
            self.failure = failure
        torch.set_num_threads(self._threads)
        self.done = True
        self._came.release()


_here = threading.local()
"""Of each sample's thread, its runner."""


class Walk:
    """All samples on their way through a model.

    To be used as a context manager: leaving it ends all threads and gives the model its own
    forwards back.

    Args:
        blocks: The modules to stop at, by their names.
        outside: The modules that run between them, whose buffers and caches all samples share.
        forward: Runs the model on the sample with this number.
        samples: How many there are.
        activations: Where they wait.
        gradients: Whether what lies between blocks is to be recorded for gradients.

    Attributes:
        activations: Where samples wait.
    """

    def __init__(
        self,
        blocks: dict[str, nn.Module],
        outside: Sequence[nn.Module],
        forward: Callable[[int], Any],
        samples: int,
        activations: Activations,
        *,
        gradients: bool = False,
    ) -> None:
        self._blocks = blocks
        self._outside = outside
        self.activations = activations
        self._runners = [
            _Runner(sample, functools.partial(forward, sample), gradients=gradients)
            for sample in range(samples)
        ]
        self._forwards = {name: block.forward for name, block in blocks.items()}

    def __enter__(self) -> Walk:
        for name, block in self._blocks.items():
            block.forward = self._stop_at(name)
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            for runner in self._runners:
                runner.stop()
            for runner in self._runners:
                runner.join()
        finally:
            for block in self._blocks.values():
                del block.forward

    def results(self) -> list[Any]:
        """What the model gave for each sample, once there are no more stops."""
        return [runner.result for runner in self._runners]

    def stops(self) -> Iterator[tuple[str, list[Call]]]:
        """The blocks that samples come to, each with all samples that wait there.

        Before the next one is asked for, `pass_on` is to be called for each.

        Raises:
            CheckpointError: If samples of one model part ways.
        """
        for runner in self._runners:
            runner.proceed()
            self._put_away(runner)
        while waiting := [runner for runner in self._runners if not runner.done]:
            names = {runner.block for runner in waiting}
            if len(names) > 1 or len(waiting) < len(self._runners):
                raise CheckpointError(
                    f"samples take different ways through the model ({', '.join(sorted(names))}): "
                    "calibrate with a single sample"
                )
            yield names.pop(), [runner.call for runner in waiting if runner.call is not None]

    def pass_on(self, call: Call, outcome: Any) -> None:  # noqa: ANN401 (what a block gives)
        """Let a sample go on with what its block gave."""
        call.args, call.kwargs = (), {}
        self._runners[call.sample].proceed(outcome)

    @contextmanager
    def present(self, call: Call) -> Iterator[None]:
        """Have a sample's activations in memory for a while."""
        self.activations.bring_back(self._runners[call.sample])
        try:
            yield
        finally:
            self._put_away(self._runners[call.sample])

    def own_forward(self, name: str) -> Callable[..., Any]:
        """The forward of a block itself."""
        return self._forwards[name]

    def _put_away(self, runner: _Runner) -> None:
        if runner.call is not None:
            tensors = tensors_of(runner.call.args, runner.call.kwargs)
            if any(tensor.is_meta for tensor in tensors):
                raise CheckpointError(
                    f"{runner.block}: the model puts data where weights lie that are not in memory "
                    "at that time: it cannot be calibrated; use the criterion magnitude"
                )
            self.activations.leave(_held(self._outside))
            self.activations.put_away(runner, tensors)

    def _stop_at(self, name: str) -> Callable[..., Any]:
        @functools.wraps(self._forwards[name])
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            runner: _Runner = _here.runner  # nobody else runs the model
            return runner.arrive(name, args, kwargs)

        return forward


def _held(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """What modules keep: parameters, buffers, and whatever they have put by."""
    kept = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
        or (isinstance(value, list | tuple | dict) and len(value) > 0)
    ]
    return [tensor for tensor in tensors_of(kept) if not tensor.is_meta]
