"""Install emp-llm as its users do, and load a packed model by programs that never import it.

    python benchmarks/check_installed.py [--environment FOLDER] [--runs N]

A wheel is built from a copy of this checkout and installed into a virtual environment; then the
copy is installed as editable. After each, a script and a pipeline load a packed model, and have to
give what the dense one gives; programs without torch must not import emp-llm; and after it is
uninstalled, nothing may be left of it but kernels that numba has compiled, which pip does not know
of, and transformers has to refuse the model. The time that
starting Python and importing torch takes, with the entry point and without, is printed, too.

The environment is a new one that is deleted at the end, which takes minutes, or FOLDER: it is made
if it is not there, and is left with everything but emp-llm.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import venv
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
COMPILED = {".nbi", ".nbc"}
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")

SCRIPT = """
import hashlib, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
found = hashlib.sha256()
for name, weight in sorted(model.state_dict().items()):
    found.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
print(found.hexdigest())
"""
BEFORE = (
    "",
    "import torch",
    "from transformers import PreTrainedModel",
    "from transformers.quantizers import AutoQuantizationConfig",
)
"""What a script may import first. All but torch import it while they are imported themselves."""
PIPELINE = """
import sys
from transformers import pipeline
write = pipeline("text-generation", model=sys.argv[1])
print(write("The sky is", max_new_tokens=12, do_sample=False)[0]["generated_text"])
"""
WITHOUT_TORCH = "import sys; print('emp_llm' in sys.modules or 'wrapt' in sys.modules)"


def main() -> None:
    """Install in both ways, check and print; exit status 1 at the first thing that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--environment", type=Path, help="a virtual environment to use or to make")
    parser.add_argument("--runs", type=int, default=50, help="times that each start is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
        environment = Environment(options.environment or folder / "environment")
        for how in "wheel", "editable":
            with environment.installed(how, folder):
                check(environment, folder)
                print(f"{how}: packed models load", flush=True)
                if how == "wheel":
                    time_starts(environment, options.runs)
            check_nothing_is_left(environment, folder)
            print(f"{how}: uninstalled, nothing is left")


class Environment:
    """A virtual environment.

    Args:
        folder: Where it is; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._bin = folder.resolve() / "bin"
        if not (self._bin / "python").exists():
            venv.create(folder, with_pip=True)
            pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
            self._pip("install", *(pin for pin in pins if pin.startswith("torch==")))
        (self.packages,) = folder.resolve().glob("lib/python*/site-packages")

    @contextmanager
    def installed(self, how: str, folder: Path) -> Iterator[None]:
        """Have emp-llm installed from a checkout that is at `folder`/source."""
        source = folder / "source"
        what = ["-e", source]
        if how == "wheel":
            self._pip("wheel", "--no-deps", "--wheel-dir", folder, source)
            what = list(folder.glob("*.whl"))
        self._pip("install", "-c", ROOT / "constraints.txt", *what)
        try:
            yield
        finally:
            self._pip("uninstall", "--yes", "emp-llm")

    def _pip(self, command: str, *words: object) -> None:
        quiet = ["--quiet", "--disable-pip-version-check"]
        self.run("pip", command, *quiet, *(["--no-compile"] * (command == "install")), *words)

    def run(self, program: str, *words: object) -> str:
        """Stdout of one of its programs.

        Raises:
            SystemExit: If it fails.
        """
        result = self.start(program, *words)
        if result.returncode:
            raise SystemExit(f"{program} {' '.join(map(str, words))}\n{result.stderr}")
        return result.stdout

    def start(
        self, program: str, *words: object, autoload: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, which finds nothing that is installed elsewhere."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [self._bin / program, *map(str, words)],
            env=kept | {AUTOLOAD: str(int(autoload)), "HF_HUB_OFFLINE": "1"},
            cwd=self._bin,
            capture_output=True,
            text=True,
            check=False,
        )


def check(environment: Environment, folder: Path) -> None:
    """Have programs load a packed model that know nothing of emp-llm."""
    packed, dense = folder / "packed", folder / "dense"
    for out, format_ in (packed, "packed"), (dense, "dense"):
        model = ROOT / "demo" / "model"
        environment.run("emp-llm", "prune", model, "--out", out, "--format", format_, "--overwrite")
    for program, firsts in (SCRIPT, BEFORE), (PIPELINE, BEFORE[:1]):
        wanted = environment.run("python", "-c", program, dense)
        for first in firsts:
            given = environment.start("python", "-c", f"{first}\n{program}", packed)
            if given.stdout != wanted or "emp-llm" in given.stderr:
                raise SystemExit(f"after {first!r} the packed model gives {given}, not {wanted!r}")
    if environment.run("python", "-c", WITHOUT_TORCH) != "False\n":
        raise SystemExit("a program that does not import torch imports emp_llm")


def check_nothing_is_left(environment: Environment, folder: Path) -> None:
    """Look for files after emp-llm was uninstalled, and have transformers refuse the model."""
    names = "emp_*", "__editable__*emp_*"
    for path in [path for name in names for path in environment.packages.glob(name)]:
        left = [it for it in (path, *path.rglob("*")) if it.suffix not in COMPILED and it.is_file()]
        if left:
            raise SystemExit(f"after emp-llm was uninstalled there is {left[0]}")
        shutil.rmtree(path)
    result = environment.start("python", "-c", SCRIPT, folder / "packed")
    if not result.returncode or "mismatch" not in result.stderr:
        raise SystemExit(f"transformers alone did not refuse the model:\n{result.stderr}")


def time_starts(environment: Environment, runs: int) -> None:
    """Print the CPU time of starting Python, and of importing torch, which calls emp-llm or not."""
    for program in "pass", "import torch":
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(runs):
            for autoload, taken in seconds.items():
                before = cpu_seconds()
                environment.start("python", "-c", program, autoload=autoload)
                taken.append(cpu_seconds() - before)
        with_it, without = median(seconds[True]), median(seconds[False])
        print(
            f"{program}: {with_it * 1000:.0f} ms with the entry point, {without * 1000:.0f} without"
        )


def cpu_seconds() -> float:
    """What all processes have taken so far that this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
