"""Tiny models with a tokenizer and a text, and what plain torch finds of them whole."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.architectures import V, save_tiny_model
from support.checkpoints import Tensors, load
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, silu
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from emp_llm import PruneOptions, prune
from emp_llm.calibration.session import Session, recording
from emp_llm.hub.source import find_source
from emp_llm.options import CalibrationOptions
from emp_llm.pruning.plan import PruningPlan
from emp_llm.runtime.progress import SharedProgress, Silent

SAMPLES, LENGTH, SEED = 4, 24, 3


def save_model(folder: Path, architecture: str, **options: Any) -> Path:
    """A tiny model, in float32 by default, that knows the words w0, w1, …"""
    save_tiny_model(folder, architecture, **{"dtype": torch.float32, **options})
    return save_tokenizer(folder, V)


def save_tokenizer(folder: Path, words: int) -> Path:
    """Put a tokenizer of so many words in a folder."""
    level = models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def save_text(path: Path, words: int = 200) -> Path:
    """Write a text of words that a model knows."""
    numbers = np.random.default_rng(7).integers(4, V, words)
    path.write_text(" ".join(f"w{number}" for number in numbers))
    return path


def ids_of(text: Path) -> torch.Tensor:
    """The samples of a text, int64 [N, L], worked out by hand."""
    ids = [int(word[1:]) for word in text.read_text().split()]
    starts = np.random.PCG64(SEED).random_raw(SAMPLES) % np.uint64(len(ids) - LENGTH + 1)
    return torch.tensor([ids[int(start) :][:LENGTH] for start in starts])


def calibration(text: Path | None, **options: Any) -> CalibrationOptions:
    """What asks for these samples."""
    asked = {"text": None if text is None else str(text), "samples": SAMPLES, "length": LENGTH}
    return CalibrationOptions(**{**asked, "seed": SEED, **options})


@contextmanager
def opened(source: Path, text: Path, scratch: Path, targets: str = "mlp") -> Iterator[Session]:
    """A model and its samples."""
    found = find_source(source, progress=SharedProgress(Silent()))
    options = PruneOptions(targets=targets, calibration=calibration(text))
    plan = PruningPlan.make(found, found.open_checkpoint(), options)
    with found.files(plan.checkpoint.shards) as files, recording():
        yield Session(plan, SharedProgress(Silent()), files, scratch)


def divergence(dense: PreTrainedModel, other: PreTrainedModel, ids_NL: torch.Tensor) -> float:
    """The divergence of a model's predictions from a dense one's, nats per token."""
    with torch.no_grad():
        p, q = (m(input_ids=ids_NL, use_cache=False).logits.double() for m in (dense, other))
    return float(kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1).mean())


def pruned(
    source: Path, out: Path, text: Path | None, *, options: Mapping[str, Any], **calibrated: Any
) -> Tensors:
    """What `prune` leaves of a model, as a dense checkpoint."""
    asked = {"output_format": "dense", "targets": "all-linear", **options}
    prune(source, out, PruneOptions(calibration=calibration(text, **calibrated), **asked))
    return load(out)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a layer that is pruned by its one weight."""
    return isinstance(module, nn.Linear | Conv1D)


def inputs_of(model: nn.Module, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """What each linear layer of a model is given while something runs, [T, C] by its name."""
    found: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if is_linear(module):

                def keep(_: nn.Module, args: Any, name: str = name) -> None:
                    found.setdefault(name, []).append(
                        args[0].detach().reshape(-1, args[0].shape[-1])
                    )

                stack.callback(module.register_forward_pre_hook(keep).remove)
        run()
    return {name: torch.cat(parts) for name, parts in found.items()}


def run_on(model: PreTrainedModel, ids_NL: torch.Tensor) -> None:
    """Run a model on samples, one by one."""
    for ids_L in ids_NL:
        model(input_ids=ids_L[None], use_cache=False)


def expert_inputs(
    model: PreTrainedModel, ids_NL: torch.Tensor, tensors: Tensors, experts: int = 4
) -> dict[str, torch.Tensor]:
    """What each matrix of each expert of a Mixtral is given, by its name in the checkpoint.

    A token goes to the two experts that the router gives the most.
    """
    found: dict[str, list[torch.Tensor]] = {}
    seen: dict[int, list[torch.Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(model.model.layers):

            def keep(_: nn.Module, args: Any, number: int = number) -> None:
                seen.setdefault(number, []).append(args[0].reshape(-1, args[0].shape[-1]))

            stack.callback(layer.mlp.register_forward_pre_hook(keep).remove)
        run_on(model, ids_NL)
    for number, samples in seen.items():
        start = f"model.layers.{number}.block_sparse_moe"
        for x_TC in samples:
            chosen_TK = (x_TC @ tensors[f"{start}.gate.weight"].T).topk(2).indices
            for expert in range(experts):
                at = f"{start}.experts.{expert}"
                some = x_TC[(chosen_TK == expert).any(dim=1)]
                gate, up = (some @ tensors[f"{at}.{leaf}.weight"].T for leaf in ("w1", "w3"))
                for leaf, values in (("w1", some), ("w3", some), ("w2", silu(gate) * up)):
                    found.setdefault(f"{at}.{leaf}.weight", []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


def gradients_of(model: PreTrainedModel, ids_NL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss per token, by a parameter's name."""
    logits = model(input_ids=ids_NL, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids_NL[:, 1:].reshape(-1))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
