"""JSON that is nearly right: values of a wrong type, size or place, fields twice or not at all."""

import json
from typing import Any

from fuzzing.choices import Choices, damaged

NAMES = [
    *("a", "b", "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "__metadata__", ""),
    *("../../x", "/etc/passwd", "a\0b", "a\nb", "a\x1b[2Jb", "\u202eb", "é", "𝄞", "a" * 1025),
    *("n" * 300 + ".safetensors", "../x.safetensors", "x\0.safetensors", ".safetensors"),
    *("x.emp_rows", "x.emp_meta", "x.emp_meta.emp_meta", ".emp_rows", "1" * 5000, "a.1.2"),
]
TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\udc00", b"\0"),
    *(
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e400",
        b"-0",
        b"0.0",
        b"1E2",
        b" ",
        b"\xef\xbb\xbf",
    ),
    *(b"\xff", b"\xed\xa0\x80", b"[[[[", b"{}", b"[]", b'""', b"9" * 5000, b"[" * 2000),
    *(b"18446744073709551616", b"-1", b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"'),
]


def odd_value(choices: Choices) -> Any:
    """A value where another was expected."""
    return choices.pick(
        [
            *(None, True, False, "", "U8", [], {}, [[]], [None], 0.0, -0.0, 1.5, 1e308),
            *(choices.edge(), choices.edge(), [choices.edge()], [choices.edge(), choices.edge()]),
            *({"a": {}}, "\ud800", choices.pick(NAMES)),
        ]
    )


def spoiled(choices: Choices, value: Any) -> Any:
    """A value of JSON with one part of it changed, at any depth."""
    if isinstance(value, dict) and value and not choices.once_in(8):
        key = choices.pick(sorted(value))
        rest = {name: part for name, part in value.items() if name != key}
        how = choices.number(0, 9)
        if how == 0:
            return rest
        if how == 1:
            return {**rest, choices.pick(NAMES): value[key]}
        if how == 2:
            return {**value, choices.pick(NAMES): value[choices.pick(sorted(value))]}
        return {
            name: spoiled(choices, part) if name == key else part for name, part in value.items()
        }
    if isinstance(value, list) and value and not choices.once_in(4):
        at = choices.place(len(value))
        how = choices.number(0, 5)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return [*value, value[at]]
        return [*value[:at], spoiled(choices, value[at]), *value[at + 1 :]]
    if type(value) is int and not choices.once_in(4):
        return choices.pick([value + 1, value - 1, -value, value * 2, choices.edge(), float(value)])
    return odd_value(choices)


def text_of(choices: Choices, value: Any) -> bytes:
    """JSON of a value, maybe with a field twice, maybe damaged."""
    text = json.dumps(value, ensure_ascii=choices.once_in(2)).encode(errors="surrogatepass")
    if choices.once_in(16) and text.startswith(b"{") and len(text) > 2:
        text = text[:-1] + b"," + text[1:]
    return damaged(choices, text, TOKENS) if choices.once_in(3) else text
