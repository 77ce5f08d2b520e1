"""`decide_all` in a process of its own, which ends once it has answered.

It imports torch and transformers, which takes seconds and 300 MB, and pruning by magnitude needs
neither afterwards. If this process has imported transformers already, it decides itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emp_llm.structure.question import Question
from emp_llm.structure.targets import Decisions, TargetDecision, decide_all

__all__ = ["TargetsQuestion"]


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
        question = {
            "folder": str(folder),
            "tensors": tensors,
            "targets": targets,
            "ignore": list(ignore),
            "config": config,
            "absent": dict(absent),
            "where": where,
        }
        self._asked = Question(_reply, question)

    def __enter__(self) -> "TargetsQuestion":
        return self

    def __exit__(self, *error: object) -> None:
        self._asked.__exit__(*error)

    def answer(self) -> Decisions:
        """The decisions; waits until they are made.

        Raises:
            CheckpointError: As `decide_all` does.
        """
        answer = self._asked.answer()
        decisions = {name: TargetDecision(**fields) for name, fields in answer["decisions"].items()}
        return Decisions(decisions, answer["missing"])


def _reply(question: Mapping[str, Any]) -> dict[str, Any]:
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in question["tensors"].items()}
    more = {name: question[name] for name in ("targets", "ignore", "config", "absent", "where")}
    found = decide_all(Path(question["folder"]), tensors, **more)
    decisions = {name: asdict(decision) for name, decision in found.tensors.items()}
    return {"decisions": decisions, "missing": found.missing}
