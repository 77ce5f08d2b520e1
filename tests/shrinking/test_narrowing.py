"""Neurons and groups of heads chosen on data, and repaired, against plain torch on whole models."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrated import calibration, ids_of, save_text, save_tokenizer
from support.widths import GROUPS, NEURONS, make
from transformers import AutoModelForCausalLM, PreTrainedModel

from emp_llm import CheckpointError
from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.column_sink import ColumnSink
from emp_llm.shrinking.narrowing import find_readers, narrowing
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.repaired import repaired_files
from emp_llm.shrinking.writing import write_config_and_index, write_shards

pytestmark = pytest.mark.usefixtures("one_thread")

KEEP: dict[KindName, int] = {"neurons": 24, "kv heads": 2}
NUMBER: dict[KindName, int] = {"neurons": NEURONS, "kv heads": GROUPS}


Order = Callable[[KindName, torch.Tensor, torch.Tensor, torch.Tensor], list[int]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


def saved(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = make(architecture, dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, 32)
    return model


def plan_of(folder: Path, kinds: Sequence[KindName]) -> ShrinkPlan:
    source = find_source(folder, progress=SharedProgress(Silent()))
    return ShrinkPlan.make(source, source.open_checkpoint(), kinds)


@contextmanager
def narrowed(
    plan: ShrinkPlan, store: Path, text: Path | None, **options: Any
) -> Iterator[ColumnSink]:
    asked = ShrinkOptions(**{"neurons": 24, "calibration": calibration(text), **options})
    kinds = list(plan.structures)
    keep = {kind: KEEP[kind] for kind in kinds}
    with (
        MaskStore(store) as found,
        narrowing(plan, kinds, asked, SharedProgress(Silent()), store.parent) as it,
    ):
        yield it.choose(keep, found)


def written(plan: ShrinkPlan, sink: ColumnSink, store: Path, out: Path) -> Path:
    """Write the smaller model."""
    shrinkage = plan.with_choices(sink.choices())
    out.mkdir()
    workers = Workers(threads=2, progress=SharedProgress(Silent()))
    with MaskStore(store) as found:
        write_shards(shrinkage, workers, out, replaced=repaired_files(found))
    write_config_and_index(shrinkage, out)
    return out


def inputs_of(model: PreTrainedModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What the layer of that name is given for all tokens."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, given: found.append(given[0].reshape(-1, given[0].shape[-1]).double())
    )
    with torch.no_grad():
        for row in ids:
            model(row[None])
    hook.remove()
    return torch.cat(found)


def plain(
    model: PreTrainedModel, readers: list[tuple[str, KindName]], ids: torch.Tensor, order: Order
) -> dict[str, tuple[list[int], torch.Tensor]]:
    """Reader by reader: what stays, and the best weights, aimed by a quarter at the dense ones.

    Dense inputs are those of the first half of the samples, and count twice.

    Args:
        order: Given weights, inputs, and those whose outputs are wanted: which structures stay.
    """
    own, result = copy.deepcopy(model), {}
    for name, kind in readers:
        dense_x, x = inputs_of(model, name, ids), inputs_of(own, name, ids)
        layer = own.get_submodule(name)
        turned = type(layer).__name__ == "Conv1D"
        weight = (layer.weight.data.T if turned else layer.weight.data).double()
        between = x.clone()
        half = len(x) // 2
        between[:half] += 2 * (dense_x - x)[:half] / 4
        kept = order(kind, weight, x, between)
        columns = torch.zeros(x.shape[1], dtype=torch.bool)
        columns.view(NUMBER[kind], -1)[kept] = True
        tokens, inputs = x.shape
        squares = x.square().sum(0)
        more = (max(0.3, inputs / tokens) * squares + 0.01 * squares.mean()).sqrt().diag()
        matrix, wanted = torch.cat([x, more]), torch.cat([between, more]) @ weight.T
        found = torch.zeros_like(weight)
        found[:, columns] = torch.linalg.lstsq(matrix[:, columns], wanted).solution.T
        layer.weight.data = (found.T if turned else found).float().contiguous()
        result[name] = kept, layer.weight.data
    return result


def by_contribution(
    kind: KindName, weight: torch.Tensor, x: torch.Tensor, _wanted: torch.Tensor
) -> list[int]:
    parts = [part.split(x.shape[1] // NUMBER[kind], dim=1) for part in (x, weight)]
    norms = [(some_x @ some.T).norm() for some_x, some in zip(*parts, strict=True)]
    return sorted(torch.stack(norms).argsort(descending=True)[: KEEP[kind]].tolist())


def by_error(
    kind: KindName, weight: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor
) -> list[int]:
    """One by one the structure goes without which the sum of squares is least."""
    more = (0.01 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
    matrix, outputs = torch.cat([x, more]), torch.cat([wanted, more]) @ weight.T
    kept = list(range(NUMBER[kind]))
    width = x.shape[1] // NUMBER[kind]

    def error(gone: int) -> float:
        columns = [one * width + at for one in kept if one != gone for at in range(width)]
        best = torch.linalg.lstsq(matrix[:, columns], outputs).solution
        return float((matrix[:, columns] @ best - outputs).square().sum())

    while len(kept) > KEEP[kind]:
        kept.remove(min(kept, key=error))
    return kept


@pytest.mark.parametrize(
    ("architecture", "score", "order"),
    [("llama", "activation", by_contribution), ("phi3", "obs", by_error)],
)
def test_each_reader_is_the_least_squares_of_what_stays_behind_those_before_it(
    tmp_path: Path, text: Path, architecture: str, score: str, order: Order
) -> None:
    model = saved(tmp_path / "model", architecture)
    readers: list[tuple[str, KindName]] = [
        (f"model.layers.{layer}.{leaf}", kind)
        for layer in range(2)
        for leaf, kind in (("self_attn.o_proj", "kv heads"), ("mlp.down_proj", "neurons"))
    ]
    expected = plain(model, readers, ids_of(text), order)

    plan = plan_of(tmp_path / "model", ["neurons", "kv heads"])
    with narrowed(plan, tmp_path / "store", text, width_score=score) as sink:
        choices = {choice.kind: choice for choice in sink.choices()}
        for name, kind in readers:
            kept, weight = expected[name]
            assert choices[kind].kept[name.rsplit(".", 2)[0]] == tuple(kept)
            dense = model.get_submodule(name).weight.detach().clone()
            found = sink.changed(f"{name}.weight", dense)
            torch.testing.assert_close(found, weight, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("architecture", "dtype", "kinds"),
    [
        ("llama", torch.bfloat16, ["neurons", "kv heads"]),
        ("gpt2", torch.float16, ["neurons"]),
    ],
)
def test_the_written_model_computes_what_the_dense_one_does_with_the_repaired_weights(
    tmp_path: Path,
    text: Path,
    architecture: str,
    dtype: torch.dtype,
    kinds: list[KindName],
) -> None:
    dense = saved(tmp_path / "model", architecture, dtype)
    plan = plan_of(tmp_path / "model", kinds)
    with narrowed(plan, tmp_path / "store", text) as sink:
        out = written(plan, sink, tmp_path / "store", tmp_path / "out")
        for name, parameter in dense.named_parameters():
            parameter.data = sink.changed(name, parameter.data.clone())

    small = AutoModelForCausalLM.from_pretrained(out)

    with torch.no_grad():
        expected, found = (model(ids_of(text)[:1]).logits.float() for model in (dense, small))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "model", "smollm3")
    plan = plan_of(tmp_path / "model", ["neurons", "kv heads"])
    with narrowed(plan, tmp_path / "store", text) as sink:
        whole = written(plan, sink, tmp_path / "store", tmp_path / "whole")
    calls: list[str] = []
    process = ColumnSink.process

    def killed(sink: ColumnSink, *args: Any) -> None:
        calls.append(args[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        process(sink, *args)

    monkeypatch.setattr(ColumnSink, "process", killed)
    with pytest.raises(KeyboardInterrupt), narrowed(plan, tmp_path / "again", text):
        pass
    with narrowed(plan, tmp_path / "again", text) as sink:
        again = written(plan, sink, tmp_path / "again", tmp_path / "goes-on")

    assert calls == [f"model.layers.{layer}" for layer in (0, 0, 1, 1, 1)]
    name = "model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_by_magnitude_the_largest_columns_stay_and_no_text_is_needed(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "gpt2")
    plan = plan_of(tmp_path / "model", ["neurons"])
    with narrowed(plan, tmp_path / "store", None, width_score="magnitude", repair="none") as sink:
        (choice,) = sink.choices()
        for layer, kept in enumerate(choice.kept.values()):
            norms = model.get_submodule(f"transformer.h.{layer}.mlp.c_proj").weight.data.norm(dim=1)
            assert list(kept) == sorted(norms.argsort(descending=True)[:24].tolist())
            scores = torch.tensor(list(choice.scores.values())[layer])
            torch.testing.assert_close(scores, norms)


def test_random_choices_follow_the_seed(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama")
    plan = plan_of(tmp_path / "model", ["neurons"])
    found = []
    for run, seed in enumerate((0, 0, 1)):
        options = {"calibration": calibration(None, seed=seed), "repair": "none"}
        with narrowed(
            plan, tmp_path / f"store-{run}", None, width_score="random", **options
        ) as sink:
            found.append(sink.choices()[0].kept)
    assert found[0] == found[1] != found[2]
    assert len(set(found[0].values())) == 2


def test_structures_that_no_single_matrix_reads_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama")
    plan = plan_of(tmp_path / "model", ["neurons"])
    axes = {name: axes for name, axes in plan.found.axes.items() if "1.mlp.down" not in name}
    plan = replace(plan, found=replace(plan.found, axes=axes))
    with pytest.raises(CheckpointError, match=r"model.layers.1: 0 matrices have inputs for its"):
        find_readers(plan, ["neurons"])


def test_a_dtype_that_nothing_is_computed_with_is_refused(tmp_path: Path) -> None:
    make("llama", torch.float64).save_pretrained(tmp_path / "model")
    plan = plan_of(tmp_path / "model", ["kv heads"])
    with pytest.raises(CheckpointError, match=r"o_proj.weight' is F64"):
        find_readers(plan, ["kv heads"])
