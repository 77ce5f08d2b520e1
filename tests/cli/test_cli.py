"""The command line: exit statuses, what goes to stdout and to stderr, nothing heavy for --help."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from emp_cli.app import app
from emp_cli.tables import file_lines
from support.architectures import save_tiny_model
from support.checkpoints import F, H, files, llama_config, mlp, write_checkpoint
from support.hub_server import HubServer
from typer.testing import CliRunner, Result

from emp_llm import prune

TinyModel = Callable[..., Path]

COMMANDS = (
    *("prune", "pack", "inspect", "diff", "report", "unpack", "verify", "push", "eval"),
    *("generate", "compare"),
)
HEAVY = {"torch", "transformers", "numba", "numpy", "accelerate", "safetensors", "huggingface_hub"}


def run(*arguments: object) -> Result:
    """Run a command in this process; what no command foresees is raised."""
    return CliRunner().invoke(app, [str(part) for part in arguments], catch_exceptions=False)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, with arguments."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    return run_python("from emp_cli import main; main()", *arguments)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["prune", "--help"], ["push", "--help"], ["--version"]], ids=str
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('imported:', *sys.modules, file=sys.stderr))\n"
        "from emp_cli import main\n"
        "main()\n"
    )
    done = run_python(code, *arguments)
    assert done.returncode == 0
    assert HEAVY & set(done.stderr.partition("imported:")[2].split()) == set()


def test_help_names_every_command() -> None:
    help_text = run("--help").stdout
    assert [name for name in COMMANDS if name not in help_text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_version_is_the_one_of_the_library() -> None:
    import emp_llm

    assert run("--version").stdout == f"emp-llm {emp_llm.__version__}\n"


@pytest.mark.parametrize("arguments", [["prune", "--out", "out"], ["inspect"]])
def test_what_transformers_will_initialise_is_said_and_reported(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(tiny_model("llama"), "source"))
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (source / "config.json").write_text(json.dumps(config))
    line = "missing, so transformers initialises it: score.weight"
    command, *more = arguments
    assert line in " ".join(run(command, "source", *more).stdout.split())
    more = [part.replace("out", "json") if part == "out" else part for part in more]
    assert json.loads(run(command, "source", *more, "--json").stdout)["missing"] == ["score.weight"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["prune"],
        ["prune", "model"],
        ["prune", "model", "--out", "out", "--beta", "much"],
        ["prune", "model", "--out", "out", "--granularity", "column"],
        ["prune", "model", "--out", "out", "--format", "zip"],
        ["prune", "model", "--out", "out", "--threads", "0"],
        ["inspect", "model", "--out", "out"],
        ["verify"],
        ["push", "folder"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr != ""


@pytest.mark.parametrize("beta", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("command", [["prune", "--out", "out"], ["inspect"]], ids=" ".join)
def test_an_impossible_beta_exits_with_1_and_one_line(command: list[str], beta: str) -> None:
    result = run(*command, "model", f"--beta={beta}")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("OptionError: beta is ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["prune", "inspect", "unpack", "verify"])
def test_a_bad_source_exits_with_1_and_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "out"] if command in ("prune", "unpack") else []
    result = run(command, tmp_path / "empty", *out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("CheckpointError: ")
    assert result.stderr.count("\n") == 1


def test_a_foreseen_error_ends_the_process_with_one_line_and_no_traceback() -> None:
    done = run_process("prune", "model", "--out", "out", "--targets", "(")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("OptionError: targets '(' is not a regular expression")
    assert done.stderr.count("\n") == 1


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    code = (
        "import sys, types\n"
        "def prune(*args, **kwargs): raise RuntimeError('a bug')\n"
        "sys.modules['emp_llm.entrypoints.prune'] = types.SimpleNamespace(prune=prune)\n"
        "from emp_cli import main\n"
        "main()\n"
    )
    done = run_python(code, "prune", "model", "--out", "out")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("RuntimeError: a bug\n")


def test_the_module_runs_a_whole_job_in_a_process_of_its_own(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "emp_cli", "prune", source, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    prune(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_options_reach_the_library(source: Path, tmp_path: Path) -> None:
    options = ["--beta", 0.5, "--granularity", "layer", "--targets", "all-linear"]
    more = ["--ignore", "gate", "--ignore", "down", "--format", "dense", "--threads", 1]
    result = run("prune", source, "--out", tmp_path / "out", *options, *more)
    assert result.exit_code == 0
    report = json.loads((tmp_path / "out" / "emp_report.json").read_text())
    assert report["format"] == "dense"
    assert report["rule"] == {
        "beta": 0.5,
        "granularity": "layer",
        "criterion": "magnitude",
        "targets": "all-linear",
        "ignore": ["gate", "down"],
    }


def test_json_is_one_object_on_stdout_for_every_command(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    commands = [
        ["inspect", source],
        ["prune", source, "--out", packed],
        ["verify", packed],
        ["verify", packed, "--against", source],
        ["diff", packed, source],
        ["report", packed],
        ["unpack", packed, "--out", tmp_path / "dense"],
    ]
    for command in commands:
        result = run(*command, "--json")
        assert result.exit_code == 0
        content = json.loads(result.stdout)
        assert content["seconds"] >= 0
        assert content["peak_memory_bytes"] > 1 << 20


def test_json_of_prune_has_the_totals_of_the_report(source: Path, tmp_path: Path) -> None:
    content = json.loads(run("prune", source, "--out", tmp_path / "out", "--json").stdout)
    report = json.loads((tmp_path / "out" / "emp_report.json").read_text())
    assert content["out"] == str(tmp_path / "out")
    assert content["totals"] == report["totals"]
    assert content["kinds"].keys() == {"down_proj", "gate_proj", "up_proj"}


def test_progress_is_on_stderr_only(source: Path, tmp_path: Path) -> None:
    result = run("prune", source, "--out", tmp_path / "out", "--granularity", "model")
    assert "pruning" in result.stderr
    assert "selecting" in result.stderr
    assert "selecting" not in result.stdout


@pytest.mark.parametrize("architecture", ["jamba", "deepseek-v3", "llava"])
def test_tables_fit_80_columns(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    source = tiny_model(architecture)
    texts = [
        run("inspect", source, "--targets", "all-linear").stdout,
        run("prune", source, "--out", "out", "--targets", "all-linear").stdout,
    ]
    lines = [line for text in texts for line in text.splitlines()]
    assert [line for line in lines if len(line) > 80] == []


@pytest.fixture
def with_copies(source: Path) -> Path:
    """A source with other copies of its weights, files of a training, and a head of its own."""
    shards = [f"pytorch_model-{i:05}-of-00007.bin" for i in range(1, 8)]
    for name in (*shards, "tf_model.h5", "checkpoint-5/optimizer.pt", "value_head.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(bytes(1000))
    return source


FILE_LINES = [
    "copied beside the weights: 1 file (1 kB)",
    "left behind, training leftovers: checkpoint-5/ (1 kB)",
    "left behind, the same weights in another file: pytorch_model-00001-of-00007.bin,",
    "  pytorch_model-00002-of-00007.bin, pytorch_model-00003-of-00007.bin,",
    "  pytorch_model-00004-of-00007.bin, pytorch_model-00005-of-00007.bin and 2 more",
    "  (7 kB)",
    "left behind, the same weights for TensorFlow: tf_model.h5 (1 kB)",
]


def test_what_is_copied_and_what_stays_behind_is_printed_with_its_reason(
    with_copies: Path, tmp_path: Path
) -> None:
    texts = [
        run("inspect", with_copies).stdout,
        run("prune", with_copies, "--out", tmp_path / "out").stdout,
        run("report", tmp_path / "out").stdout,
    ]
    for text in texts:
        lines = [line.rstrip() for line in text.splitlines()]
        begin = lines.index(FILE_LINES[0])
        assert lines[begin : begin + len(FILE_LINES)] == FILE_LINES
    (tmp_path / "out" / "flax_model.msgpack").write_bytes(bytes(1000))
    text = run("unpack", tmp_path / "out", "--out", tmp_path / "dense").stdout
    assert text.splitlines()[:2] == [
        FILE_LINES[0],
        "left behind, the same weights for Flax: flax_model.msgpack (1 kB)",
    ]


def test_a_size_stays_on_one_line_and_links_have_none() -> None:
    index = ("model.safetensors.index.json", "the same weights in another file", 1, 75)
    entries = [index, ("shared/", "links to folders", 0, 0)]
    left: Any = [dict(zip(("path", "reason", "files", "bytes"), e, strict=True)) for e in entries]
    assert file_lines(None, left) == [
        "left behind, the same weights in another file: model.safetensors.index.json",
        "  (75 B)",
        "left behind, links to folders: shared/",
    ]


def test_json_lists_what_stays_behind(with_copies: Path, tmp_path: Path) -> None:
    content = json.loads(run("prune", with_copies, "--out", tmp_path / "out", "--json").stdout)
    assert content["carried"] == {"files": 1, "bytes": 1000}
    assert len(content["left_behind"]) == 1 + 7 + 1
    assert content["left_behind"][0] == {
        "path": "checkpoint-5/",
        "reason": "training leftovers",
        "files": 1,
        "bytes": 1000,
    }


def test_tables_have_a_line_for_each_kind_and_inspect_tells_why_the_rest_is_left(
    tiny_model: TinyModel,
) -> None:
    text = run("inspect", tiny_model("llama")).stdout
    words = ["up_proj", "gate_proj", "down_proj", "all targets", "embedding", "norm", "lm_head"]
    assert [word for word in words if word not in text] == []


def test_verify_of_a_damaged_folder_exits_with_1(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(source, out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-200] ^= 1
    (out / "model.safetensors").write_bytes(data)
    result = run("verify", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "FormatError: model.safetensors" in result.stderr


def test_verify_tells_what_was_proved(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(source, out)
    assert run("verify", out).stdout.startswith(f"{out}: whole. 3 tensors (")
    proved = run("verify", out, "--against", source).stdout
    assert proved.startswith(f"{out}: whole, and exactly what pruning {source} gives. 3 tensors")
    assert json.loads(run("verify", out, "--json").stdout)["whole"] is True
    (out / "emp_report.json").unlink()
    (out / "notes.txt").write_text("mine")
    result = run("verify", out)
    assert result.exit_code == 0
    assert "valid in structure" in result.stdout
    assert "there are no hashes to compare with: changed values would not show" in result.stdout
    assert json.loads(run("verify", out, "--json").stdout)["whole"] is False
    assert json.loads(run("verify", out, "--against", source, "--json").stdout)["whole"] is True


def test_verify_against_another_source_exits_with_1(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out")
    other = write_checkpoint(tmp_path / "other", llama_config(H, F), few_mlp())
    result = run("verify", tmp_path / "out", "--against", other)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "prune or pack it again, or give the source that it was made from" in result.stderr


def few_mlp():
    return {name: weights * 2 for name, weights in mlp(H, F).items()}


def test_overwrite_must_be_asked_for(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("prune", source, "--out", out).exit_code == 0
    assert run("prune", source, "--out", out).exit_code == 1
    assert run("prune", source, "--out", out, "--overwrite").exit_code == 0


def test_a_model_of_the_hub_is_pruned_by_id_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path / "local", "llama", max_shard_size=8 * 1024)
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        commit = hub.commit("me/model", files(folder), branch="v1")
        hub.commit("me/model", {"config.json": b"{}"})
        result = run("prune", "me/model", "--revision", "v1", "--out", tmp_path / "out")
    assert result.exit_code == 0
    report = json.loads((tmp_path / "out" / "emp_report.json").read_text())
    assert report["source"] == {"model": "me/model", "revision": commit}
    local = prune(folder, tmp_path / "expected")
    assert report["tensors"] == local["tensors"]
