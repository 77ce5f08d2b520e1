"""From shard to pruned shard: the work of one run, planned and done.

shard_writer  a safetensors file written before the sizes of all tensors are known
shard_output  the loop that writes shards, for `prune` and `unpack`
copy_job      a tensor copied as it is
target_job    what all jobs on a target have in common
pack_job      a target packed, or the bytes that packing it would give
rest_job      a tensor that is no target packed without loss, or the bytes that packing would give
dense_job     a target with zeros in it
shard_plan    the tensors of one new shard, their order, and the work on each
plan          a checkpoint with its targets decided
delta_plan    a plan for differences to a base
stages        find β, select what stays, work shard by shard
plan_report   the report of a plan that was carried out
beta_curve    sparsity and bytes at every β
"""
