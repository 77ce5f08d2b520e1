"""A question about a model's structure, answered in a process of its own.

The question goes to ``python -P -m emp_llm.structure.question`` as JSON on stdin, with the name of
the function that replies; the answer comes back as JSON on stdout. What the process imports and
allocates is given back when it ends.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from emp_llm import errors
from emp_llm.runtime.module_process import ask, module_environment

__all__ = ["Question", "Reply"]

Reply = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A function of a module of ours that answers a question; both are what JSON can hold."""

_MEMORY = 8 << 30


class Question:
    """A question, worked on while this process does other things.

    To build a model from its config takes torch and transformers: seconds and 300 MB, which a
    process of its own gives back. If this process has imported transformers already, it answers
    itself. Making a question starts the process, `answer` waits for it. Use it as a context
    manager: leaving that ends the process.

    Args:
        reply: What answers it; it is called here or, by its name, in the process.
        question: What is asked; its ``folder`` is the checkpoint's, for errors.
    """

    def __init__(self, reply: Reply, question: Mapping[str, Any]) -> None:
        self._reply = reply
        self._question = question
        self._process = None if "transformers" in sys.modules else _start(reply, question)

    def __enter__(self) -> "Question":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def answer(self) -> Mapping[str, Any]:
        """The answer; waits until it is there.

        Raises:
            CheckpointError: If the process was killed.
            EmpError: What the module raises.
        """
        if self._process is None:
            return self._reply(self._question)
        output, complaint = self._process.communicate()
        if self._process.returncode < 0:  # by a signal, as when memory is short
            raise errors.CheckpointError(
                f"{self._question['folder']}: the process that builds the model of config.json was "
                f"ended by {signal.Signals(-self._process.returncode).name}: check that the config "
                "is the right one and that enough memory is free"
            )
        if self._process.returncode:
            raise RuntimeError(f"{self._reply.__module__} failed:\n{complaint.decode().strip()}")
        answer: dict[str, Any] = json.loads(output)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer


def _start(reply: Reply, question: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "emp_llm.structure.question"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=module_environment(),
        start_new_session=True,  # so that Ctrl-C reaches this process only, which reports it
    )
    by = {"module": reply.__module__, "function": reply.__name__}
    ask(process.stdin, {"by": by, "question": question})
    process.stdin = None
    return process


def _main() -> None:
    # a hostile config could fill all memory; torch and transformers alone take 400 MB
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    # keeps torch from importing Triton, which takes 90 MB: nothing is compiled here
    sys.modules["triton"] = None  # type: ignore[assignment]
    try:
        asked = json.load(sys.stdin)
        reply: Reply = getattr(import_module(asked["by"]["module"]), asked["by"]["function"])
        json.dump(reply(asked["question"]), sys.stdout)
    except errors.EmpError as error:
        json.dump({"error": type(error).__name__, "message": str(error)}, sys.stdout)


if __name__ == "__main__":
    _main()
    sys.stdout.flush()
    os._exit(0)  # unloading what was imported would take as long as answering a small question
