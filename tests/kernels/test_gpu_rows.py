"""Kernels for GPUs decide, pack and prune rows as the reference does, bit for bit.

R rows of C weights, as bit patterns. Without a GPU the kernels run in Triton's interpreter, program
after program; what programs do to each other is tested on what they read and write.
"""

import threading
import time
from itertools import cycle

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emp_kernels.dispatch import pack_rows, prune_rows, select_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.gpu import launching
from emp_kernels.gpu import prune as pruning
from emp_kernels.gpu.look_back import END_KNOWN, LENGTH_KNOWN, begin_record
from emp_kernels.gpu.pack import pack
from emp_kernels.gpu_backend import GpuBackend
from emp_kernels.gpu_devices import find_devices
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.rows import Given, PerRow, Threshold
from support.rows import KINDS, NUMBER_FORMATS, make_rows, to_bits
from test_kernels import doubtful_betas

interpreter = pytest.mark.interpreter
formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)


def each_with_a_format(name, values):
    """Each value once, with one format after the other: the interpreter is slow."""
    pairs = list(zip(values, cycle(NUMBER_FORMATS), strict=False))
    return pytest.mark.parametrize(
        (name, "number_format"), pairs, ids=[f"{value}-{f.name}" for value, f in pairs]
    )


def on_device():
    return DeviceWorkspace(find_devices()[0])


def check_packed(weights, layout, rule, tile):
    """The kernel's records, table and sums are those of the reference."""
    expected = pack_rows(weights, layout, rule, impl="reference")
    packed = GpuBackend(on_device(), tile=tile).pack(weights, layout, rule, emit=True)
    np.testing.assert_array_equal(packed.table, expected.table)
    assert packed.payload.tobytes() == expected.payload.tobytes()
    np.testing.assert_allclose(packed.stats, expected.stats, rtol=1e-13)


def check_pruned(weights, number_format, rule, tile):
    expected = prune_rows(weights, number_format, rule, impl="reference")
    out = np.full_like(weights, 0x5555)
    pruned = GpuBackend(on_device(), tile=tile).prune(weights, number_format, rule, out)
    np.testing.assert_array_equal(out, expected.weights)
    np.testing.assert_array_equal(pruned.table, expected.table)
    np.testing.assert_allclose(pruned.stats, expected.stats, rtol=1e-13)


def layout_of(number_format, columns, **parameters):
    return RowLayout(number_format=number_format, columns=columns, **parameters)


@interpreter
@each_with_a_format("columns", [1, 15, 16, 17, 33])
def test_rows_below_at_and_past_a_tile_are_packed_and_pruned(columns, number_format):
    for rows, kind in ((1, "gaussian"), (3, "heavy tailed")):
        weights = make_rows(kind, number_format, (rows, columns))
        check_packed(weights, layout_of(number_format, columns), PerRow(1.0), tile=16)
        check_pruned(weights, number_format, PerRow(1.0), tile=16)


@interpreter
@each_with_a_format("kind", KINDS)
def test_every_kind_of_row_is_packed_as_the_reference_packs_it(kind, number_format):
    weights = make_rows(kind, number_format, (2, 77))
    check_packed(weights, layout_of(number_format, 77, align=16), PerRow(1.0), tile=64)


@interpreter
@each_with_a_format("beta", [0.01, 0.5, 1.3, 1e308])
def test_any_beta_keeps_what_the_reference_keeps(beta, number_format):
    weights = make_rows("gaussian", number_format, (2, 50))
    check_packed(weights, layout_of(number_format, 50), PerRow(beta), tile=32)
    check_pruned(make_rows("ties", number_format, (2, 50)), number_format, PerRow(beta), tile=32)


@interpreter
@formats
def test_where_histograms_are_slow_thresholds_are_found_by_counting(number_format, monkeypatch):
    monkeypatch.setattr(launching, "COUNTS_IN_SHARED_MEMORY", False)
    gaussian = make_rows("gaussian", number_format, (3, 50))
    check_pruned(gaussian, number_format, PerRow(0.9), tile=32)
    layout = layout_of(number_format, 40)
    check_packed(make_rows("ties", number_format, (2, 40)), layout, PerRow(0.5), tile=32)


@interpreter
@each_with_a_format("radix", RADICES)
def test_every_radix_alignment_and_dropping_writes_the_same_bytes(radix, number_format):
    align = {1: 1, 2: 2, 3: 4, 4: 8, 6: 32, 16: 64}[radix]
    dropped = {1: 0, 2: 3, 3: number_format.mantissa_bits, 4: 5, 6: 1, 16: 2}[radix]
    layout = layout_of(number_format, 70, radix=radix, align=align, dropped_bits=dropped)
    weights = make_rows("gaussian", number_format, (2, 70), dropped_bits=dropped)
    weights[:, ::9] = make_rows("heavy tailed", number_format, (2, 70))[:, ::9]
    check_packed(weights, layout, PerRow(1.2), tile=64)


@interpreter
@each_with_a_format("ties", [0, 1, 7, 10**6])
def test_of_the_weights_at_a_threshold_the_first_ones_of_all_rows_stay(ties, number_format):
    weights = make_rows("ties", number_format, (3, 40))
    threshold = int(to_bits(np.array([1.0]), number_format)[0])
    rule = Threshold(threshold, ties)
    check_packed(weights, layout_of(number_format, 40), rule, tile=16)
    check_pruned(weights, number_format, rule, tile=16)


@interpreter
@formats
def test_a_given_mask_is_obeyed(number_format):
    weights = make_rows("any finite bits", number_format, (3, 41))
    keep = np.random.default_rng(1).random((3, 41)) < 0.5
    keep[1] = False
    keep[2] = True
    rule = Given(np.packbits(keep, axis=1, bitorder="little"))
    check_packed(weights, layout_of(number_format, 41, radix=2), rule, tile=16)
    check_pruned(weights, number_format, rule, tile=16)


@interpreter
def test_counts_that_float64_cannot_decide_are_decided_exactly_and_pruned_in_place():
    weights = make_rows("gaussian", BF16, (3, 64), seed=5)
    values = BF16.magnitudes(weights)
    for beta, kept in doubtful_betas(values[1], 40).items():
        expected = prune_rows(weights, BF16, PerRow(beta), impl="reference")
        there = weights.copy()
        workspace = on_device()
        with workspace.active():
            place = workspace.upload("weights", there).view(torch.int16).view(there.shape)
            pruned = pruning.prune(
                place, BF16, PerRow(beta), out=place, workspace=workspace, tile=32
            )
        assert pruned.table[1, 0] == kept
        np.testing.assert_array_equal(place.cpu().numpy().view(np.uint16), expected.weights)
        np.testing.assert_allclose(pruned.stats, expected.stats, rtol=1e-13)


@interpreter
@pytest.mark.parametrize("number_format", [BF16, F32], ids=lambda f: f.name)
def test_the_first_row_that_is_not_finite_is_named_and_nothing_of_it_is_written(number_format):
    weights = make_rows("gaussian", number_format, (4, 20))
    weights[2, 19] = number_format.infinity
    weights[3, 0] = number_format.infinity + 1  # NaN
    out = np.full_like(weights, 0x5555)
    with pytest.raises(NonFiniteRowError) as caught:
        GpuBackend(on_device(), tile=16).prune(weights, number_format, PerRow(1.0), out)
    assert caught.value.row == 2
    with pytest.raises(NonFiniteRowError):
        pack_rows(weights, layout_of(number_format, 20), PerRow(1.0), impl="triton")
    assert (out == 0x5555).all()


@interpreter
@pytest.mark.parametrize("number_format", [BF16, F32], ids=lambda f: f.name)
def test_no_rows_and_measuring_give_no_bytes(number_format):
    nothing = np.empty((0, 5), number_format.storage)
    layout = layout_of(number_format, 5)
    packed = pack_rows(nothing, layout, PerRow(1.0), impl="triton")
    assert packed.table.shape == packed.stats.shape == (0, 3)
    assert packed.payload.size == 0
    weights = make_rows("heavy tailed", number_format, (2, 33))
    layout = layout_of(number_format, 33)
    measured = pack_rows(weights, layout, PerRow(1.0), emit=False, impl="triton")
    expected = pack_rows(weights, layout, PerRow(1.0), impl="reference")
    np.testing.assert_array_equal(measured.table, expected.table)
    assert measured.payload.size == 0


@interpreter
@pytest.mark.parametrize("rule", [PerRow(0.8), Threshold(0x3C000000, 5)], ids=["row", "threshold"])
def test_scores_are_selected_as_the_reference_selects_them(rule):
    scores = make_rows("heavy tailed", F32, (3, 45))
    expected = select_rows(scores, rule, impl="reference")
    selected = select_rows(scores, rule, impl="triton")
    np.testing.assert_array_equal(selected.mask, expected.mask)
    np.testing.assert_array_equal(selected.table, expected.table)


@interpreter
def test_as_many_scores_stay_as_are_asked_for():
    scores = make_rows("ties", F32, (3, 45))
    kept = np.array([0, 13, 45])
    selected = select_rows(scores, PerRow(1.0), kept=kept, impl="triton")
    expected = select_rows(scores, PerRow(1.0), kept=kept, impl="reference")
    np.testing.assert_array_equal(selected.mask, expected.mask)
    assert selected.table[:, 0].tolist() == [0, 13, 45]


@interpreter
def test_rows_that_are_columns_of_a_matrix_are_pruned_and_packed_where_they_are():
    rows = make_rows("gaussian", F16, (3, 20))
    matrix = torch.from_numpy(rows.view(np.int16).T.copy())  # [C, R], as Conv1D has it
    workspace = on_device()
    matrix = matrix.to(workspace.device)
    layout = layout_of(F16, 20)
    packed = pack(matrix.T, layout, PerRow(1.0), workspace=workspace)
    expected = pack_rows(rows, layout, PerRow(1.0), impl="reference")
    assert packed.payload.cpu().numpy().tobytes() == expected.payload.tobytes()
    pruning.prune(matrix.T, F16, PerRow(1.0), out=matrix.T, workspace=workspace)
    zeros = prune_rows(rows, F16, PerRow(1.0), impl="reference").weights
    np.testing.assert_array_equal(matrix.cpu().numpy().T.view(np.uint16), zeros)


@interpreter
def test_rows_apart_from_each_other_are_read_by_their_stride():
    rows = make_rows("gaussian", BF16, (3, 24))
    workspace = on_device()
    wide = torch.from_numpy(rows.view(np.int16).copy()).to(workspace.device)
    packed = pack(wide[:, 3:20], layout_of(BF16, 17), PerRow(1.0), workspace=workspace, tile=16)
    narrow = np.ascontiguousarray(rows[:, 3:20])
    expected = pack_rows(narrow, layout_of(BF16, 17), PerRow(1.0), impl="reference")
    assert packed.payload.cpu().numpy().tobytes() == expected.payload.tobytes()


@triton.jit
def look_back(state_ptr, row, nbytes, begin_ptr, WINDOW: tl.constexpr):
    begin = begin_record(state_ptr, tl.cast(row, tl.int64), tl.cast(nbytes, tl.int64), WINDOW)
    tl.store(begin_ptr, begin)


def begin_of(states, row, nbytes):
    begin = torch.zeros(1, dtype=torch.int64, device=states.device)
    look_back[(1,)](states, row, nbytes, begin, WINDOW=64, num_warps=2, enable_fp_fusion=True)
    return begin.item()


@interpreter
@pytest.mark.parametrize("row", [1, 2, 64, 65, 66, 130, 199])
def test_a_record_begins_where_those_before_it_end_however_far_that_is_known(row):
    lengths = np.random.default_rng(2).integers(0, 1 << 40, 200)
    for known in {0, row // 2, row - 1}:  # the last row before it that knows its own end
        states = lengths + LENGTH_KNOWN.value
        states[known] = lengths[: known + 1].sum() + END_KNOWN.value
        states[row:] = 0
        there = torch.from_numpy(states.copy()).to(find_devices()[0])
        assert begin_of(there, row, 77) == lengths[:row].sum()
        assert there[row].item() == lengths[:row].sum() + 77 + END_KNOWN.value
        assert (there[row + 1 :] == 0).all()


@interpreter
def test_the_first_record_begins_at_once():
    states = torch.zeros(3, dtype=torch.int64, device=find_devices()[0])
    assert begin_of(states, 0, 9) == 0
    assert states.tolist() == [9 + END_KNOWN.value, 0, 0]


@interpreter
def test_a_record_waits_for_rows_that_have_published_nothing_yet():
    if find_devices()[0].type == "cuda":
        pytest.skip("what a GPU's programs wait for is not to be written from here")
    states = torch.tensor([10 + END_KNOWN.value, 0, 5 + LENGTH_KNOWN.value, 0])
    publisher = threading.Timer(0.2, lambda: states.__setitem__(1, 7 + LENGTH_KNOWN.value))
    publisher.start()
    before = time.monotonic()
    assert begin_of(states, 3, 1) == 22
    assert time.monotonic() - before > 0.1
    publisher.join()


@pytest.mark.gpu
@formats
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4096, 4096), (4096, 11008), (1024, 28672), (28672, 8192), (4096, 14336), (256, 65536)],
)
def test_rows_of_known_models_are_packed_and_pruned_on_a_gpu(rows, columns, number_format):
    # LLaMA-2 7B and 70B, Mixtral, and the longest rows
    weights = make_rows("gaussian", number_format, (rows, columns))
    weights[::7] = make_rows("ties", number_format, (rows, columns))[::7]
    layout = layout_of(number_format, columns, align=16)
    for rule in (PerRow(1.0), Threshold(int(weights[1, 0] & number_format.key_mask), 1000)):
        expected = pack_rows(weights, layout, rule)
        packed = pack_rows(weights, layout, rule, impl="triton")
        np.testing.assert_array_equal(packed.table, expected.table)
        assert packed.payload.tobytes() == expected.payload.tobytes()
        pruned = prune_rows(weights, number_format, rule, impl="triton")
        zeros = prune_rows(weights, number_format, rule).weights
        np.testing.assert_array_equal(pruned.weights, zeros)
