"""Written folders of one file that are changed so that nothing in them contradicts itself.

Whoever does that knows how to make every checksum, count and size right: only the source tells.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from emp_kernels.dispatch import pack_rows
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Threshold
from safetensors.torch import load_file, save_file
from support.packing import rows_of

from emp_llm.report.folder_files import describe_files
from emp_llm.report.totals import count_totals
from emp_llm.tensors.geometry import Geometry
from emp_llm.tensors.packed import PackedTensor, padding

FORMAT_OF = {torch.bfloat16: FORMATS["BF16"], torch.float32: FORMATS["F32"]}
ALL_BUT_ZEROS = Threshold(0, 0)


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a file of JSON."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def replace_weights(folder: Path, name: str, weights: torch.Tensor) -> None:
    """Put other weights in the place of a tensor, packed if it is, and make all else agree."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    packed = name + ".emp_meta" in tensors
    report = json.loads((folder / "emp_report.json").read_text())
    fields = report["tensors"][name]
    rows = rows_of(_patterns(weights), transposed=fields.get("transposed", False))
    if packed:
        planes = _planes(name, weights, fields["transposed"])
        tensors.update(planes)
        data = b"".join(plane.numpy().tobytes() for plane in planes.values())
    else:
        tensors[name] = weights
        data = rows.tobytes() if fields["pruned"] else _patterns(weights).tobytes()
    save_file(tensors, path, {"format": "pt"})
    if fields["pruned"]:
        fields["kept"] = int((rows != 0).sum())
        fields["sparsity"] = float(f"{(rows == 0).mean():.6g}")
    fields["bytes_after"] = len(data)
    fields["hash"] = f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"
    for part, sums in zip(("targets", "model"), count_totals(report["tensors"]), strict=True):
        report["totals"][part].update(sums)
    (folder / "emp_report.json").write_text(json.dumps(report))
    agree(folder)


def agree(folder: Path) -> None:
    """Have the report describe the files as they are now."""
    described = describe_files(folder, [path.name for path in folder.glob("*.safetensors")])
    edit_json(folder / "emp_report.json", lambda report: report.update(files=described))


def _patterns(weights: torch.Tensor):
    storage = torch.int16 if weights.dtype == torch.bfloat16 else torch.int32
    array = weights.contiguous().view(storage).numpy()
    return array.view(FORMAT_OF[weights.dtype].storage)


def _planes(name: str, weights: torch.Tensor, transposed: bool) -> dict[str, torch.Tensor]:
    geometry = Geometry(
        number_format=FORMAT_OF[weights.dtype], shape=tuple(weights.shape), transposed=transposed
    )
    layout = RowLayout(number_format=geometry.number_format, columns=geometry.columns)
    packed = PackedTensor(geometry, layout)
    rows = pack_rows(rows_of(_patterns(weights), transposed=transposed), layout, ALL_BUT_ZEROS)
    records = rows.payload.tobytes()
    parts = [
        (name, records + padding(len(records))),
        (name + ".emp_rows", packed.encode_table(rows.table)),
        (name + ".emp_meta", packed.encode_meta()),
    ]
    planes = {key: torch.frombuffer(bytearray(part), dtype=torch.uint8) for key, part in parts}
    return planes | {name + ".emp_meta": planes[name + ".emp_meta"].view(torch.int64)}
