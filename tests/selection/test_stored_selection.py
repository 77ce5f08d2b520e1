"""A checkpoint is pruned by masks and weights from the store, to the bit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import stored_masks
from support.arriving import layer
from support.checkpoints import (
    F,
    H,
    differing,
    files,
    llama_config,
    load,
    visible,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.processes import free_port, rank_environment, start
from support.stored_masks import CALIBRATION, expected_of, given, kept_of, prune_given, take_part
from transformers import AutoModelForCausalLM

from emp_llm import (
    CheckpointError,
    OptionError,
    OutputError,
    PruneOptions,
    inspect,
    prune,
    unpack,
    verify,
)
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.selection.mask_store import MaskStore

__all__ = ["given"]

TinyModel = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("given")


def options_of(**options: object) -> PruneOptions:
    return PruneOptions(**{"criterion": "wanda", "calibration": CALIBRATION, **options})


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"granularity": "layer", "beta": 0.6}),
        ("llama", {"count_by": "magnitude", "repair": "obs"}),
        ("gpt2", {"repair": "bias"}),
        ("gpt2", {"granularity": "layer", "count_by": "magnitude"}),
        ("gpt-oss", {"repair": "obs"}),
        ("mixtral", {"granularity": "layer"}),
    ],
)
def test_packed_and_dense_hold_the_stored_weights(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, options: dict[str, object]
) -> None:
    source, names = tiny_model(architecture), EXPECTED[architecture]
    asked = options_of(**options)
    expected = expected_of(load(source), names.mlp, asked, names.transposed)
    prune(source, tmp_path / "packed", asked)
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert differing(load(tmp_path / "unpacked"), expected) == []
    prune(source, tmp_path / "dense", options_of(**options, output_format="dense"))
    assert differing(load(tmp_path / "dense"), expected) == []
    for folder in ("packed", "unpacked", "dense"):
        verify(tmp_path / folder)


def test_transformers_loads_what_was_packed(tiny_model: TinyModel, tmp_path: Path) -> None:
    source, asked = tiny_model("llama"), options_of(repair="obs")
    prune(source, tmp_path / "packed", asked)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto")
    expected = expected_of(load(source), EXPECTED["llama"].mlp, asked)
    found = {name: tensor for name, tensor in model.state_dict().items() if name in expected}
    assert differing(found, {name: expected[name] for name in found}) == []
    assert set(EXPECTED["llama"].mlp) <= found.keys()


@pytest.mark.parametrize("granularity", ["row", "layer"])
@pytest.mark.parametrize("count_by", ["criterion", "magnitude"])
def test_the_report_has_the_statistics_of_the_scores(
    tiny_model: TinyModel, tmp_path: Path, granularity: str, count_by: str
) -> None:
    source = tiny_model("llama")
    asked = options_of(granularity=granularity, count_by=count_by)
    report = prune(source, tmp_path / "out", asked)
    tensors = load(source)
    for name in EXPECTED["llama"].mlp:
        s, keep = kept_of(name, tensors[name], asked)
        groups = s.reshape(-1, s.shape[-1]) if granularity == "row" else s.reshape(1, -1)
        n_eff = groups.sum(1) ** 2 / (groups**2).sum(1)
        reported = report["tensors"][name]
        assert reported["kept"] == keep.sum()
        assert reported["n_eff_min"] == pytest.approx(n_eff.min(), rel=1e-5)
        assert reported["n_eff_mean"] == pytest.approx(n_eff.mean(), rel=1e-5)
        assert reported["n_eff_fraction_max"] == pytest.approx(
            n_eff.max() / groups.shape[1], rel=1e-5
        )
        assert reported["mass"] == pytest.approx(s.sum(), rel=1e-5)
        assert reported["retained_mass"] == pytest.approx(s[keep].sum() / s.sum(), rel=1e-5)
        bound = reported["retained_mass_bound"]
        if count_by == "magnitude":  # it promises nothing for another count than N_eff's
            assert bound is None
        else:
            assert 0.3 < bound <= reported["retained_mass"]


def test_the_report_tells_what_was_asked_and_what_was_found(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    asked = options_of(repair="bias", count_by="magnitude")
    report = prune(tiny_model("gpt2"), tmp_path / "out", asked)
    rule = {
        "beta": 1.0,
        "granularity": "row",
        "criterion": "wanda",
        "targets": "mlp",
        "ignore": [],
        "count_by": "magnitude",
        "repair": "bias",
        "calibration": {
            "text": "some/text",
            "samples": 4,
            "length": 16,
            "seed": 3,
            "sequential": True,
            "hash": "xxh3-128:0",
        },
    }
    assert report["rule"] == rule
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "emp", "format_version": 2, **rule}
    blocks = [f"transformer.h.{number}.expert" for number in range(2)]
    assert report["calibration"] == {"without_tokens": blocks}
    repaired = [name for name, fields in report["tensors"].items() if fields.get("repaired")]
    assert repaired == [f"transformer.h.{number}.mlp.c_fc.bias" for number in range(2)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A checkpoint of three shards, each with one of three layers."""
    shards = [layer(number) for number in range(3)]
    return write_checkpoint(tmp_path / "three", llama_config(H, F, layers=3), *shards)


@pytest.mark.parametrize("threads", [1, 4])
def test_any_number_of_threads_writes_the_same_bytes(
    three: Path, tmp_path: Path, threads: int
) -> None:
    prune(three, tmp_path / "expected", options_of(repair="obs"))
    prune(three, tmp_path / "out", options_of(repair="obs"), threads=threads)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_any_number_of_ranks_writes_the_same_bytes(three: Path, tmp_path: Path) -> None:
    size = 3
    asked, port = options_of(granularity="layer", repair="obs"), free_port()
    prune(three, tmp_path / "alone", asked)
    ranks = [
        start(
            take_part,
            three,
            tmp_path / "out",
            asked,
            tmp_path / str(rank),
            str(tmp_path),
            environment=rank_environment(rank, size, port),
        )
        for rank in range(size)
    ]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * size
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_a_run_killed_at_any_step_looks_like_no_model_or_is_one_and_is_completed(
    three: Path, tmp_path: Path
) -> None:
    asked, out = options_of(repair="obs"), tmp_path / "out"
    prune(three, tmp_path / "expected", asked)
    expected, stored = files(tmp_path / "expected"), set()
    for step in range(3, 84, 10):
        run = start(prune_given, three, out, asked, killed_at=step)
        run.join()
        assert run.exitcode in (0, -9)
        if (out / "config.json").exists():
            verify(out)
            assert visible(out) == expected
        else:
            folder = out / STAGING_NAME / ".masks"
            stored.add(len(list(folder.glob("*.json"))))
            prune(three, out, asked)
            assert files(out) == expected
        shutil.rmtree(out)
    assert len(stored) > 2


def interrupted(three: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    """Prune with a calibration that fails at its third decoder block; returns the error's notes."""

    def fail(store: MaskStore, key: str) -> bool:
        if key == "model.layers.2":
            raise error
        return has(store, key)

    has = MaskStore.has
    with monkeypatch.context() as patch:
        patch.setattr(MaskStore, "has", fail)
        with pytest.raises(type(error)) as caught:
            prune(three, out, options_of())
    return " ".join(getattr(caught.value, "__notes__", ()))


def test_masks_of_an_interrupted_run_are_kept_and_not_made_again(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    notes = interrupted(three, out, monkeypatch, OutputError("the disk is full"))
    assert notes == (
        f"the masks of 2 parts of the model are kept in {out}: the same command goes on from there"
    )
    assert visible(out) == {}
    masked, mask_by_scores = [], stored_masks.mask_by_scores

    def counted(name: str, *arguments: object, **options: object) -> object:
        masked.append(name)
        return mask_by_scores(name, *arguments, **options)

    monkeypatch.setattr(stored_masks, "mask_by_scores", counted)
    with pytest.raises(OutputError, match="criterion was 'wanda', is 'magnitude'"):
        prune(three, out)
    other = options_of(calibration=replace(CALIBRATION, seed=4))
    with pytest.raises(OutputError, match=r"'seed': 3.*is .*'seed': 4"):
        prune(three, out, other)
    prune(three, out, options_of())
    assert {name.split(".")[2] for name in masked} == {"2"}
    prune(three, tmp_path / "expected", options_of())
    assert files(out) == files(tmp_path / "expected")


def test_a_source_at_fault_leaves_nothing_behind(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted(three, tmp_path / "out", monkeypatch, CheckpointError("no tokens")) == ""
    assert not (tmp_path / "out").exists()


def test_a_text_that_changed_meanwhile_is_refused(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    asked = options_of(calibration=replace(CALIBRATION, text=str(text)))
    with monkeypatch.context() as patch:
        patch.setattr(
            "emp_llm.entrypoints.prune.write_index", lambda *_: (_ for _ in ()).throw(OSError(5))
        )
        with pytest.raises(OutputError):
            prune(three, tmp_path / "out", asked)
    text.write_text("two")
    with pytest.raises(OutputError, match="calibration was"):
        prune(three, tmp_path / "out", asked)
    text.write_text("one")
    report = prune(three, tmp_path / "out", asked)
    assert report["rule"]["calibration"]["text"] == "text.txt"


def test_what_is_read_twice_cannot_be_discarded(three: Path, tmp_path: Path) -> None:
    for options in ({}, {"criterion": "magnitude", "repair": "obs"}):
        with pytest.raises(OptionError, match="discard_source: scores from data, repair"):
            prune(three, tmp_path / "out", options_of(**options), discard_source=True)
    assert not (tmp_path / "out").exists()


def test_inspect_refuses_what_only_pruning_can_tell(three: Path) -> None:
    with pytest.raises(OptionError, match="criterion 'wanda' with repair 'none'"):
        inspect(three, options_of())
