"""Tensor parallelism is refused in every process, before any of them waits for the others."""

from pathlib import Path

import torch
from support.architectures import save_tiny_model
from support.processes import start
from transformers import LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from emp_llm import EmpConfig, OptionError


def load_in_parallel(rank: int, store: Path, folder: Path, told: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    try:
        LlamaForCausalLM.from_pretrained(
            folder,
            quantization_config=EmpConfig(),
            distributed_config=DistributedConfig(tp_plan="auto"),
        )
    except OptionError as error:
        told.write_text(str(error))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_that_would_share_a_model_are_both_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", num_key_value_heads=2)
    told = [tmp_path / f"told {rank}" for rank in range(2)]
    processes = [
        start(
            *(load_in_parallel, rank, tmp_path / "store", folder, told[rank]),
            environment={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for path in told:
        message = path.read_text()
        assert message.startswith("tensor parallelism (over 2 processes) splits weights")
        assert "load with device_map instead" in message
