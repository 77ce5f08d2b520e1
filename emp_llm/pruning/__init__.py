"""From shard to pruned shard: the work of one run, planned and done.

shard_writer  a safetensors file written as its tensors come
copy_job      a tensor copied as it is
target_jobs   a tensor pruned and packed
shard_plan    what becomes of one shard
planned_run   a checkpoint with its targets decided
beta_curve    sparsity and bytes at every β
"""
