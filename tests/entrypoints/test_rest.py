"""Prune and inspect pack what is not pruned, every bit of it, unless they are told not to."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from emp_kernels.numbers import patterns_of_tensor
from support.calibrated import calibration, save_text, save_tokenizer
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    bits,
    differing,
    files,
    load,
    write_checkpoint,
)
from support.format_reader import read_packed
from support.original_llamas import params, whole_model, write_original
from support.processes import free_port, rank_environment, start
from support.wide_models import (
    EMBED,
    HEAD,
    NORM,
    REST_CONFIG,
    TARGETS,
    Q,
    WideModel,
    large,
    planes_of,
    save_wide_model,
    with_odd_values,
    with_rest,
)

from emp_llm import OptionError, OutputError, PruneOptions, inspect, pack, prune, unpack, verify

SMALL_BLOCKS = ("tensors.geometry.ROW_BLOCK_BYTES", "files.direct_file.CHUNK_BYTES")
LOSSLESS = PruneOptions(targets="none")
OPTIONS = {"prune": PruneOptions(), "plain": PruneOptions(rest="plain"), "pack": LOSSLESS}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", REST_CONFIG, with_rest())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_float_matrices_that_get_smaller_are_packed_and_the_others_copied(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = with_rest(dtype) | {
        "model.vector": torch.ones(40_000, dtype=dtype),
        "model.integers": torch.zeros(512, 64, dtype=torch.int32),
        "model.double": torch.zeros(512, 64, dtype=torch.float64),
    }
    source = write_checkpoint(tmp_path / "source", REST_CONFIG, tensors)
    report = prune(source, tmp_path / "out")
    stored = load(tmp_path / "out")
    plain = tensors.keys() - {*TARGETS, EMBED, Q}
    assert stored.keys() == planes_of({*TARGETS, EMBED, Q}) | plain
    assert differing({name: stored[name] for name in plain}, {n: tensors[n] for n in plain}) == []
    for name in plain | {EMBED, Q}:
        fields = report["tensors"][name]
        assert not fields["pruned"]
        nbytes = [stored[plane].nbytes for plane in planes_of({name}) if plane in stored]
        assert fields["bytes_after"] == sum(nbytes)
    read = read_packed(tmp_path / "out" / "model.safetensors")
    for name in (EMBED, Q):
        assert (read[name] == patterns_of_tensor(tensors[name])).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == report["format_version"] == 2


def test_the_rest_left_plain_gives_the_bytes_of_the_release_that_knew_nothing_else(
    tmp_path: Path,
) -> None:
    def evenly(rows: int, columns: int, step: int) -> torch.Tensor:
        numbers = torch.arange(rows * columns)
        values = (numbers * step % 8191 - 4095) / 8192
        return values.to(torch.bfloat16).reshape(rows, columns)

    tensors = {
        DOWN: evenly(64, 96, 7919),
        GATE: evenly(96, 64, 5573),
        UP: evenly(96, 64, 3571),
        EMBED: evenly(512, 64, 6133),
        NORM: evenly(1, 64, 11).reshape(64),
    }
    source = write_checkpoint(tmp_path / "source", REST_CONFIG, tensors)
    report = prune(source, tmp_path / "out", PruneOptions(rest="plain"))
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    # SHA-256 of the file that release 0.1.0 wrote
    expected = "07f07d2af1dd7e77981b28a0800e499a210e882904044da0a5431941e1aeaea2"
    assert hashlib.sha256(written).hexdigest() == expected
    assert report["format_version"] == 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["one file", "sharded", "torch"])
def test_inspect_foretells_every_byte(tmp_path: Path, kind: str, options: PruneOptions) -> None:
    tensors = with_rest()
    shards = [{name: tensors[name]} for name in tensors] if kind == "sharded" else [tensors]
    source = write_checkpoint(tmp_path / "source", REST_CONFIG, *shards)
    if kind == "torch":
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin")
    found, report = inspect(source, options), prune(source, tmp_path / "out", options)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert found["files"] == {name: {"bytes": nbytes} for name, nbytes in written.items()}
    assert found["totals"]["files"]["bytes_after"] == sum(written.values())
    for name, fields in report["tensors"].items():
        assert found["tensors"][name]["bytes_after"] == fields["bytes_after"]
    assert verify(tmp_path / "out", against=source)["tensors"] == len(tensors)


def test_a_source_of_torch_save_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "expected")
    torch.save(load(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    prune(source, tmp_path / "out")
    assert differing(load(tmp_path / "out"), load(tmp_path / "expected")) == []


def test_metas_format_is_packed_in_parts_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.pruning.rest_job.SMALLEST_PACKED", 2048)
    source = write_original(tmp_path / "source", params(), whole_model())
    for name, options in (("dense", PruneOptions(output_format="dense")), ("packed", None)):
        prune(source, tmp_path / name, options)
    assert verify(tmp_path / "packed", against=source)["tensors"] > 0
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert differing(load(tmp_path / "unpacked"), load(tmp_path / "dense")) == []
    assert EMBED + ".emp_meta" in load(tmp_path / "packed")


@pytest.mark.parametrize("options", [PruneOptions(), LOSSLESS], ids=["prune", "pack"])
def test_nan_infinity_and_negative_zero_come_back_bit_for_bit(
    tmp_path: Path, options: PruneOptions
) -> None:
    tensors = with_rest() | {EMBED: with_odd_values(with_rest()[EMBED])}
    source = write_checkpoint(tmp_path / "source", REST_CONFIG, tensors)
    prune(source, tmp_path / "out", options)
    assert EMBED + ".emp_meta" in load(tmp_path / "out")
    unpack(tmp_path / "out", tmp_path / "dense")
    found = load(tmp_path / "dense")
    assert bits(found[EMBED]) == bits(tensors[EMBED])
    changed = [] if options.targets == "none" else sorted(TARGETS)
    assert differing(found, tensors) == changed
    assert verify(tmp_path / "out", against=source)["tensors"] == len(tensors)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bytes_depend_on_neither_threads_nor_blocks(
    source: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(source, tmp_path / "expected")
    for place in SMALL_BLOCKS:
        monkeypatch.setattr(f"emp_llm.{place}", 1 << 13)
    prune(source, tmp_path / "out", threads=threads)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def prune_to(source: Path, out: Path, options: PruneOptions, distributed: bool = False) -> None:
    import emp_llm.files.direct_file as direct_file
    import emp_llm.tensors.geometry as geometry

    geometry.ROW_BLOCK_BYTES = direct_file.CHUNK_BYTES = 1 << 14
    prune(source, out, options, threads=2, distributed=distributed)


@pytest.mark.parametrize("options", [PruneOptions(), LOSSLESS], ids=["prune", "pack"])
def test_several_ranks_write_what_one_does(tmp_path: Path, options: PruneOptions) -> None:
    tensors = with_rest()
    shards = [{name: tensors[name]} for name in tensors]
    source = write_checkpoint(tmp_path / "source", REST_CONFIG, *shards)
    port = free_port()
    ranks = [
        start(
            *(prune_to, source, tmp_path / "out", options, True),
            environment=rank_environment(rank, 2, port),
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    prune(source, tmp_path / "expected", options)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize("options", [PruneOptions(), LOSSLESS], ids=["prune", "pack"])
def test_a_run_killed_in_a_packed_tensor_is_completed_to_the_same_bytes(
    tmp_path: Path, options: PruneOptions
) -> None:
    tensors = with_rest()
    source = write_checkpoint(
        tmp_path / "source", REST_CONFIG, {EMBED: tensors.pop(EMBED)}, {Q: tensors.pop(Q)}, tensors
    )
    prune(source, tmp_path / "expected", options)
    out, finished = tmp_path / "out", set()
    for step in range(6, 36, 5):
        run = start(prune_to, source, out, options, killed_at=step)
        run.join()
        assert run.exitcode == -9
        finished.add(len(list(out.glob(".*/*.safetensors"))))
        prune(source, out, options)
        assert files(out) == files(tmp_path / "expected")
        shutil.rmtree(out)
    assert len(finished) > 1  # it was hit in several shards


def test_a_disk_that_fails_in_a_packed_tensor_keeps_the_shards_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = with_rest()
    source = write_checkpoint(tmp_path / "source", REST_CONFIG, {Q: tensors.pop(Q)}, tensors)
    pwrite, out = os.pwrite, tmp_path / "out"

    def write(fd: int, data: memoryview, offset: int) -> int:
        if "00002-of" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(5, "Input/output error")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", write)
        with pytest.raises(OutputError):
            prune(source, out)
    with pytest.raises(OutputError, match=r"\(rest was 'packed', is 'plain'\)"):
        prune(source, out, PruneOptions(rest="plain"))
    prune(source, out)
    prune(source, tmp_path / "expected")
    assert files(out) == files(tmp_path / "expected")


@pytest.mark.parametrize("repair", ["none", "obs", "bias"])
def test_a_model_pruned_by_data_has_the_rest_of_its_source(tmp_path: Path, repair: str) -> None:
    source = save_wide_model(tmp_path / "source", "llama", vocab_size=512, mlp_bias=True)
    save_tokenizer(source, 512)
    text = save_text(tmp_path / "text.txt")
    options = PruneOptions(criterion="wanda", repair=repair, calibration=calibration(text))
    prune(source, tmp_path / "out", options)
    verify(tmp_path / "out", against=source)
    tensors = load(source)
    assert large(tensors) >= {EMBED, HEAD, Q}
    assert planes_of(large(tensors)) <= load(tmp_path / "out").keys()
    unpack(tmp_path / "out", tmp_path / "dense")
    changed = differing(load(tmp_path / "dense"), tensors)
    assert changed
    assert all(".mlp." in name for name in changed)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral", "t5", "bert"])
def test_pack_gives_back_the_source(
    wide_model: WideModel, tmp_path: Path, architecture: str
) -> None:
    source, out = wide_model(architecture), tmp_path / "out"
    report = pack(source, out)
    tensors = load(source)
    assert not any(fields["pruned"] for fields in report["tensors"].values())
    assert load(out).keys() == planes_of(large(tensors)) | tensors.keys()
    checked = verify(out, against=source)
    assert (checked["tensors"], checked["pruned_tensors"]) == (len(tensors), 0)
    unpack(out, tmp_path / "dense")
    assert differing(load(tmp_path / "dense"), tensors) == []
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    prune(source, tmp_path / "same", LOSSLESS)
    assert files(out) == files(tmp_path / "same")


def test_pack_does_not_write_over_what_is_there(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(source, out)
    before = files(out)
    with pytest.raises(OutputError, match="is not empty"):
        pack(source, out)
    assert files(out) == before
    prune(source, out, overwrite=True)
    pack(source, out, overwrite=True)
    assert files(out) == before


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 2.0},
        {"target_sparsity": 0.5},
        {"max_loss_increase": 1.0},
        {"granularity": "layer"},
        {"ignore": "down"},
        {"criterion": "wanda"},
        {"count_by": "magnitude"},
        {"repair": "bias"},
        {"rest": "plain"},
    ],
    ids=str,
)
def test_what_only_pruning_does_is_refused_where_nothing_is_pruned(options: dict) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"^{name} is .*, but targets is 'none'"):
        PruneOptions(targets="none", **options)


def test_the_rest_is_packed_or_plain() -> None:
    with pytest.raises(OptionError, match="rest is 'dense'; choose one of packed, plain"):
        PruneOptions(rest="dense")  # type: ignore[arg-type]
