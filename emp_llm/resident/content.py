"""What a packed weight is made of: planes, and which of their rows in which shape."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from emp_llm.resident.form import Form, Stretch, joined
from emp_llm.resident.held_planes import Held, HeldPlanes, described, unpack
from emp_llm.runtime.device_trial import device_of_kernels

__all__ = ["Content", "described_content", "dtype_of", "join", "of_buffers"]

_living: WeakValueDictionary[tuple[int, int], HeldPlanes] = WeakValueDictionary()
"""Planes by where their buffers are, so that those of a tensor that lives are found again."""


@dataclass(frozen=True)
class Part:
    """Rows first to stop of a content, ready to multiply."""

    first: int
    stop: int
    held: Held


class Content:
    """Packed rows as a tensor.

    Args:
        planes: Planes of one number format, all on one device.
        form: Which of their rows, and in which shape.
    """

    def __init__(self, planes: Sequence[HeldPlanes], form: Form) -> None:
        self.planes = tuple(planes)
        self.form = form

    @classmethod
    def of(cls, planes: HeldPlanes) -> "Content":
        """The tensor that was packed into some planes."""
        _remember(planes)
        geometry = planes.geometry
        stretches = (Stretch(0, 0, geometry.rows),)
        return cls([planes], Form(geometry.shape, geometry.transposed, stretches))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.planes[0].number_format.torch_dtype

    @cached_property
    def rows_count(self) -> int:
        """Rows of all matrices."""
        return self.form.rows

    @cached_property
    def columns(self) -> int:
        """Weights in a row."""
        return self.form.columns

    @cached_property
    def is_linear(self) -> bool:
        """Whether it is one matrix whose rows are outputs, as torch's linear has them."""
        return len(self.form.shape) == 2 and not self.form.transposed

    @cached_property
    def buffers(self) -> list[torch.Tensor]:
        """The buffers of the planes."""
        return [planes.buffer for planes in self.planes]

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.planes[0].buffer.device

    @property
    def nbytes(self) -> int:
        """Bytes of the planes."""
        return sum(planes.buffer.nbytes for planes in self.planes)

    @cached_property
    def sign(self) -> torch.Tensor:
        """A byte of its own, whose storage stands for it: savers tell tied tensors by storages."""
        return torch.empty(1, dtype=torch.uint8)

    @cached_property
    def text(self) -> str:
        """All but the buffers, in words that `described_content` understands."""
        form = self.form
        stretches = [[it.planes, it.first, it.stop] for it in form.stretches]
        metas = [planes.meta.hex() for planes in self.planes]
        return json.dumps([form.shape, form.transposed, stretches, form.turned, metas])

    @property
    def is_whole_planes(self) -> bool:
        """Whether it is a packed tensor as it was packed, and nothing but that."""
        return len(self.planes) == 1 and self.form == Content.of(self.planes[0]).form

    def formed(self, form: Form) -> "Content":
        """The same planes, or those of them that are needed, in another form."""
        used = sorted({stretch.planes for stretch in form.stretches})
        if len(used) == len(self.planes):
            return Content(self.planes, form)
        numbers = {planes: number for number, planes in enumerate(used)}
        stretches = tuple(replace(it, planes=numbers[it.planes]) for it in form.stretches)
        return Content([self.planes[it] for it in used], replace(form, stretches=stretches))

    def moved(self, device: torch.device) -> "Content | torch.Tensor":
        """The same on another device; dense on one that has no kernels for it."""
        if device.type != "cpu" and device_of_kernels(device) is None:
            _say_that_it_is_dense(device)
            return self.dense().to(device)
        planes = [it.moved(device) for it in self.planes]
        for it in planes:
            _remember(it)
        return Content(planes, self.form)

    def shared(self) -> "Content":
        """The same in memory that processes share."""
        buffers: list[Any] = [planes.buffer.clone() for planes in self.planes]
        metas = [planes.meta for planes in self.planes]
        shared = [buffer.share_memory_() for buffer in buffers]
        return Content(list(map(HeldPlanes, shared, metas)), self.form)

    @cached_property
    def matrices(self) -> list["Content"]:
        """Each of its matrices, in two dimensions; those of experts are asked for often."""
        rows, form = self.form.row_shape[-1], self.form
        return [self.formed(form.matrix(it)) for it in range(form.rows // rows)]

    @cached_property
    def parts(self) -> list[Part]:
        """Its rows, ready to multiply."""
        return [
            Part(at, at + it.stop - it.first, self.planes[it.planes].held.part(it.first, it.stop))
            for at, it in self.form.some_rows(0, self.form.rows)
        ]

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """Some rows, decoded: [stop - first, columns]."""
        out = torch.empty(stop - first, self.columns, dtype=self.dtype, device=self.device)
        self.unpack(first, stop, out)
        return out

    def unpack(self, first: int, stop: int, out: torch.Tensor) -> None:
        """Decode some rows into memory, [stop - first, columns] and contiguous."""
        for at, stretch in self.form.some_rows(first, stop):
            part = out[at : at + stretch.stop - stretch.first]
            unpack(self.planes[stretch.planes].held, stretch.first, stretch.stop, part)

    def dense(self) -> torch.Tensor:
        """All weights, decoded, in the form's shape and strides."""
        form = self.form
        rows = self.rows(0, form.rows).view(*form.row_shape, form.columns)
        if form.transposed == form.turned:
            return rows.mT if form.transposed else rows.view(form.shape)
        return rows.mT.contiguous() if form.transposed else rows.mT.contiguous().mT


def join(contents: Sequence[Content], dim: int) -> Content | None:
    """Contents one after the other along a dimension; None if that breaks their rows."""
    planes: list[HeldPlanes] = []
    forms: list[Form] = []
    for content in contents:
        shift = len(planes)
        planes.extend(content.planes)
        moved = tuple(replace(it, planes=it.planes + shift) for it in content.form.stretches)
        forms.append(replace(content.form, stretches=moved))
    form = joined(forms, dim)
    return None if form is None else Content(planes, form)


@cache
def described_content(text: str) -> tuple[Form, tuple[bytes, ...]]:
    """The form of a content and the parameters of its planes, from its `Content.text`."""
    shape, transposed, stretches, turned, metas = json.loads(text)
    form = Form(tuple(shape), transposed, tuple(Stretch(*it) for it in stretches), turned)
    return form, tuple(bytes.fromhex(meta) for meta in metas)


@cache
def dtype_of(text: str) -> torch.dtype:
    """The dtype of the weights that a `Content.text` describes."""
    _, metas = described_content(text)
    return described(metas[0]).layout.number_format.torch_dtype


def of_buffers(buffers: Sequence[torch.Tensor], text: str) -> Content:
    """The content with these buffers and this description.

    It is asked for with each step of a compiled model, so planes that live are not made again.
    """
    form, metas = described_content(text)
    return Content(
        [_planes(buffer, meta) for buffer, meta in zip(buffers, metas, strict=True)], form
    )


def _remember(planes: HeldPlanes) -> None:
    """Have `of_buffers` find planes again, whose rows may have been checked already."""
    if type(planes.buffer) is torch.Tensor:
        _living[planes.buffer.data_ptr(), planes.buffer.numel()] = planes


@cache
def _say_that_it_is_dense(device: torch.device) -> None:
    warnings.warn(
        f"weights cannot stay packed on {device}, on which none of emp-llm's kernels run: they are "
        "dense there",
        stacklevel=2,
    )


def _planes(buffer: torch.Tensor, meta: bytes) -> HeldPlanes:
    if type(buffer) is not torch.Tensor:  # it stands for one in a graph, and has no memory
        return HeldPlanes(buffer, meta)
    where = buffer.data_ptr(), buffer.numel()
    planes = _living.get(where)
    if planes is None:
        planes = HeldPlanes(buffer, meta)
        _living[where] = planes
        buffer.__dict__["held_by_emp_llm"] = planes
    return planes
