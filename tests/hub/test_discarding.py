"""Shards that were downloaded are deleted once they are pruned, if that is asked for."""

import shutil
import threading
from pathlib import Path

import pytest
from support.arriving import SHARDS, arrived, before_first_read, in_cache, wait_for, weights
from support.checkpoints import files
from support.hub_server import HubServer

from emp_llm import HubError, OptionError, PruneOptions, prune
from emp_llm.hub.cached_files import discard_file


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_discarded_shards_are_never_more_than_two_and_none_in_the_end(
    hub: HubServer,
    model: str,
    local: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    granularity: str,
) -> None:
    there: dict[str, list[str]] = {}
    hub.on_download = lambda name: there.setdefault(name, arrived(cache)) and None

    def dawdle() -> None:  # so that more than one shard ahead would come
        assert wait_for(lambda: len(arrived(cache)) == 2)
        threading.Event().wait(0.5)
        assert len(arrived(cache)) == 2

    before_first_read(monkeypatch, dawdle)
    options = PruneOptions(granularity=granularity)
    prune(model, tmp_path / "out", options, discard_source=True)
    assert [there[name] for name in SHARDS[:2]] == [[], SHARDS[:1]]
    assert max(len(there[name]) for name in SHARDS) == 1  # and the one that begins
    assert in_cache(cache) == []
    assert [path.name for path in cache.glob("snapshots/*/config.json")] == ["config.json"]
    prune(local, tmp_path / "expected", options)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_without_discarding_all_shards_stay(model: str, tmp_path: Path, cache: Path) -> None:
    prune(model, tmp_path / "out")
    assert in_cache(cache) == SHARDS


def test_a_shard_that_was_in_the_cache_is_not_discarded(
    hub: HubServer, model: str, tmp_path: Path, cache: Path
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(model, SHARDS[1])
    hub.requests.clear()
    prune(model, tmp_path / "out", discard_source=True)
    assert in_cache(cache) == [SHARDS[1]]
    assert [name for name in hub.downloads() if name in SHARDS] == [SHARDS[0], *SHARDS[2:]]


def test_a_shard_of_another_revision_in_the_cache_is_not_discarded(
    hub: HubServer, local: Path, tmp_path: Path, cache: Path
) -> None:
    from huggingface_hub import hf_hub_download

    hub.commit("me/model", {"config.json": b"{}", SHARDS[1]: files(local)[SHARDS[1]]}, branch="v1")
    older = Path(hf_hub_download("me/model", SHARDS[1], revision="v1"))
    hub.commit("me/model", files(local))
    prune("me/model", tmp_path / "out", discard_source=True)
    assert older.read_bytes() == (local / SHARDS[1]).read_bytes()
    assert len([blob for blob in cache.glob("blobs/*") if blob.stat().st_size > 300_000]) == 1


def test_a_shard_in_the_store_that_repositories_share_is_discarded(model: str, cache: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

    link = Path(hf_hub_download(model, SHARDS[0]))
    blob = link.parent / link.readlink()
    home, key = cache.parent, "ab" * 32
    size = link.stat().st_size
    assert publish_blob_to_shared_store(
        blob_path=str(blob.parent.resolve() / blob.name),
        xet_hash=key,
        cache_dir=home,
        expected_size=size,
    )
    assert (home / "blobs" / "ab" / key).stat().st_size == size
    discard_file(link)
    assert not link.is_symlink()
    assert in_cache(cache) == []
    assert not (home / "blobs" / "ab" / key).exists()


def test_discarding_is_refused_where_all_shards_are_needed_at_once(
    hub: HubServer, model: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="granularity 'model' ranks all weights together"):
        prune(model, tmp_path / "out", PruneOptions(granularity="model"), discard_source=True)
    assert hub.requests == []


def test_a_local_folder_is_never_discarded(local: Path, tmp_path: Path) -> None:
    before = files(local)
    with pytest.raises(OptionError, match="local folder, which is never deleted"):
        prune(local, tmp_path / "out", discard_source=True)
    assert files(local) == before


def test_with_discarding_the_disk_needs_room_for_two_shards(
    hub: HubServer, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = files(local) | {"tokenizer.json": b"tokens"}
    hub.commit("me/model", content)
    two = sum(sorted(len(content[name]) for name in SHARDS)[-2:]) + len(b"tokens")
    real = shutil.disk_usage("/")
    free = two
    monkeypatch.setattr("shutil.disk_usage", lambda _: type(real)(10**9, 10**9 - free, free))
    with pytest.raises(HubError, match="are needed"):
        prune("me/model", tmp_path / "out")
    free = two - 1
    with pytest.raises(HubError, match=f"{two - 1:,} bytes free, {two:,} are needed"):
        prune("me/model", tmp_path / "out", discard_source=True)
    free = two
    prune("me/model", tmp_path / "out", discard_source=True)
