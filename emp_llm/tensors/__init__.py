"""Tensors as rows of weights, stored plain or packed.

bit_patterns    weights as bit patterns, compared and printed
geometry        how rows lie in a file; row blocks
layout_choice   the layout that packs a tensor smallest
packed_config   what config.json says of a packed checkpoint
planes          the planes of packed tensors, found by name
packed          a packed tensor as three plain ones (FORMAT.md)
row_reader      rows of a tensor, packed or plain
packed_reader   a packed tensor, decoded row block by row block
stored_tensors  the tensors of a checkpoint, packed or plain
target          a tensor that is pruned
read_order      the byte ranges that hold a target
"""
