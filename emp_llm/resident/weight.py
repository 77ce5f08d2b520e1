"""``PackedWeight``: a weight that is dense to look at and packed in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from emp_llm.errors import OptionError
from emp_llm.resident import operators
from emp_llm.resident.content import Content, of_buffers
from emp_llm.resident.operations import HANDLERS

__all__ = ["PackedWeight"]


class PackedWeight(Tensor):
    """A tensor that stays packed: shape, dtype and device are those of the dense one.

    It takes the place of a parameter's data in any module. Products with it, and rows and experts
    of it, are computed from the packed rows; whatever else is done with it decodes it for that
    moment. It cannot be written to, and has no gradient.

    Args:
        content: What it is made of.
    """

    @staticmethod
    def __new__(cls: type["PackedWeight"], content: Content) -> "PackedWeight":
        """Make the tensor."""
        return Tensor._make_wrapper_subclass(
            cls,
            content.form.shape,
            strides=content.form.strides,
            dtype=content.dtype,
            device=content.device,
            requires_grad=False,
        )

    def __init__(self, content: Content) -> None:
        self._set(content)

    def _set(self, content: Content) -> None:
        self.content = content
        for number, planes in enumerate(content.planes):
            setattr(self, f"planes_{number}", planes.buffer)

    def unpacked(self) -> Tensor:
        """The dense tensor, bit for bit, in new memory."""
        return operators.unpack(self.content)

    @property
    def packed_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.content.nbytes

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return [f"planes_{number}" for number in range(len(self.content.planes))], self.content.text

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], text: str, _size: Sequence[int], _strides: Sequence[int]
    ) -> "PackedWeight":
        buffers = [inner[f"planes_{number}"] for number in range(len(inner))]
        return PackedWeight(of_buffers(buffers, text))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        _types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """The shortest way for what a model does with each token."""
        if func is F.linear and not torch.compiler.is_dynamo_compiling() and not kwargs:
            made = _linear_now(*args)
            if made is not None:
                return made
        special = _SPECIAL.get(func)
        if special is not None:
            return special(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        _types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """What torch asks of it below autograd."""
        return _dispatch(func, args, kwargs or {})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _dispatch(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    if func is torch.ops.aten.copy_.default and _took_over(*args[:2]):
        return args[0]
    _refuse_writing(func, args, kwargs)
    handler = HANDLERS.get(func.overloadpacket)
    if handler is not None:
        packed = tree_map_only(PackedWeight, _content, (args, dict(kwargs)))
        made = handler(*packed[0], **packed[1])
        if made is not None:
            return tree_map_only(Content, PackedWeight, made)
    if func._can_decompose():
        made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    dense = tree_map_only(PackedWeight, PackedWeight.unpacked, (args, dict(kwargs)))
    return func(*dense[0], **dense[1])


def _linear_now(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The shortest way to a product; None if more than the product is asked for."""
    if type(x) is not Tensor or not isinstance(weight, PackedWeight):
        return None
    content = weight.content
    if torch.is_autocast_enabled(x.device.type):
        if content.dtype == torch.get_autocast_dtype(x.device.type):
            return None  # only the activations are cast, on the longer way
        return F.linear(x, weight.unpacked(), bias)  # packing a cast weight again takes longer
    if not content.is_linear or x.dtype != content.dtype or isinstance(bias, PackedWeight):
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    return operators.multiply(x, content, bias)


def _content(weight: PackedWeight) -> Content:
    return weight.content


def _refuse_writing(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operator that would write to a packed weight."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[number] if number < len(args) else kwargs.get(argument.name)
        if isinstance(given, PackedWeight):
            raise _unchangeable(str(func.overloadpacket))


def _took_over(target: Tensor, source: Tensor) -> bool:
    """Have a parameter become a copy of a packed weight, as when a state is loaded."""
    if not isinstance(target, PackedWeight) or not isinstance(source, PackedWeight):
        return False
    made = source.to(target.device, target.dtype)
    if not (isinstance(made, PackedWeight) and isinstance(target, torch.nn.Parameter)):
        return False
    if made.content.form.strides != target.content.form.strides or made.shape != target.shape:
        return False
    target._set(made.content)
    return True


def _address(weight: PackedWeight) -> int:
    return weight.content.sign.data_ptr()


def _shared(weight: PackedWeight) -> PackedWeight:
    if not _is_shared(weight):
        weight._set(weight.content.shared())
    return weight


def _is_shared(weight: PackedWeight) -> bool:
    buffers: list[Any] = [planes.buffer for planes in weight.content.planes]
    return all(buffer.is_shared() for buffer in buffers)


def _no_shallow_copy(*_: Tensor) -> bool:
    """Say that a dense tensor cannot be set as the data of a packed one."""
    return False


def _set_requires_grad(weight: PackedWeight, requires_grad: bool = True) -> PackedWeight:
    if requires_grad:
        raise OptionError(
            f"a weight that stays packed in memory ({list(weight.shape)}) cannot be trained: train "
            "adapters on top of it, or call emp_llm.densify(model) first"
        )
    return weight


def _set_data(weight: PackedWeight, data: Tensor) -> None:
    """As when a state is loaded; torch would ignore it, and only say that the shape has changed."""
    if not _took_over(weight, data):
        raise _unchangeable(".data =")


def _unchangeable(what: str) -> OptionError:
    return OptionError(
        f"a weight that stays packed in memory cannot be changed, as {what} would do: call "
        "emp_llm.densify(model) first"
    )


def _storage(weight: PackedWeight) -> torch.UntypedStorage:
    return weight.content.sign.untyped_storage()


def _repr(weight: PackedWeight, **_: object) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return (
        f"PackedWeight({list(weight.shape)}, {dtype}, {weight.packed_bytes:,} bytes on "
        f"{weight.device})"
    )


def _deepcopy(weight: PackedWeight, memo: dict[int, Any]) -> PackedWeight:
    """Planes are never changed, so that copies share them."""
    if id(weight) not in memo:
        memo[id(weight)] = _rebuilt(weight.content, isinstance(weight, torch.nn.Parameter))
    copy: PackedWeight = memo[id(weight)]
    return copy


def _reduced(weight: PackedWeight, _protocol: int) -> tuple[Any, ...]:
    content = weight.content
    buffers = [planes.buffer for planes in content.planes]
    return _unpickled, (buffers, content.text, isinstance(weight, torch.nn.Parameter))


def _unpickled(buffers: Sequence[Tensor], text: str, is_parameter: bool) -> PackedWeight:
    return _rebuilt(of_buffers(buffers, text), is_parameter)


def _rebuilt(content: Content, is_parameter: bool) -> PackedWeight:
    weight = PackedWeight(content)
    if not is_parameter:
        return weight
    return cast(PackedWeight, torch.nn.Parameter(weight, requires_grad=False))


_SPECIAL: Final[dict[Callable[..., object], Callable[..., object]]] = {
    Tensor.storage: _storage,
    Tensor.untyped_storage: _storage,
    Tensor.data_ptr: _address,
    Tensor.share_memory_: _shared,
    Tensor.is_shared: _is_shared,
    Tensor.requires_grad_: _set_requires_grad,
    vars(torch._C.TensorBase)["data"].__set__: _set_data,
    vars(torch._C.TensorBase)["requires_grad"].__set__: _set_requires_grad,
    torch._has_compatible_shallow_copy_type: _no_shallow_copy,
    Tensor.__repr__: _repr,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__reduce_ex__: _reduced,
}
"""What torch does with tensors outside of its operators."""

torch.serialization.add_safe_globals([_unpickled])
