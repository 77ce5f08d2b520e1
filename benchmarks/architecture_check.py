"""Whether a tiny model of one of transformers' classes comes through pruning, to the bit.

Expected is worked out without emp-llm's own code: what transformers loads from the source and from
the dense folder, and the rule in float64 on whole tensors.
"""

import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny_models import H, make_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import emp_llm
from emp_llm import EmpConfig, PruneOptions

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.checkpoints import bits, differing, pruned_by_rule

ROUND_TRIP, NO_TARGET = "round trip", "nothing to prune"
NOT_BUILT, NOT_LOADED, FAILED = "not built", "not loaded by transformers", "failed"
TARGETS = ("mlp", "all-linear")
FORMS = ("safetensors", "sharded safetensors", "torch.save", "sharded torch.save")
_SHARD_BYTES = 40_000

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a class.

    Attributes:
        name: Name of the class.
        status: `ROUND_TRIP`, `NO_TARGET`, `NOT_BUILT`, `NOT_LOADED` or `FAILED`.
        cause: Why it is not a round trip, in one line.
        form: One of `FORMS`; empty if there was no source.
        tensors: How many tensors the source has.
        pruned: How many of them are pruned, by the value of `targets`.
        seconds: What it took.
    """

    name: str
    status: str
    cause: str = ""
    form: str = ""
    tensors: int = 0
    pruned: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Difference(Exception):
    """What was found is not what was expected."""


def check_class(name: str, folder: Path, values: Sequence[str] = TARGETS) -> Outcome:
    """Build, save, prune, load and compare; all of it in an empty folder.

    Args:
        name: Of one of transformers' model classes.
        folder: Where to.
        values: Of the option targets; each is tried.
    """
    form = FORMS[zlib.crc32(name.encode()) % len(FORMS)]
    source = folder / "source"
    try:
        write_source(make_model(name), source, form)
    except Exception as error:
        return Outcome(name=name, status=NOT_BUILT, cause=one_line(error, folder))
    found = {"name": name, "form": form, "tensors": len(read(source))}
    try:
        plain = Loaded(name, source)
    except Exception as error:
        return Outcome(**found, status=NOT_LOADED, cause=one_line(error, folder))
    pruned, why_not = {}, {}
    for targets in values:
        try:
            pruned[targets] = _round_trip(name, folder / targets, source, plain, targets)
        except Exception as error:
            text = one_line(error, folder)
            if "nothing to prune" not in text:
                return Outcome(**found, status=FAILED, cause=f"{targets}: {text}")
            pruned[targets] = 0
            why_not[targets] = text.partition("; ")[2]
    if not any(pruned.values()):
        return Outcome(**found, status=NO_TARGET, pruned=pruned, cause=why_not[targets])
    cause = "; ".join(f"nothing with --targets {targets}" for targets in why_not)
    return Outcome(**found, status=ROUND_TRIP, pruned=pruned, cause=cause)


def one_line(error: BaseException, folder: Path) -> str:
    """The kind of an error and what it says, in one line; paths from the folder on."""
    text = " ".join(str(error).replace(f"{folder}/", "").split())
    return text if isinstance(error, Difference) else f"{type(error).__name__}: {text[:200]}"


def write_source(model: PreTrainedModel, folder: Path, form: str) -> None:
    """Save a model with the names that checkpoints on the Hub have, in one of `FORMS`."""
    size = _SHARD_BYTES if form.startswith("sharded") else "5GB"
    model.save_pretrained(folder, max_shard_size=size)
    if form.endswith("torch.save"):
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        state = model.state_dict()
        _as_torch_save(folder, {name: state[name] for name in tied & state.keys()})


def _as_torch_save(folder: Path, tied: Tensors) -> None:
    """Turn safetensors into files of torch.save, which hold tied tensors by each of their names."""
    index_file = folder / "model.safetensors.index.json"
    paths = sorted(folder.glob("*.safetensors"))
    renamed = {p.name: f"pytorch_{p.stem}.bin" for p in paths}
    for path in paths:
        more = tied if path == paths[0] else {}
        torch.save({**load_file(path), **more}, folder / renamed[path.name])
        path.unlink()
    if index_file.exists():
        index = json.loads(index_file.read_text())
        index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
        index["weight_map"].update(dict.fromkeys(tied, renamed[paths[0].name]))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        index_file.unlink()


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint's files, read by their own libraries."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for path in sorted(folder.glob("*.bin")):
        tensors.update(torch.load(path, weights_only=True))
    return tensors


class Loaded:
    """A model as `from_pretrained` gives it.

    Attributes:
        model: The model.
        state: All its parameters and buffers by name, those of tied names too.
        keys: The names that transformers reports as missing, unexpected or mismatched.
    """

    def __init__(self, name: str, folder: Path, **options: object) -> None:
        torch.manual_seed(0)  # of weights that the checkpoint does not have
        model, info = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, **options
        )
        self.model: PreTrainedModel = model
        self.state = {
            name: tensor.detach()
            for part in (model.named_parameters, model.named_buffers)
            for name, tensor in part(remove_duplicate=False)
        }
        self.keys = {kind: sorted(map(str, names)) for kind, names in info.items()}
        self._missing = info["missing_keys"]

    def compare(self, other: "Loaded", which: str) -> None:
        """Compare all that the checkpoint gives, bit for bit.

        Raises:
            Difference: If something is not the same.
        """
        if self.keys != other.keys:
            raise Difference(f"{which}: keys are {self.keys}, not {other.keys}")
        names = set(differing(self.state, other.state)) - self._missing
        if names:
            raise Difference(f"{which}: {len(names)} parameters differ, such as {min(names)}")


def _round_trip(name: str, work: Path, source: Path, plain: Loaded, targets: str) -> int:
    """Check one value of the option targets; returns how many tensors are pruned."""
    options = {"targets": targets}
    report = emp_llm.prune(source, work / "packed", PruneOptions(**options))
    emp_llm.prune(source, work / "dense", PruneOptions(**options, output_format="dense"))
    names = [name for name, fields in report["tensors"].items() if fields["pruned"]]
    _check_rule(read(work / "dense"), read(source), names, plain)
    for output_format in ("packed", "dense"):
        emp_llm.verify(work / output_format, against=source)
    emp_llm.unpack(work / "packed", work / "unpacked")
    _same_tensors(work / "unpacked", work / "dense")

    dense = Loaded(name, work / "dense")
    _check_zeros(dense, plain)
    packed = Loaded(name, work / "packed")
    packed.compare(dense, "packed, loaded")
    packed.model.save_pretrained(work / "again")
    emp_llm.verify(work / "again")
    again = Loaded(name, work / "again")
    if differing(again.state, dense.state):  # some models come back in another dtype
        dense.model.save_pretrained(work / "dense again")
        again.compare(Loaded(name, work / "dense again"), "packed, loaded, saved and loaded")
    del packed, again
    pruned = Loaded(name, source, quantization_config=EmpConfig(**options))
    pruned.compare(dense, "EmpConfig")
    pruned.model.save_pretrained(work / "saved")
    _same_tensors(work / "saved", work / "again")
    return len(names)


def _check_rule(found: Tensors, source: Tensors, names: list[str], plain: Loaded) -> None:
    """Compare the files of the dense folder with what the rule leaves of the source."""
    lies = {name: _lies_transposed(name, source[name], plain.model) for name in names}
    rows, columns = (
        pruned_by_rule(source, names, beta=1.0, granularity="row", transposed=transposed)
        for transposed in ((), names)
    )
    for name, tensor in found.items():  # a tied tensor may be left out
        allowed = {False: [rows], True: [columns]}.get(lies.get(name), [rows, columns])
        if bits(tensor) not in [bits(expected[name]) for expected in allowed]:
            raise Difference(f"{name!r} is not what the rule leaves of it")


def _lies_transposed(name: str, tensor: torch.Tensor, model: PreTrainedModel) -> bool | None:
    """Whether the weights into an output neuron run along dimension -2; None if shapes cannot say.

    Conv1D is the only matrix that does. Fused experts map the hidden size to another one, or back.
    """
    if tensor.ndim == 2:
        path = name.rpartition(".")[0]
        return any(path == end and isinstance(m, Conv1D) for end, m in model.named_modules())
    if (tensor.shape[-2] == H) == (tensor.shape[-1] == H):
        return None
    back = bool(re.search("down|output|w2|fc2", name))
    return (tensor.shape[-2] == H) != back


def _check_zeros(found: Loaded, plain: Loaded) -> None:
    """Check that pruning has changed weights to +0.0 and nothing else, and has changed some."""
    if found.keys != plain.keys:
        raise Difference(f"keys are {found.keys}, those of the source {plain.keys}")
    changed = set(differing(found.state, plain.state)) - found._missing
    if not changed:
        raise Difference("nothing was pruned")
    for name in changed:
        new, old = found.state[name], plain.state[name]
        stays = (new == old) & (new.signbit() == old.signbit())
        if not torch.all(stays | ((new == 0) & ~new.signbit())):
            raise Difference(f"{name} has other weights than the source")


def _same_tensors(folder: Path, other: Path) -> None:
    names = differing(read(folder), read(other))
    if names:
        raise Difference(f"{folder.name} is not {other.name}: {len(names)}, such as {names[0]}")
