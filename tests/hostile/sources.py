"""Hostile checkpoints for pruning, made from a small Llama of one bfloat16 file."""

import json
import os
import struct
from pathlib import Path

from hostile.damage import INDEX, WEIGHTS, Case, edit, make_sharded, put, rehead, replace_by_link
from support.checkpoints import DOWN, UP, H


def config(**fields: object) -> object:
    return lambda folder: put(folder / "config.json", **fields)


def shape(*sizes: int) -> object:
    """UP with another shape that fills its bytes."""
    return lambda folder: rehead(folder / WEIGHTS, lambda header: header[UP].update(shape=sizes))


def index_of(text: bytes) -> object:
    """Weights behind an index that is this text, FILE standing for the shard's name."""

    def spoil(folder: Path) -> None:
        make_sharded(folder)
        (folder / INDEX).write_bytes(text.replace(b"FILE", b"model-00001-of-00001.safetensors"))

    return spoil


def linked_index(target: str) -> object:
    def spoil(folder: Path) -> None:
        make_sharded(folder)
        replace_by_link(folder / INDEX, target)

    return spoil


def pipe_for_index(folder: Path) -> None:
    make_sharded(folder)
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


def pipe_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def code(**fields: object) -> object:
    """A config that wants code of the checkpoint to be run, which would leave a file."""

    def spoil(folder: Path) -> None:
        put(folder / "config.json", **fields)
        text = f"open({str(folder.parent / 'code_was_run')!r}, 'w')\nclass Model: pass\n"
        for name in ("configuration.py", "modeling.py", "torch.py", "transformers.py", "emp.py"):
            (folder / name).write_text(text)

    return spoil


AUTO_MAP = {
    "AutoConfig": "configuration.Model",
    "AutoModel": "modeling.Model",
    "AutoModelForCausalLM": "modeling.Model",
}


def endless_row(folder: Path) -> None:
    """A row of 2^38 weights, in a file without blocks."""
    columns = 1 << 38
    put(folder / "config.json", hidden_size=columns, intermediate_size=1)
    entry = {"dtype": "BF16", "shape": [1, columns], "data_offsets": [0, 2 * columns]}
    text = json.dumps({UP: entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / WEIGHTS, 8 + len(text) + 2 * columns)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def add_tensor(name: str) -> object:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return lambda folder: rehead(folder / WEIGHTS, lambda header: header.update({name: entry}))


def repeated_tensor(folder: Path) -> None:
    text = b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    rehead(folder / WEIGHTS, (text % b"a" + b"," + text[1:] % b"a" + b"}"))


def overlap(header: dict) -> None:
    header[UP]["data_offsets"] = header[DOWN]["data_offsets"]


def negative(header: dict) -> None:
    start, end = header[UP]["data_offsets"]
    header[UP]["data_offsets"] = [start - (1 << 32), end - (1 << 32)]


MANY = b",".join(b'"tensor.%d":"FILE"' % number for number in range(300_000))

SOURCES: dict[str, Case] = {
    # headers
    "a header longer than the file": Case(
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 20) + b"{}"),
        "its header alone needs 1,048,584",
    ),
    "a header of a terabyte": Case(
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40)),
        "over the limit of 64,000,000",
    ),
    "a header of twenty million lists": Case(
        lambda folder: rehead(folder / WEIGHTS, b'{"a":[' + b"[]," * 20_000_000 + b"0]}"),
        "more than the 4,000,000 values that any checkpoint needs",
    ),
    "a header of 60 MB of text and one wide character": Case(
        lambda folder: rehead(
            folder / WEIGHTS, b'{"a":"' + b"x" * 60_000_000 + "𝄞".encode() + b'"}'
        ),
        "tensor 'a' is 'xxx",
    ),
    "a header of 400,000 tensors": Case(
        lambda folder: rehead(
            folder / WEIGHTS,
            b"{" + b",".join(b'"%d":{"dtype":"U8"}' % i for i in range(400_000)) + b"}",
        ),
        "tensor '0' has shape None",
    ),
    "a header 100,000 objects deep": Case(
        lambda folder: rehead(folder / WEIGHTS, nested(100_000)), "too deep"
    ),
    "metadata of 50 MB that is not a text": Case(
        lambda folder: rehead(
            folder / WEIGHTS, b'{"__metadata__":{"a":[' + b"1," * 3_000_000 + b"1]}}"
        ),
        "__metadata__ has [1, 1, 1",
    ),
    "a tensor twice": Case(repeated_tensor, "has 'a' twice"),
    "tensors that overlap": Case(
        lambda folder: rehead(folder / WEIGHTS, overlap), "overlaps another"
    ),
    "negative offsets": Case(
        lambda folder: rehead(folder / WEIGHTS, negative), "has data_offsets [-"
    ),
    "a shape whose product overflows": Case(shape(1 << 62, 1 << 62), "overflows 64 bits"),
    "a shape of 65 dimensions": Case(shape(*[1] * 65), "65 dimensions, more than 64"),
    "items that do not fill bytes": Case(
        lambda folder: rehead(
            folder / WEIGHTS,
            lambda header: header.update(
                a={"dtype": "F6_E3M2", "shape": [1], "data_offsets": [0, 0]}
            ),
        ),
        "do not fill whole bytes",
    ),
    "a name of a megabyte": Case(add_tensor("n" * 1_000_000), "a name of 1,000,000 characters"),
    "a name that clears the screen": Case(
        add_tensor("\x1b[2J\x1b]0;owned\x07\n\u202e.emp_rows"), r"\x1b[2J\x1b]0;owned\x07\n\u202e"
    ),
    "a row of 2^38 weights": Case(endless_row, "has 274,877,906,944 columns"),
    # the index
    "an index of 300,000 tensors that are not there": Case(
        index_of(b'{"weight_map":{' + MANY + b"}}"), "lacks tensor 'tensor.0'"
    ),
    "an index of five million lists": Case(
        index_of(b'{"weight_map":[' + b"[]," * 5_000_000 + b"0]}"),
        "more than the 4,000,000 values",
    ),
    "an index that names a tensor twice": Case(
        index_of(b'{"weight_map":{"a":"FILE","a":"FILE"}}'), "has 'a' twice"
    ),
    "an index that leads out": Case(
        index_of(b'{"weight_map":{"a":"../outside/secret.safetensors"}}'), "without a folder"
    ),
    "an index of a file name of 300 bytes": Case(
        index_of(b'{"weight_map":{"a":"%s.safetensors"}}' % (b"n" * 300)), "names the file"
    ),
    "an index of a name with an escape sequence": Case(
        index_of(b'{"weight_map":{"a":"\\u001b[31m\\n.safetensors"}}'), r"\x1b[31m\n.safetensors"
    ),
    "an index that is a pipe": Case(pipe_for_index, "not a regular file"),
    "an index that is an endless device": Case(
        linked_index("/dev/zero"), "is a link to /dev/zero, which is not a file of this checkpoint"
    ),
    "an index that is a link to itself": Case(
        linked_index(INDEX), "which is not a file of this checkpoint"
    ),
    "weights that are a pipe": Case(pipe_for_weights, "model.safetensors, which is not there"),
    # the config
    "a config that is a secret elsewhere": Case(
        lambda folder: replace_by_link(folder / "config.json", "../outside/secret.json"),
        "config.json: is a link to",
    ),
    "a config of half a character": Case(config(note="\ud800"), "is not UTF-8 text"),
    "a config 400 objects deep": Case(config(note=json.loads(nested(400))), "too deep"),
    "a config of 70 MB": Case(config(note="x" * 70_000_000), "longer than the 64,000,000 bytes"),
    "a config of 10^9 layers": Case(
        config(num_hidden_layers=10**9), "'num_hidden_layers' is 1000000000; no model has more"
    ),
    "a config of 5,000 layers": Case(
        config(num_hidden_layers=5_000),
        "a far larger model than one of the checkpoint's 3 tensors",
    ),
    "a config of 10^9 labels": Case(config(num_labels=10**9), "'num_labels' is 1000000000;"),
    "a config of a negative size": Case(config(hidden_size=-H), "cannot be built from it"),
    "a config of a broken size": Case(config(hidden_size=1.5), "refuses this config"),
    "a config of architectures that are no list": Case(
        config(architectures=5), "architectures is 5; it must be a list"
    ),
    "a config of an architecture in the checkpoint": Case(
        code(architectures=["Model"], auto_map=AUTO_MAP), "runs no code from a checkpoint"
    ),
    "a config of a model type in the checkpoint": Case(
        code(model_type="mine", auto_map=AUTO_MAP), "runs no code from a checkpoint"
    ),
    "a config of a model type elsewhere": Case(
        code(model_type="mine", auto_map={"AutoConfig": "someone/model--configuration.Model"}),
        "runs no code from a checkpoint",
    ),
    # the small files
    "a tokenizer that is a secret elsewhere": Case(
        lambda folder: (folder / "tokenizer.json").symlink_to("../outside/secret.json"),
        "tokenizer.json: is a link to",
    ),
    "a tokenizer that is a device": Case(
        lambda folder: (folder / "tokenizer.json").symlink_to("/dev/zero"),
        "tokenizer.json: is a link to /dev/zero",
    ),
    "a tokenizer that is a link to itself": Case(
        lambda folder: (folder / "tokenizer.json").symlink_to("tokenizer.json"),
        "tokenizer.json: is a link to",
    ),
    "a model card of 20 MB": Case(
        lambda folder: (folder / "README.md").write_bytes(b"x" * 20_000_000),
        "README.md: has 20,000,000 bytes, too many for a model card",
    ),
    "a file with a line end in its name, linked elsewhere": Case(
        lambda folder: (folder / "a\n\x1b[2Jb.json").symlink_to("/etc/passwd"), r"a\n\x1b[2Jb.json"
    ),
}


def harmless(folder: Path) -> None:
    """What looks hostile and is not: code that is not run, pipes that are left, odd names."""
    code(auto_map=AUTO_MAP)(folder)  # type: ignore[operator]
    os.mkfifo(folder / "pipe.json")
    (folder / "folder").symlink_to("../outside")
    add_tensor("../../x")(folder)  # type: ignore[operator]
    add_tensor("/etc\0passwd")(folder)  # type: ignore[operator]
    add_tensor("\x1b[2J\nodd\u202e")(folder)  # type: ignore[operator]
    edit(folder / "config.json", lambda content: content.update(note=[float("inf"), "\x1b[2J"]))
