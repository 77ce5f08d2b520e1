"""Tiny models streamed one decoder block at a time, and the tokens that they are run on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from support.architectures import ARCHITECTURES, V
from transformers import PreTrainedModel

from emp_llm.calibration.activations import Activations
from emp_llm.calibration.sample_walk import Call, Walk
from emp_llm.calibration.streamed_model import StreamedModel
from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.structure.targets import decide_targets

SAMPLES, LENGTH = 3, 12

Visit = Callable[[StreamedModel, Walk, str, list[Call]], None]


def tokens(samples: int = SAMPLES, length: int = LENGTH) -> torch.Tensor:
    """Tokens of some samples, int64 [N, L], none of them special."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, V, (samples, length), generator=generator)


def inputs_of(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is called with to predict tokens, [1, L]."""
    return {"input_ids": ids, **({"labels": ids} if model.config.is_encoder_decoder else {})}


def load_whole(architecture: str, folder: Path) -> PreTrainedModel:
    """The same model, whole."""
    loader: Any = getattr(transformers, ARCHITECTURES[architecture][0])
    model: PreTrainedModel = loader.from_pretrained(
        folder, dtype="auto", experts_implementation="eager"
    )
    return model.eval()


@contextmanager
def streamed(folder: Path, targets: str = "all-linear") -> Iterator[StreamedModel]:
    """A model whose units are not loaded."""
    checkpoint = open_checkpoint(folder)
    shapes = {name: (entry.dtype, entry.shape) for name, (_, entry) in checkpoint.tensors.items()}
    decisions = decide_targets(folder, shapes, targets=targets)
    pruned = [name for name, decision in decisions.items() if decision.prune]
    with OpenFiles() as files:
        yield StreamedModel(checkpoint, files, torch.device("cpu"), pruned)


def pass_on(_model: StreamedModel, walk: Walk, unit: str, calls: list[Call]) -> None:
    """Let all samples pass a unit."""
    for call in calls:
        with walk.present(call):
            walk.pass_on(call, walk.own_forward(unit)(*call.args, **call.kwargs))


def walk_through(
    model: StreamedModel,
    folder: Path,
    forward: Callable[[int], Any],
    visit: Visit = pass_on,
    *,
    memory: int = 0,
    samples: int = SAMPLES,
    gradients: bool = False,
) -> list[Any]:
    """Let all samples walk through a model.

    Args:
        model: The model.
        folder: Where activations wait.
        forward: Runs the model on the sample with this number.
        visit: Called for each unit that they wait at, which is loaded.
        memory: Bytes of activations that wait in memory.
        samples: How many.
        gradients: Whether what runs between units is recorded for gradients.

    Returns:
        What `forward` returned for each sample.
    """
    activations = Activations(memory, folder)
    units = {unit: model.module(unit) for unit in model.units}
    model.load_embeddings()
    walk = Walk(units, model.outside, forward, samples, activations, gradients=gradients)
    with walk, torch.no_grad():
        for unit, calls in walk.stops():
            model.release_temporary()
            model.load(unit, unchanged)
            visit(model, walk, unit, calls)
            model.release(unit)
        results = walk.results()
    activations.close()
    return results
