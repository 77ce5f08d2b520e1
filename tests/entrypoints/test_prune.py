"""The folder that prune writes: whole, self-describing, the same on any number of threads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    bits,
    differing,
    few_values,
    files,
    gaussian,
    llama_config,
    load,
    mlp,
    pruned_by_rule,
    write_checkpoint,
)
from support.expected_targets import EXPECTED

from emp_llm import PruneOptions, inspect, prune, unpack

TinyModel = Callable[..., Path]

PLANES = ("", ".emp_rows", ".emp_meta")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def small_source(folder: Path, **extra: torch.Tensor) -> Path:
    return write_checkpoint(folder, llama_config(H, F), mlp(H, F) | extra)


# Weights


def test_every_output_file_opens_with_the_safetensors_library(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", sharded=True)
    prune(source, tmp_path / "out")
    names = {path.name for path in source.glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == names
    for name in names:
        with safe_open(tmp_path / "out" / name, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            for key in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                shard.get_tensor(key)


def test_a_packed_tensor_is_three_planes_and_its_own_name_is_one_of_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    prune(source, tmp_path / "out")
    targets = set(EXPECTED["llama"].mlp)
    planes = {name + suffix for name in targets for suffix in PLANES}
    assert load(tmp_path / "out").keys() == (load(source).keys() - targets) | planes


def test_the_index_lists_exactly_the_planes_and_their_size(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    prune(tiny_model("llama", sharded=True), tmp_path / "out")
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    written, nbytes = {}, 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                written[name] = path.name
                nbytes += shard.get_tensor(name).nbytes
    assert index["weight_map"] == written
    assert index["metadata"]["total_size"] == nbytes


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_untouched_tensors_are_the_same_to_the_byte(
    tiny_model: TinyModel, tmp_path: Path, output_format: str
) -> None:
    source = tiny_model("mixtral", sharded=True)
    prune(source, tmp_path / "out", PruneOptions(output_format=output_format))
    before, after = load(source), load(tmp_path / "out")
    untouched = before.keys() - set(EXPECTED["mixtral"].mlp)
    assert [name for name in untouched if bits(before[name]) != bits(after[name])] == []


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_empty_tensors_scalars_and_tensors_of_other_dtypes_are_copied(
    tmp_path: Path, output_format: str
) -> None:
    extra = {
        "empty": torch.zeros(0, 4),
        "empty.too": torch.zeros(3, 0, dtype=torch.uint8),
        "scalar": torch.tensor(7),
        "numbers": torch.arange(5, dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.tensor([1.5, -0.0], dtype=torch.float64),
        "narrow": gaussian(3, 3).to(torch.float8_e4m3fn),
    }
    source = small_source(tmp_path / "source", **extra)
    prune(source, tmp_path / "out", PruneOptions(output_format=output_format))
    written = load(tmp_path / "out")
    assert differing({name: written[name] for name in extra}, extra) == []


@pytest.mark.parametrize("output_format", ["packed", "dense"])
@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
def test_targets_without_any_weight_are_copied(
    tmp_path: Path, granularity: str, output_format: str
) -> None:
    tensors = {DOWN: torch.zeros(H, 0), GATE: torch.zeros(0, H), UP: torch.zeros(0, H)}
    query = {"model.layers.0.self_attn.q_proj.weight": gaussian(8, H)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, 0), tensors | query)
    options = PruneOptions(
        targets="all-linear", granularity=granularity, output_format=output_format
    )
    prune(source, tmp_path / "out", options)
    written = load(tmp_path / "out")
    assert differing({name: written[name] for name in tensors}, tensors) == []


def test_a_lone_file_of_another_name_becomes_the_one_that_transformers_looks_for(
    tmp_path: Path,
) -> None:
    source = small_source(tmp_path / "source")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    prune(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_fp16_weights_that_were_bf16_are_packed_without_their_three_zero_bits(
    tmp_path: Path,
) -> None:
    # 2048 weights keep about 1300, and each is 3 bits shorter
    as_bf16 = gaussian(32, 64, dtype=torch.bfloat16)
    as_fp16 = gaussian(32, 64, dtype=torch.float16)
    sizes = {}
    for name, weights in (("bf16", as_bf16.half()), ("fp16", as_fp16)):
        source = write_checkpoint(tmp_path / name, llama_config(64, 32), {UP: weights})
        report = prune(source, tmp_path / f"{name}-out")
        sizes[name] = report["tensors"][UP]["bytes_after"]
        unpack(tmp_path / f"{name}-out", tmp_path / f"{name}-dense")
        expected = pruned_by_rule({UP: weights}, [UP], beta=1.0, granularity="row")
        assert differing(load(tmp_path / f"{name}-dense"), expected) == []
    assert sizes["fp16"] - sizes["bf16"] == pytest.approx(1300 * 3 / 8, rel=0.1)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
def test_the_folder_does_not_depend_on_the_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str, output_format: str
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 50)
    monkeypatch.setattr("emp_llm.files.checksum.COPY_BYTES", 64)
    tensors = {DOWN: few_values(H, F), GATE: few_values(F, H, seed=1)}
    source = write_checkpoint(
        tmp_path / "source",
        llama_config(H, F),
        {**tensors, "other": gaussian(99)},
        {UP: mlp(H, F)[UP]},
    )
    options = PruneOptions(granularity=granularity, output_format=output_format)
    for threads in (1, 2, 5):
        prune(source, tmp_path / str(threads), options, threads=threads)
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert files(tmp_path / "5") == files(tmp_path / "1")


# Other files


def test_the_small_files_of_the_source_come_along(tmp_path: Path) -> None:
    source = small_source(tmp_path / "source")
    small = {
        "tokenizer.json": "{}",
        "generation_config.json": '{"do_sample": true}',
        "LICENSE": "yours",
        "chat_template.jinja": "{{ messages }}",
        "modeling_own.py": "pass",
        "extra/notes.txt": "in a folder",
        "empty.txt": "",
    }
    (source / "extra").mkdir()
    for name, text in small.items():
        (source / name).write_text(text)
    prune(source, tmp_path / "out")
    own = {"model.safetensors", "config.json", "README.md", "emp_report.json", "emp_report.svg"}
    written = files(tmp_path / "out")
    assert written.keys() == small.keys() | own
    assert {name: written[name].decode() for name in small} == small


def test_other_copies_of_the_weights_stay_behind(tmp_path: Path) -> None:
    source = small_source(tmp_path / "source")
    for name in ("pytorch_model.bin", "model.gguf", "tf_model.h5"):
        (source / name).write_bytes(b"weights")
    prune(source, tmp_path / "out")
    names = {"model.safetensors", "config.json", "README.md", "emp_report.json", "emp_report.svg"}
    assert files(tmp_path / "out").keys() == names


def test_the_config_says_how_the_model_was_pruned_and_is_the_same_otherwise(tmp_path: Path) -> None:
    source = small_source(tmp_path / "source")
    options = PruneOptions(beta=0.75, granularity="layer", targets="gate|up", ignore=("gate",))
    prune(source, tmp_path / "out", options)
    config = read_json(tmp_path / "out" / "config.json")
    assert config.pop("quantization_config") == {
        "quant_method": "emp",
        "format_version": 2,
        "beta": 0.75,
        "granularity": "layer",
        "criterion": "magnitude",
        "targets": "gate|up",
        "ignore": ["gate"],
    }
    assert config == llama_config(H, F)


def test_a_dense_folder_has_the_config_of_its_source(tmp_path: Path) -> None:
    source = small_source(tmp_path / "source")
    prune(source, tmp_path / "out", PruneOptions(output_format="dense"))
    assert read_json(tmp_path / "out" / "config.json") == llama_config(H, F)


def test_transformers_loads_a_dense_folder_with_the_pruned_weights(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model("llama", sharded=True)
    prune(source, tmp_path / "out", PruneOptions(output_format="dense"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = EXPECTED["llama"].mlp
    expected = pruned_by_rule(load(source), names, beta=1.0, granularity="row")
    assert differing(model.state_dict(), expected) == []


# Report and inspect


def test_sparsity_and_retained_mass_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    # Row 0: N_eff = 8² / 22 = 2.909…, two stay, 6 of 8. Row 1: N_eff = 4, all stay.
    # Bound of row 0 at β = 1 is the less of 0.708333 (j = 3) and 0.5 + 0.5·√0.125 (j = 4).
    weights = torch.tensor([[4.0, -2.0, 1.0, 1.0], [1.0, -1.0, 1.0, 1.0]])
    source = write_checkpoint(tmp_path / "source", llama_config(4, 2), {UP: weights})
    fields = prune(source, tmp_path / "out")["tensors"][UP]
    expected = {
        "pruned": True,
        "dtype": "F32",
        "shape": [2, 4],
        "rows": 2,
        "weights": 8,
        "kept": 6,
        "sparsity": 0.25,
        "n_eff_min": 2.90909,
        "n_eff_mean": 3.45455,
        "n_eff_max": 4.0,
        "n_eff_fraction_mean": 0.863636,
        "retained_mass": 0.833333,
        "retained_mass_bound": 0.784518,
        "bytes_before": 32,
    }
    assert {name: fields[name] for name in expected} == expected


def test_the_totals_of_a_report_add_up(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("qwen2-moe", sharded=True)
    report = prune(source, tmp_path / "out")
    tensors = report["tensors"].values()
    pruned = [fields for fields in tensors if fields["pruned"]]
    targets, model = report["totals"]["targets"], report["totals"]["model"]
    for name in ("weights", "kept", "bytes_before", "bytes_after"):
        assert targets[name] == sum(fields[name] for fields in pruned)
    for name in ("bytes_before", "bytes_after"):
        assert model[name] == sum(fields[name] for fields in tensors)
    removed = targets["weights"] - targets["kept"]
    assert model["weights"] == sum(tensor.numel() for tensor in load(source).values())
    assert model["kept"] == model["weights"] - removed
    assert model["sparsity"] == pytest.approx(removed / model["weights"], rel=1e-5)
    assert (targets["tensors"], model["tensors"]) == (len(pruned), len(tensors))


def test_a_report_counts_kept_weights_and_bytes_as_they_are_in_the_files(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("gpt-oss")
    report = prune(source, tmp_path / "out")
    names = EXPECTED["gpt-oss"].mlp
    left = pruned_by_rule(load(source), names, beta=1.0, granularity="row", transposed=names)
    written = load(tmp_path / "out")
    for name in names:
        fields = report["tensors"][name]
        assert fields["kept"] == left[name].count_nonzero()
        assert fields["bytes_after"] == sum(written[name + plane].nbytes for plane in PLANES)


def test_the_report_is_what_prune_returns_and_tells_no_absolute_path(tmp_path: Path) -> None:
    report = prune(small_source(tmp_path / "source"), tmp_path / "out")
    assert read_json(tmp_path / "out" / "emp_report.json") == report
    assert report["source"] == {"model": "source", "revision": None}
    assert all(str(tmp_path).encode() not in data for data in files(tmp_path / "out").values())


def test_the_report_holds_a_checksum_of_every_other_file_and_of_headers(tmp_path: Path) -> None:
    source = small_source(tmp_path / "source")
    (source / "extra").mkdir()
    small = {"tokenizer.json": b"{}", "extra/notes.txt": b"in a folder", "empty.txt": b""}
    for name, data in small.items():
        (source / name).write_bytes(data)
    (source / "README.md").write_text("# A card, which pushing writes again")
    report = prune(source, tmp_path / "out")
    written = files(tmp_path / "out")
    shard = written["model.safetensors"]
    header = shard[: 8 + int.from_bytes(shard[:8], "little")]
    hashed = {name: {"bytes": len(data), "hash": xxh3(data)} for name, data in small.items()}
    hashed["config.json"] = {
        "bytes": len(written["config.json"]),
        "hash": xxh3(written["config.json"]),
    }
    hashed["model.safetensors"] = {"bytes": len(shard), "header_hash": xxh3(header)}
    assert report["files"] == hashed


def xxh3(data: bytes) -> str:
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"


@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-oss"])
def test_inspect_tells_all_that_prune_reports_but_checksums(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: str
) -> None:
    options = PruneOptions(granularity=granularity)
    report = prune(tiny_model(architecture), tmp_path / "out", options)
    for fields in report["tensors"].values():
        del fields["hash"]
    del report["files"]
    found = inspect(tiny_model(architecture), options)
    del found["totals"]["files"]  # what inspect alone tells is for test_inspecting
    for part in ("files", "standing_out", "standing_out_counts", "curve"):
        del found[part]
    assert found == report


def test_inspect_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_source(tmp_path / "source")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    inspect(source)
    assert files(tmp_path) == before


def test_inspect_gives_the_reason_for_every_tensor_that_is_left(tiny_model: TinyModel) -> None:
    report = inspect(tiny_model("llama"), PruneOptions(ignore=("layers.1.*up",)))
    reasons = {name: fields["reason"] for name, fields in report["tensors"].items()}
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert reasons["lm_head.weight"] == "lm_head"
    assert reasons["model.norm.weight"] == "norm"
    assert "attention" in reasons["model.layers.0.self_attn.q_proj.weight"]
    assert "--ignore 'layers.1.*up'" in reasons["model.layers.1.mlp.up_proj.weight"]
