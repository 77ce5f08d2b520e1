"""A model, the samples that it is calibrated on, and their walks through it."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from emp_llm.calibration.activations import Activations, tensors_of
from emp_llm.calibration.input_statistics import PartedError
from emp_llm.calibration.sample_walk import Walk
from emp_llm.calibration.samples import read_samples
from emp_llm.calibration.streamed_model import StreamedModel
from emp_llm.errors import CheckpointError, EmpError, OptionError
from emp_llm.messages import first_line
from emp_llm.structure.auto_class import auto_class
from emp_llm.texts.texts import read_text
from emp_llm.texts.tokenizer import load_tokenizer
from emp_llm.texts.tokens import positions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from emp_llm.calibration.sample_walk import Call
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.tensors.target import Target

__all__ = ["Session", "recording"]

_PREDICT = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")
_OTHER = "give a checkpoint whose dtype the model was trained in, or another text"


class Session:
    """A calibration of one model: its parts and samples.

    Args:
        plan: What is to be pruned, and the calibration that was asked for.
        progress: Reports the walks through the model.
        files: The checkpoint's files.
        folder: Where activations wait that find no room in memory.

    Attributes:
        options: The calibration that was asked for.
        model: The model, in parts.
        samples: What it is calibrated on.

    Raises:
        CheckpointError: If the model cannot be built, or has no tokenizer.
        OptionError: If the text is too short, or samples are longer than the model allows.
    """

    def __init__(
        self, plan: PruningPlan, progress: SharedProgress, files: OpenFiles, folder: Path
    ) -> None:
        options = plan.options.calibration
        if options is None or options.text is None:
            raise OptionError("criterion and repair need data: give a text to calibrate on")
        self.device = _device(options.device)
        self._change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _name, tensor: tensor
        self.options = options
        self._folder = folder
        self._config = plan.checkpoint.config
        self._progress = progress
        self._targets = {target.name: target for target in plan.all_targets}
        text = read_text(options.text, protocol="paper", part="train")
        tokenizer = load_tokenizer(str(plan.checkpoint.folder), plan.checkpoint.folder)
        self.model = StreamedModel(
            plan.checkpoint,
            files,
            self.device,
            self._targets,
            lambda name, tensor: self._change(name, tensor),
        )
        model = self.model.model
        with self.explained():
            embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
        positions = positions_of(model.config)
        self.samples = read_samples(
            text, tokenizer, options, positions=positions, embeddings=embeddings
        )

    @property
    def gradient_scale(self) -> float:
        """What gradients are multiplied by, so that float16 has numbers for them.

        The loss is a mean over tokens, and float16 ends at 6e-8: each token's own loss counts 32
        times or more, as it does in mixed precision (Micikevicius et al., arXiv 1710.03740). A
        power of two, which changes no bit of larger formats.
        """
        return float(32 << (self.samples.ids_NL.shape[1] - 1).bit_length())

    @property
    def targets(self) -> dict[str, list[Target]]:
        """The targets of each part of the model that has any."""
        found = {
            unit: [self._targets[name] for name in names if name in self._targets]
            for unit, names in self.model.units.items()
        }
        return {unit: targets for unit, targets in found.items() if targets}

    def begin(self, stage: str, rounds: int = 1) -> None:
        """Tell that all samples are going to come to each part so many times."""
        self._progress.begin(stage, rounds * len(self.model.units), "blocks")

    def load(self, unit: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Load a part of the model.

        Args:
            unit: The part.
            change: Given each tensor that is loaded, by its name; returns what is loaded instead.
        """
        self._change = change
        self.model.load(unit)

    def stops(self, walk: Walk) -> Iterator[tuple[str, list[Call]]]:
        """The parts that samples come to; see `Walk.stops`."""
        for unit, calls in walk.stops():
            self.model.release_others()
            yield unit, calls
            self.passed()

    @contextmanager
    def walk(
        self, *, lanes: int = 1, loss: bool = False, gradients: bool = False
    ) -> Iterator[Walk]:
        """All samples on their way through the model.

        Args:
            lanes: How many times each sample goes: all of them first, then all once more.
            loss: Whether each sample's result is its share of the mean loss in nats per token, as a
                float; otherwise it is nothing.
            gradients: Whether each sample's own mean loss is to be told its gradients.
        """
        count = len(self.samples.ids_NL)
        activations = Activations(self.options.activation_memory, self._folder)
        blocks = {unit: self.model.module(unit) for unit in self.model.units}
        forward: Callable[[int, bool], object] = self._run
        if loss or gradients:
            self._check_predicts()
            forward = self._loss
        self.model.load_embeddings()
        try:
            with Walk(
                blocks,
                self.model.outside,
                lambda number: forward(number % count, gradients),
                lanes * count,
                activations,
                gradients=gradients,
            ) as walk:
                yield walk
        finally:
            activations.close()
            self.model.release_all()

    def pass_block(self, walk: Walk, unit: str, call: Call) -> Any:  # noqa: ANN401
        """What a block, which is loaded, gives for a sample whose activations are present.

        Raises:
            CheckpointError: If some of it is NaN or infinite.
        """
        with torch.no_grad(), self.explained():
            outcome = walk.own_forward(unit)(*call.args, **call.kwargs)
        for tensor in tensors_of(outcome):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                self._check_weights(unit)
                where = self._where(call.sample % len(self.samples.ids_NL))
                raise CheckpointError(f"{where}: {unit} gives NaN or infinity: {_OTHER}")
        return outcome

    def pass_on(
        self,
        walk: Walk,
        unit: str,
        calls: Sequence[Call],
        change: Callable[[str, torch.Tensor], torch.Tensor],
    ) -> None:
        """Let samples go on with what a part gives, which is loaded for it.

        Args:
            walk: Their walk.
            unit: The part.
            calls: The samples at it.
            change: As for `load`.
        """
        self.load(unit, change)
        for call in calls:
            with walk.present(call):
                walk.pass_on(call, self.pass_block(walk, unit, call))
        self.model.release(unit)

    def passed(self) -> None:
        """Tell that all samples are through with a part."""
        self._progress.advance(1)

    def loss(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> float:
        """The mean loss of all samples in nats per token.

        Args:
            change: As for `load`.
        """
        with self.walk(loss=True) as walk:
            for unit, calls in self.stops(walk):
                self.pass_on(walk, unit, calls, change)
            return math.fsum(walk.results())

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Explain what the model's own code fails with.

        Raises:
            CheckpointError: In its place.
        """
        try:
            yield
        except (EmpError, PartedError, MemoryError):
            raise
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"{self.device}: has no room for a block and a sample ({first_line(error)}): give "
                "fewer tokens a sample, or calibrate on the CPU"
            ) from error
        except Exception as error:  # whatever a model raises
            raise CheckpointError(
                f"{type(self.model.model).__name__}: transformers {transformers.__version__} does "
                f"not run it on tokens alone ({type(error).__name__}: {first_line(error)}): choose "
                "a criterion that needs no data, such as magnitude"
            ) from error

    def _inputs(self, sample: int) -> dict[str, torch.Tensor]:
        # of its own: what waits is emptied, and all samples would be
        ids_1L = self.samples.ids_NL[sample : sample + 1].to(self.device, copy=True)
        model = self.model.model
        if not getattr(model.config, "is_encoder_decoder", False):
            return {"input_ids": ids_1L}
        taken = inspect.signature(model.forward).parameters
        return {"input_ids": ids_1L, "labels" if "labels" in taken else "decoder_input_ids": ids_1L}

    def _run(self, sample: int, _gradients: bool) -> None:
        with self.explained():
            self.model.model(**self._inputs(sample), use_cache=False)

    def _loss(self, sample: int, gradients: bool) -> float:
        inputs = self._inputs(sample)
        ids_L = inputs["input_ids"][0]
        with self.explained():
            logits_LV = self.model.model(**inputs, use_cache=False).logits[0]
            # a decoder that is fed what it is to predict has been given one token less
            first = 0 if "labels" in inputs else 1
            loss = cross_entropy(logits_LV[: len(ids_L) - first].float(), ids_L[first:])
            if not torch.isfinite(loss):
                raise CheckpointError(
                    f"{self._where(sample)}: the model's loss is NaN or infinite: {_OTHER}"
                )
            if gradients:
                (loss * self.gradient_scale).backward()  # type: ignore[no-untyped-call]
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
        if auto_class(self._config) not in _PREDICT:
            raise CheckpointError(
                f"{type(self.model.model).__name__}: predicts no next token, so that there is no "
                "loss on a text, nor gradients of it: choose another criterion, such as wanda"
            )


@contextmanager
def recording() -> Iterator[None]:
    """Have torch see products and gradients, even where its caller wants none of them seen."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
