"""Scores become masks by the rule, whatever the group is and whosever count says how many stay.

What must come out is worked out in float64 on whole tensors, by `checkpoints.kept_by_rule`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from emp_kernels.numbers import BF16, F32
from safetensors.numpy import load_file
from support.checkpoints import H, kept_by_rule, write_checkpoint

from emp_llm import CheckpointError, PruneOptions
from emp_llm.calibration.masks import mask_by_scores
from emp_llm.calibration.stored_scores import mask_by_stored_scores, save_scores
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import read_shard
from emp_llm.selection.mask_store import MaskStore
from emp_llm.tensors.target import Target

GRANULARITIES = ("row", "layer")
COUNTS = ("criterion", "magnitude")


def unpacked(mask: np.ndarray, columns: int) -> np.ndarray:
    return np.unpackbits(mask, axis=1, count=columns, bitorder="little").astype(bool)


def some_scores(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    if kind == "ties":
        return rng.choice(np.array([0.0, 0.25, 1.0, 3.0], np.float32), shape)
    if kind == "tiny":  # so small that float32 squares vanish
        return (rng.random(shape) * 1e-40).astype(np.float32)
    return rng.standard_exponential(shape).astype(np.float32)


def weights_of(shape: tuple[int, ...], seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 weights, as bit patterns and as float64."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()


def expected_keep(scores, magnitudes, granularity, count_by, beta):
    """What stays of one matrix, bool [R, C]."""
    groups = [(...,)] if granularity == "layer" else [(r,) for r in range(len(scores))]
    keep = np.zeros(scores.shape, bool)
    for group in groups:
        values = scores[group].astype(np.float64).reshape(-1)
        counted = values if count_by == "criterion" else np.abs(magnitudes[group]).reshape(-1)
        count = int(kept_by_rule(counted, beta).sum())
        stay = np.zeros(values.size, bool)
        stay[np.argsort(-values, kind="stable")[:count]] = True
        keep[group] = stay.reshape(scores[group].shape)
    return keep


@pytest.mark.parametrize("kind", ["smooth", "ties", "tiny"])
@pytest.mark.parametrize("count_by", COUNTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_matrix_is_masked_as_the_rule_says(granularity, count_by, kind) -> None:
    bits, weights = weights_of((7, 61))
    scores = some_scores(kind, (7, 61))
    for beta in (0.3, 1.0, 1.6):
        options = PruneOptions(
            beta=beta, granularity=granularity, criterion="wanda", count_by=count_by
        )
        masked = mask_by_scores("w", scores, bits, BF16, options)
        keep = expected_keep(scores, weights, granularity, count_by, beta)
        np.testing.assert_array_equal(unpacked(masked.mask, 61), keep)
        np.testing.assert_array_equal(masked.kept, keep.sum(axis=1))
        s = scores.astype(np.float64)
        sums = np.stack([s.sum(1), (s * s).sum(1), np.where(keep, s, 0).sum(1)], axis=1)
        np.testing.assert_allclose(masked.stats, sums, rtol=1e-13)
        if granularity == "row":
            assert masked.group is None
        else:
            assert masked.group is not None
            assert masked.group.size == s.size
            n_eff = s.sum() ** 2 / (s * s).sum()
            assert masked.group.n_eff == pytest.approx(n_eff, rel=1e-12)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_magnitudes_as_scores_keep_what_pruning_by_magnitude_keeps(granularity) -> None:
    bits, weights = weights_of((5, 40))
    options = PruneOptions(granularity=granularity)
    masked = mask_by_scores("w", np.abs(weights).astype(np.float32), bits, BF16, options)
    keep = expected_keep(np.abs(weights), weights, granularity, "criterion", 1.0)
    np.testing.assert_array_equal(unpacked(masked.mask, 40), keep)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_of_nothing_but_zeros_keep_nothing_by_their_own_count(granularity) -> None:
    bits, _ = weights_of((3, 9))
    zeros = np.zeros((3, 9), np.float32)
    masked = mask_by_scores("w", zeros, bits, BF16, PruneOptions(granularity=granularity))
    assert not masked.mask.any()
    assert not masked.stats.any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scores_of_zero_are_kept_from_the_first_on_where_the_magnitudes_count(granularity) -> None:
    ones = np.full((2, 8), 0x3F80, np.uint16)  # N_eff is all of them
    scores = np.zeros((2, 8), np.float32)
    options = PruneOptions(
        beta=0.5, granularity=granularity, criterion="wanda", count_by="magnitude"
    )
    masked = mask_by_scores("w", scores, ones, BF16, options)
    expected = [[0x0F], [0x0F]] if granularity == "row" else [[0xFF], [0x00]]
    assert masked.mask.tolist() == expected


@pytest.mark.parametrize("value", [-1e-30, np.nan, np.inf, -np.inf])
def test_a_score_that_is_none_is_told_with_its_place_and_criterion(value) -> None:
    bits, _ = weights_of((3, 9))
    scores = some_scores("smooth", (3, 9))
    scores[1, 4] = value
    with pytest.raises(CheckpointError) as caught:
        mask_by_scores("w", scores, bits, BF16, PruneOptions(criterion="mine:Own"), first_row=20)
    assert f"'w' row 21 column 4: its score by the criterion 'mine:Own' is {value}" in str(
        caught.value
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_weight_that_cannot_be_counted_is_told_with_its_row(granularity) -> None:
    bits, _ = weights_of((3, 9))
    bits[2, 0] = 0x7F80
    options = PruneOptions(granularity=granularity, criterion="wanda", count_by="magnitude")
    with pytest.raises(CheckpointError, match="'w' row 22 holds NaN or infinity"):
        mask_by_scores("w", some_scores("smooth", (3, 9)), bits, BF16, options, first_row=20)


# a stack of two matrices stored transposed, in float16, and a plain matrix
STACK, PLAIN = "a.experts", "b.weight"


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[list[Target], dict[str, Path]]:
    """Two targets in one file, and their scores in two."""
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(2, 33, 6, generator=generator).half()
    plain = torch.randn(H, 33, generator=generator)
    folder = write_checkpoint(tmp_path / "source", {}, {STACK: stack, PLAIN: plain})
    shard = read_shard(folder / "model.safetensors")
    targets = [
        Target.of(shard, entry, transposed=entry.name == STACK) for entry in shard.header.tensors
    ]
    paths = {key: tmp_path / f"{key}.safetensors" for key in "ab"}
    save_scores(paths["a"], {STACK: some_scores("ties", (2, 6, 33))}, "wanda")
    save_scores(paths["b"], {PLAIN: some_scores("ties", (H, 33), seed=1)}, "wanda")
    return targets, paths


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count_by", COUNTS)
@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
def test_scores_that_waited_are_masked_as_the_rule_says(
    waiting, tmp_path: Path, granularity, count_by, threads
) -> None:
    targets, paths = waiting
    options = PruneOptions(granularity=granularity, criterion="wanda", count_by=count_by, beta=0.8)
    with OpenFiles() as files, MaskStore(tmp_path / "decisions") as store:
        mask_by_stored_scores(paths, targets, options, files, store, threads=threads)
        assert store.names == [STACK, PLAIN]
        assert store.has("a")
        assert store.has("b")
        found = {
            name: unpacked(store.read_mask(name, 0, store.rows(name)), 33) for name in store.names
        }
        groups = {name: list(store.groups(name)) for name in store.names}
    source = load_file(tmp_path / "source" / "model.safetensors")
    scores = {key: load_file(paths[key]) for key in "ab"}
    matrices = [*scores["a"][STACK], scores["b"][PLAIN]]
    weights = [*source[STACK].swapaxes(1, 2).astype(np.float64), source[PLAIN].astype(np.float64)]
    if granularity == "model":
        flat = np.concatenate([m.reshape(-1) for m in matrices])[None]
        flat_weights = np.concatenate([m.reshape(-1) for m in weights])[None]
        keep = expected_keep(flat, flat_weights, "layer", count_by, 0.8).reshape(-1, 33)
        sizes = [[flat.size] * 2, [flat.size]]
    else:
        pairs = zip(matrices, weights, strict=True)
        keep = np.concatenate([expected_keep(s, w, granularity, count_by, 0.8) for s, w in pairs])
        sizes = [[6 * 33] * 2, [H * 33]] if granularity == "layer" else [[], []]
    np.testing.assert_array_equal(np.concatenate([found[STACK], found[PLAIN]]), keep)
    assert [[group.size for group in groups[name]] for name in (STACK, PLAIN)] == sizes


@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
def test_scores_that_wait_are_cut_to_the_share_that_was_asked_for(
    waiting: tuple[list[Target], dict[str, Path]], tmp_path: Path, granularity: str
) -> None:
    targets, paths = waiting
    options = PruneOptions(granularity=granularity, criterion="wanda", target_sparsity=0.35)
    with OpenFiles() as files, MaskStore(tmp_path / "decisions") as store:
        beta = mask_by_stored_scores(paths, targets, options, files, store, threads=1)
        masks = [
            unpacked(store.read_mask(name, 0, store.rows(name)), 33) for name in (STACK, PLAIN)
        ]
    keep = np.concatenate(masks)
    assert keep.sum() == round(0.65 * keep.size)
    again = PruneOptions(granularity=granularity, criterion="wanda", beta=beta)
    with OpenFiles() as files, MaskStore(tmp_path / "again") as store:
        assert mask_by_stored_scores(paths, targets, again, files, store, threads=1) == beta
        masks = [
            unpacked(store.read_mask(name, 0, store.rows(name)), 33) for name in (STACK, PLAIN)
        ]
    np.testing.assert_array_equal(np.concatenate(masks), keep)


def test_scores_that_cannot_be_ranked_are_not_let_wait(tmp_path: Path) -> None:
    scores = {"w": np.array([[[1.0, 2.0]], [[3.0, -4.0]]], np.float32)}
    with pytest.raises(CheckpointError, match="'w' row 1 column 1"):
        save_scores(tmp_path / "scores.safetensors", scores, "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_is_counted_in_several_parts_is_one_group() -> None:
    # 2**24 scores are counted at a time: here the second part has the largest
    scores = np.full((3, 1 << 23), 0.5, np.float32)
    scores[2, :10] = 8.0
    options = PruneOptions(granularity="layer", beta=1e-6)
    masked = mask_by_scores("w", scores, scores.view(np.uint32), F32, options)
    s1, s2 = 0.5 * (scores.size - 10) + 80, 0.25 * (scores.size - 10) + 640
    count = int(1e-6 * s1 * s1 / s2)
    assert masked.kept.tolist() == [count - 10, 0, 10]
