"""A run that broke off, however it did, is completed by the same command, to the same bytes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.arriving import layer
from support.checkpoints import (
    F,
    H,
    files,
    kept_unfinished,
    llama_config,
    mlp,
    refusal,
    visible,
    write_checkpoint,
)
from support.processes import start
from support.tuned import tune

import emp_llm
from emp_llm import CalibrationOptions, OutputError, PruneOptions, prune, unpack, verify
from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.output.run_description import describe_run, difference, pruning_options

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
STEPS = 75
"""About as many as a run on this checkpoint takes."""


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A checkpoint of three shards, with a small file beside them."""
    shards = [layer(number) for number in range(3)]
    folder = write_checkpoint(tmp_path / "three", llama_config(H, F, layers=3), *shards)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def prune_to(source: Path, out: Path, options: PruneOptions, overwrite: bool) -> None:
    prune(source, out, options, overwrite=overwrite, threads=2)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (PruneOptions(), 0),
        *(pytest.param(PruneOptions(), part, marks=pytest.mark.slow) for part in (1, 2, 3)),
        (PruneOptions(granularity="model", output_format="dense"), 0),
    ],
)
def test_a_run_killed_at_any_step_looks_like_no_model_or_is_one_and_is_completed(
    three: Path, tmp_path: Path, options: PruneOptions, part: int
) -> None:
    out = tmp_path / "out"
    prune(three, tmp_path / "expected", options)
    expected, kept = files(tmp_path / "expected"), set()
    for step in range(part, STEPS, 4):
        run = start(prune_to, three, out, options, False, killed_at=step)
        run.join()
        assert run.exitcode in (0, -9)
        if (out / "config.json").exists():
            verify(out)
            assert visible(out) == expected
        else:
            kept.add(len(list((out / STAGING_NAME).glob("*.safetensors"))))
            prune(three, out, options)
            assert files(out) == expected
        shutil.rmtree(out)
    assert kept == {0, 1, 2, 3}  # every stage was hit


def prune_less(source: Path, out: Path, base: Path) -> None:
    prune(source, out, base=base, threads=2)


def test_a_run_on_differences_to_a_base_that_was_killed_is_completed(
    three: Path, tmp_path: Path
) -> None:
    tuned, out = tune(three, tmp_path / "tuned"), tmp_path / "out"
    prune_less(tuned, tmp_path / "once", three)
    run = start(prune_less, tuned, out, three, killed_at=30)
    run.join()
    assert run.exitcode == -9
    assert list((out / STAGING_NAME).glob("*.safetensors")) != []
    os.utime(three / SHARDS[0], (1, 1))
    with pytest.raises(OutputError, match=rf"the base's {SHARDS[0]} has changed"):
        prune_less(tuned, out, three)
    prune(tuned, out, base=three, overwrite=True)
    assert files(out) == files(tmp_path / "once")


@pytest.mark.parametrize("part", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_overwrite_killed_at_any_step_leaves_the_older_model_or_none_and_is_completed(
    three: Path, tmp_path: Path, part: int
) -> None:
    older, out = tmp_path / "older", tmp_path / "out"
    prune(three, older, PruneOptions(beta=0.5))
    (older / "notes.txt").write_text("mine")
    prune(three, tmp_path / "expected")
    expected = files(tmp_path / "expected") | {"notes.txt": b"mine"}
    for step in range(part, STEPS + 12, 4):
        shutil.copytree(older, out)
        run = start(prune_to, three, out, PruneOptions(), True, killed_at=step)
        run.join()
        assert run.exitcode in (0, -9)
        if (out / "config.json").exists():
            verify(out)
            assert visible(out) in (files(older), expected)
        if run.exitcode == -9:
            prune(three, out, overwrite=True)
        assert files(out) == expected
        shutil.rmtree(out)


@pytest.fixture
def unfinished(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two finished shards of three, of a run whose disk failed."""
    out, pwrite = tmp_path / "out", os.pwrite

    def write(fd: int, data: memoryview, offset: int) -> int:
        if SHARDS[2] in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(5, "Input/output error")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", write)
        with pytest.raises(OutputError) as caught:
            prune(three, out, threads=1)  # so that no shard is overtaken by the next one
    note = f"2 files are finished and kept in {out}: the same command goes on from there"
    assert caught.value.__notes__ == [note]
    assert kept_unfinished(out) == SHARDS[:2]
    return out


def test_finished_shards_are_not_written_again(
    three: Path, unfinished: Path, tmp_path: Path
) -> None:
    staged = unfinished / STAGING_NAME
    before = {name: (staged / name).stat().st_ino for name in SHARDS[:2]}
    prune(three, unfinished)
    assert {name: (unfinished / name).stat().st_ino for name in SHARDS[:2]} == before
    prune(three, tmp_path / "expected")
    assert files(unfinished) == files(tmp_path / "expected")


def test_an_interruption_before_any_work_tells_what_is_kept_already(
    three: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emp_llm.output.journal.Journal.begin", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        prune(three, unfinished)
    note = f"2 files are finished and kept in {unfinished}: the same command goes on from there"
    assert caught.value.__notes__ == [note]
    assert kept_unfinished(unfinished) == SHARDS[:2]


@pytest.mark.parametrize("offset", [9, 300, -1])
def test_a_finished_shard_that_was_damaged_since_is_made_again(
    three: Path, unfinished: Path, tmp_path: Path, offset: int
) -> None:
    path = unfinished / STAGING_NAME / SHARDS[0]
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    prune(three, unfinished)
    prune(three, tmp_path / "expected")
    assert files(unfinished) == files(tmp_path / "expected")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"tensors": 1}', b'{"tensors": {}}'])
def test_a_shard_whose_record_is_damaged_is_made_again(
    three: Path, unfinished: Path, tmp_path: Path, damage: bytes
) -> None:
    (unfinished / STAGING_NAME / ".finished" / f"{SHARDS[1]}.json").write_bytes(damage)
    prune(three, unfinished)
    prune(three, tmp_path / "expected")
    assert files(unfinished) == files(tmp_path / "expected")


def refused(three: Path, out: Path, **options: object) -> str:
    """The refusal of a run that differs; nothing has changed after it."""
    before = files(out)
    with pytest.raises(OutputError) as caught:
        prune(three, out, PruneOptions(**options))
    assert files(out) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"beta": 0.75}, "beta was 1.0, is 0.75"),
        ({"granularity": "layer"}, "granularity was 'row', is 'layer'"),
        ({"targets": "all-linear"}, "targets was 'mlp', is 'all-linear'"),
        ({"ignore": ("up",)}, r"ignore was [], is ['up']"),
        ({"output_format": "dense"}, "format was 'packed', is 'dense'"),
        ({"target_sparsity": 0.5}, "target sparsity was None, is 0.5"),
    ],
)
def test_other_options_are_refused_and_the_work_is_kept(
    three: Path, unfinished: Path, options: dict[str, object], difference: str
) -> None:
    message = refused(three, unfinished, **options)
    assert message == (
        f"{unfinished}: holds an unfinished run that differs from this one ({difference}): repeat "
        "the command that began it, or give --overwrite to discard it"
    )


def test_a_search_for_beta_on_other_data_is_another_run(three: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"

    def describe(content: str, seed: int = 0) -> dict:
        text.write_text(content)
        data = CalibrationOptions(text=str(text), seed=seed)
        options = PruneOptions(max_loss_increase=1.0, calibration=data)
        source = {"model": "three", "revision": None}
        return describe_run(open_checkpoint(three), pruning_options(options), source)

    run = describe("one")
    assert difference(describe("one"), run) is None
    for other in (describe("one", seed=1), describe("two")):
        assert str(difference(other, run)).startswith("search data was")


def test_a_later_release_refuses_the_work_of_an_earlier_one(
    three: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.output.run_description.__version__", "9.9")
    assert f"emp-llm was '{emp_llm.__version__}', is '9.9'" in refused(three, unfinished)


def test_work_in_a_staging_folder_of_another_layout_is_refused(
    three: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp_llm.output.run_description._STAGING_LAYOUT", 4)
    assert "staging layout was 3, is 4" in refused(three, unfinished)


def change_time(source: Path) -> str:
    """The shard that is still to be done is written anew."""
    os.utime(source / SHARDS[2], ns=(1, 1))
    return SHARDS[2]


def change_weights(source: Path) -> str:
    """A finished one is."""
    content = bytearray((source / SHARDS[0]).read_bytes())
    content[-1] ^= 1
    (source / SHARDS[0]).write_bytes(content)
    return SHARDS[0]


def change_tokenizer(source: Path) -> str:
    (source / "tokenizer.json").write_text("[]")
    return "tokenizer.json"


def change_config(source: Path) -> str:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"bos_token_id": 3}))
    return "config.json"


@pytest.mark.parametrize("change", [change_time, change_weights, change_tokenizer, change_config])
def test_a_source_that_changed_since_is_refused(three: Path, unfinished: Path, change) -> None:
    name = change(three)
    assert f"(the source's {name} has changed)" in refused(three, unfinished)


def test_a_file_that_the_source_has_gained_or_lost_is_refused(
    three: Path, unfinished: Path
) -> None:
    (three / "vocab.txt").write_text("new")
    assert "(the source's vocab.txt is new)" in refused(three, unfinished)
    (three / "vocab.txt").unlink()
    (three / "tokenizer.json").unlink()
    assert "(the source's tokenizer.json is gone)" in refused(three, unfinished)


def test_overwrite_discards_an_unfinished_run_that_differs(
    three: Path, unfinished: Path, tmp_path: Path
) -> None:
    prune(three, unfinished, PruneOptions(beta=0.5), overwrite=True)
    prune(three, tmp_path / "expected", PruneOptions(beta=0.5))
    assert files(unfinished) == files(tmp_path / "expected")


def test_overwrite_goes_on_with_the_same_run(three: Path, unfinished: Path) -> None:
    inode = (unfinished / STAGING_NAME / SHARDS[0]).stat().st_ino
    prune(three, unfinished, overwrite=True)
    assert (unfinished / SHARDS[0]).stat().st_ino == inode


def test_unpack_does_not_throw_away_what_prune_has_finished(
    three: Path, unfinished: Path, tmp_path: Path
) -> None:
    prune(three, tmp_path / "packed")
    before = files(unfinished)
    with pytest.raises(
        OutputError, match="holds an unfinished run of prune or shrink: repeat the command"
    ):
        unpack(tmp_path / "packed", unfinished)
    assert files(unfinished) == before
    unpack(tmp_path / "packed", unfinished, overwrite=True)
    assert "config.json" in files(unfinished)
    assert not (unfinished / STAGING_NAME).exists()


def test_bad_input_in_a_later_shard_leaves_nothing(tmp_path: Path) -> None:
    shards = [layer(number) for number in range(3)]
    shards[2]["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    source = write_checkpoint(tmp_path / "bad", llama_config(H, F, layers=3), *shards)
    assert "holds NaN or infinity" in refusal(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_one_file_starts_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "one", llama_config(H, F), mlp(H, F))
    prune(source, tmp_path / "expected")
    for step in range(20):
        run = start(prune_to, source, tmp_path / "out", PruneOptions(), False, killed_at=step)
        run.join()
        assert run.exitcode == -9
    prune(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "expected")
