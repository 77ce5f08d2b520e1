"""What is kept of tensors, and how it is read."""

from pathlib import Path

import numpy as np
import pytest
from emp_kernels.rows import Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.shrinking import cut_parts as parts_module
from emp_llm.shrinking.axes import Axis
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.cut_parts import cut_parts
from emp_llm.shrinking.cuts import Cut, cut_tensor

START = 24  # bytes of something else before the tensor


def entry(name: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, "BF16", shape, START, START + 2 * int(np.prod(shape)))


def choice(**kept: tuple[int, ...]) -> dict:
    layers = {name.replace("_", "."): stays for name, stays in kept.items()}
    return {"experts": Choice(kind="experts", kept=layers)}


def test_an_expert_that_goes_is_dropped_and_those_behind_it_are_numbered_anew() -> None:
    axes = [Axis(kind="experts", holder="h.1", part=3)]
    cuts = [cut_tensor(entry(f"h.1.experts.{e}.w1", (4, 2)), axes, choice(h_1=(0, 2)))
            for e in range(3)]  # fmt: skip

    assert cuts[1] is None
    assert [cut.name for cut in cuts if cut] == ["h.1.experts.0.w1", "h.1.experts.1.w1"]
    assert all(cut.shape == (4, 2) for cut in cuts if cut)


def test_a_name_keeps_what_stands_before_the_number() -> None:
    axes = [Axis(kind="experts", holder="h.1", part=2)]
    cut = cut_tensor(entry("h.1.expert_2.w1", (4, 2)), axes, choice(h_1=(0, 2)))
    assert cut is not None
    assert cut.name == "h.1.expert_1.w1"


def test_structures_of_a_kind_without_a_choice_stay() -> None:
    axes = [Axis(kind="experts", holder="h.1", dimension=0, widths=(1,))]
    cut = cut_tensor(entry("h.1.gate", (4, 2)), axes, {})
    assert cut is not None
    assert (cut.shape, cut.kept) == ((4, 2), {})


CASES = [
    ((7, 5), {0: [0, 3, 4]}),  # rows of a router
    ((7, 5), {1: [1, 2, 4]}),  # columns
    ((7, 5), {0: [2], 1: [0, 4]}),
    ((4, 6, 5), {0: [0, 3]}),  # fused experts
    ((4, 6, 5), {0: [0, 3], 1: [1, 2, 5]}),
    ((4, 6, 5), {1: [5], 2: [0]}),
    ((4, 6, 5), {0: [1, 2, 3], 1: [0], 2: [0, 1, 2, 4]}),
    ((9,), {0: [0, 1, 8]}),  # a bias
    ((4, 0, 3), {0: [1]}),
    ((7, 5), {}),
]


@pytest.mark.parametrize("most", [8, 40, 4 << 20])
@pytest.mark.parametrize("long", [0, 12, 4096])
@pytest.mark.parametrize(("shape", "kept"), CASES)
def test_what_is_read_is_what_numpy_takes(
    tmp_path: Path, monkeypatch, shape: tuple[int, ...], kept: dict, long: int, most: int
) -> None:
    monkeypatch.setattr(parts_module, "COPY_BYTES", most)
    monkeypatch.setattr(parts_module, "_LONG", long)
    items = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    (tmp_path / "file").write_bytes(bytes(START) + items.tobytes())
    cut = Cut(entry("x", shape), "x", {d: np.array(i) for d, i in kept.items()})
    file, workspace = PlainFile(tmp_path / "file"), Workspace()

    found = [(part, part.read(file, workspace).tobytes()) for part in cut_parts(cut)]
    file.close()

    expected = items
    for dimension, indices in kept.items():
        expected = expected.take(indices, axis=dimension)
    assert b"".join(data for _, data in found) == expected.tobytes()
    assert all(part.nbytes <= most for part, _ in found)
    assert all(part.kept_bytes == len(data) for part, data in found)
    assert cut.shape == expected.shape
