"""`decide_all` in a process of its own, which ends once it has answered.

It imports torch and transformers, which takes seconds and 300 MB, and pruning by magnitude needs
neither afterwards. If this process has imported transformers already, it decides itself.

The question goes to ``python -m emp_llm.structure.targets_process`` as JSON on stdin, the answer
comes back as JSON on stdout.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emp_llm import errors
from emp_llm.runtime.module_process import ask, module_environment
from emp_llm.structure.targets import Decisions, TargetDecision, decide_all

__all__ = ["TargetsQuestion"]

_MEMORY = 8 << 30


class TargetsQuestion:
    """The question which tensors are targets, worked on while this process does other things.

    Making it starts the process, `answer` waits for it. Use it as a context manager: leaving that
    ends the process.

    Args:
        folder: As for `decide_all`.
        tensors: As for `decide_all`.
        targets: As for `decide_all`.
        ignore: As for `decide_all`.
        config: As for `decide_all`.
        absent: As for `decide_all`.
        where: As for `decide_all`.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        targets: str,
        ignore: Sequence[str],
        config: Mapping[str, Any] | None = None,
        absent: Mapping[str, str] = MappingProxyType({}),
        where: str | None = None,
    ) -> None:
        self._question: dict[str, Any] = {
            "folder": str(folder),
            "tensors": tensors,
            "targets": targets,
            "ignore": list(ignore),
            "config": config,
            "absent": dict(absent),
            "where": where,
        }
        self._process = None if "transformers" in sys.modules else _start(self._question)

    def __enter__(self) -> "TargetsQuestion":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def answer(self) -> Decisions:
        """The decisions; waits until they are made.

        Raises:
            CheckpointError: As `decide_all` does.
        """
        if self._process is None:
            return _decide(self._question)
        output, complaint = self._process.communicate()
        if self._process.returncode < 0:  # by a signal, as when memory is short
            raise errors.CheckpointError(
                f"{self._question['folder']}: the process that builds the model of config.json was "
                f"ended by {signal.Signals(-self._process.returncode).name}: check that the config "
                "is the right one and that enough memory is free"
            )
        if self._process.returncode:
            raise RuntimeError(f"deciding the targets failed:\n{complaint.decode().strip()}")
        answer = json.loads(output)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        decisions = {name: TargetDecision(**fields) for name, fields in answer["decisions"].items()}
        return Decisions(decisions, answer["missing"])


def _start(question: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "emp_llm.structure.targets_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=module_environment(),
        start_new_session=True,  # so that Ctrl-C reaches this process only, which reports it
    )
    ask(process.stdin, question)
    process.stdin = None
    return process


def _decide(question: Mapping[str, Any]) -> Decisions:
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in question["tensors"].items()}
    more = {name: question[name] for name in ("targets", "ignore", "config", "absent", "where")}
    return decide_all(Path(question["folder"]), tensors, **more)


def _main() -> None:
    # a hostile config could fill all memory; torch and transformers alone take 400 MB
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    # keeps torch from importing Triton, which takes 90 MB: nothing is compiled here
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        found = _decide(json.load(sys.stdin))
        decisions = {name: asdict(decision) for name, decision in found.tensors.items()}
        json.dump({"decisions": decisions, "missing": found.missing}, sys.stdout)
    except errors.EmpError as error:
        json.dump({"error": type(error).__name__, "message": str(error)}, sys.stdout)


if __name__ == "__main__":
    _main()
    sys.stdout.flush()
    os._exit(0)  # unloading what was imported would take as long as answering a small question
