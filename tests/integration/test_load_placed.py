"""Models spread by a device map, the disk included: pruned or unpacked, loaded and saved again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import differing, load
from support.loading import Traces, load_model, logits, state

from emp_llm import EmpConfig, unpack

TinyModel = Callable[..., Path]

# transformers says so of every model that a device map has spread
pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempting to save a model with offloaded modules:UserWarning"
)

PARTLY_ON_DISK: dict[str, dict[str, str]] = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "gpt2": {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.drop": "cpu",
        "transformer.h.0": "disk",
        "transformer.h.1": "cpu",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    },
    "t5": {
        "shared": "cpu",
        "encoder": "cpu",
        "decoder.embed_tokens": "cpu",
        "decoder.block": "disk",
        "decoder.final_layer_norm": "cpu",
        "decoder.dropout": "cpu",
        "lm_head": "cpu",
    },
}
for _name in ("llama-tied", "mixtral", "gpt-oss", "qwen3-moe", "gemma2", "llama4"):
    PARTLY_ON_DISK[_name] = PARTLY_ON_DISK["llama"]


@pytest.fixture(params=["pruned", "unpacked"])
def place(request: pytest.FixtureRequest, tiny_model: TinyModel, pruned_model: TinyModel) -> Any:
    """Loads a model pruned, in one way or the other."""

    def make(architecture: str, *, sharded: bool = True, **options: Any) -> Any:
        if request.param == "pruned":
            folder = tiny_model(architecture, sharded=sharded)
            options["quantization_config"] = EmpConfig()
        else:
            folder = pruned_model(architecture, sharded=sharded)
        return load_model(architecture, folder, **options)

    return make


@pytest.fixture
def whole(pruned_model: TinyModel) -> Any:
    """Loads what must come out, all of it in memory."""

    def make(architecture: str) -> Any:
        return load_model(
            architecture, pruned_model(architecture, sharded=True, output_format="dense")
        )

    return make


def assert_same(found: Any, expected: Any) -> None:
    assert differing(state(found), state(expected)) == []
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", "balanced", "sequential", {"": "cpu"}, torch.device("cpu")],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_a_device_map_of_the_processor_changes_nothing(
    place: Any, whole: Any, architecture: str, device_map: Any
) -> None:
    assert_same(place(architecture, device_map=device_map), whole(architecture))


def test_a_limit_of_memory_that_suffices_changes_nothing(place: Any, whole: Any) -> None:
    found = place("gpt-oss", device_map="auto", max_memory={"cpu": "1GiB"})
    assert_same(found, whole("gpt-oss"))


@pytest.mark.parametrize("architecture", PARTLY_ON_DISK)
def test_a_model_partly_on_the_disk_says_what_it_says_in_memory(
    place: Any, whole: Any, tmp_path: Path, architecture: str
) -> None:
    found = place(
        architecture, device_map=PARTLY_ON_DISK[architecture], offload_folder=tmp_path / "disk"
    )
    on_disk = [name for name, parameter in found.named_parameters() if parameter.is_meta]
    assert on_disk
    assert torch.equal(logits(found), logits(whole(architecture)))
    assert torch.equal(logits(found), logits(whole(architecture)))  # it was fetched and put back


@pytest.mark.parametrize("architecture", PARTLY_ON_DISK)
def test_a_model_partly_on_the_disk_is_saved_as_it_is_from_memory(
    place: Any, whole: Any, tmp_path: Path, architecture: str
) -> None:
    found = place(
        architecture, device_map=PARTLY_ON_DISK[architecture], offload_folder=tmp_path / "disk"
    )
    found.save_pretrained(tmp_path / "saved")
    place(architecture).save_pretrained(tmp_path / "from memory")
    assert differing(load(tmp_path / "saved"), load(tmp_path / "from memory")) == []
    assert_same(load_model(architecture, tmp_path / "saved"), whole(architecture))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_a_model_that_memory_is_too_small_for_is_put_on_the_disk(
    place: Any, whole: Any, tmp_path: Path, architecture: str
) -> None:
    found = place(
        architecture,
        device_map="auto",
        max_memory={"cpu": 9_000},
        offload_folder=tmp_path / "disk",
    )
    assert any(parameter.is_meta for parameter in found.parameters())
    assert torch.equal(logits(found), logits(whole(architecture)))
    found.save_pretrained(tmp_path / "saved")
    assert_same(load_model(architecture, tmp_path / "saved"), whole(architecture))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_packed_folder_saved_from_the_disk_unpacks_to_the_dense_checkpoint(
    place: Any, pruned_model: TinyModel, tmp_path: Path, sharded: bool
) -> None:
    found = place(
        "mixtral",
        sharded=sharded,
        device_map=PARTLY_ON_DISK["mixtral"],
        offload_folder=tmp_path / "disk",
    )
    found.save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    unpack(tmp_path / "saved", tmp_path / "dense")
    expected = load(pruned_model("mixtral", sharded=sharded, output_format="dense"))
    assert differing(load(tmp_path / "dense"), expected) == []


def test_another_dtype_reaches_the_disk(
    place: Any, pruned_model: TinyModel, tmp_path: Path
) -> None:
    options = {"device_map": PARTLY_ON_DISK["mixtral"], "dtype": torch.float32}
    dense = pruned_model("mixtral", sharded=True, output_format="dense")
    found = place("mixtral", offload_folder=tmp_path / "a", **options)
    expected = load_model("mixtral", dense, offload_folder=tmp_path / "b", **options)
    assert torch.equal(logits(found), logits(expected))


def test_offloading_leaves_no_open_file_and_no_thread(place: Any, tmp_path: Path) -> None:
    traces = Traces()
    found = place("llama", device_map=PARTLY_ON_DISK["llama"], offload_folder=tmp_path / "disk")
    assert traces.left() == set()
    assert logits(found).shape == (1, 8, 32)
