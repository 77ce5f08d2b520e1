"""From shard to pruned shard: the work of one run, planned and done.

shard_writer  a safetensors file written as its tensors come
copy_job      a tensor copied as it is
target_jobs   a tensor pruned and packed
shard_plan    what becomes of one shard
plan          a checkpoint with its targets decided
shares        which rank and which devices work on what
stages        find β, select what stays, work shard by shard
plan_report   the report of a plan that was carried out
beta_curve    sparsity and bytes at every β
"""
