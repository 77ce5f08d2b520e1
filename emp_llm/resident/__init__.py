"""Weights that stay packed in memory, as tensors that torch computes with.

dense_weights  a dense tensor seen as rows of bit patterns
held_there     packed rows in a GPU's memory
held_planes    the planes of one packed tensor in memory
packing        a tensor in memory, packed
form           which rows of which planes make up a tensor, in which shape
content        what a packed weight is made of: planes and a form
casting        a packed weight in another dtype
products       products with packed weights, rows looked up in them
operators      these as operators of torch
operations     what torch's operators mean for packed rows
weight         `PackedWeight`: a tensor that is dense to look at and packed in memory

Nothing here knows transformers.
"""
