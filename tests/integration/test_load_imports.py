"""How transformers comes to know packed folders, in new processes, and what it does without it."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from support.checkpoints import bits, load
from support.expected_targets import EXPECTED
from support.loading import load_model

import emp_llm

TinyModel = Callable[..., Path]

NAME = EXPECTED["llama"].mlp[0]


ROOT = Path(__file__).parents[2]


def run(
    program: str, *arguments: Path, installed: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program for which torch does not look for what is installed when it is imported.

    If it looks later it finds what is in the folder `installed`, too.
    """
    path = os.pathsep.join([*([str(installed)] if installed else []), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": path},
    )


def entry_points(folder: Path) -> Path:
    """Write what pip writes of the entry points that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    written = folder / "emp_llm-0.dist-info"
    written.mkdir(parents=True)
    (written / "METADATA").write_text("Metadata-Version: 2.1\nName: emp-llm\nVersion: 0\n")
    lines = []
    for group, named in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {function}" for name, function in named.items())]
    (written / "entry_points.txt").write_text("\n".join(lines))
    return folder


def test_importing_emp_llm_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, emp_llm\n"
        "heavy = {'torch', 'transformers', 'numpy', 'numba', 'accelerate', 'huggingface_hub'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert run(program).stdout.strip() == "[]"


def test_packed_checkpoints_are_known_to_transformers_before_kernels_are_imported() -> None:
    program = (
        "import sys, emp_llm, transformers.modeling_utils\n"
        "from transformers.quantizers.auto import AutoHfQuantizer\n"
        "known = AutoHfQuantizer.supports_quant_method({'quant_method': 'emp'})\n"
        "print(known, 'numba' in sys.modules, 'emp_llm.integration.quantizers' in sys.modules)"
    )
    assert run(program).stdout.split() == ["True", "False", "False"]


def test_plain_from_pretrained_loads_a_packed_folder_whichever_was_imported_first(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    order = ("emp_llm", "transformers", "transformers.modeling_utils", "torch alone")
    program = (
        "import datasets, importlib, os, sys, torch._dynamo, torch.distributed.tensor\n"
        "assert not {'transformers', 'emp_llm'} & sys.modules.keys()\n"  # what they need, once
        f"for before in {order}:\n"
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0, before\n"
        "        continue\n"
        "    if before == 'torch alone':\n"
        "        class Torch:\n"  # as if transformers were the first to import torch, where it is
        "            def find_spec(self, name, path, target=None):\n"
        "                if name == 'transformers.modeling_rope_utils':\n"
        "                    assert 'transformers.configuration_utils' in sys.modules\n"
        "                    torch._import_device_backends()\n"  # as `import torch` ends
        "        sys.meta_path.insert(0, Torch())\n"
        "    else:\n"
        "        importlib.import_module(before)\n"
        "        import emp_llm\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "    AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=None)\n"
        f"    weights = model.get_parameter({NAME!r}).data\n"
        "    torch.save(weights, f'{sys.argv[2]}/{before}.pt')\n"
        "    break\n"
    )
    installed = entry_points(tmp_path / "installed")
    result = run(program, pruned_model("llama"), tmp_path, installed=installed)
    assert result.returncode == 0, result.stderr
    expected = load(pruned_model("llama", output_format="dense"))[NAME]
    for before in order:
        assert bits(torch.load(tmp_path / f"{before}.pt")) == bits(expected)


def test_without_emp_llm_a_packed_folder_is_an_error_and_its_dense_twin_loads(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    packed = pruned_model("llama")
    emp_llm.densify(load_model("llama", packed)).save_pretrained(tmp_path / "dense")
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[2])\n"
        f"torch.save(model.get_parameter({NAME!r}).data, sys.argv[3])\n"
        "assert not any(name.split('.')[0].startswith('emp') for name in sys.modules)\n"
        "try:\n"
        "    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print('refused', type(error).__name__, error)\n"
        "else:\n"
        "    print('loaded')\n"
    )
    result = run(program, packed, tmp_path / "dense", tmp_path / "weights.pt")
    assert result.stdout.startswith("refused"), result.stderr
    assert bits(torch.load(tmp_path / "weights.pt")) == bits(load(tmp_path / "dense")[NAME])
    assert "mismatch" in result.stdout + result.stderr
