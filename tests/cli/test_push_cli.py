"""``emp-llm push`` and ``emp-llm prune --push-to-hub``, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emp_cli.app import app
from support.checkpoints import files
from support.hub_uploads import UploadHub
from support.uploading import LEGACY_UPLOAD, REPO, without_card
from typer.testing import CliRunner, Result

from emp_llm import prune

pytestmark = LEGACY_UPLOAD


@pytest.fixture(autouse=True)
def hub(upload_hub: UploadHub) -> UploadHub:
    return upload_hub


def run(*arguments: object) -> Result:
    """Run a command in this process; what no command foresees is raised."""
    return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


def failure(*arguments: object) -> str:
    """The one line on stderr of a command that fails."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    *progress, line = result.stderr.splitlines()
    assert not [part for part in progress if "Error" in part]
    return line


def test_push_tells_where_the_model_is_and_how_to_load_it(
    hub: UploadHub, packed_folder: Path
) -> None:
    result = run("push", packed_folder, REPO)
    assert result.exit_code == 0
    sizes = [len(data) for data in hub.files(REPO).values()]
    assert result.stdout.splitlines() == [
        f"{hub.url}/me/model: {len(sizes)} files, {sum(sizes) / 1000:.3g} kB; load it with",
        "    # needs emp-llm: pip install emp-llm",
        "    from transformers import AutoModelForCausalLM",
        '    model = AutoModelForCausalLM.from_pretrained("me/model")',
    ]


def test_off_a_terminal_stages_are_lines_and_no_bars_are_drawn(packed_folder: Path) -> None:
    stderr = run("push", packed_folder, REPO).stderr
    size = sum(len(data) for data in files(packed_folder).values())
    assert stderr == f"verifying 1.2 kB\nuploading {size / 1000:.3g} kB to me/model\n"


def test_an_edited_file_is_told_before_the_upload(packed_folder: Path) -> None:
    (packed_folder / "tokenizer.json").write_text("{} ")
    lines = run("push", packed_folder, REPO).stderr.splitlines()
    assert lines[1] == "edited since they were written, uploaded as they are: tokenizer.json"


def test_a_branch_that_was_made_is_told(hub: UploadHub, packed_folder: Path) -> None:
    result = run("push", packed_folder, REPO, "--revision", "v1", "--private")
    first, second, *_ = result.stdout.splitlines()
    assert first == "me/model: branch v1 was not there and was made"
    assert second.startswith(f"{hub.url}/me/model/tree/v1: ")
    assert 'from_pretrained("me/model", revision="v1")' in result.stdout
    assert hub.models[REPO].private is True


def test_a_pull_request_is_told(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit("they/model", {})
    result = run("push", packed_folder, "they/model", "--create-pr")
    assert result.stdout.startswith(f"{hub.url}/they/model/discussions/1: ")


def test_json_of_push_is_one_object(hub: UploadHub, packed_folder: Path) -> None:
    content = json.loads(run("push", packed_folder, REPO, "--json").stdout)
    assert content["folder"] == str(packed_folder)
    assert (content["repo_id"], content["url"]) == (REPO, f"{hub.url}/{REPO}")
    assert content["commit"] == hub.models[REPO].refs["main"]
    assert content["seconds"] > 0


def test_a_push_that_is_refused_is_one_line(hub: UploadHub, packed_folder: Path) -> None:
    hub.refusals["/commit/"] = 503
    line = failure("push", packed_folder, REPO)
    assert line.startswith("HubError: me/model: the Hub answered with status 503")
    assert line.endswith(f"run `emp-llm push {packed_folder} me/model`: what has been sent is kept")


def test_an_interrupted_push_says_how_to_go_on(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupt)
    result = run("push", packed_folder, REPO)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == (
        f"interrupted: {packed_folder} is whole and what has been sent is kept; "
        f"run emp-llm push {packed_folder} me/model to go on"
    )


def test_a_process_of_its_own_pushes_by_its_environment(
    hub: UploadHub, packed_folder: Path, tmp_path: Path
) -> None:
    variables = hub.environment(tmp_path / "other") | {"HF_TOKEN": "hf_me", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "emp_cli", "push", packed_folder, REPO],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert without_card(hub.files(REPO)) == without_card(files(packed_folder))
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["verifying", "uploading"]


# prune --push-to-hub


def test_prune_pushes_what_it_wrote(hub: UploadHub, carded: Path, tmp_path: Path) -> None:
    result = run("prune", carded, "--out", tmp_path / "out", "--push-to-hub", REPO)
    assert result.exit_code == 0
    prune(carded, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert without_card(hub.files(REPO)) == without_card(files(tmp_path / "out"))
    assert hub.models[REPO].private is False
    assert "all targets" in result.stdout
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in result.stdout


def test_prune_takes_the_owners_name_and_private(hub: UploadHub, carded: Path) -> None:
    result = run(
        *("prune", carded, "--out", carded.with_name("out"), "--json"),
        *("--push-to-hub", "model", "--private"),
    )
    content = json.loads(result.stdout)
    assert content["pushed"]["url"] == f"{hub.url}/me/model"
    assert content["totals"]["model"]["weights"] > 0
    assert hub.models[REPO].private is True


def test_the_token_is_asked_for_before_anything_is_pruned(
    hub: UploadHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in failure("prune", source, "--out", out, "--push-to-hub", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = failure("prune", source, "--out", out, "--push-to-hub", REPO)
    assert line == (
        "HubError: me/model: the Hub does not accept the token: run `hf auth login` or set "
        "HF_TOKEN anew, then run the command again"
    )
    assert not out.exists()
    assert hub.models == {}


def test_a_device_that_is_not_there_is_told_before_a_repository_is_made(
    hub: UploadHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = ("prune", source, "--out", tmp_path / "out", "--push-to-hub", REPO)
    assert "device is 'cuda'" in failure(*arguments, "--device", "cuda")
    assert hub.models == {}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["they/model", "a b"])
def test_a_repository_that_cannot_be_written_is_refused_before_anything_is_pruned(
    source: Path, tmp_path: Path, repo: str
) -> None:
    line = failure("prune", source, "--out", tmp_path / "out", "--push-to-hub", repo)
    assert line.startswith("HubError: ")
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_pruned_folder_and_says_how_to_go_on(
    hub: UploadHub, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hub.refusals["/preupload/"] = 503
    result = run("prune", source, "--out", out, "--push-to-hub", REPO)
    assert result.exit_code == 1
    assert "all targets" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f"then run `emp-llm push {out} me/model`: what has been sent is kept")
    assert run("verify", out).exit_code == 0
    hub.refusals.clear()
    assert run("push", out, REPO).exit_code == 0
    assert without_card(hub.files(REPO)) == without_card(files(out))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--private"], "goes with --push-to-hub only"),
        (["--push-to-hub", "me/source"], "is the model that is pruned"),
    ],
    ids=["private alone", "onto its source"],
)
def test_wrong_usage_exits_with_2(hub: UploadHub, options: list[str], reason: str) -> None:
    result = run("prune", "me/source", "--out", "out", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in result.stderr
    assert hub.requests == []
