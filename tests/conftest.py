"""Checkpoints that many tests read."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # Triton reads it where it is imported, and transformers imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support.architectures import save_tiny_model
from support.arriving import layer
from support.checkpoints import DOWN, F, H, Tensors, files, llama_config, mlp, write_checkpoint
from support.hub_server import HubServer
from support.hub_uploads import UploadHub, User
from support.loading import load_model, logits, state
from support.wide_models import WideModel, save_wide_model

from emp_llm import PruneOptions, prune

TinyModel = Callable[..., Path]


def pytest_configure() -> None:
    """Tests send Ctrl-C, to this process and to others; shells have jobs behind ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Let go of what `_imported_is_no_garbage` has kept; Triton complains of what is left."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are quicker so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _imported_is_no_garbage() -> None:
    """What is there before a file's tests is kept: collecting garbage takes 0.02 s and not 0.35."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Folders of tiny models, each made once: (architecture, dtype, sharded) to its path."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def make(
        architecture: str, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = False
    ) -> Path:
        key = (architecture, dtype, sharded)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            size = 8 * 1024 if sharded else "5GB"
            made[key] = save_tiny_model(folder, architecture, dtype=dtype, max_shard_size=size)
        return made[key]

    return make


@pytest.fixture(scope="session")
def pruned_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> TinyModel:
    """Folders of tiny models as prune writes them with its own options, each made once.

    (architecture, dtype, sharded, output_format) to its path.
    """
    made: dict[tuple[str, torch.dtype, bool, str], Path] = {}

    def make(
        architecture: str,
        dtype: torch.dtype = torch.bfloat16,
        *,
        sharded: bool = False,
        output_format: str = "packed",
    ) -> Path:
        key = (architecture, dtype, sharded, output_format)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture) / output_format
            source = tiny_model(architecture, dtype, sharded=sharded)
            prune(source, folder, PruneOptions(output_format=output_format))
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def expected_model(pruned_model: TinyModel) -> Callable[..., tuple[Tensors, torch.Tensor]]:
    """The state and logits of the dense checkpoints that `pruned_model` makes, loaded plainly."""
    made: dict[tuple[str, torch.dtype, bool], tuple[Tensors, torch.Tensor]] = {}

    def make(
        architecture: str, dtype: torch.dtype = torch.bfloat16, *, sharded: bool = False
    ) -> tuple[Tensors, torch.Tensor]:
        key = (architecture, dtype, sharded)
        if key not in made:
            folder = pruned_model(architecture, dtype, sharded=sharded, output_format="dense")
            model = load_model(architecture, folder)
            made[key] = state(model), logits(model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> WideModel:
    """Folders of tiny models with large tensors, each made once: architecture to its path."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture) / "wide"
            made[architecture] = save_wide_model(folder, architecture)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def wide_packed(tmp_path_factory: pytest.TempPathFactory, wide_model: WideModel) -> WideModel:
    """Folders of these as prune writes them, each made once: architecture, options to its path."""
    made: dict[tuple[str, str], Path] = {}

    def make(architecture: str, **options: str) -> Path:
        key = (architecture, str(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture) / "packed"
            prune(wide_model(architecture), folder, PruneOptions(**options))
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkpoint of one file, of this test alone."""
    return write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in two shards."""
    tensors = mlp(H, F)
    shards = {DOWN: tensors.pop(DOWN)}, tensors
    return write_checkpoint(tmp_path / "sharded", llama_config(H, F), *shards)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process's client is connected to, with a cache of this test alone."""
    import huggingface_hub

    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def upload_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """A Hub that takes uploads of ``me``, who is logged in and writes for ``lab`` as well."""
    import huggingface_hub

    with UploadHub() as server:
        server.connect(monkeypatch, tmp_path / "home")
        server.users["hf_me"] = User("me", organizations=("lab",))
        server.readers.add("hf_me")
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def carded(source: Path) -> Path:
    """A source with a model card and small files."""
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("do what you like")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: no\n---\n# A model\n")
    return source


@pytest.fixture
def packed_folder(carded: Path, tmp_path: Path) -> Path:
    """The same, pruned and packed."""
    prune(carded, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def packed_shards(sharded: Path, tmp_path: Path) -> Path:
    """A packed folder of two files of weights."""
    prune(sharded, tmp_path / "packed shards")
    return tmp_path / "packed shards"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A checkpoint of four shards, one layer in each."""
    shards = [layer(number) for number in range(4)]
    return write_checkpoint(tmp_path / "local", llama_config(H, F, layers=4), *shards)


@pytest.fixture
def model(hub: HubServer, local: Path) -> str:
    """The name of the same on the Hub."""
    hub.commit("me/model", files(local))
    return "me/model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where the Hub's cache keeps that model."""
    return tmp_path / "home" / "hub" / "models--me--model"
