"""A β for each target by the loss it causes, against plain torch on the model run whole."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibrated import (
    calibration,
    divergence,
    ids_of,
    inputs_of,
    opened,
    run_on,
    save_model,
    save_text,
)
from support.checkpoints import load
from support.streaming import load_whole
from support.tampering import replace_weights

from emp_llm import FormatError, PruneOptions, prune, verify
from emp_llm.calibration import loss_allocation
from emp_llm.calibration.sensitivity import divergences, parts_of
from emp_llm.selection.allocation import Curve, least

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORS = [2 ** (step / 32) for step in range(-32, 33)]
MEASURED = [0, 16, 32, 48, 64]  # FACTORS of 0.5, 0.71, 1, 1.41 and 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


def save(folder: Path, architecture: str) -> Path:
    """A tiny model with weights so large that its predictions depend on them."""
    save_model(folder, architecture)
    for path in folder.glob("*.safetensors"):
        tensors = {n: t * 20 if t.ndim > 1 else t for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


def with_tensors(source: Path, folder: Path, changed: Mapping[str, torch.Tensor]) -> Path:
    """A copy of a model in which some tensors are others."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file({**load(source), **changed}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_a_part_matters_as_much_as_the_whole_model_says(
    tmp_path: Path, text: Path, architecture: str
) -> None:
    source = save(tmp_path / "source", architecture)
    dense = load_whole(architecture, source)
    with opened(source, text, tmp_path, "all-linear") as session:
        parts = parts_of(session.targets)
        found = divergences(session, parts, lambda _, tensor: tensor * 0.5)
    assert set(found) == set(parts)
    tensors = load(source)
    for number, part in enumerate(parts):
        changed = {name: tensors[name] * 0.5 for name in part.names}
        folder = with_tensors(source, tmp_path / f"part {number}", changed)
        expected = divergence(dense, load_whole(architecture, folder), ids_of(text))
        assert found[part] == pytest.approx(expected, rel=1e-3, abs=1e-8), part


def test_the_same_projections_of_all_experts_are_one_part(tmp_path: Path, text: Path) -> None:
    source = save_model(tmp_path / "source", "mixtral")
    with opened(source, text, tmp_path) as session:
        parts = parts_of(session.targets)
    assert [len(part.names) for part in parts] == [4] * 6
    assert len({part.unit for part in parts}) == 2


def cubic(y: np.ndarray) -> np.ndarray:
    """Hermite's cubics through falling values at every 16th of 65 places.

    Inner slopes are the harmonic means of those on both sides, outer ones those to the next value.
    """
    rise = np.diff(y)
    inner = (2 / (1 / a + 1 / b) for a, b in pairwise(rise))
    slope = [rise[0], *inner, rise[-1]]
    found = []
    for place in range(65):
        i = min(place // 16, 3)
        t = place / 16 - i
        found.append(
            (2 * t**3 - 3 * t**2 + 1) * y[i]
            + (t**3 - 2 * t**2 + t) * slope[i]
            + (3 * t**2 - 2 * t**3) * y[i + 1]
            + (t**3 - t**2) * slope[i + 1]
        )
    return np.array(found)


class Reference:
    """The curves of a Llama's targets, by plain torch."""

    def __init__(self, source: Path, ids: torch.Tensor, repair: str) -> None:
        self._tensors, self._dense, self._ids = load(source), load_whole("llama", source), ids
        self._source, self._repair = source, repair
        self._inputs = inputs_of(self._dense, lambda: run_on(self._dense, ids))

    def curve(self, name: str, folder: Path) -> Curve:
        """Counts and losses at all β."""
        w = self._tensors[name].double()
        x = self._inputs[name.removesuffix(".weight")].double()
        n_eff = w.abs().sum(1) ** 2 / w.square().sum(1)
        kept, errors, probed = [], [], w
        for number, factor in enumerate(FACTORS):
            beta = float(f"{0.9 * factor:.6g}")
            k = (beta * n_eff * (1 + 1e-9)).floor().clamp(1, w.shape[1]).long()
            kept.append(int(k.sum()))
            if number in MEASURED:
                v = self._pruned(w, x, k)
                lost = (x @ (w - v).T).square().sum() / (x @ w.T).square().sum()
                errors.append(len(x) * float(lost))
                probed = v if factor == FACTORS[16] else probed
        changed = {name: probed.float()}
        model = load_whole("llama", with_tensors(self._source, folder, changed))
        scale = divergence(self._dense, model, self._ids) / errors[1]
        # a row that is whole has no error: 1e-9 of the largest stands for it
        logs = np.log(np.maximum(errors, 1e-9 * max(errors)))
        return Curve(np.array(kept), scale * np.exp(cubic(logs)))

    def _pruned(self, w: torch.Tensor, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        h = x.T @ x
        order = (w.abs() * x.norm(dim=0)).argsort(1, descending=True)
        keep = torch.zeros_like(w, dtype=torch.bool)
        for row, count in enumerate(k.tolist()):
            keep[row, order[row, :count]] = True
        if self._repair == "none":
            return w * keep
        squares = h.diagonal()
        damping = max(0.3, len(h) / len(x)) * squares + 0.01 * squares.mean()
        damped = h + damping.diag()
        v = torch.zeros_like(w)
        for row, some in enumerate(keep):
            v[row, some] = torch.linalg.solve(damped[some][:, some], (damped @ w[row])[some])
        return v


@pytest.mark.parametrize("repair", ["none", "obs"])
def test_curves_and_betas_are_those_of_plain_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, llama: Path, repair: str
) -> None:
    seen: list[tuple[list[Curve], int]] = []
    monkeypatch.setattr(
        loss_allocation, "least", lambda *asked: (seen.append(asked), least(*asked))[1]
    )
    options = PruneOptions(
        beta=0.9,
        criterion="wanda",
        count_by="magnitude",
        repair=repair,
        allocate="loss",
        calibration=calibration(text),
    )
    report = prune(llama, tmp_path / "out", options)
    ((curves, total),) = seen
    targets = {name: f for name, f in sorted(report["tensors"].items()) if f["pruned"]}
    reference = Reference(llama, ids_of(text), repair)
    expected = [reference.curve(name, tmp_path / name) for name in targets]
    for found, curve in zip(curves, expected, strict=True):
        assert found.kept.tolist() == curve.kept.tolist()
        some = curve.loss > 1e-6 * curve.loss.max()
        assert found.loss[some] == pytest.approx(curve.loss[some], rel=0.02)
    assert total == sum(int(curve.kept[32]) for curve in expected)
    assert sum(f["kept"] for f in targets.values()) == pytest.approx(total, abs=1)
    wanted = least(curves, total)
    assert [f["kept"] for f in targets.values()] == pytest.approx(wanted, abs=1)
    assert all(0.45 <= f["beta"] <= 1.8 for f in targets.values())
    assert len({f["beta"] for f in targets.values()}) > 1
    assert verify(tmp_path / "out", against=llama)["masks_derived"] is False


@pytest.mark.parametrize(("architecture", "granularity"), [("llama", "row"), ("gpt-oss", "layer")])
def test_as_many_weights_stay_however_they_are_allocated(
    tmp_path: Path, text: Path, architecture: str, granularity: str
) -> None:
    source = save(tmp_path / "source", architecture)
    reports = {
        allocate: prune(
            source,
            tmp_path / allocate,
            PruneOptions(
                target_sparsity=0.5,
                granularity=granularity,
                allocate=allocate,
                calibration=calibration(text) if allocate == "loss" else None,
            ),
        )
        for allocate in ("emp", "uniform", "loss")
    }
    kept = {name: report["totals"]["targets"]["kept"] for name, report in reports.items()}
    assert kept["uniform"] == kept["emp"]
    assert kept["loss"] == pytest.approx(kept["emp"], abs=1)
    sparsities = [f["sparsity"] for f in reports["uniform"]["tensors"].values() if f["pruned"]]
    assert max(sparsities) - min(sparsities) < 0.01
    for name in ("uniform", "loss"):
        assert reports[name]["rule"]["allocate"] == name
        assert verify(tmp_path / name, against=source)["masks_derived"] is False


@pytest.mark.parametrize("allocate", ["uniform", "loss"])
def test_a_row_that_keeps_another_number_than_it_was_allocated_is_found(
    tmp_path: Path, text: Path, llama: Path, allocate: str
) -> None:
    data = calibration(text) if allocate == "loss" else None
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    prune(llama, out, PruneOptions(allocate=allocate, calibration=data, output_format="dense"))
    weights = load(out)[name]
    weights[5, weights[5].nonzero()[0]] = 0
    replace_weights(out, name, weights)
    with pytest.raises(FormatError, match="weights, which is not what the rule gives"):
        verify(out, against=llama)
