"""All kinds of structures, by name."""

from collections.abc import Mapping
from typing import Final

from emp_llm.shrinking.blocks import Blocks
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.experts import Experts
from emp_llm.shrinking.kind import Kind
from emp_llm.shrinking.kv_heads import KvHeads
from emp_llm.shrinking.neurons import Neurons

__all__ = ["KINDS"]

KINDS: Final[Mapping[KindName, Kind]] = {
    kind.name: kind for kind in (Blocks(), Experts(), Neurons(), KvHeads())
}
"""In the order in which their changes of the config are made."""
