"""A model of the Hub is inspected by ranges of its files, of which nothing stays."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from support.arriving import SHARDS, arrived, wait_for
from support.checkpoints import UP, F, H, files, gaussian, llama_config, mlp, write_checkpoint
from support.hub_server import HubServer
from support.wide_models import EMBED, HEAD, REST_CONFIG, TARGETS, Q, with_rest

from emp_llm import CheckpointError, HubError, PruneOptions, inspect
from emp_llm.hub import ranges as read_ranges
from emp_llm.hub.remote_file import RemoteFile
from emp_llm.tensors import read_order


def ranges(hub: HubServer) -> list[tuple[str, int, int]]:
    """Ranges of shards that were asked for: file, first byte and the one behind the last."""
    found = (re.search(r"/([^/]+)\?bytes=(\d+)-(\d+)", path) for _, path in hub.requests)
    return [(match[1], int(match[2]), int(match[3]) + 1) for match in found if match]


def without_time(report: dict) -> dict:
    return {name: part for name, part in report.items() if name != "source"}


@pytest.mark.parametrize("options", [PruneOptions(), PruneOptions(targets=r"layers\.2\..*up_proj")])
def test_a_model_of_the_hub_is_inspected_as_a_folder_is_and_nothing_is_kept(
    hub: HubServer, model: str, local: Path, cache: Path, options: PruneOptions
) -> None:
    found = inspect(model, options)
    assert without_time(found) == without_time(inspect(local, options))
    assert arrived(cache) == []
    assert [blob.name for blob in cache.glob("blobs/*") if blob.stat().st_size > 10_000] == []
    assert not set(hub.downloads()) & set(SHARDS)


def test_only_the_targets_are_fetched(hub: HubServer, model: str) -> None:
    report = inspect(model, PruneOptions(targets=r"layers\.2\..*up_proj"))
    data = [(name, stop - start) for name, start, stop in ranges(hub) if start]
    (fields,) = [one for one in report["tensors"].values() if one["pruned"]]
    assert data == [(SHARDS[2], fields["bytes_before"])]


def test_large_tensors_are_fetched_block_by_block(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_order, "_SMALL_TENSOR", 1000)
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 2000)
    folder = write_checkpoint(tmp_path / "local", llama_config(50, 70), mlp(50, 70))
    hub.commit("me/model", files(folder))
    found = inspect("me/model")
    lengths = [stop - start for _, start, stop in ranges(hub) if start]
    # rows of 100 bytes in blocks of 20, rows of 140 in blocks of 14; 16 rows of each are sampled
    assert sorted(lengths) == sorted(
        2 * (3 * [2000] + [1000] + 16 * [100]) + 3 * [1960] + [1120] + 16 * [140]
    )
    assert without_time(found) == without_time(inspect(folder))


@pytest.mark.parametrize("block_bytes", [100, 200])
def test_rows_so_long_that_samples_are_blocks_and_fill_the_room_are_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(read_order, "_SMALL_TENSOR", 1000)
    monkeypatch.setattr(read_ranges, "_MEMORY_BYTES", 500)
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", block_bytes)
    folder = write_checkpoint(tmp_path / "local", llama_config(50, 70), mlp(50, 70))
    hub.commit("me/model", files(folder))
    found: list[dict] = []
    # in a thread of its own, which may wait forever
    worker = threading.Thread(target=lambda: found.append(inspect("me/model")), daemon=True)
    worker.start()
    worker.join(30)
    assert [without_time(report) for report in found] == [without_time(inspect(folder))]


def test_rows_across_a_matrix_are_fetched_with_it(
    hub: HubServer, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_order, "_SMALL_TENSOR", 100)
    monkeypatch.setattr("emp_llm.tensors.geometry.TRANSPOSED_ROW_BLOCK_BYTES", 500)
    for architecture in ("gpt2", "gpt-oss"):
        folder = tiny_model(architecture)
        hub.commit("me/model", files(folder))
        assert without_time(inspect("me/model")) == without_time(inspect(folder))


def test_a_shard_in_the_cache_is_read_from_there(
    hub: HubServer, model: str, local: Path, cache: Path
) -> None:
    inspect(model, PruneOptions(targets=r"layers\.1\."), download=True)
    assert arrived(cache) == SHARDS[1:2]
    hub.requests.clear()
    found = inspect(model)
    assert {name for name, *_ in ranges(hub)} == {SHARDS[0], *SHARDS[2:]}
    assert without_time(found) == without_time(inspect(local))
    assert arrived(cache) == SHARDS[1:2]


def test_several_requests_are_under_way_at_once(hub: HubServer, model: str, local: Path) -> None:
    together = threading.Barrier(4)
    headers, data = threading.Semaphore(len(SHARDS)), threading.Semaphore(4)

    def meet(_name: str) -> None:
        if not headers.acquire(blocking=False) and data.acquire(blocking=False):
            together.wait(timeout=60)

    hub.on_range = meet
    assert without_time(inspect(model)) == without_time(inspect(local))
    assert not together.broken


def test_no_more_is_fetched_ahead_than_there_is_room_for(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ranges, "_MEMORY_BYTES", 2000)
    held: list[int] = []
    claim = read_ranges.RangeFiles._claim

    def watched(self):
        span = claim(self)
        held.append(self._held)
        return span

    monkeypatch.setattr(read_ranges.RangeFiles, "_claim", watched)
    inspect(model, threads=1)
    assert max(held) == 1920  # a tensor is 480 bytes


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: HubServer, model: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = len((local / SHARDS[1]).read_bytes()) - 400_000 - 3 * 480
    headers = threading.Semaphore(len(SHARDS))

    def cut(name: str) -> None:
        if not headers.acquire(blocking=False) and name == SHARDS[1]:
            hub.cut.setdefault(name, header + 400_000 + 100)

    hub.on_range = cut
    monkeypatch.setattr(read_ranges, "_REQUESTS", 1)
    monkeypatch.setattr(
        "emp_llm.hub.remote_file.time.sleep", lambda _: hub.cut.update({SHARDS[1]: 10**9})
    )
    assert without_time(inspect(model)) == without_time(inspect(local))
    asked = [(start, stop) for name, start, stop in ranges(hub) if name == SHARDS[1]]
    assert any(start == header + 400_000 + 100 for start, _ in asked)


def test_a_connection_that_stays_broken_is_one_error(
    hub: HubServer, model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = threading.Semaphore(len(SHARDS))
    hub.on_range = lambda name: (
        None if headers.acquire(blocking=False) else hub.cut.update({name: 0})
    )
    monkeypatch.setattr("emp_llm.hub.remote_file.time.sleep", lambda _: None)
    with pytest.raises(HubError, match=r"the connection to .* failed") as caught:
        inspect(model)
    assert "\n" not in str(caught.value)
    assert arrived(cache) == []


def test_a_hub_that_sends_whole_files_only_is_one_error_that_names_the_way_out(
    hub: HubServer, model: str
) -> None:
    hub.knows_ranges = False
    with pytest.raises(HubError, match=r"whole files only.*--download"):
        inspect(model)
    inspect(model, download=True)


class _Answers(BaseHTTPRequestHandler):
    """Answers each range of 100 bytes as its class says: (status, Content-Range, body)."""

    answer: tuple[int, str | None, bytes]
    count = 0

    def do_GET(self) -> None:
        if "Range" not in self.headers or "/me/answered/" not in self.path:
            self.send_error(404)  # what an earlier test has left behind may ask, too
            return
        type(self).count += 1
        status, told, body = self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if told:
            self.send_header("Content-Range", told)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args) -> None:  # noqa: A002
        """Stay silent."""


@pytest.mark.parametrize(
    ("answer", "reason", "count"),
    [
        ((206, "bytes 20-49/100", b"x" * 30), "sends other bytes of a.bin", 1),
        ((206, "bytes 0-29/100", b"x" * 30), "sends other bytes of a.bin", 1),
        ((206, "bytes 10-39/101", b"x" * 30), "sends other bytes of a.bin", 1),
        ((206, None, b"x" * 30), "sends other bytes of a.bin", 1),
        ((200, None, b"please log in" * 3), "sends other bytes of a.bin", 1),
        ((206, "bytes 10-39/100", b""), "its answer ended early", 5),
    ],
)
def test_an_answer_that_is_not_the_bytes_asked_for_is_one_error(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    answer: tuple[int, str | None, bytes],
    reason: str,
    count: int,
) -> None:
    monkeypatch.setattr("emp_llm.hub.remote_file.time.sleep", lambda _: None)
    handler = type("Handler", (_Answers,), {"answer": answer})
    with HubServer() as hub, ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        hub.connect(monkeypatch, tmp_path)
        file = RemoteFile("me/answered", "0" * 40, False, "a.bin", 100)
        with pytest.raises(HubError, match=reason):
            file.read_into(10, memoryview(bytearray(30)), any_server=True)
        server.shutdown()
    assert handler.count == count


def test_a_row_that_is_not_finite_ends_the_run(hub: HubServer, tmp_path: Path) -> None:
    tensors = mlp(H, F)
    tensors[UP][7, 3] = torch.nan
    hub.commit("me/model", files(write_checkpoint(tmp_path / "local", llama_config(H, F), tensors)))
    with pytest.raises(CheckpointError, match=r"up_proj.weight' row 7 holds NaN"):
        inspect("me/model")

    def fetching() -> bool:
        return any(thread.name.startswith("emp-range") for thread in threading.enumerate())

    assert wait_for(lambda: not fetching())


def test_a_model_that_torch_saved_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    tensors = mlp(H, F)
    folder = write_checkpoint(tmp_path / "safe", llama_config(H, F), tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    saved = {"config.json": files(folder)["config.json"]}
    saved["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.commit("me/torch", saved)
    assert inspect("me/torch")["tensors"] == inspect(folder)["tensors"]
    assert "pytorch_model.bin" in hub.downloads()


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_what_is_read_more_than_once_is_downloaded(
    model: str, local: Path, cache: Path, granularity: str
) -> None:
    options = PruneOptions(granularity=granularity)
    assert without_time(inspect(model, options)) == without_time(inspect(local, options))
    assert arrived(cache) == SHARDS


def test_an_address_that_the_hub_sends_us_to_is_asked_from_then_on(
    hub: HubServer, model: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.redirects = True
    monkeypatch.setattr(read_order, "_SMALL_TENSOR", 100)
    assert without_time(inspect(model)) == without_time(inspect(local))
    asked = [path for _, path in hub.requests if "?bytes=" in path]
    of_the_hub = [path for path in asked if not path.startswith("/elsewhere/")]
    # of each file its header, and what is under way when the first answer comes
    assert len(of_the_hub) <= len(SHARDS) * (1 + read_ranges._REQUESTS)
    assert len(asked) > 3 * len(of_the_hub)


def test_gaussian_ranges_of_a_private_model_need_the_token(hub: HubServer, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "local", llama_config(H, F), {UP: gaussian(F, H)})
    hub.commit("me/private", files(folder), private=True)
    hub.readers.add("hf_reader")
    report = inspect("me/private", token="hf_reader")
    assert without_time(report) == without_time(inspect(folder))


@pytest.mark.parametrize(
    ("targets", "rest"), [("mlp", "packed"), ("mlp", "plain"), ("none", "packed")]
)
def test_of_what_is_not_pruned_only_what_is_packed_is_fetched(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: str,
    rest: str,
) -> None:
    monkeypatch.setattr(read_order, "_SMALL_TENSOR", 1000)
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 1 << 15)
    tensors = with_rest()
    folder = write_checkpoint(tmp_path / "local", REST_CONFIG, tensors)
    hub.commit("me/model", files(folder))
    options = PruneOptions(targets=targets, rest=rest)
    found = inspect("me/model", options)
    assert without_time(found) == without_time(inspect(folder, options))
    pruned = TARGETS if targets == "mlp" else ()
    packed = {*pruned, *((EMBED, HEAD, Q) if rest == "packed" else ())}
    # each once, and the samples that layouts and codes are chosen by: what is not pruned has
    # rows of 128 bytes, of which 16 are taken in 32 places, so all
    fetched = sum(stop - start for _, start, stop in ranges(hub) if start)
    sampled = sum(tensors[name].nbytes for name in packed - set(pruned))
    whole = sum(tensors[name].nbytes for name in packed)
    of_targets = fetched - whole - sampled
    assert 0 <= of_targets <= sum(tensors[name].nbytes for name in pruned)


def test_inspecting_fetches_no_file_beside_the_weights_and_reports_them(
    hub: HubServer, model: str, local: Path
) -> None:
    own = {"2_Dense/model.safetensors": b"a dense layer", "tf_model.h5": b"a copy"}
    hub.commit(model, files(local) | own)
    report = inspect(model, PruneOptions(granularity="layer"))
    assert set(hub.downloads()).isdisjoint(own)
    assert set(SHARDS) <= set(hub.downloads())
    assert report["carried"] == {"files": 1, "bytes": 13}
    assert [entry["path"] for entry in report["left_behind"]] == ["tf_model.h5"]
