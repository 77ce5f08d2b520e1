"""Estimate the bytes, memory and hours of pruning a checkpoint of 405B and one of 1T weights.

    python benchmarks/plan.py --folder SOME_FOLDER --json result.json

The checkpoints have the real names and shapes of tensors, but no data: they are sparse files, which
take no room on disk. `emp-llm prune` starts on them as on any checkpoint, reads all headers and
the model's structure, and is interrupted when it begins to write. That measures the time and memory
that the size of a model costs. The bytes follow from the shapes and from the ratio that Gaussian
weights are packed to; the hours follow from the bytes, at the rate that `bench_prune.py` measured
and at those of slower disks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
from common import GB, MB, print_table, say, write_json
from timed_process import resident_bytes

from emp_llm.checkpoint.safetensors_header import encode_header

RESULTS = Path(__file__).parent / "results" / "prune.json"
SHARD_BYTES = 5 * GB
SLOWER = (0.5, 2.0)
"""Rates of shared file systems to estimate for as well: GB/s, reads and writes together."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """One checkpoint.

    Attributes:
        config: Its config.json.
        shapes: Name and shape of every tensor, all in bf16.
        pruned: Parts of names by which the matrices of its MLPs are known.
    """

    config: dict[str, Any]
    shapes: Shapes
    pruned: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")


def llama_405b() -> Plan:
    """Llama 3.1 405B."""
    hidden, inner, layers, vocabulary, kv = 16384, 53248, 126, 128256, 1024
    block = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        **mlp("mlp", hidden, inner),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
    }
    return Plan(config, whole(hidden, vocabulary, [block] * layers))


def deepseek_1t() -> Plan:
    """A mixture of 384 experts of DeepSeek-V3's kind, 1.03 T weights."""
    hidden, inner, narrow, layers, vocabulary, experts, heads = (
        7168, 18432, 2048, 61, 163840, 384, 64,
    )  # fmt: skip
    q_rank, kv_rank, rope, nope, value = 1536, 512, 64, 128, 128
    attention = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (q_rank, hidden),
        "self_attn.q_a_layernorm": (q_rank,),
        "self_attn.q_b_proj": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "self_attn.kv_a_layernorm": (kv_rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), kv_rank),
        "self_attn.o_proj": (hidden, heads * value),
    }
    mixture = {"mlp.gate": (experts, hidden), **mlp("mlp.shared_experts", hidden, narrow)}
    for expert in range(experts):
        mixture |= mlp(f"mlp.experts.{expert}", hidden, narrow)
    dense = attention | mlp("mlp", hidden, inner)
    shapes = whole(hidden, vocabulary, [dense, *[attention | mixture] * (layers - 1)])
    for layer in range(1, layers):
        shapes[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": narrow,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        "vocab_size": vocabulary,
    }
    return Plan(config, shapes)


def mlp(name: str, hidden: int, inner: int) -> Shapes:
    """The three matrices of a gated MLP."""
    wide, back = (inner, hidden), (hidden, inner)
    return {f"{name}.gate_proj": wide, f"{name}.up_proj": wide, f"{name}.down_proj": back}


def whole(hidden: int, vocabulary: int, blocks: list[Shapes]) -> Shapes:
    """The shapes of all tensors of a model of these decoder blocks."""
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{
            f"model.layers.{number}.{name}.weight": shape
            for number, block in enumerate(blocks)
            for name, shape in block.items()
        },
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


PLANS = {"405B": llama_405b, "1T": deepseek_1t}


def main() -> None:
    """Start pruning each checkpoint, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder / "plan"
    measured = json.loads(RESULTS.read_text())["results"]
    results = {}
    for name, make in PLANS.items():
        plan = make()
        shutil.rmtree(folder, ignore_errors=True)
        make_sparse(folder / "source", plan)
        say(f"{name}: {len(plan.shapes):,} tensors")
        try:
            results[name] = start(folder) | sizes(plan, measured["totals"]["targets"])
        finally:
            shutil.rmtree(folder)
    seconds = measured["prune_seconds"]["median"]
    rate = measured["source_bytes"] / seconds / GB
    print_plans(results, rate)
    if args.json:
        write_json(args.json, "plan", {"measured_gb_per_second": rate}, results)


def make_sparse(folder: Path, plan: Plan) -> None:
    """Write a checkpoint of sparse files."""
    folder.mkdir(parents=True)
    shards: list[Shapes] = [{}]
    for name, shape in plan.shapes.items():
        if shards[-1] and sum(map(nbytes, shards[-1].values())) + nbytes(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries = [(name, "BF16", shape, nbytes(shape)) for name, shape in shard.items()]
        with (folder / file).open("wb") as out:
            out.write(encode_header(entries))
            out.truncate(out.tell() + sum(map(nbytes, shard.values())))
        weight_map |= dict.fromkeys(shard, file)
    config = {**plan.config, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def nbytes(shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of bf16."""
    return 2 * prod(shape)


def start(folder: Path) -> dict[str, Any]:
    """Start pruning; the seconds until it begins to write, and the peak memory of all processes."""
    out = folder / "out"
    command = [sys.executable, "-m", "emp_cli", "prune", str(folder / "source"), "--out", str(out)]
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not any(out.rglob("*.safetensors.unfinished")):
        peak = max(peak, resident(process.pid))
        time.sleep(0.01)
    seconds = time.monotonic() - began
    pruning = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < pruning:
        peak = max(peak, resident(process.pid))
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    return {"seconds_to_first_byte": seconds, "peak_bytes": peak}


def resident(pid: int) -> int:
    """Resident memory of a process and of those it has started, in bytes."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return sum(map(resident_bytes, (process, *process.children(recursive=True))))
    return 0


def sizes(plan: Plan, packed: dict[str, Any]) -> dict[str, Any]:
    """Bytes before and after, by the ratio of Gaussian weights at β = 1; the rest is plain."""
    before = sum(map(nbytes, plan.shapes.values()))
    targets = sum(
        nbytes(shape)
        for name, shape in plan.shapes.items()
        if any(part in name for part in plan.pruned)
    )
    after = before - targets + int(targets * packed["bytes_ratio"])
    return {"tensors": len(plan.shapes), "bytes_before": before, "bytes_after": after}


def print_plans(results: dict[str, Any], rate: float) -> None:
    """Print the table."""
    slower = [f"hours at {gb:g} GB/s" for gb in SLOWER]
    head = ["", "tensors", "GB", "packed", "first byte s", "peak MB", f"hours at {rate:.2f} GB/s"]
    table = [[*head, *slower]]
    for name, found in results.items():
        before, moved = found["bytes_before"], found["bytes_before"] + found["bytes_after"]
        table.append(
            [
                name,
                f"{found['tensors']:,}",
                f"{before / GB:.0f}",
                f"{found['bytes_after'] / GB:.0f}",
                f"{found['seconds_to_first_byte']:.1f}",
                f"{found['peak_bytes'] / MB:.0f}",
                f"{before / GB / rate / 3600:.2f}",
                *(f"{moved / GB / gb / 3600:.2f}" for gb in SLOWER),
            ]
        )
    print_table(table)


if __name__ == "__main__":
    main()
