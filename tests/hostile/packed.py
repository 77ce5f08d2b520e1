"""Hostile packed checkpoints, made from one that was written by `prune`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile.damage import WEIGHTS, Case, change_tensors, edit, replace_by_link
from support.checkpoints import DOWN, GATE, UP

ROWS, META = UP + ".emp_rows", UP + ".emp_meta"
REPORT = "emp_report.json"

Tensors = dict[str, np.ndarray]


def planes(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / WEIGHTS, change)


def line(field: int, value: int) -> Callable[[Path], None]:
    """Set a number of the row table's first line: kept, escaped, base."""

    def change(tensors: Tensors) -> None:
        tensors[ROWS].view("<u2")[field] = value

    return planes(change)


def parameter(*changes: tuple[int, int]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for field, value in changes:
            tensors[META][field] = value

    return planes(change)


def record(at: int, flip: int) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[UP][at] ^= flip

    return planes(change)


def whole_row_of_zeros(rows: int, columns: int) -> Callable[[Path], None]:
    """A tensor of this shape that keeps nothing: a few bytes for any size."""

    def change(tensors: Tensors) -> None:
        item = 2 if columns <= 0xFFFF else 4
        tensors[META][6:8] = rows, columns
        tensors[ROWS] = np.zeros(-(-rows * 3 * item // 16) * 16, np.uint8)
        tensors[UP] = np.zeros(0, np.uint8)

    return planes(change)


def doubled(tensors: Tensors) -> None:
    tensors[ROWS + ".emp_rows"], tensors[ROWS + ".emp_meta"] = tensors[ROWS], tensors[META]


def longer(name: str, nbytes: int) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = np.append(tensors[name], np.zeros(nbytes, tensors[name].dtype))

    return planes(change)


def retyped(name: str, dtype: str) -> Callable[[Path], None]:
    return planes(lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))


def reshaped(name: str) -> Callable[[Path], None]:
    return planes(lambda tensors: tensors.update({name: tensors[name].reshape(1, -1)}))


def without(name: str) -> Callable[[Path], None]:
    return planes(lambda tensors: tensors.pop(name))


PACKED: dict[str, Case] = {
    "a mask of another number of weights than its table line": Case(
        record(0, 1), "row 0: its mask"
    ),
    "more weights kept than columns": Case(line(0, 13), "is impossible"),
    "more escapes than weights kept": Case(line(1, 13), "is impossible"),
    "escapes that no weight marks": Case(line(1, 1), "it marks another number of escapes"),
    "a window past all numbers": Case(line(2, 0xFFFF), "is impossible"),
    "a window that reaches infinity": Case(line(2, 0x7F7F), "it holds NaN or infinity"),
    "records past the end": Case(line(0, 12), "its row table describes"),
    "garbage behind the records": Case(longer(UP, 16), "its row table describes"),
    "a row table too long": Case(longer(ROWS, 16), "its row table has"),
    "parameters too long": Case(longer(META, 1000), "emp_meta has"),
    "a version to come": Case(parameter((0, 3)), "version 3 of the format"),
    "a number format of 2^62": Case(parameter((1, 1 << 62)), "is not that of a packed tensor"),
    "a negative number of bits": Case(parameter((2, -1)), "dropped_bits is -1"),
    "a radix of zero": Case(parameter((3, 0)), "radix is 0"),
    "an alignment of 2^40": Case(parameter((4, 1 << 40)), "align is 1099511627776"),
    "a negative shape": Case(parameter((6, -20)), "is not that of a packed tensor"),
    "a shape that overflows": Case(parameter((6, 1 << 62), (7, 1 << 62)), "emp-llm takes up to"),
    "a row of 2^47 weights": Case(whole_row_of_zeros(1, 1 << 47), "140,737,488,355,328 columns"),
    "2^38 weights in a few bytes": Case(
        whole_row_of_zeros(1 << 16, 1 << 22), "this is not a valid checkpoint"
    ),
    "a plane missing": Case(without(UP), f"lacks its plane '{UP}'"),
    "a row table alone": Case(without(META), "is there without its other planes"),
    "a plane of two tensors": Case(planes(doubled), "would be a plane of two packed tensors"),
    "a plane of another dtype": Case(retyped(META, "<i4"), "is I32 [8]; it must be I64"),
    "a plane of two dimensions": Case(reshaped(ROWS), "it must be U8 of one dimension"),
}


def tensor(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / REPORT, lambda report: report["tensors"][UP].update(fields))


def report(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / REPORT, change)


def add_file(name: str) -> Callable[[Path], None]:
    fields = {"bytes": 1, "hash": "xxh3-128:0"}
    return report(lambda content: content["files"].update({name: fields}))


NONE_OF_OURS = "is not a report that emp-llm wrote: "

REPORTS: dict[str, Case] = {
    "a list": Case(
        lambda folder: (folder / REPORT).write_text("[]"), "holds a JSON list, not an object"
    ),
    "nothing in it": Case(
        lambda folder: (folder / REPORT).write_text("{}"), NONE_OF_OURS + "emp_llm_version is None"
    ),
    "tensors that are a list": Case(
        report(lambda content: content.update(tensors=[])),
        NONE_OF_OURS + "tensors is not an object",
    ),
    "five million lists": Case(
        lambda folder: (folder / REPORT).write_bytes(b'{"a":[' + b"[]," * 5_000_000 + b"0]}"),
        "more than the 4,000,000 values",
    ),
    "400 objects deep": Case(
        lambda folder: (folder / REPORT).write_bytes(b'{"a":' * 400 + b"1" + b"}" * 400), "too deep"
    ),
    "a secret elsewhere": Case(
        lambda folder: replace_by_link(folder / REPORT, "../outside/secret.json"), "is a link to"
    ),
    "a shape of a million sizes": Case(tensor(shape=[2] * 1_000_000), f"tensors.{UP}.shape is [2,"),
    "a negative size": Case(tensor(shape=[-1, 12]), f"tensors.{UP}.shape is [-1, 12]"),
    "more weights than can be counted": Case(tensor(weights=1 << 63), f"tensors.{UP}.weights is"),
    "a number of 4,000 digits": Case(tensor(mass=10**4000), f"tensors.{UP}.mass is"),
    "a mass of infinity": Case(tensor(mass=float("inf")), "Infinity is not a JSON number"),
    "true for a number": Case(tensor(kept=True), f"tensors.{UP}.kept is True"),
    "no kind": Case(tensor(kind=None), f"tensors.{UP}.kind is None"),
    "a file elsewhere": Case(
        add_file("../outside/secret.json"), NONE_OF_OURS + "'../outside/secret.json' is not a file"
    ),
    "a file by its whole path": Case(
        add_file("/etc/passwd"), "'/etc/passwd' is not a file beside it"
    ),
    "a file name that no system takes": Case(add_file("n" * 5000), "is not a file beside it"),
    "a file name with an escape sequence": Case(add_file("\x1b[2J\0"), r"\x1b[2J\x00"),
    "no tensor": Case(report(lambda content: content["tensors"].pop(GATE)), f"'{GATE}'"),
    "other totals": Case(
        report(lambda content: content["totals"].update(model=[])), "totals.model is not an object"
    ),
    "a rule that is none": Case(
        report(lambda content: content["rule"].update(granularity="everything")),
        "rule.granularity is 'everything'",
    ),
    "a tensor that is not there": Case(
        report(lambda content: content["tensors"].update(x=content["tensors"][DOWN])), "'x'"
    ),
}
