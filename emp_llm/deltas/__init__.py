"""Deltas: a fine-tuned model stored as its pruned difference to the base that it was tuned from.

arithmetic   bit patterns subtracted and added in float32
differences  a shard whose targets are read as differences to a base
survey       a base read once: its checksum, and which tensors another checkpoint has too
base         the base, found by the name that a delta gives it
sum_reader   a packed difference, read as its sum with the base
"""
