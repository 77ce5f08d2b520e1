"""What torch's operators mean for packed rows.

Each handler gets an operator's arguments with `Content` in place of packed weights. It returns what
the operator gives, as contents where that is packed again; or None if it cannot, and then the
weights are decoded.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from emp_llm.resident import operators
from emp_llm.resident.casting import cast
from emp_llm.resident.content import Content, join

__all__ = ["HANDLERS"]

aten = torch.ops.aten

Made = Content | Tensor | None


def _same(weight: Content, *_: object, **__: object) -> Content:
    return weight


def _to_copy(
    weight: Content,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_: object,
) -> Made:
    if device is not None and device.type == "meta":
        form = weight.form
        return torch.empty_strided(
            form.shape, form.strides, dtype=dtype or weight.dtype, device=device
        )
    made = weight if dtype is None or dtype == weight.dtype else cast(weight, dtype)
    if device is None:
        return made
    return made.moved(device) if isinstance(made, Content) else made.to(device)


def _transpose(weight: Content, first: int, second: int) -> Content | None:
    dims = len(weight.form.shape)
    which = {first % dims, second % dims}
    if len(which) == 1:
        return weight
    return _exchanged(weight) if which == {dims - 2, dims - 1} else None


def _exchanged(weight: Content) -> Content:
    return Content(weight.planes, weight.form.exchanged())


def _permute(weight: Content, order: Sequence[int]) -> Content | None:
    dims = len(weight.form.shape)
    places = [place % dims for place in order]
    if places == list(range(dims)):
        return weight
    last = [dims - 1, dims - 2]
    return _exchanged(weight) if places == [*range(dims - 2), *last] else None


def _taken(weight: Content, dim: int, places: Sequence[int]) -> Content | None:
    form = weight.form.taken(dim, places)
    return None if form is None else weight.formed(form)


def _select(weight: Content, dim: int, place: int) -> Made:
    dims = len(weight.form.shape)
    dim %= dims
    place = int(place) % weight.form.shape[dim]
    if dims == 3 and dim == 0:
        return weight.matrices[place]
    one = _taken(weight, dim, range(place, place + 1))
    if one is None:
        return None
    shape = [*one.form.shape[:dim], *one.form.shape[dim + 1 :]]
    return _view(one, shape) or operators.unpack(one).select(dim, 0)


def _slice(
    weight: Content,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Content | None:
    everywhere = range(weight.form.shape[dim])
    places = everywhere[start:end:step]
    if places == everywhere:  # along the columns, too
        return weight
    return _taken(weight, dim, places) if len(places) else None


def _split(weight: Content, size: int, dim: int = 0) -> list[Content] | None:
    length = weight.form.shape[dim]
    return _split_with_sizes(
        weight, [min(size, length - start) for start in range(0, length, size)], dim
    )


def _split_with_sizes(weight: Content, sizes: Iterable[int], dim: int = 0) -> list[Content] | None:
    parts, start = [], 0
    for size in sizes:
        part = _taken(weight, dim, range(start, start + size)) if size else None
        if part is None:
            return None
        parts.append(part)
        start += size
    return parts


def _unbind(weight: Content, dim: int = 0) -> list[Content] | None:
    parts = [_select(weight, dim, place) for place in range(weight.form.shape[dim])]
    found = [part for part in parts if isinstance(part, Content)]
    return found if len(found) == len(parts) else None


def _index_select(weight: Content, dim: int, places: Tensor) -> Content | None:
    return _taken(weight, dim, places.tolist()) if places.numel() else None


def _index(weight: Content, places: Sequence[Tensor | None]) -> Made:
    if len(places) != 1 or places[0] is None or places[0].is_floating_point():
        return None
    chosen = places[0]
    if chosen.dtype in (torch.bool, torch.uint8) or not chosen.numel():
        return None
    length = weight.form.shape[0]
    chosen = torch.where(chosen < 0, chosen + length, chosen)
    if len(weight.form.shape) == 2:
        return None if weight.form.transposed else operators.look_up(chosen, weight)
    return _index_select(weight, 0, chosen) if chosen.ndim == 1 else None


def _view(weight: Content, shape: Sequence[int]) -> Content | None:
    known = [length for length in shape if length != -1]
    whole = torch.Size(weight.form.shape).numel()
    rest = whole // max(torch.Size(known).numel(), 1)
    form = weight.form.reshaped([rest if length == -1 else length for length in shape])
    return None if form is None else weight.formed(form)


def _unsqueeze(weight: Content, dim: int) -> Content | None:
    shape = list(weight.form.shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return _view(weight, shape)


def _squeeze(weight: Content, dims: int | Sequence[int] | None = None) -> Content | None:
    shape = weight.form.shape
    if dims is None:
        dims = range(len(shape))
    chosen = {dim % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}
    return _view(weight, [it for dim, it in enumerate(shape) if dim not in chosen or it != 1])


def _expand(weight: Content, shape: Sequence[int], **_: object) -> Content | None:
    return weight if tuple(shape) == weight.form.shape else None


def _cat(weights: Sequence[Content | Tensor], dim: int = 0) -> Content | None:
    contents = [weight for weight in weights if isinstance(weight, Content)]
    if len(contents) < len(weights) or len({(it.dtype, it.device) for it in contents}) > 1:
        return None
    dim %= len(contents[0].form.shape)
    others = {(*it.form.shape[:dim], *it.form.shape[dim + 1 :]) for it in contents}
    return join(contents, dim) if len(others) == 1 else None


def _stack(weights: Sequence[Content | Tensor], dim: int = 0) -> Content | None:
    apart = [_unsqueeze(weight, dim) if isinstance(weight, Content) else None for weight in weights]
    found = [weight for weight in apart if weight is not None]
    return _cat(found, dim) if len(found) == len(weights) else None


def _linear(x: Tensor, weight: Content, bias: Tensor | None = None) -> Made:
    if x.dtype != weight.dtype or len(weight.form.shape) != 2 or x.ndim < 1:
        return None
    if weight.form.transposed:
        flat = x.reshape(-1, x.shape[-1])
        product = operators.multiply_rows_by(flat, weight).view(*x.shape[:-1], weight.form.columns)
        return product if bias is None else product + bias
    return operators.multiply(x, weight, bias)


def _mm(left: Content | Tensor, right: Content | Tensor) -> Made:
    if isinstance(right, Content):
        return _linear(left, _exchanged(right)) if isinstance(left, Tensor) else None
    made = _linear(right.t(), left) if isinstance(left, Content) else None
    return made.t() if isinstance(made, Tensor) else None


def _addmm(
    bias: Tensor, left: Content | Tensor, right: Content | Tensor, *, beta: int = 1, alpha: int = 1
) -> Made:
    if not isinstance(right, Content) or not isinstance(left, Tensor) or not beta == alpha == 1:
        return None
    if bias.ndim != 1 or len(bias) != right.form.shape[1]:
        return None
    return _linear(left, _exchanged(right), bias)


def _bmm(left: Content | Tensor, right: Content | Tensor) -> Made:
    pairs = zip(_each(left), _each(right), strict=True)
    made = [_mm(*pair) for pair in pairs]
    found = [it for it in made if isinstance(it, Tensor)]
    return torch.stack(found) if found and len(found) == len(made) else None


def _each(batch: Content | Tensor) -> Sequence[Content | Tensor]:
    return batch.matrices if isinstance(batch, Content) else batch.unbind()


def _embedding(weight: Content, ids: Tensor, *_: object, **__: object) -> Made:
    if weight.form.transposed:
        return None
    return operators.look_up(ids, weight)


def _grouped_mm(
    x: Content | Tensor,
    weight: Content | Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Made:
    """Tokens sorted by expert, each times its expert's weights; only called experts are decoded."""
    if not isinstance(x, Tensor) or not isinstance(weight, Content) or offs is None:
        return None
    if bias is not None or x.ndim != 2 or x.dtype != weight.dtype or out_dtype:
        return None
    return operators.multiply_experts(x, weight, offs)


HANDLERS: Final[dict[Any, Callable[..., Any]]] = {
    aten.detach: _same,
    aten.alias: _same,
    aten.clone: _same,
    aten.lift_fresh: _same,
    aten.lift_fresh_copy: _same,
    aten.contiguous: _same,
    aten._to_copy: _to_copy,
    aten.t: _exchanged,
    aten.transpose: _transpose,
    aten.permute: _permute,
    aten.select: _select,
    aten.slice: _slice,
    aten.split: _split,
    aten.split_with_sizes: _split_with_sizes,
    aten.unbind: _unbind,
    aten.index_select: _index_select,
    aten.index: _index,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.expand: _expand,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.linear: _linear,
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.bmm: _bmm,
    aten.embedding: _embedding,
    aten._grouped_mm: _grouped_mm,
}
"""What each operator does with packed rows, by its name in torch."""
