"""Models that are loaded to a GPU: its kernels make their weights, the same as the CPU does.

Triton's interpreter stands in for the GPU, but in the last tests: it works on tensors of the CPU,
and loading is told that this is the device on which kernels run.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_kernels.errors import NoDeviceError
from safetensors.torch import save_file
from support.architectures import save_tiny_model
from support.checkpoints import differing, load
from support.loading import DTYPES, Traces, load_model, state

from emp_llm import EmpConfig, prune
from emp_llm.loading.tensor_readers import DenseWeights
from emp_llm.runtime import device_trial
from emp_llm.runtime.device_trial import device_of_kernels
from emp_llm.runtime.devices import Devices
from emp_llm.tensors.geometry import Geometry

interpreter = pytest.mark.interpreter
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

_SMALL = {"num_hidden_layers": 1, "hidden_size": 4, "head_dim": 4, "intermediate_size": 3}
_EXPERTS = {**_SMALL, "num_local_experts": 2}
SMALL: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "gpt2": {"n_layer": 1, "n_embd": 4, "n_inner": 3},
    "mixtral": _EXPERTS,
    "gpt-oss": _EXPERTS,
}
"""Models of few rows, for the interpreter takes its time for each."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of such models: (architecture, dtype) to its path."""

    @cache
    def make(architecture: str, dtype: str = "bf16") -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        return save_tiny_model(folder, architecture, dtype=DTYPES[dtype], **SMALL[architecture])

    return make


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread, no open file and no changed setting is left, whatever failed."""
    traces = Traces()
    yield
    assert traces.left() == set()


@pytest.fixture(autouse=True)
def few_rows_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of four bfloat16 weights, so that tensors are filled in parts."""
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 16)
    monkeypatch.setattr("emp_llm.tensors.geometry.TRANSPOSED_ROW_BLOCK_BYTES", 16)


@contextmanager
def kernels_make_weights() -> Iterator[None]:
    """Loading has a device on which kernels run, and none of the weights are made on the CPU."""

    def refuse(_geometry: Geometry) -> DenseWeights:
        raise AssertionError("weights were made on the CPU")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseWeights, "empty", refuse)
        patch.setattr(
            "emp_llm.integration.weight_feed.device_of_kernels", lambda _device: torch.device("cpu")
        )
        yield


def assert_same_on_the_device(architecture: str, folder: Path, **options: Any) -> None:
    """A model is the same to the bit, whether the CPU or the device makes its weights."""
    expected = state(load_model(architecture, folder, **options))
    with kernels_make_weights():
        found = state(load_model(architecture, folder, **options))
    assert differing(found, expected) == []


@interpreter
@pytest.mark.parametrize(
    ("architecture", "dtype", "cast_to"),
    [
        ("llama", "fp32", torch.bfloat16),
        ("gpt2", "bf16", "auto"),
        ("mixtral", "bf16", "auto"),
        ("gpt-oss", "fp16", torch.float32),
    ],
)
def test_packed_weights_are_unpacked_and_cast_on_the_device(
    small: Callable[..., Path], tmp_path: Path, architecture: str, dtype: str, cast_to: Any
) -> None:
    prune(small(architecture, dtype), tmp_path / "packed")
    assert_same_on_the_device(architecture, tmp_path / "packed", dtype=cast_to)


@interpreter
@pytest.mark.parametrize(
    ("architecture", "granularity"),
    [("llama", "row"), ("gpt2", "layer"), ("mixtral", "layer"), ("gpt2", "row")],
)
def test_weights_are_pruned_on_the_device(
    small: Callable[..., Path], architecture: str, granularity: str
) -> None:
    rule = EmpConfig(granularity=granularity)
    assert_same_on_the_device(architecture, small(architecture), quantization_config=rule)


def refusals(folder: Path, **options: Any) -> list[str]:
    """What loading fails with, by the CPU and by the device."""
    messages = []
    for where in (pytest.MonkeyPatch.context(), kernels_make_weights()):
        with where, pytest.raises(Exception, match="row ") as caught:
            load_model("llama", folder, **options)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


@interpreter
def test_nan_is_refused_in_the_same_words(small: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small("llama"), tmp_path / "source"))
    tensors = load(folder)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    on_cpu, on_device = refusals(folder, quantization_config=EmpConfig())
    assert on_device == on_cpu
    assert on_cpu.startswith("CheckpointError: model.safetensors: ")
    assert "'model.layers.0.mlp.down_proj.weight' row 3 holds NaN" in on_cpu


@interpreter
def test_a_damaged_row_is_refused_in_the_same_words(
    small: Callable[..., Path], tmp_path: Path
) -> None:
    prune(small("llama"), tmp_path / "packed")
    tensors = load(tmp_path / "packed")
    tensors["model.layers.0.mlp.down_proj.weight"][0] ^= 1  # the first column of the first row
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    on_cpu, on_device = refusals(tmp_path / "packed")
    assert on_device == on_cpu
    assert "row 0: its mask names another number of weights than its table line" in on_cpu


# Which device it is


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Torch says that there are two GPUs, of which the second is the current one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("emp_kernels.gpu_devices.interpreted", lambda: False)
    monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", lambda name: [torch.device(name)])
    monkeypatch.setattr(device_trial, "tried", lambda gpus, _trial: gpus)
    device_trial._unpacks.cache_clear()
    yield monkeypatch
    device_trial._unpacks.cache_clear()


@without_gpu
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda", "cuda:0", torch.device("cpu")])
def test_without_a_gpu_the_cpu_makes_the_weights(device: Any) -> None:
    assert device_of_kernels(device) is None


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("device", "gpu"),
    [("cuda:0", 0), ("cuda", 1), (torch.device("cuda", 1), 1)],
    ids=str,
)
def test_weights_are_made_on_the_gpu_that_they_are_to_be_on(device: Any, gpu: int) -> None:
    assert device_of_kernels(device) == torch.device("cuda", gpu)
    assert device_of_kernels("cpu") is None


def test_the_cpu_makes_weights_for_a_gpu_that_kernels_do_not_run_on(
    two_gpus: pytest.MonkeyPatch,
) -> None:
    def fail(_gpus: Devices, _trial: object) -> None:
        raise NoDeviceError("the kernels do not run")

    two_gpus.setattr(device_trial, "tried", fail)
    assert device_of_kernels("cuda:0") is None


def test_the_cpu_makes_weights_where_triton_is_missing(two_gpus: pytest.MonkeyPatch) -> None:
    def missing() -> bool:
        raise NoDeviceError("the kernels for GPUs need Triton, which is not installed")

    two_gpus.setattr("emp_kernels.gpu_devices.interpreted", missing)
    assert device_of_kernels("cuda:0") is None


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_on_a_real_device_is_the_one_on_the_cpu(
    small: Callable[..., Path], tmp_path: Path, architecture: str, dtype: str
) -> None:
    source = small(architecture, dtype)
    prune(source, tmp_path / "packed", device="cpu")
    assert device_of_kernels("cuda") is not None
    expected = state(load_model(architecture, tmp_path / "packed"))
    for folder, options in (
        (tmp_path / "packed", {}),
        (source, {"quantization_config": EmpConfig()}),
    ):
        found = load_model(architecture, folder, device_map="cuda", **options)
        assert {parameter.device.type for parameter in found.parameters()} == {"cuda"}
        on_cpu = {name: tensor.cpu() for name, tensor in state(found).items()}
        assert differing(on_cpu, expected) == []
