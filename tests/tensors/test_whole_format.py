"""Tensors that are not pruned follow FORMAT.md's version 2: a reader that knows nothing else reads
them.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from emp_kernels.numbers import BF16, F16, F32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import format_reader
from support.packing import pack, pack_all, prune, read_with_ours, save_planes, whole_tensor
from support.rows import KINDS, NUMBER_FORMATS, golden_values, make_rows, to_bits

import emp_llm
from emp_llm.tensors import geometry as geometry_module
from emp_llm.tensors.whole import WholeTensor

GOLDEN = Path(__file__).parent / "golden"
FORMAT_MD = Path(emp_llm.__file__).parent / "FORMAT.md"

readers = pytest.mark.parametrize("read", [format_reader.read_packed, read_with_ours])


@readers
def test_a_file_may_hold_tensors_of_both_versions(read, tmp_path, monkeypatch):
    monkeypatch.setattr(geometry_module, "ROW_BLOCK_BYTES", 200)  # many blocks
    planes, expected = {}, {}
    for number_format in NUMBER_FORMATS:
        for shape in [(7, 40), (1, 3), (2, 3, 4, 5), (90, 1)]:
            name = f"{number_format.name}.{shape}"
            dense = make_rows("any finite bits", number_format, (1, int(np.prod(shape))))
            expected[name] = dense.reshape(shape)
            tensor = whole_tensor(shape, number_format, record_rows=3)
            planes |= pack_all(name, expected[name], tensor)
    pruned = make_rows("gaussian", BF16, (4, 50))
    planes |= pack("pruned", pruned, BF16)
    expected["pruned"] = prune(pruned, BF16, 1.0)
    path = tmp_path / "x.safetensors"
    save_planes(path, planes)
    found = read(path)
    assert found.keys() == expected.keys()
    for name, dense in expected.items():
        assert found[name].dtype == dense.dtype
        np.testing.assert_array_equal(found[name], dense)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_readers_get_any_tensor_of_any_code_back(data):
    number_format = data.draw(st.sampled_from(NUMBER_FORMATS))
    shape = (*data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)),)
    shape += (data.draw(st.integers(1, 40)),)
    dropped_bits = data.draw(st.integers(0, number_format.mantissa_bits))
    dense = make_rows(
        data.draw(st.sampled_from(KINDS)),
        number_format,
        (1, int(np.prod(shape))),
        seed=data.draw(st.integers(0, 2**32)),
        dropped_bits=data.draw(st.sampled_from([0, dropped_bits])),
    ).reshape(shape)
    tensor = whole_tensor(
        shape,
        number_format,
        record_rows=data.draw(st.integers(1, 9)),
        widths=data.draw(st.sampled_from([(1,), (1, 2), (3,), (2, 1, 1, 1, 1, 1, 1, 2)])),
        dropped_bits=dropped_bits,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_planes(path, pack_all("x", dense, tensor))
        np.testing.assert_array_equal(format_reader.read_packed(path)["x"], dense)
        np.testing.assert_array_equal(read_with_ours(path)["x"], dense)


LISTS = ("7E 7D 7F 00", "7D 7E 7F 00", "7E 7D 00 7F", "7D 7E 00 7F")
META = [2, 1, 0, 10, 33]
for one in LISTS:
    META += [int.from_bytes(bytes.fromhex(one), "little"), *[0] * 7]
META += [2, 5, 0]


def test_the_worked_example_of_version_2():
    weights = np.array(
        [[0x3F00, 0xBF40, 0x3F20, 0x3E80, 0xBF80], [0, 0xBF00, 0x3F60, 0xFF80, 0x3EA0]], np.uint16
    )
    tensor = whole_tensor((2, 5), BF16)
    lists = tuple(tuple(bytes.fromhex(one)) for one in LISTS)
    tensor = replace(tensor, layout=replace(tensor.layout, exponents=lists))
    planes = {name: plane.tobytes() for name, plane in pack_all("X", weights, tensor).items()}
    assert planes == {
        "X": bytes.fromhex("00C02000800080608020 BC01 24 28 FF 00"),
        "X.emp_rows": bytes([15, *[0] * 15]),
        "X.emp_meta": np.array(META, "<i8").tobytes(),
    }
    dense = format_reader.read_tensor(planes["X"], planes["X.emp_rows"], META)
    assert dense.tolist() == weights.tolist()


def test_the_specification_tells_the_bytes_of_its_example_of_version_2():
    text = FORMAT_MD.read_text("utf-8")
    example = text[text.index("### A worked example of version 2") :]
    told = [line.rsplit("  ", 1)[-1].strip() for line in example.splitlines()]
    record = ["00 C0 20 00 80 00 80 60 80 20", "BC 01", "24", "28", "FF"]
    assert [part for part in told if part in record] == record
    for number, one in enumerate(LISTS):
        assert f"\n    list {number}    {one}\n" in example
    numbers = [META[at] for at in range(5, 37, 8)]
    text = " ".join(example.split())
    assert (
        f"2, 1, 0, 10, 33 (1 + 2 · 16), then {numbers[0]}, {numbers[1]}, {numbers[2]} and "
        f"{numbers[3]}, each with seven zeros behind it, then 2, 5 and a zero of padding."
    ) in text


@pytest.mark.parametrize("dimensions", range(2, 9))
def test_parameters_of_any_number_of_dimensions_come_back(dimensions):
    shape = tuple(range(2, 2 + dimensions))
    tensor = whole_tensor(shape, F16, record_rows=4, widths=(3, 1), dropped_bits=3)
    data = tensor.encode_meta()
    fields = np.frombuffer(data, "<i8").tolist()
    lists = []
    for listed in (
        [14, 13, 12, 11, 10, 9, 8, 7],
        [13, 12, 11, 10, 9, 8, 7, 14],
        [12, 11, 10, 9, 8, 7, 14, 13],
        [11, 10, 9, 8, 7, 14, 13, 12],
    ):
        lists += [int.from_bytes(bytes(listed), "little"), *[0] * 7]
    padding = [0] * ((37 + dimensions) % 2)
    assert fields == [2, 2, 3, 4 * shape[-1], 0x13, *lists, *shape, *padding]
    assert WholeTensor.decode_meta("x", data) == tensor


@pytest.mark.parametrize(("dropped_bits", "lists"), [(5, 4), (6, 2), (7, 1)])
def test_lists_that_no_stored_bits_choose_are_zeros(dropped_bits, lists):
    tensor = whole_tensor((4, 6), BF16, dropped_bits=dropped_bits)
    data = tensor.encode_meta()
    fields = np.frombuffer(data, "<i8").tolist()
    assert [fields[at] != 0 for at in range(5, 37, 8)] == [n < lists for n in range(4)]
    assert WholeTensor.decode_meta("x", data) == tensor


def test_lengths_are_32_bit_numbers():
    tensor = whole_tensor((5, 7), BF16, record_rows=2)
    lengths = np.array([1, 2**16, 2**31 + 5])
    data = tensor.encode_table(lengths)
    assert data == bytes.fromhex("01000000 00000100 05000080 00000000")
    assert tensor.table_bytes == 16
    np.testing.assert_array_equal(tensor.decode_table(np.frombuffer(data[:12], np.uint8)), lengths)


# The golden files. `make_golden(GOLDEN)` made them once, with version 2; they never change.


def golden_sources():
    """Name, bit patterns and tensor of every packed tensor."""

    def source(shape, seed, number_format, dropped_bits=0):
        return to_bits(golden_values(shape, seed), number_format) >> dropped_bits << dropped_bits

    bits = source((7, 40), 1, BF16)
    # zeros, infinities, NaN, subnormal weights, the largest
    bits[3, :10] = [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 1, 0x807F, 0x7F7F]
    listed = (126, 125, 124, 123, 0, 127, 122, 121, 255, 120, 119)
    yield "bf16", bits, whole_tensor((7, 40), BF16, widths=(1, 2, 3), exponents=listed)

    yield "bf16.short", source((3, 50, 3), 2, BF16), whole_tensor((3, 50, 3), BF16, record_rows=16)

    ones = np.full((8, 16), 0x3F80, np.uint16)
    ones[5, 5] = 0xBF80
    tensor = whole_tensor((8, 16), BF16, widths=(1,), exponents=(127,), dropped_bits=7)
    yield "bf16.ones", ones, tensor

    bits = source((5, 33), 3, F16)
    bits[4, :10] = [0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01, 1, 0x83FF, 0x7BFF]
    yield "fp16", bits, whole_tensor((5, 33), F16, widths=(2, 2))

    bits = source((4, 40), 4, F16, 3)
    bits[2, 17] += 1
    yield "fp16.dropped", bits, whole_tensor((4, 40), F16, record_rows=1, dropped_bits=3)

    bits = source((3, 70), 5, F32)
    bits[1, :6] = [1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 1, 0x807FFFFF]
    yield "fp32", bits, whole_tensor((3, 70), F32, widths=(1, 1, 1, 1, 1, 1, 1, 3))

    bits = source((2, 2, 65), 6, F32, 16)
    bits[1, 1, :3] = [0x7F800000, 0xFFC00000, 0x3F000001]
    yield "fp32.bf16", bits, whole_tensor((2, 2, 65), F32, record_rows=3, dropped_bits=16)

    bits = source((2, 9), 7, F32, 5)
    bits[0, 3] += 31
    yield "fp32.odd", bits, whole_tensor((2, 9), F32, record_rows=1, dropped_bits=5)


def golden_planes():
    return {
        plane: data
        for name, bits, tensor in golden_sources()
        for plane, data in pack_all(name, bits, tensor).items()
    }


TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


def make_golden(folder):
    """Write the golden files, by the writer that is installed."""
    save_planes(folder / "packed_v2.safetensors", golden_planes())
    dense = {
        name: torch.from_numpy(bits.copy()).view(TORCH[tensor.layout.number_format])
        for name, bits, tensor in golden_sources()
    }
    save_file(dense, folder / "dense_v2.safetensors")


@readers
def test_golden_files_of_version_2_are_read_to_the_bit(read):
    found, dense = (
        read(GOLDEN / "packed_v2.safetensors"),
        load_file(GOLDEN / "dense_v2.safetensors"),
    )
    assert found.keys() == dense.keys()
    for name, tensor in dense.items():
        bits = tensor.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()
        assert found[name].dtype == bits.dtype
        np.testing.assert_array_equal(found[name], bits)


def test_the_golden_weights_are_their_sources():
    dense = load_file(GOLDEN / "dense_v2.safetensors")
    assert set(dense) == {name for name, _, _ in golden_sources()}
    for name, bits, tensor in golden_sources():
        assert dense[name].dtype == TORCH[tensor.layout.number_format]
        assert dense[name].view(torch.uint8).numpy().tobytes() == bits.tobytes()


def test_the_writer_still_writes_the_golden_bytes_of_version_2():
    planes = golden_planes()
    with safe_open(GOLDEN / "packed_v2.safetensors", "np") as file:
        assert set(file.keys()) == set(planes)
        for name, plane in planes.items():
            stored = file.get_tensor(name)
            assert stored.dtype == plane.dtype
            assert stored.tobytes() == plane.tobytes()
