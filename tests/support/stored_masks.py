"""Masks by made-up scores, in place of a calibration's, and the weights that they leave.

Scores are random numbers that follow from a tensor's name. A repaired weight is the source's
negated, and biases become ones, so that both differ from the source's.
"""

import os
import sys
import types
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from emp_kernels.rows import Workspace
from support.checkpoints import Tensors, kept_by_rule

from emp_llm import PruneOptions, prune
from emp_llm.calibration.masks import mask_by_scores
from emp_llm.options import CalibrationOptions
from emp_llm.pruning.plan import PruningPlan
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.tensors.geometry import RowBlock

CALIBRATION = CalibrationOptions(text="some/text", samples=4, seed=3)
CALIBRATING = "emp_llm.calibration.calibrate"


def scores_of(name: str, rows: int, columns: int) -> np.ndarray:
    """Scores of a tensor's rows, float32 [R, C], some of them equal."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (rng.integers(0, 64, (rows, columns)) / 8).astype(np.float32)


def is_bias(name: str) -> bool:
    """Whether a tensor gets new bytes with ``repair="bias"``."""
    return name.endswith("mlp.c_fc.bias")


def calibrate(plan: PruningPlan, _workers: Workers, store: MaskStore) -> float:
    """Mask all targets, one decoder block after the other."""
    targets = plan.all_targets
    keys = sorted({plan.decisions[target.name].block or "" for target in targets})
    with plan.source.files(plan.checkpoint.shards) as files:
        for key in keys:
            if store.has(key):
                continue
            with store.writer(key) as writer:
                for target in targets:
                    if (plan.decisions[target.name].block or "") != key:
                        continue
                    geometry = target.geometry
                    scores = scores_of(target.name, geometry.rows, geometry.columns)
                    for matrix in range(geometry.matrices):
                        whole = RowBlock(matrix, 0, geometry.matrix_rows)
                        first = geometry.first_row(whole)
                        bits = target.read(files.file(target.shard), whole, Workspace())
                        masked = mask_by_scores(
                            target.name,
                            scores[first : first + geometry.matrix_rows],
                            bits,
                            geometry.number_format,
                            plan.options,
                        )
                        writer.add(
                            target.name,
                            masked.mask,
                            masked.stats,
                            [masked.group] if masked.group else (),
                            bits ^ geometry.number_format.storage.type(0x8000)
                            if plan.options.repair == "obs"
                            else None,
                        )
                for name, (_, entry) in plan.checkpoint.tensors.items():
                    if is_bias(name) and name.startswith(key) and plan.options.repair == "bias":
                        writer.replace(name, b"\x80\x3f" * (entry.nbytes // 2))
                writer.note("without_tokens", [f"{key}.expert"])
    if plan.options.calibration is not None and plan.options.calibration.text is not None:
        store.note("calibration", {"length": 16, "hash": "xxh3-128:0"})
    return plan.options.beta


def put_in_place() -> None:
    """Have `prune` call this `calibrate`, in this process."""
    sys.modules[CALIBRATING] = types.SimpleNamespace(calibrate=calibrate)  # type: ignore[assignment]


def prune_given(
    source: Path, out: Path, options: PruneOptions, overwrite: bool = False, threads: int = 2
) -> None:
    """`prune` with these masks, in a process of its own."""
    put_in_place()
    prune(source, out, options, overwrite=overwrite, threads=threads)


def take_part(
    source: Path, out: Path, options: PruneOptions, error_file: Path, folder: str
) -> None:
    """`prune` with these masks, as one rank."""
    os.chdir(folder)
    put_in_place()
    try:
        prune(source, out, options, distributed=True)
    except Exception as error:
        error_file.write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prune` calls this `calibrate` during a test."""
    monkeypatch.setitem(
        sys.modules,
        CALIBRATING,
        types.SimpleNamespace(calibrate=calibrate),  # type: ignore[arg-type]
    )


def kept_of(
    name: str, weights: torch.Tensor, options: PruneOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float64 [E, R, C], of weights [..., R, C], and which of them stay."""
    rows = weights.reshape(-1, *weights.shape[-2:])
    scores = scores_of(name, rows.shape[0] * rows.shape[1], rows.shape[2])
    s = scores.astype(np.float64).reshape(rows.shape)
    counted = s if options.count_by == "criterion" else rows.double().abs().numpy()
    width = rows.shape[2] * (rows.shape[1] if options.granularity == "layer" else 1)
    keep = np.zeros((s.size // width, width), bool)
    groups = zip(keep, s.reshape(-1, width), counted.reshape(-1, width), strict=True)
    for stay, group, values in groups:
        count = int(kept_by_rule(values, options.beta).sum())
        stay[np.argsort(-group, kind="stable")[:count]] = True
    return s, keep.reshape(s.shape)


def expected_of(
    tensors: Tensors,
    targets: Collection[str],
    options: PruneOptions,
    transposed: Collection[str] = (),
) -> Tensors:
    """What must be left of a checkpoint."""
    result = dict(tensors)
    for name in targets:
        weights = tensors[name].mT if name in transposed else tensors[name]
        keep = torch.from_numpy(kept_of(name, weights, options)[1].reshape(weights.shape))
        new = -weights if options.repair == "obs" else weights
        left = torch.where(keep, new, torch.zeros((), dtype=weights.dtype))
        result[name] = (left.mT if name in transposed else left).contiguous()
    for name, tensor in tensors.items():
        if is_bias(name) and options.repair == "bias":
            result[name] = torch.ones_like(tensor)
    return result
