"""Do two checkouts of emp-llm write the same bytes and reports, as after a mere refactoring?

    git worktree add ../before COMMIT
    python benchmarks/compare_checkouts.py ../before . demo/model

Each checkout prunes the model at every granularity, packed and dense, and with scores and repair
from data; inspects, verifies, compares and unpacks what came out. Files are compared byte for byte,
answers in JSON field by field, times and memory aside. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine

GRANULARITIES = ("row", "layer", "model")
FORMATS = ("packed", "dense")
VARYING = ("seconds", "peak_memory_bytes", "bytes_per_second")
CALIBRATED = (
    *("--criterion", "wanda", "--repair", "obs", "--beta", "0.9"),
    *("--calibration", "text.txt", "--samples", "4", "--length", "32"),
)


def main() -> None:
    """Compare two checkouts on some models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, default=Path("demo/text.txt"), help="To calibrate on.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "models": {}}
    for model in given.models:
        before, after = (
            results_of(root, model, given.text) for root in (given.before, given.after)
        )
        differing = sorted(name for name in before | after if before.get(name) != after.get(name))
        result["models"][model.name] = {"compared": len(before), "differing": differing}
        print(f"{model.name}: {len(before)} results compared, {len(differing)} differ")
        for name in differing:
            print(f"  {name}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any(found["differing"] for found in result["models"].values()):
        raise SystemExit(1)


def results_of(root: Path, model: Path, text: Path) -> dict[str, str]:
    """All that a checkout writes and answers, each by a name, as a digest.

    The folders have the same names for both, in a temporary folder, so that no path tells them
    apart.
    """
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").symlink_to(model.resolve())
        (folder / "text.txt").symlink_to(text.resolve())
        for granularity in GRANULARITIES:
            answer(found, root, folder, "inspect", "model", "--granularity", granularity)
            for output_format in FORMATS:
                out = f"{granularity}-{output_format}"
                rule = ("--granularity", granularity, "--format", output_format)
                answer(found, root, folder, "prune", "model", "--out", out, *rule)
                answer(found, root, folder, "verify", out, "--against", "model")
                answer(found, root, folder, "diff", "model", out)
        answer(found, root, folder, "prune", "model", "--out", "calibrated", *CALIBRATED)
        answer(found, root, folder, "verify", "calibrated", "--against", "model")
        answer(found, root, folder, "unpack", "row-packed", "--out", "unpacked")
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_relative_to(folder / "model"):
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def answer(found: dict[str, str], root: Path, folder: Path, *arguments: str) -> None:
    """Run a command of a checkout and note what it answers."""
    path = os.pathsep.join(str((root / part).resolve()) for part in (".", "kernels", "cli"))
    done = subprocess.run(
        [sys.executable, "-m", "emp_cli", *arguments, "--json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{root}: {' '.join(arguments)}: {done.stderr.strip()}")
    found[f"$ {' '.join(arguments)}"] = json.dumps(without_varying(json.loads(done.stdout)))


def without_varying(value: object) -> object:
    """A value of JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_varying(v) for k, v in value.items() if k not in VARYING}
    return [without_varying(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
