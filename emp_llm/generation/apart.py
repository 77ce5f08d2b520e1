"""`generate_with` in a process of its own, so that its memory is that of one model alone.

The question goes to ``python -m emp_llm.generation.apart`` as JSON on stdin; what comes back on
stdout is a line of JSON for each call of the listener, and at last one with the result or error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm import errors
from emp_llm.evaluation.found_model import Found
from emp_llm.generation.options import GenerateOptions
from emp_llm.generation.results import Generated
from emp_llm.hub.source import Source
from emp_llm.runtime.module_process import ask, module_environment

if TYPE_CHECKING:
    from emp_llm.generation.listener import Listener
    from emp_llm.generation.results import Weights

__all__ = ["generate_apart"]


def generate_apart(
    found: Found, prompt: str, options: GenerateOptions, listener: Listener
) -> Generated:
    """What `emp_llm.generation.run.generate_with` does, in a process that then ends.

    Args:
        found: The model.
        prompt: What the text begins with.
        options: How it is generated.
        listener: Hears it, in this process.

    Raises:
        CheckpointError: As `generate_with`, and if the process was killed.
        OptionError: As `generate_with`.
    """
    question = {
        "model": {
            "name": found.name,
            "folder": os.fspath(found.source.folder),
            "revision": found.source.revision,
            "config": found.config,
            "packed": found.packed,
        },
        "prompt": prompt,
        "options": asdict(options),
    }
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "emp_llm.generation.apart"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=module_environment(),
        start_new_session=True,  # so that Ctrl-C reaches this process only, which ends it
    ) as process:
        try:
            ask(process.stdin, question)
            for line in process.stdout or ():
                event: dict[str, Any] = json.loads(line)
                match event["kind"]:
                    case "begin":
                        listener.begin(event["model"], event["weights"])
                    case "hear":
                        listener.hear(event["text"])
                    case "end":
                        listener.end()
                    case "result":
                        return _generated(event["fields"])
                    case _:
                        raise getattr(errors, event["error"])(event["message"])
            status = process.wait()
        finally:
            process.kill()
    if status < 0:  # by a signal, as when memory is short
        raise errors.CheckpointError(
            f"{found.name}: the process that ran it was ended by {signal.Signals(-status).name}: "
            "check that enough memory is free"
        )
    raise RuntimeError(f"generating with {found.name} failed, as said above")


def _generated(fields: dict[str, Any]) -> Generated:
    ids = {name: tuple(fields[name]) for name in ("prompt_ids", "new_ids")}
    return Generated(**{**fields, **ids})


class _Teller:
    """A listener that passes on what it hears, a line of JSON each."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", encoding="utf-8")

    def begin(self, model: str, weights: Weights) -> None:
        self.tell("begin", model=model, weights=weights)

    def hear(self, text: str) -> None:
        self.tell("hear", text=text)

    def end(self) -> None:
        self.tell("end")

    def tell(self, kind: str, **more: object) -> None:
        print(json.dumps({"kind": kind, **more}), file=self._pipe, flush=True)


def _main() -> None:
    # only events go to the pipe: what libraries print is shown on stderr
    teller = _Teller(os.dup(1))
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    model = question["model"]
    found = Found(
        name=model["name"],
        source=Source(Path(model["folder"]), revision=model["revision"]),
        config=model["config"],
        packed=model["packed"],
    )
    from emp_llm.generation.run import generate_with

    options = GenerateOptions(**question["options"])
    try:
        result = generate_with(found, question["prompt"], options, teller)
        teller.tell("result", fields=asdict(result))
    except errors.EmpError as error:
        teller.tell("error", error=type(error).__name__, message=str(error))


if __name__ == "__main__":
    _main()
    sys.stdout.flush()
    os._exit(0)  # unloading what was imported would take a while
