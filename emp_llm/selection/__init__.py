"""Which weights stay: the rule over groups of any size, and masks that data decided.

allocation         how many weights each target keeps, where that is not one β for all
ranking            the largest weights of a group, or random ones
row_block_pass     one pass over the row blocks of targets
group_search       the threshold of a group larger than a row
mask_index         where masks and repaired weights lie in their file on disk
mask_writer        writes masks and repaired weights as they are computed
mask_store         masks and repaired weights on disk, by tensor and row
selection          masks by the weights alone
stored_selection   masks from the store
sampled_selection  weights of differences, sampled
group_numbers      N_eff of every group, and what each β keeps
target_sparsity    the β that gives a total sparsity
"""
