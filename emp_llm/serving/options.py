"""The options of packed checkpoints in a server's own configuration."""

from collections.abc import Mapping
from typing import Any, Final

from emp_llm.errors import OptionError

__all__ = ["keeps_packed"]

_SECTION: Final = "emp"
_KEEP_PACKED: Final = "keep_packed"


def keeps_packed(additional_config: object) -> bool:
    """Whether weights are to stay packed in memory.

    >>> keeps_packed({"emp": {"keep_packed": True}})
    True

    Args:
        additional_config: vLLM's ``--additional-config``, which holds the options of plugins.

    Raises:
        OptionError: If there are other options for emp-llm, or it is not true or false.
    """
    ours: Any = (
        additional_config.get(_SECTION, {}) if isinstance(additional_config, Mapping) else {}
    )
    keep = ours.get(_KEEP_PACKED, False) if isinstance(ours, Mapping) else None
    if not isinstance(keep, bool) or len(ours) > (_KEEP_PACKED in ours):
        raise OptionError(
            f"additional_config: {_SECTION!r} is {ours!r}; give "
            f'{{"{_SECTION}": {{"{_KEEP_PACKED}": true}}}}, or leave it out'
        )
    return keep
