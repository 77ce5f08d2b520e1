"""A file that torch.save wrote, opened as its header describes it: each tensor dense, by itself."""

from pathlib import Path

from emp_llm.checkpoint.assembled_file import AssembledFile
from emp_llm.checkpoint.dtypes import item_bytes
from emp_llm.checkpoint.extents import Extent, StridedArray
from emp_llm.checkpoint.source_file import PlainFile, SourceFile
from emp_llm.checkpoint.torch_save.header import locate_tensors

__all__ = ["open_torch_file"]


def open_torch_file(path: Path) -> SourceFile:
    """Open a file of torch.save for reading.

    Raises:
        CheckpointError: If it is not whole; see `locate_tensors`.
    """
    extents: list[Extent] = []
    end = 0
    for entry, tensor, start in locate_tensors(path):
        if entry.start == end:  # else it is the same bytes as the one before
            array = StridedArray(0, start, tensor.shape, tensor.strides)
            extents.append(Extent(end, entry.nbytes, item_bytes(entry.dtype), (array,)))
            end = entry.end
    return AssembledFile(path.name, [PlainFile(path)], extents)
