"""One file of a checkpoint's weights: what it holds, and how it is opened."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from emp_llm.checkpoint.header import Header, ReadRange
from emp_llm.checkpoint.safetensors_header import read_header, read_header_by
from emp_llm.checkpoint.source_file import PlainFile, SourceFile
from emp_llm.checkpoint.torch_save.header import read_torch_header, read_torch_header_by

__all__ = ["Shard", "TorchShard", "read_any_header_by", "read_shard"]

_SAFETENSORS = ".safetensors"
_TORCH_PREFIX = "pytorch_"


@dataclass(frozen=True)
class Shard:
    """One file of weights, in the safetensors format.

    Attributes:
        name: Its file name, as in the index.
        path: Where it is, or will be once it is downloaded; in the Hub's cache this is a link.
        header: What it holds.
        made_from: The files on disk that its bytes come from; empty if it is one itself.
    """

    name: str
    path: Path
    header: Header
    made_from: "tuple[Shard, ...]" = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of the files on disk that its bytes come from."""
        return tuple(part.path for part in self.parts)

    @property
    def parts(self) -> "tuple[Shard, ...]":
        """The files on disk that its bytes come from, as shards: itself, if it is one."""
        return self.made_from or (self,)

    @property
    def safetensors_name(self) -> str:
        """Its file name in a checkpoint of safetensors, the format of everything written."""
        return self.name

    def without(self, names: Collection[str]) -> Self:
        """The shard without some of its tensors."""
        tensors = tuple(entry for entry in self.header.tensors if entry.name not in names)
        header = replace(self.header, tensors=tensors)
        return replace(self, header=header, made_from=self.parts)

    def read_header(self) -> Header:
        """Read its header again.

        Raises:
            CheckpointError: If the file cannot be read or is not whole.
        """
        return read_header(self.path)

    def open(self) -> SourceFile:
        """Open it for reading, as the file that its header describes.

        Raises:
            CheckpointError: If it cannot be opened.
        """
        return PlainFile(self.path)


class TorchShard(Shard):
    """A file that torch.save wrote."""

    @property
    def safetensors_name(self) -> str:
        """Transformers' name for it: pytorch_model-….bin becomes model-….safetensors."""
        return Path(self.name.removeprefix(_TORCH_PREFIX)).stem + _SAFETENSORS

    def read_header(self) -> Header:
        """Read again what it holds."""
        return read_torch_header(self.path)

    def open(self) -> SourceFile:
        """Open it for reading, as the file that its header describes: every tensor dense."""
        from emp_llm.checkpoint.torch_save.file import open_torch_file

        return open_torch_file(self.path)


def read_shard(path: Path, header: Header | None = None) -> Shard:
    """Open a file of weights as a shard: safetensors or torch.save's, by the end of its name.

    Args:
        path: The file.
        header: Its header, if that is known already because the file is still to be downloaded.

    Raises:
        CheckpointError: If the file cannot be read or is not whole.
    """
    if path.suffix == _SAFETENSORS:
        return Shard(path.name, path, header or read_header(path))
    return TorchShard(path.name, path, header or read_torch_header(path))


def read_any_header_by(read: ReadRange, name: str, file_size: int) -> Header:
    """Read the header of a file of weights that is anywhere, such as on the Hub.

    Args:
        read: Reads a range of the file.
        name: The file's name; its end says whether it is safetensors or torch.save's.
        file_size: Bytes of the whole file.

    Raises:
        CheckpointError: If it is not whole.
    """
    is_safetensors = name.endswith(_SAFETENSORS)
    return (read_header_by if is_safetensors else read_torch_header_by)(read, name, file_size)
