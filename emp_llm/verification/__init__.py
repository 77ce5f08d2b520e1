"""Checks of a written folder: it is whole, and it is what pruning its source gives.

folder_checks        the files beside the weights
tensor_checks        one tensor of a written folder
finished_shards      shards of an unfinished run
written_folder       a folder by itself
weight_differences   the weights of two tensors, compared
bytes_comparison     a tensor that was not pruned, against its source
target_comparison    a target against its source
source_comparison    a folder against its source
shrunken_report      the numbers in the report of a folder that shrink wrote
shrunken_folder      a folder that shrink wrote, by itself
shrunken_comparison  the same against its source
"""
