"""Tensors as rows of weights, stored plain or packed.

bit_patterns    weights as bit patterns, compared, converted and printed
geometry        how rows lie in a file; row blocks
layout_choice   the layout that packs a tensor smallest
packed_config   what config.json says of a packed checkpoint
planes          the planes of packed tensors, found by name
packed          a packed tensor that is pruned as three plain ones (FORMAT.md)
whole           a packed tensor that is not pruned as three plain ones
code_choice     the code that packs a tensor which is not pruned smallest
planes_reader   what readers of packed tensors have in common
row_reader      rows of a tensor, packed or plain
whole_reader    a packed tensor that is not pruned, decoded row block by row block
packed_reader   any packed tensor, decoded row block by row block
stored_tensors  the tensors of a checkpoint, packed or plain
target          a tensor that is pruned
read_order      the byte ranges that hold a target
"""
