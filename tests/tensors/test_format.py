"""What is written follows FORMAT.md: a reader that knows nothing else gets every bit back."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16, F32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import format_reader
from support.packing import pack, prune, read_with_ours, rows_of, save_planes, tensor_of
from support.rows import KINDS, NUMBER_FORMATS, golden_values, make_rows, to_bits, to_floats

import emp_llm
from emp_llm.tensors import geometry as geometry_module
from emp_llm.tensors.geometry import Geometry
from emp_llm.tensors.packed import PackedTensor

GOLDEN = Path(__file__).parent / "golden"
FORMAT_MD = Path(emp_llm.__file__).parent / "FORMAT.md"

SHAPES = [(1, 1), (3, 5), (1, 130), (2, 3, 8), (2, 1, 1), (2, 2, 3, 9)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
def test_both_readers_get_every_bit_back(number_format, shape, transposed, tmp_path, monkeypatch):
    monkeypatch.setattr(geometry_module, "ROW_BLOCK_BYTES", 40)  # many blocks
    monkeypatch.setattr(geometry_module, "TRANSPOSED_ROW_BLOCK_BYTES", 40)
    planes, expected = {}, {}
    for kind in KINDS:
        dense = make_rows(kind, number_format, (shape[0], int(np.prod(shape[1:])))).reshape(shape)
        planes |= pack(kind, dense, number_format, transposed=transposed)
        expected[kind] = prune(dense, number_format, 1.0, transposed=transposed)
    path = tmp_path / "x.safetensors"
    save_planes(path, planes)
    for found in (format_reader.read_packed(path), read_with_ours(path)):
        assert found.keys() == expected.keys()
        for name, dense in expected.items():
            assert found[name].dtype == number_format.storage
            np.testing.assert_array_equal(found[name], dense)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_both_readers_get_any_tensor_of_any_layout_back(data):
    number_format = data.draw(st.sampled_from(NUMBER_FORMATS))
    dropped_bits = data.draw(st.integers(0, number_format.mantissa_bits))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=2)))
    shape += (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70)))
    dense = make_rows(
        data.draw(st.sampled_from(KINDS)),
        number_format,
        (1, int(np.prod(shape))),
        seed=data.draw(st.integers(0, 2**32)),
        dropped_bits=dropped_bits,
    ).reshape(shape)
    transposed, beta = data.draw(st.booleans()), data.draw(st.sampled_from([0.3, 1.0, 2.0]))
    planes = pack(
        "x",
        dense,
        number_format,
        beta=beta,
        transposed=transposed,
        dropped_bits=dropped_bits,
        radix=data.draw(st.sampled_from(RADICES)),
        align=data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_planes(path, planes)
        expected = prune(dense, number_format, beta, transposed=transposed)
        np.testing.assert_array_equal(format_reader.read_packed(path)["x"], expected)
        np.testing.assert_array_equal(read_with_ours(path)["x"], expected)


def test_the_worked_example_of_the_specification():
    weights = to_bits(np.array([[0.5, 0, -1.5, 0, 2.0, 0, -0.75, 0.0078125]]), BF16)
    planes = {name: plane.tobytes() for name, plane in pack("X", weights, BF16, beta=1.4).items()}
    assert planes == {
        "X": bytes.fromhex("55 00C000C0 15" + "00" * 10),
        "X.emp_rows": bytes.fromhex("0400 0000 003F" + "00" * 10),
        "X.emp_meta": np.array([1, 1, 0, 3, 1, 0, 1, 8], "<i8").tobytes(),
    }
    dense = format_reader.read_tensor(planes["X"], planes["X.emp_rows"], [1, 1, 0, 3, 1, 0, 1, 8])
    assert dense.tolist() == [[0x3F00, 0, 0xBFC0, 0, 0x4000, 0, 0xBF40, 0]]


def test_the_specification_tells_the_bytes_of_its_example():
    lines = [line.rsplit("  ", 1)[-1].strip() for line in FORMAT_MD.read_text("utf-8").splitlines()]
    example = lines[lines.index("### A worked example") :]
    assert [line for line in example if line in ("55", "00 C0 00 C0", "15")] == [
        "55",
        "00 C0 00 C0",
        "15",
    ]


def test_escapes_aside_are_whole_weights_in_their_order():
    # radix 1: the window is 127 keys from 3F00 on; 3F7F, one further, and 3F80 escape
    weights = np.array([[0x3F7F, 0x3F00, 0xBF80, 0xBF01]], np.uint16)
    planes = pack("X", weights, BF16, beta=100.0, radix=1, align=4)
    assert planes["X"].tobytes().hex() == "7f00ff81" + "7f3f80bf" + "00" * 8
    assert planes["X.emp_rows"].view(np.uint16)[:3].tolist() == [4, 2, 0x3F00]


@pytest.mark.parametrize(
    ("number_format", "columns", "item"),
    [(BF16, 65_535, 2), (F16, 65_536, 4), (BF16, 65_536, 4), (F32, 3, 4)],
)
def test_table_numbers_are_as_wide_as_the_specification_says(number_format, columns, item):
    layout = RowLayout(number_format=number_format, columns=columns)
    geometry = Geometry(number_format=number_format, shape=(3, columns))
    table = np.array([[0, 0, 0], [3, 2, 1], [2, 1, 77]], np.int64)
    data = PackedTensor(geometry, layout).encode_table(table)
    numbers = np.frombuffer(data[: 9 * item], f"<u{item}")
    assert numbers.tolist() == [0, 0, 0, 3, 2, 1, 2, 1, 77]
    assert data[9 * item :] == bytes(-9 * item % 16)
    assert PackedTensor(geometry, layout).table_bytes == len(data)
    lines = np.frombuffer(data, np.uint8, 9 * item)
    np.testing.assert_array_equal(PackedTensor(geometry, layout).decode_table(lines), table)


@pytest.mark.parametrize("dimensions", range(2, 9))
@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_of_any_number_of_dimensions_come_back(dimensions, transposed):
    shape = tuple(range(2, 2 + dimensions))
    geometry = Geometry(number_format=F16, shape=shape, transposed=transposed)
    layout = RowLayout(
        number_format=F16, columns=geometry.columns, dropped_bits=3, radix=6, align=32
    )
    data = PackedTensor(geometry, layout).encode_meta()
    fields = np.frombuffer(data, "<i8").tolist()
    assert fields == [1, 2, 3, 6, 32, int(transposed), *shape] + [0] * (dimensions % 2)
    assert PackedTensor.decode_meta("x", data) == PackedTensor(geometry, layout)


# The golden files. `make_golden(GOLDEN)` made them once, with version 1; they never change.


def golden_sources():
    """Name, source weights, number format and options of every packed tensor."""

    def source(shape, seed, number_format, dropped_bits=0):
        return to_bits(golden_values(shape, seed), number_format) >> dropped_bits << dropped_bits

    escaping = source((4, 40), 1, BF16)
    escaping[1, 7] = 0xC080  # −4
    escaping[2] = [0x8000, 0] * 20
    escaping[3] = [0x3F00, 0xBF00] * 20
    yield "bf16.escapes", escaping, BF16, {"radix": 2}
    yield "bf16.signs", source((2, 33), 2, BF16, 7), BF16, {"dropped_bits": 7, "radix": 16}
    yield "bf16.experts", source((2, 5, 3), 3, BF16), BF16, {"radix": 6, "transposed": True}
    dropping = {"dropped_bits": 3, "radix": 4, "align": 16}
    yield "fp16.dropped", source((3, 17), 4, F16, 3), F16, dropping
    subnormal = np.array([[0x0100, 0x8180, 0x03FF, 0, 2, 0x8400]], np.uint16)
    yield "fp16.subnormal", subnormal, F16, {"radix": 1}
    yield "fp32", source((2, 9), 5, F32), F32, {"radix": 3}


def golden_dense(bits, number_format, transposed):
    """The rule in exact fractions, apart from all of our code."""
    rows = rows_of(bits, transposed=transposed)
    pruned = np.zeros_like(rows)
    for r, values in enumerate(np.abs(to_floats(rows, number_format)).tolist()):
        exact = [Fraction(value) for value in values]
        squares = sum(value**2 for value in exact)
        n_eff = sum(exact) ** 2 / squares if squares else 0
        order = sorted(range(len(exact)), key=lambda c: (-exact[c], c))
        kept = order[: max(1, int(n_eff * (1 + Fraction(1, 10**9)))) if squares else 0]
        pruned[r, kept] = rows[r, kept]
    return tensor_of(pruned, bits.shape, transposed=transposed)


def golden_tensors():
    """All tensors of the packed file, and those of the dense one."""
    packed, dense = {}, {}
    for name, bits, number_format, options in golden_sources():
        packed |= pack(name, bits, number_format, **options)
        dense[name] = golden_dense(bits, number_format, options.get("transposed", False))
    return packed, dense


TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}


def make_golden(folder):
    """Write the golden files, by the writer that is installed."""
    packed, dense = golden_tensors()
    norm = np.array([1.0, 0.5], np.float32)
    save_planes(folder / "packed_v1.safetensors", packed | {"norm": norm})
    formats = {name: number_format for name, _, number_format, _ in golden_sources()}
    tensors = {
        name: torch.from_numpy(bits.copy()).view(TORCH[formats[name]])
        for name, bits in dense.items()
    }
    save_file(tensors | {"norm": torch.from_numpy(norm)}, folder / "dense_v1.safetensors")


def golden_expected():
    """The dense file's pruned tensors as bit patterns."""
    tensors = load_file(GOLDEN / "dense_v1.safetensors")
    assert tensors.pop("norm").tolist() == [1.0, 0.5]
    storage = {torch.float32: torch.uint32}
    return {
        name: tensor.view(storage.get(tensor.dtype, torch.uint16)).numpy()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("read", [format_reader.read_packed, read_with_ours])
def test_golden_files_of_version_1_are_read_to_the_bit(read):
    found, expected = read(GOLDEN / "packed_v1.safetensors"), golden_expected()
    assert found.keys() == expected.keys()
    for name, bits in expected.items():
        assert found[name].dtype == bits.dtype
        np.testing.assert_array_equal(found[name], bits)


def test_the_writer_still_writes_the_golden_bytes():
    packed, _ = golden_tensors()
    with safe_open(GOLDEN / "packed_v1.safetensors", "np") as file:
        assert set(file.keys()) == {*packed, "norm"}
        for name, plane in packed.items():
            stored = file.get_tensor(name)
            assert stored.dtype == plane.dtype
            assert stored.tobytes() == plane.tobytes()


def test_the_golden_weights_are_what_exact_fractions_keep():
    _, dense = golden_tensors()
    expected = golden_expected()
    assert dense.keys() == expected.keys()
    for name, bits in dense.items():
        np.testing.assert_array_equal(bits, expected[name])


def test_the_golden_files_cover_escapes_empty_and_whole_rows():
    with safe_open(GOLDEN / "packed_v1.safetensors", "np") as file:
        table = file.get_tensor("bf16.escapes.emp_rows").view("<u2")[:12].reshape(4, 3)
    assert (table[:2, 1] > 0).all()
    assert table[2].tolist() == [0, 0, 0]
    assert table[3].tolist() == [40, 0, 0x3F00]
