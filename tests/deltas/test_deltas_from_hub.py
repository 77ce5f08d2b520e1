"""Base, model and delta on the Hub, with the real client; the base stays the one of its commit."""

from pathlib import Path

import pytest
from support.checkpoints import differing, files, load
from support.hub_server import HubServer
from support.loading import state
from support.tuned import tune
from transformers import AutoModelForCausalLM

from emp_llm import prune, unpack, verify

# how the Hub's client hands files to httpx and httpx2
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def new_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps a client for the Hub that it met first; here each test has its own."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)


def test_a_delta_names_the_commit_of_its_base_and_is_loaded_by_its_id(
    hub: HubServer, tiny_model, tmp_path: Path
) -> None:
    base = tiny_model("llama", sharded=True)
    tuned = tune(base, tmp_path / "tuned")
    commit = hub.commit("me/base", files(base))
    hub.commit("me/tuned", files(tuned))
    report = prune("me/tuned", tmp_path / "delta", base="me/base")
    assert (report["base"]["model"], report["base"]["revision"]) == ("me/base", commit)

    later = tune(base, tmp_path / "later", seed=9)
    hub.commit("me/base", files(later))
    hub.commit("me/delta", files(tmp_path / "delta"))
    prune(tuned, tmp_path / "local", base=base)
    unpack(tmp_path / "local", tmp_path / "expected")
    expected = load(tmp_path / "expected")
    unpack("me/delta", tmp_path / "whole")
    assert differing(load(tmp_path / "whole"), expected) == []
    assert differing(state(AutoModelForCausalLM.from_pretrained("me/delta")), expected) == []
    assert verify(tmp_path / "delta", against="me/tuned")["masks_derived"] is True
