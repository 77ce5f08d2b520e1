"""Histograms made on a device count what plain counting does, for weights of any kind and size."""

import numpy as np
import pytest
import torch
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.gpu.histogram import (
    Spread,
    count_bins,
    count_equal_rows,
    count_keys,
    count_low_parts,
)
from emp_kernels.gpu_devices import find_devices
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.histogram import BlockHistogram, count_equal
from emp_kernels.histogram import count_low_parts as count_block_low_parts
from emp_kernels.numbers import BF16, F16, F32, tensor_of_patterns
from support.checkpoints import (
    F,
    H,
    differing,
    few_values,
    llama_config,
    load,
    mlp,
    write_checkpoint,
)
from support.rows import KINDS, NUMBER_FORMATS, make_rows

from emp_llm import PruneOptions, prune

interpreter = pytest.mark.interpreter
formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)

# the kernels look at 16 weights at a time here
SIZES = [(1, 1), (1, 15), (1, 16), (1, 17), (3, 11), (5, 16)]
SPREADS = {
    "one program": Spread(programs=1, tile=16, copies=1),
    "three programs": Spread(programs=3, tile=16, copies=1),
    "two copies": Spread(programs=3, tile=16, copies=2),
    "more copies than programs": Spread(programs=2, tile=16, copies=4),
    "a window": Spread(programs=3, tile=16, copies=2, window=(0x3F80, 64)),
}
spreads = pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)


@pytest.fixture
def workspace():
    return DeviceWorkspace(find_devices()[0])


def on_device(bits, workspace):
    """Bit patterns as a tensor of the workspace's device, in memory of their own."""
    return tensor_of_patterns(bits.copy()).to(workspace.device)


def keys_of(bits, number_format):
    return (bits & number_format.storage.type(number_format.key_mask)).astype(np.int64)


def plain_bins(keys, number_format):
    """Counts, sums of low parts and of their squares, one weight after the other."""
    expected = np.zeros((3, 1 << 15), np.int64)
    low_bits = number_format.bits - 16
    for key in keys.ravel().tolist():
        low = key & ((1 << low_bits) - 1)
        expected[:, key >> low_bits] += (1, low, low * low)
    return expected


def counted(bits, number_format, workspace, spread):
    weights = on_device(bits, workspace)
    with workspace.active():
        for name, nbytes in (("counts", 4 << 17), ("low sums", 16 << 17)):
            workspace.on_device(name, nbytes).fill_(0xAA)  # what is left from calls before
        if number_format is F32:
            return count_bins(weights, workspace, spread=spread).cpu().numpy()
        return count_keys(weights, number_format, workspace, spread=spread)[None].cpu().numpy()


@interpreter
@formats
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_weights_is_counted_bin_by_bin(number_format, kind, workspace):
    bits = make_rows(kind, number_format, (3, 11))
    found = counted(bits, number_format, workspace, SPREADS["a window"])
    expected = plain_bins(keys_of(bits, number_format), number_format)
    np.testing.assert_array_equal(found, expected[: len(found)])


@interpreter
@formats
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_at_and_past_the_tile_are_counted(number_format, size, workspace):
    bits = make_rows("heavy tailed", number_format, size)
    found = counted(bits, number_format, workspace, SPREADS["two copies"])
    expected = plain_bins(keys_of(bits, number_format), number_format)
    np.testing.assert_array_equal(found, expected[: len(found)])


@interpreter
@formats
@spreads
def test_the_counts_do_not_depend_on_how_they_are_spread(number_format, spread, workspace):
    # in the bins next to the window's ends, on both sides, and in the first and the last of all
    step = 1 << number_format.bits - 16
    first, end = 0x3F80 * step, (0x3F80 + 64) * step
    near = [first - step, first - 1, first, first + 1, end - step, end - 1, end, end + 1, 0]
    top = number_format.infinity - 1
    bits = np.array([*near * 7, top, 1], number_format.storage)[None]
    found = counted(bits, number_format, workspace, spread)
    expected = plain_bins(keys_of(bits, number_format), number_format)
    np.testing.assert_array_equal(found, expected[: len(found)])


@interpreter
def test_low_sums_pass_32_bits(workspace):
    bits = np.full((1, 70_001), 0xBF80FFFF, np.uint32)  # 70,001 · 65,535² is more than 2**48
    spread = Spread(programs=2, tile=65_536, copies=1)
    found = counted(bits, F32, workspace, spread)[:, 0x3F80]
    assert found.tolist() == [70_001, 70_001 * 65_535, 70_001 * 65_535**2]


@interpreter
@spreads
def test_low_parts_of_one_bin_are_counted(spread, workspace):
    kinds = "heavy tailed", "ties", "subnormal", "all zero"
    bits = np.concatenate([make_rows(kind, F32, (2, 13)) for kind in kinds])
    bits[0, :5] = [0x3F80FFFF, 0xBF800000, 0x3F800007, 0xBF800007, 0x3F80FFFF]
    keys = keys_of(bits, F32).ravel()
    for chosen in {0, 0x3F80, int(keys[-1]) >> 16}:
        with workspace.active():
            weights = on_device(bits, workspace)
            found = count_low_parts(weights, chosen, workspace, spread=spread).cpu().numpy()
        expected = np.zeros(1 << 16, np.int64)
        for key in keys.tolist():
            expected[key & 0xFFFF] += key >> 16 == chosen
        np.testing.assert_array_equal(found, expected)


@interpreter
@formats
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33])
def test_weights_that_equal_a_key_are_counted_row_by_row(number_format, columns, workspace):
    bits = make_rows("ties", number_format, (5, columns))
    keys = keys_of(bits, number_format)
    weights = on_device(bits, workspace)
    for key in {0, int(keys[0, 0]), int(keys.max()), number_format.key_mask}:
        with workspace.active():
            counts = count_equal_rows(weights, number_format, key, workspace, tile=16)
        assert counts.tolist() == [list(row).count(key) for row in keys]


@interpreter
def test_rows_that_lie_apart_are_counted_by_their_stride(workspace):
    bits = np.array([[1, 1, 7], [1, 7, 7], [7, 1, 1]], np.uint16)
    with workspace.active():
        weights = on_device(bits, workspace)[:, :2]
        assert count_equal_rows(weights, BF16, 1, workspace).tolist() == [2, 1, 1]


@interpreter
@formats
def test_a_block_is_counted_the_same_by_both_backends(number_format, workspace):
    bits = make_rows("heavy tailed", number_format, (40, 257))
    for found in (
        BlockHistogram(bits, number_format, workspace),
        BlockHistogram(bits, number_format, impl="triton"),
    ):
        expected = BlockHistogram(bits, number_format, impl="scalar")
        for name in ("counts", "low_sums", "low_squares"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@interpreter
def test_what_was_counted_outlives_the_next_block(workspace):
    first = BlockHistogram(np.array([[0x3F800001]], np.uint32), F32, workspace)
    low_parts = count_block_low_parts(np.array([[0x3F800001]], np.uint32), 0x3F80, workspace)
    BlockHistogram(np.array([[0x40000000]], np.uint32), F32, workspace)
    count_block_low_parts(np.array([[0x40000003]], np.uint32), 0x4000, workspace)
    assert (first.counts[0x3F80], first.low_sums[0x3F80], first.counts[0x4000]) == (1, 1, 0)
    assert (low_parts[1], low_parts[3]) == (1, 0)


@interpreter
@formats
def test_equal_weights_of_a_block_are_counted_by_both_backends(number_format, workspace):
    bits = make_rows("ties", number_format, (7, 33))
    key = int(keys_of(bits, number_format)[0, 0])
    expected = keys_of(bits, number_format).ravel().tolist().count(key)
    assert count_equal(bits, number_format, key, workspace) == expected
    assert count_equal(bits, number_format, key, impl="scalar") == expected


@interpreter
@formats
@pytest.mark.parametrize("bad", ["infinity", "key_mask"])
def test_nan_and_infinity_are_refused_with_their_row(number_format, bad, workspace):
    bits = make_rows("gaussian", number_format, (4, 9))
    bits[2, 8] = bits[3, 0] = getattr(number_format, bad) | 1 << (number_format.bits - 1)
    with pytest.raises(NonFiniteRowError) as caught:
        BlockHistogram(bits, number_format, workspace)
    assert caught.value.row == 2


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_is_pruned_as_one_group_by_counts_of_the_device_alone(dtype, tmp_path, monkeypatch):
    tensors = {name: few_values(*each.shape, dtype=dtype) for name, each in mlp(H, F).items()}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    options = PruneOptions(granularity="model", output_format="dense")
    prune(source, tmp_path / "expected", options, device="cpu")
    for counting in ("count_keys", "count_bins", "count_low_parts", "count_equal"):
        monkeypatch.delattr(f"emp_kernels.cpu.histogram.{counting}")
    prune(source, tmp_path / "found", options, device="cuda")
    assert differing(load(tmp_path / "found"), load(tmp_path / "expected")) == []


@pytest.mark.gpu
@formats
@pytest.mark.parametrize(
    "shape", [(4096, 11008), (28672, 8192), (8 * 14336, 4096)], ids=["7B", "70B", "Mixtral"]
)
def test_layers_of_real_models_are_counted_exactly(number_format, shape, workspace):
    rng = np.random.default_rng()
    values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    values[rng.random(shape, np.float32) < 0.1] = 0
    values[0, : shape[1] // 2] = 3.0  # outside of the window
    bits = values.view(np.uint32)
    if number_format is F16:
        bits = values.astype(np.float16).view(np.uint16)
    elif number_format is BF16:
        bits = (bits >> 16).astype(np.uint16)
    found = BlockHistogram(bits, number_format, workspace)
    expected = BlockHistogram(bits, number_format, impl="scalar")
    for name in ("counts", "low_sums", "low_squares"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    key = int(keys_of(bits[:1], number_format)[0, -1])
    equal = count_equal(bits, number_format, key, impl="scalar")
    assert count_equal(bits, number_format, key, workspace) == equal
    if number_format is F32:
        on_cpu = count_block_low_parts(bits, key >> 16, impl="scalar")
        np.testing.assert_array_equal(count_block_low_parts(bits, key >> 16, workspace), on_cpu)
