"""The names that the pickle of a torch checkpoint may hold: those that weights_only allows."""

from typing import Final

from emp_llm.checkpoint.dtypes import TORCH_NAMES

__all__ = [
    "ALLOWED",
    "DTYPES",
    "ORDERED_DICT",
    "REBUILD",
    "REBUILD_TYPE",
    "STORAGES",
    "TENSORS",
    "UNTYPED",
]

STORAGES: Final = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
}
UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_OTHER_STORAGES = ("ComplexDouble", "QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")
DTYPES: Final = {torch_name: dtype for dtype, torch_name in TORCH_NAMES.items()}
_OTHER_DTYPES = ("complex128", "complex32", "qint8", "quint8", "qint32", "quint4x2", "quint2x4")
TENSORS = ("torch.nn.parameter.Parameter", "torch.Tensor")
REBUILD = "torch._utils._rebuild_"
REBUILD_TYPE = "torch._tensor._rebuild_from_type_v2"
ORDERED_DICT = "collections.OrderedDict"
# What torch allows as well, and what makes no tensor that safetensors could hold.
_OTHERS = (
    *("collections.Counter", "torch.Size", "torch.device", "torch.serialization._get_layout"),
    *("_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex"),
    *(f"torch.per_{kind}" for kind in ("tensor_affine", "channel_affine", "tensor_symmetric")),
    *(f"torch.per_{kind}" for kind in ("channel_symmetric", "channel_affine_float_qparams")),
    *(f"{REBUILD}{kind}" for kind in ("qtensor", "sparse_tensor", "nested_tensor")),
    *(f"{REBUILD}{kind}" for kind in ("meta_tensor_no_storage", "wrapper_subclass")),
    *(f"{REBUILD}device_tensor_from_{kind}" for kind in ("numpy", "cpu_tensor")),
    *(f"torch.{name}" for name in _OTHER_DTYPES),
    *(f"torch.{name}Storage" for name in _OTHER_STORAGES),
    "torch.storage.TypedStorage",
)
ALLOWED: Final = frozenset(
    {
        *(ORDERED_DICT, REBUILD_TYPE, *TENSORS, *_OTHERS, *UNTYPED),
        *(f"{REBUILD}{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")),
        *(f"{REBUILD}{kind}" for kind in ("parameter", "parameter_with_state")),
        *(f"{module}.{name}" for name in STORAGES for module in ("torch", "torch.cuda")),
        *(f"torch.{name}" for name in DTYPES),
    }
)
