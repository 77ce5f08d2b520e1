"""A streamed model, the samples that it is calibrated on, and their walks through it.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.
"""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import transformers
from torch.nn.functional import cross_entropy

from emp_llm.calibration.activations import Activations, tensors_of
from emp_llm.calibration.input_statistics import UnsharedInputsError
from emp_llm.calibration.sample_walk import Walk
from emp_llm.calibration.samples import read_samples
from emp_llm.calibration.streamed_model import StreamedModel
from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.errors import CheckpointError, EmpError, OptionError
from emp_llm.messages import first_line
from emp_llm.structure.auto_class import auto_class
from emp_llm.texts.texts import read_text
from emp_llm.texts.tokenizer import load_tokenizer
from emp_llm.texts.tokens import positions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from emp_llm.calibration.remembered import Remembered
    from emp_llm.calibration.sample_walk import Call
    from emp_llm.calibration.samples import Samples
    from emp_llm.calibration.tensor_loading import Change
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.tensors.target import Target

__all__ = ["Session", "device_of", "recording"]

_PREDICTING = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")
_OVERFLOW_REMEDY = "give a checkpoint whose dtype the model was trained in, or another text"


class Session:
    """A calibration of one model.

    Args:
        plan: What is to be pruned, and the options of the calibration.
        progress: Reports the walks through the model.
        files: The checkpoint's files.
        folder: Where activations wait that exceed the memory for them.
        dtype: What the model computes in; by default that of the checkpoint.
        samples: The tokens, where they have been read before; by default those of the options.

    Attributes:
        options: The options of the calibration.
        device: Where the model runs.
        model: The model, loaded unit by unit.
        samples: The tokens that it is calibrated on.

    Raises:
        CheckpointError: If the model cannot be built, or has no tokenizer.
        OptionError: If the text is too short, or samples are longer than the model allows.
    """

    def __init__(
        self,
        plan: PruningPlan,
        progress: SharedProgress,
        files: OpenFiles,
        folder: Path,
        dtype: torch.dtype | None = None,
        samples: Samples | None = None,
    ) -> None:
        options = plan.options.calibration
        if options is None or options.text is None:
            raise OptionError("criterion and repair need data: give a text to calibrate on")
        self.device = device_of(options.device)
        self.options = options
        self._folder = folder
        self._config = plan.checkpoint.config
        self._progress = progress
        self._targets = {target.name: target for target in plan.all_targets}
        self.model = StreamedModel(plan.checkpoint, files, self.device, self._targets, dtype)
        self.samples = samples or self._read_samples(plan.checkpoint.folder, options.text)

    @property
    def gradient_scale(self) -> float:
        """What the loss is multiplied by, so that its gradients are not too small for float16.

        The loss is a mean over tokens, and the smallest float16 is 6e-8. With this factor, the loss
        of each token counts 32 times or more: loss scaling, as in mixed-precision training
        (Micikevicius et al., arXiv 1710.03740). A power of two, so it changes no bit in bfloat16
        and float32.
        """
        return float(32 << (self.samples.ids_NL.shape[1] - 1).bit_length())

    @property
    def targets(self) -> dict[str, list[Target]]:
        """The targets of each unit that has any."""
        found = {
            unit: [self._targets[name] for name in names if name in self._targets]
            for unit, names in self.model.units.items()
        }
        return {unit: targets for unit, targets in found.items() if targets}

    def begin(self, stage: str, rounds: int = 1) -> None:
        """Begin a stage of progress, in which all samples come to each unit so many times."""
        self._to_come = dict.fromkeys(self.model.units, rounds)
        self._progress.begin(stage, sum(self._to_come.values()), "blocks")

    def stops(self, walk: Walk) -> Iterator[tuple[str, list[Call]]]:
        """The units that samples come to, with their calls; see `Walk.stops`."""
        for unit, calls in walk.stops():
            # between units, the model may have called embeddings or the output head
            self.model.release_temporary()
            yield unit, calls
            self.passed(unit)

    @cached_property
    def visits(self) -> list[str]:
        """The units in the order in which samples come to them; some may come several times.

        Only the model's own code knows it: the first sample finds it in the dense model.

        Raises:
            CheckpointError: If the model does not run.
        """
        visits = []
        with self.walk(samples=1) as walk:
            for unit, calls in walk.stops():
                self.model.release_temporary()
                self.pass_on(walk, unit, calls, unchanged)
                visits.append(unit)
        return visits

    @contextmanager
    def walk(
        self,
        *,
        samples: int | None = None,
        lanes: int = 1,
        more: int = 0,
        loss: bool = False,
        gradients: bool = False,
        forward: Callable[[int], object] | None = None,
    ) -> Iterator[Walk]:
        """All samples, or only the first ones, on their way through the model.

        Args:
            samples: How many there are; None for all.
            lanes: How often each sample goes through the model, side by side: the calls of the
                first lane come first in `stops`, then those of the second.
            more: How many of them, the first ones, go through it once more, in a last lane.
            loss: Whether the result of each sample is its share of the mean loss in nats per token,
                a float; otherwise it is None.
            gradients: Whether the loss of each sample is propagated back, scaled, to the outputs of
                the last unit.
            forward: Runs the model on a sample and returns its result, in place of the above. It is
                given the sample's number, which goes on from lane to lane.

        Raises:
            CheckpointError: If a loss is needed and the model predicts no next token.
        """
        count = len(self.samples.ids_NL) if samples is None else samples
        activations = Activations(self.options.activation_memory, self._folder)
        units = {unit: self.model.module(unit) for unit in self.model.units}
        run: Callable[[int, bool], object] = self._run
        if loss or gradients:
            self._check_predicts()
            run = self._loss
        self.model.load_embeddings()
        # in a second lane, sample number `count` is sample 0 once more
        try:
            with Walk(
                units,
                self.model.outside,
                forward or (lambda number: run(number % count, gradients)),
                lanes * count + more,
                activations,
                gradients=gradients,
            ) as walk:
                yield walk
        finally:
            activations.close()
            self.model.release_all()

    def output(self, walk: Walk, unit: str, call: Call) -> object:
        """The output of a unit, which is loaded, for a sample whose activations are in memory.

        Raises:
            CheckpointError: If some of it is NaN or infinite, or the model's code fails.
        """
        with torch.no_grad(), self.explaining():
            output = walk.own_forward(unit)(*call.args, **call.kwargs)
        self.check_finite(unit, call, output)
        return output

    def check_finite(self, unit: str, call: Call, values: object) -> None:
        """Refuse what a unit has computed for a sample if some of it is not finite.

        Raises:
            CheckpointError: If some of it is NaN or infinite.
        """
        for tensor in tensors_of(values):
            # found here, where it begins: later the whole model gives NaN
            if tensor.is_floating_point() and not _is_finite(tensor):
                self._check_weights(unit)
                where = self._where(call.sample % len(self.samples.ids_NL))
                raise CheckpointError(f"{where}: {unit} gives NaN or infinity: {_OVERFLOW_REMEDY}")

    def pass_on(
        self,
        walk: Walk,
        unit: str,
        calls: Sequence[Call],
        change: Change,
        remembered: Remembered | None = None,
    ) -> None:
        """Let samples go on with the outputs of a unit, which is loaded for it and released.

        Args:
            walk: Their walk.
            unit: The unit.
            calls: The samples at it.
            change: Applied to each tensor that is loaded.
            remembered: What is known of the outputs.
        """
        self.model.load(unit, change)
        for call in calls:
            with walk.present(call):
                with remembered.run(call, last=True) if remembered else nullcontext():
                    output = self.output(walk, unit, call)
                walk.pass_on(call, output)
        self.model.release(unit)

    def passed(self, unit: str) -> None:
        """Advance progress by a unit that all samples have passed, unless it has counted before."""
        if self._to_come[unit]:
            self._to_come[unit] -= 1
            self._progress.advance(1)

    def logits(self, sample: int) -> torch.Tensor:
        """The logits of a sample, [L, V], of a model that is loaded whole.

        Raises:
            CheckpointError: If the model's code fails, or it predicts no next token.
        """
        self._check_predicts()
        with self.explaining():
            output = self.model.model(**self._inputs(sample), use_cache=False)
            logits_LV: torch.Tensor = output.logits[0]
            return logits_LV

    def loss(self, change: Change) -> float:
        """The mean loss of all samples in nats per token.

        Args:
            change: Applied to each tensor that is loaded.
        """
        with self.walk(loss=True) as walk:
            for unit, calls in self.stops(walk):
                self.pass_on(walk, unit, calls, change)
            return math.fsum(loss for loss in walk.results() if isinstance(loss, float))

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Within this ``with`` statement, an error of the model's own code becomes one of ours.

        Raises:
            CheckpointError: In place of any other exception.
        """
        try:
            yield
        except (EmpError, UnsharedInputsError, MemoryError):  # ours, or explained elsewhere
            raise
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"{self.device}: has no room for a decoder block and a sample "
                f"({first_line(error)}): give shorter samples, or calibrate on the CPU"
            ) from error
        except Exception as error:  # anything that a model's own code raises
            raise CheckpointError(
                f"{type(self.model.model).__name__}: transformers {transformers.__version__} does "
                f"not run it on tokens alone ({type(error).__name__}: {first_line(error)}): choose "
                "a criterion that needs no data, such as magnitude"
            ) from error

    def _read_samples(self, source: Path, text: str) -> Samples:
        options, model = self.options, self.model.model
        found = read_text(text, protocol="paper", part="train")
        tokenizer = load_tokenizer(str(source), source, trust_remote_code=options.trust_remote_code)
        with self.explaining():
            embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
        positions = positions_of(model.config)
        return read_samples(found, tokenizer, options, positions=positions, embeddings=embeddings)

    def _inputs(self, sample: int) -> dict[str, torch.Tensor]:
        # a copy: activations that wait are emptied, and a view would empty those of all samples
        ids_1L = self.samples.ids_NL[sample : sample + 1].to(self.device, copy=True)
        model = self.model.model
        if not getattr(model.config, "is_encoder_decoder", False):
            return {"input_ids": ids_1L}
        taken = inspect.signature(model.forward).parameters
        return {"input_ids": ids_1L, "labels" if "labels" in taken else "decoder_input_ids": ids_1L}

    def _run(self, sample: int, *_: object) -> None:
        with self.explaining():
            self.model.model(**self._inputs(sample), use_cache=False)

    def _loss(self, sample: int, gradients: bool) -> float:
        inputs = self._inputs(sample)
        ids_L = inputs["input_ids"][0]
        with self.explaining():
            logits_LV = self.model.model(**inputs, use_cache=False).logits[0]
            # with `labels`, the model itself shifts the decoder's inputs by one token
            first = 0 if "labels" in inputs else 1
            loss = cross_entropy(logits_LV[: len(ids_L) - first].float(), ids_L[first:])
            if not torch.isfinite(loss):
                where = self._where(sample)
                raise CheckpointError(
                    f"{where}: the model's loss is NaN or infinite: {_OVERFLOW_REMEDY}"
                )
            if gradients:
                torch.autograd.backward([loss * self.gradient_scale])
        return loss.item() / len(self.samples.ids_NL)

    def _where(self, sample: int) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"sample {sample} of {self.samples.text} in {dtype}"

    def _check_weights(self, unit: str) -> None:
        for name, parameter in self.model.parameters(unit).items():
            if not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"{name!r} holds NaN or infinity, which no model can compute with: repair the "
                    "checkpoint"
                )

    def _check_predicts(self) -> None:
        if auto_class(self._config) not in _PREDICTING:
            raise CheckpointError(
                f"{type(self.model.model).__name__}: predicts no next token, so that there is no "
                "loss on a text, nor gradients of it: choose another criterion, such as wanda"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity."""
    # a sum takes a tenth of the time; one that is not finite proves nothing, for it may overflow
    sums = tensor.sum(dtype=torch.float32).item()
    return math.isfinite(sums) or bool(torch.isfinite(tensor).all())


@contextmanager
def recording() -> Iterator[None]:
    """Have torch dispatch products and record gradients, whatever modes the caller has set."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def device_of(device: str) -> torch.device:
    """The device that an option names; with ``auto`` the first GPU, if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
