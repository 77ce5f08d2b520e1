"""The smaller model as a checkpoint that is not on disk, beside the one that is written."""

from pathlib import Path

from safetensors.torch import load_file
from support.shrinking import found_plan, write_choice
from support.widths import NEURONS, make

from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.unwritten import unwritten


def test_any_part_of_a_tensor_reads_as_it_would_be_written(tmp_path: Path) -> None:
    make("gpt2").save_pretrained(tmp_path / "dense")
    plan = found_plan(tmp_path / "dense", "neurons")
    kept = dict.fromkeys(plan.structures["neurons"].holders, tuple(range(3, NEURONS, 2)))
    written = load_file(
        write_choice(tmp_path / "dense", tmp_path / "out", kept, "neurons") / "model.safetensors"
    )
    (shard,) = unwritten(plan.with_choices([Choice(kind="neurons", kept=kept)])).shards
    file = shard.open()
    for entry in shard.header.tensors:
        whole = written[entry.name].view(-1).numpy().tobytes()
        for start, stop in ((0, entry.nbytes), (4, entry.nbytes - 8), (8, entry.nbytes)):
            buffer = bytearray(stop - start)
            file.read_into(entry.start + start, memoryview(buffer))
            assert bytes(buffer) == whole[start:stop], entry.name
    file.close()
