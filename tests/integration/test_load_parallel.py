"""Tensor parallelism is refused in every process, before any of them waits for the others."""

import os
import queue
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from architectures import save_tiny_model


def load_in_parallel(rank: int, store: Path, folder: Path, told: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    import torch
    from transformers import LlamaForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    from emp_llm import EmpConfig, OptionError

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
        told.put((rank, str(error)))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_that_would_share_a_model_are_both_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", num_key_value_heads=2)
    context = get_context("spawn")
    told = context.Queue()
    processes = [
        context.Process(target=load_in_parallel, args=(rank, tmp_path / "store", folder, told))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    messages: dict[int, str] = {}
    try:
        while len(messages) < 2:
            messages.update([told.get(timeout=100)])
    except queue.Empty:
        pass
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert messages.keys() == {0, 1}
    for message in messages.values():
        assert message.startswith("tensor parallelism (over 2 processes) splits weights")
        assert "load with device_map instead" in message
