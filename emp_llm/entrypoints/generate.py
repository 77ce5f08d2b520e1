"""Generate: a text that a model writes, with its speed and memory, alone or beside another model's.

model found, verified → loaded, text generated → the same for the other, each in its own process
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.evaluation.found_model import find_model
from emp_llm.generation.apart import generate_apart
from emp_llm.generation.listener import Deaf
from emp_llm.generation.options import GenerateOptions
from emp_llm.generation.results import Generation
from emp_llm.runtime.device_choice import check_device
from emp_llm.runtime.progress import Silent

if TYPE_CHECKING:
    import os

    from emp_llm.generation.listener import Listener
    from emp_llm.runtime.progress import Progress

__all__ = ["generate"]


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    listener: Listener | None = None,
    progress: Progress | None = None,
) -> Generation:
    """Have a model write a text, and measure its speed and memory.

    Beside another model, each runs in a process of its own, one after the other, so that the
    memory of each is its own and neither is slowed down by the other.

    >>> found = generate("demo/model", "the sky", GenerateOptions(max_new_tokens=5))
    >>> len(found.model.new_ids), found.model.ended
    (5, 'max_new_tokens')

    Args:
        model: A folder, dense or packed, or a model of the Hub.
        prompt: What the text begins with, or a user's message.
        options: How it is generated; as the class has them if None.
        against: A model to compare with, usually the dense one; its weights are dense in memory.
        revision: Branch, tag or commit of `model` on the Hub.
        listener: Hears the text as it is generated.
        progress: Reports what is downloaded and verified.

    Returns:
        The text of each model, and what it took.

    Raises:
        OptionError: If there is no such device, a value is out of its range, or the prompt is no
            text, empty or too long for the model.
        CheckpointError: If a model cannot be loaded.
        HubError: If the Hub refuses a model.
        FormatError: If a packed folder is not as it was written.
    """
    options = options or GenerateOptions()
    listener, progress = listener or Deaf(), progress or Silent()
    if against is not None and options.temperature:
        raise OptionError(
            f"temperature is {options.temperature}; texts that are drawn part by chance, so two "
            "models are compared without: leave it out"
        )
    _check_prompt(prompt)
    check_device(options.device)
    found = find_model(model, revision=revision, progress=progress)
    if against is None:
        from emp_llm.generation.run import generate_with

        alone = generate_with(found, prompt, options, listener)
        return Generation(options=options, prompt=prompt, model=alone)
    beside = find_model(against, progress=progress)
    return Generation(
        options=options,
        prompt=prompt,
        model=generate_apart(found, prompt, options, listener),
        against=generate_apart(beside, prompt, replace(options, keep_packed=False), listener),
    )


def _check_prompt(prompt: str) -> None:
    """Refuse bytes that are no text; Python hands them on as single surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"the prompt is not UTF-8 (at character {error.start + 1}): give it in UTF-8"
        ) from error
