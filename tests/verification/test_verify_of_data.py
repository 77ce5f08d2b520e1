"""verify --against tells all that a source can tell of masks and weights that came from data."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emp_cli.app import app
from emp_kernels.rows import Workspace
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    few_values,
    gaussian,
    llama_config,
    load,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.stored_masks import CALIBRATING, CALIBRATION, given
from support.tampering import agree, edit_json, replace_weights
from typer.testing import CliRunner

from emp_llm import CheckpointError, FormatError, PruneOptions, diff, prune, unpack, verify
from emp_llm.calibration.masks import mask_by_scores
from emp_llm.pruning.plan import PruningPlan
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.tensors.geometry import RowBlock

__all__ = ["given"]

TinyModel = Callable[..., Path]
NORM = "model.norm.weight"
FORMATS = ("packed", "dense")


def options_of(**options: object) -> PruneOptions:
    return PruneOptions(**{"criterion": "wanda", "calibration": CALIBRATION, **options})


def refusal(folder: Path, source: Path) -> str:
    with pytest.raises(FormatError) as caught:
        verify(folder, against=source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_weights(folder: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor of a folder so that nothing in it contradicts itself."""
    dense = folder
    if (UP + ".emp_meta") in load(folder):
        dense = folder.with_name("unpacked")
        unpack(folder, dense)
    weights = load(dense)[name]
    change(weights)
    replace_weights(folder, name, weights)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {
        DOWN: few_values(H, F, seed=1),
        GATE: few_values(F, H, seed=2),
        UP: gaussian(F, H, seed=3),
        NORM: gaussian(H),
    }
    return write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)


@pytest.mark.usefixtures("given")
class TestMasksFromData:
    """Masks by scores that the source does not tell."""

    @pytest.mark.parametrize("output_format", FORMATS)
    @pytest.mark.parametrize(
        ("architecture", "count_by", "repair"),
        [
            ("gpt2", "magnitude", "bias"),
            ("gpt2", "criterion", "obs"),
            ("gpt-oss", "magnitude", "none"),
            ("gpt-oss", "magnitude", "obs"),
            ("gpt-oss", "magnitude", "swaps"),
        ],
    )
    def test_what_prune_writes_is_accepted(
        self, tiny_model, tmp_path, architecture, output_format, count_by, repair
    ) -> None:
        asked = options_of(count_by=count_by, repair=repair, output_format=output_format)
        prune(tiny_model(architecture), tmp_path / "out", asked)
        found = verify(tmp_path / "out", against=tiny_model(architecture))
        assert found["masks_derived"] is False
        assert found["pruned_tensors"] == len(EXPECTED[architecture].mlp)

    @pytest.mark.parametrize("output_format", FORMATS)
    def test_a_kept_weight_that_is_not_the_sources_is_found(
        self, source, tmp_path, output_format
    ) -> None:
        out = tmp_path / "out"
        prune(source, out, options_of(output_format=output_format))

        def change(weights: torch.Tensor) -> None:
            weights[3, 5] = 7.0

        change_weights(out, UP, change)
        assert verify(out)["hashes"]
        assert f"{UP!r} row 3 column 5 is 7" in refusal(out, source)

    @pytest.mark.parametrize("output_format", FORMATS)
    def test_a_row_that_keeps_another_number_than_its_magnitudes_say_is_found(
        self, source, tmp_path, output_format
    ) -> None:
        out = tmp_path / "out"
        prune(source, out, options_of(output_format=output_format))
        change_rule(out, count_by="magnitude")
        assert "weights, which is not what the rule gives it in" in refusal(out, source)

    def test_a_tensor_that_was_not_pruned_is_compared(self, source, tmp_path) -> None:
        out = tmp_path / "out"
        prune(source, out, options_of(output_format="dense"))

        def change(weights: torch.Tensor) -> None:
            weights[5] = 7.0

        change_weights(out, NORM, change)
        assert f"{NORM!r} item [5] is 7" in refusal(out, source)

    def test_a_repair_that_the_rule_does_not_tell_of_is_found(self, source, tmp_path) -> None:
        out = tmp_path / "out"
        prune(source, out, options_of(output_format="dense"))
        edit_json(
            out / "emp_report.json", lambda report: report["tensors"][UP].update(repaired=True)
        )
        agree(out)
        assert "is repaired by the report, and not by the rule" in refusal(out, source)

    def test_a_source_that_cannot_be_counted_is_told(self, source, tmp_path) -> None:
        out = tmp_path / "out"
        prune(source, out, options_of(count_by="magnitude", repair="obs"))
        tensors = load(source)
        tensors[UP][4, 2] = torch.inf
        bad = write_checkpoint(tmp_path / "bad", llama_config(H, F), tensors)
        with pytest.raises(CheckpointError, match=r"up_proj.weight' row 4 holds NaN"):
            verify(out, against=bad)

    def test_the_printed_line_says_that_masks_were_not_decided_again(
        self, source, tmp_path
    ) -> None:
        prune(source, tmp_path / "out", options_of())
        result = CliRunner().invoke(
            app, ["verify", str(tmp_path / "out"), "--against", str(source)]
        )
        assert result.exit_code == 0
        told = " ".join(result.stdout.split())
        assert f"whole, and consistent with what pruning {source} gives. 4 tensors (" in told
        assert "their masks came from data or an allocation, and were not computed again" in told
        assert "repaired" not in told

    def test_diff_and_unpack_take_it_as_any_other(self, source, tmp_path) -> None:
        prune(source, tmp_path / "out", options_of(count_by="magnitude"))
        unpack(tmp_path / "out", tmp_path / "dense")
        found = diff(tmp_path / "out", tmp_path / "dense")
        assert found["same_weights"]
        assert found["rule"] == {}
        assert found["a"]["rule"]["calibration"]["hash"] == "xxh3-128:0"
        assert verify(tmp_path / "dense", against=source)["masks_derived"] is False
        prune(source, tmp_path / "magnitude")
        rule = diff(tmp_path / "out", tmp_path / "magnitude")["rule"]
        assert rule["criterion"] == {"a": "wanda", "b": "magnitude"}
        assert rule["count_by"] == {"a": "magnitude", "b": "criterion"}


def change_rule(folder: Path, **fields: object) -> None:
    edit_json(folder / "emp_report.json", lambda report: report["rule"].update(fields))
    if (folder / "config.json").read_text().find("quantization_config") >= 0:
        edit_json(
            folder / "config.json", lambda config: config["quantization_config"].update(fields)
        )
    agree(folder)


def repair_magnitudes(plan: PruningPlan, _workers: Workers, store: MaskStore) -> float:
    """Masks by magnitude, and every kept weight negated."""
    targets = plan.all_targets
    with plan.source.files(plan.checkpoint.shards) as files, store.writer("all") as block:
        for target in targets:
            geometry = target.geometry
            whole = RowBlock(0, 0, geometry.rows)
            bits = target.read(files.file(target.shard), whole, Workspace())
            scores = geometry.number_format.magnitudes(bits).astype(np.float32)
            decided = mask_by_scores(
                target.name, scores, bits, geometry.number_format, plan.options
            )
            groups = [decided.group] if decided.group else []
            sign = geometry.number_format.storage.type(1 << (geometry.number_format.bits - 1))
            block.add(target.name, decided.mask, decided.stats, groups, bits ^ sign)
    return plan.options.beta


@pytest.fixture
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(calibrate=repair_magnitudes)
    monkeypatch.setitem(sys.modules, CALIBRATING, module)


@pytest.mark.usefixtures("repaired")
class TestRepairedMagnitudes:
    """Masks by magnitude can be decided again though the kept weights have changed."""

    @pytest.mark.parametrize(
        ("granularity", "dtype", "output_format"),
        [
            ("row", torch.bfloat16, "packed"),
            ("row", torch.float16, "dense"),
            ("layer", torch.float16, "packed"),
            ("layer", torch.float32, "dense"),
        ],
        ids=str,
    )
    def test_what_prune_writes_is_accepted(
        self, tmp_path, granularity, dtype, output_format
    ) -> None:
        tensors = {
            DOWN: few_values(H, F, seed=1, dtype=dtype),
            GATE: few_values(F, H, seed=2, dtype=dtype),
            UP: gaussian(F, H, seed=3, dtype=dtype),
        }
        source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
        asked = options_of(
            criterion="magnitude",
            repair="obs",
            granularity=granularity,
            output_format=output_format,
        )
        report = prune(source, tmp_path / "out", asked)
        found = verify(tmp_path / "out", against=source)
        assert found["masks_derived"] is True
        assert found["repaired_tensors"] == 3
        plain = prune(source, tmp_path / "plain", PruneOptions(granularity=granularity))
        for name in tensors:
            told, usual = report["tensors"][name], plain["tensors"][name]
            for figure in ("kept", "n_eff_mean", "mass", "retained_mass", "retained_mass_bound"):
                assert told[figure] == usual[figure]

    @pytest.mark.parametrize("output_format", FORMATS)
    def test_a_weight_where_the_rule_prunes_is_found(self, source, tmp_path, output_format) -> None:
        out, places = tmp_path / "out", []
        prune(
            source,
            out,
            options_of(criterion="magnitude", repair="obs", output_format=output_format),
        )

        def move(weights: torch.Tensor) -> None:
            row = weights[3]
            here, there = int(row.nonzero()[0]), int((row == 0).nonzero()[0])
            row[there], row[here] = row[here].clone(), 0.0
            places.append(there)

        change_weights(out, UP, move)
        told = refusal(out, source)
        assert f"{UP!r} row 3 column {places[0]} is" in told
        assert "for the rule prunes it" in told

    def test_swaps_are_masks_from_data_that_keep_as_many_as_the_rule(
        self, source, tmp_path
    ) -> None:
        out, asked = tmp_path / "out", options_of(criterion="magnitude", repair="swaps")
        report = prune(source, out, asked)
        found = verify(out, against=source)
        assert (found["masks_derived"], found["repaired_tensors"]) == (False, 3)
        plain = prune(source, tmp_path / "plain", PruneOptions())
        for name in (DOWN, GATE, UP):
            told, usual = report["tensors"][name], plain["tensors"][name]
            assert (told["kept"], told["n_eff_mean"]) == (usual["kept"], usual["n_eff_mean"])
            assert told["retained_mass_bound"] is None

    def test_the_printed_line_says_how_many_tensors_are_repaired(self, source, tmp_path) -> None:
        prune(source, tmp_path / "out", options_of(criterion="magnitude", repair="obs"))
        result = CliRunner().invoke(
            app, ["verify", str(tmp_path / "out"), "--against", str(source)]
        )
        told = " ".join(result.stdout.split())
        assert "3 of them repaired: the others are the same bit for bit" in told
        assert told.endswith("their masks are those of the rule")

    def test_of_a_folder_without_a_report_all_targets_may_be_repaired(
        self, source, tmp_path
    ) -> None:
        prune(source, tmp_path / "out", options_of(criterion="magnitude", repair="obs"))
        (tmp_path / "out" / "emp_report.json").unlink()
        found = verify(tmp_path / "out", against=source)
        assert (found["masks_derived"], found["repaired_tensors"]) == (True, 3)
