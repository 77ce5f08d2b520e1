"""From shard to pruned shard: the work of one run, planned and done.

shard_writer  a safetensors file written as its tensors come
shard_output  the loop that writes shards, whatever becomes of their tensors
copy_job      a tensor copied as it is
target_job    what all jobs on a target have in common
pack_job      a target packed, or measured as if it were
dense_job     a target with zeros in it
shard_plan    what becomes of one shard
plan          a checkpoint with its targets decided
stages        find β, select what stays, work shard by shard
plan_report   the report of a plan that was carried out
beta_curve    sparsity and bytes at every β
"""
