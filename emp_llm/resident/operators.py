"""The products as operators of torch, so that compilers and exporters see them as one step each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emp_llm.resident import products
from emp_llm.resident.content import Content, described_content, dtype_of, of_buffers

__all__ = ["look_up", "multiply", "multiply_experts", "multiply_rows_by", "unpack"]

_operators: Any = torch.ops.emp_llm
_library: Any = torch.library.Library("emp_llm", "DEF")  # type: ignore[no-untyped-call]


def multiply(x: Tensor, content: Content, bias: Tensor | None = None) -> Tensor:
    """See `products.multiply`."""
    if _are_plain(x, *content.buffers):
        return products.multiply(x, content, bias)
    made: Tensor = _operators.multiply(x, content.buffers, content.text, bias)
    return made


def multiply_rows_by(x: Tensor, content: Content) -> Tensor:
    """See `products.multiply_rows_by`."""
    if _are_plain(x, *content.buffers):
        return products.multiply_rows_by(x, content)
    made: Tensor = _operators.multiply_rows_by(x, content.buffers, content.text)
    return made


def multiply_experts(x: Tensor, content: Content, ends: Tensor) -> Tensor:
    """See `products.multiply_experts`."""
    if _are_plain(x, *content.buffers):
        return products.multiply_experts(x, content, ends)
    made: Tensor = _operators.multiply_experts(x, content.buffers, content.text, ends)
    return made


def look_up(ids: Tensor, content: Content) -> Tensor:
    """See `products.look_up`."""
    if _are_plain(ids, *content.buffers):
        return products.look_up(ids, content)
    made: Tensor = _operators.look_up(ids, content.buffers, content.text)
    return made


def unpack(content: Content) -> Tensor:
    """All weights, decoded, in the content's shape."""
    if _are_plain(*content.buffers):
        return content.dense()
    made: Tensor = _operators.unpack(content.buffers, content.text)
    return made


def _are_plain(*tensors: Tensor) -> bool:
    """Whether none stands for a tensor in a graph that is being traced."""
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def _multiply(x: Tensor, planes: Sequence[Tensor], form: str, bias: Tensor | None) -> Tensor:
    return products.multiply(x, of_buffers(planes, form), bias)


def _multiply_rows_by(x: Tensor, planes: Sequence[Tensor], form: str) -> Tensor:
    return products.multiply_rows_by(x, of_buffers(planes, form))


def _multiply_experts(x: Tensor, planes: Sequence[Tensor], form: str, ends: Tensor) -> Tensor:
    return products.multiply_experts(x, of_buffers(planes, form), ends)


def _look_up(ids: Tensor, planes: Sequence[Tensor], form: str) -> Tensor:
    return products.look_up(ids, of_buffers(planes, form))


def _unpack(planes: Sequence[Tensor], form: str) -> Tensor:
    return of_buffers(planes, form).dense()


def _multiply_shape(
    x: Tensor, _planes: Sequence[Tensor], form: str, _bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], described_content(form)[0].rows)


def _multiply_rows_by_shape(x: Tensor, _planes: Sequence[Tensor], form: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], described_content(form)[0].columns)


def _multiply_experts_shape(
    x: Tensor, _planes: Sequence[Tensor], form: str, _ends: Tensor
) -> Tensor:
    return x.new_empty(len(x), described_content(form)[0].shape[-1])


def _look_up_shape(ids: Tensor, planes: Sequence[Tensor], form: str) -> Tensor:
    return planes[0].new_empty(*ids.shape, described_content(form)[0].columns, dtype=dtype_of(form))


def _unpack_shape(planes: Sequence[Tensor], form: str) -> Tensor:
    made, _ = described_content(form)
    return planes[0].new_empty_strided(made.shape, made.strides, dtype=dtype_of(form))


for _schema, _work, _shape in (
    ("multiply(Tensor x, Tensor[] planes, str form, Tensor? bias)", _multiply, _multiply_shape),
    (
        "multiply_rows_by(Tensor x, Tensor[] planes, str form)",
        _multiply_rows_by,
        _multiply_rows_by_shape,
    ),
    (
        "multiply_experts(Tensor x, Tensor[] planes, str form, Tensor ends)",
        _multiply_experts,
        _multiply_experts_shape,
    ),
    ("look_up(Tensor ids, Tensor[] planes, str form)", _look_up, _look_up_shape),
    ("unpack(Tensor[] planes, str form)", _unpack, _unpack_shape),
):
    _name = _library.define(f"{_schema} -> Tensor")
    _library.impl(_name, _work, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emp_llm::{_name}", _shape, lib=_library)
