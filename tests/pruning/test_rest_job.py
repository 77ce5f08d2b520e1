"""Which tensors are packed without being pruned, and that every bit of them is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import H, gaussian, llama_config, mlp, write_checkpoint

from emp_llm import inspect, prune, unpack
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.pruning.rest_job import rest_geometry

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def geometry(dtype, shape, item=2):
    nbytes = item
    for size in shape:
        nbytes *= size
    return rest_geometry(TensorEntry("x", dtype, shape, 0, nbytes))


@pytest.mark.parametrize(
    ("dtype", "item", "shape", "record_rows"),
    [
        ("BF16", 2, (8, 4096), 4),
        ("F16", 2, (32768, 1), 16384),
        ("F32", 4, (1368, 12), 1366),
        ("BF16", 2, (4, 8, 1024), 16),
        ("BF16", 2, (1, 1, 1, 32768), 1),
    ],
)
def test_matrices_of_64_kib_are_packed(dtype, item, shape, record_rows):
    found = geometry(dtype, shape, item)
    assert (found.shape, found.record_rows, found.transposed) == (shape, record_rows, False)
    assert found.nbytes >= 65_536


@pytest.mark.parametrize(
    ("dtype", "item", "shape"),
    [
        ("F8_E4M3", 1, (64, 4096)),
        ("F64", 8, (64, 4096)),
        ("I32", 4, (64, 4096)),
        ("BF16", 2, (1 << 20,)),  # a vector
        ("F32", 4, ()),
        ("BF16", 2, (8, 4088)),  # 65,408 bytes
        ("BF16", 2, (33_001, 3)),  # not a multiple of 16
        ("BF16", 2, (2, 2**22 + 8)),  # past what a reader takes
        ("BF16", 2, (2**12, 2**12 + 1, 1)),
        ("BF16", 2, (0, 4096)),
    ],
)
def test_other_tensors_stay_plain(dtype, item, shape):
    assert geometry(dtype, shape, item) is None


HIDDEN, VOCABULARY = 512, 5_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An embedding of two row blocks with weights of every kind, and a head of random bits."""
    embed = gaussian(VOCABULARY, HIDDEN)
    special = [0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 1, 0x807F]
    embed.view(torch.uint16)[4321, : len(special)] = torch.tensor(special, dtype=torch.uint16)
    noise = np.random.default_rng(0).integers(0, 1 << 16, (VOCABULARY, HIDDEN)).astype(np.uint16)
    config = llama_config(HIDDEN, H) | {"vocab_size": VOCABULARY}
    tensors = {EMBED: embed, HEAD: torch.from_numpy(noise).view(torch.bfloat16)}
    return write_checkpoint(tmp_path / "source", config, mlp(HIDDEN, H) | tensors)


def bits(folder: Path, name: str) -> bytes:
    return load_file(folder / "model.safetensors")[name].view(torch.uint8).numpy().tobytes()


def test_every_bit_of_the_rest_comes_back_on_any_number_of_threads(
    source: Path, tmp_path: Path
) -> None:
    for threads in (1, 3):
        prune(source, tmp_path / str(threads), threads=threads)
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "3")]
    assert packed[0] == packed[1]
    unpack(tmp_path / "3", tmp_path / "dense")
    for name in (EMBED, HEAD):
        assert bits(tmp_path / "dense", name) == bits(source, name)


def test_measuring_gives_the_bytes_that_are_written(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    planes = [written[EMBED + suffix] for suffix in ("", ".emp_rows", ".emp_meta")]
    nbytes = sum(plane.nbytes for plane in planes)
    measured = inspect(source)["tensors"]
    assert measured[EMBED]["bytes_after"] == nbytes < 0.68 * measured[EMBED]["bytes_before"]
    assert measured[HEAD]["bytes_after"] == written[HEAD].nbytes == VOCABULARY * HIDDEN * 2


def test_a_tensor_unlike_its_sample_comes_back_though_it_grows(tmp_path: Path) -> None:
    # the rows of the sample are zeros, and the code is for these: a bit for the sign, a tier of one
    noise = np.random.default_rng(0).integers(0, 1 << 16, (VOCABULARY, HIDDEN)).astype(np.uint16)
    for place in range(64):
        start = place * 2500 // 64 * 2
        noise[start : start + 2] = 0
    config = llama_config(HIDDEN, H) | {"vocab_size": VOCABULARY}
    tensors = mlp(HIDDEN, H) | {EMBED: torch.from_numpy(noise).view(torch.bfloat16)}
    source = write_checkpoint(tmp_path / "source", config, tensors)
    prune(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[EMBED + ".emp_meta"][0] == 2
    # any other weight takes its exponent and seven dropped bits besides, as two bytes
    bits_taken = 128 * HIDDEN * 2 + (VOCABULARY - 128) * HIDDEN * (2 + 16)
    assert written[EMBED].nbytes == pytest.approx(bits_taken / 8, rel=1e-4)
    unpack(tmp_path / "out", tmp_path / "dense")
    assert bits(tmp_path / "dense", EMBED) == noise.tobytes()
