"""Controls for EMP: what keeping the same number of other weights costs.

allocation        how many weights each group keeps, for a given total
pq_index          the PQ index of Diao et al., as a count for each group
control_model     a model loaded with the weights that a control keeps
bench             one model in memory at a time, measured
costs             the results, relative to the dense model and EMP
structures_costs  the results of fewer experts, blocks, neurons or heads
saved             the rows of a comparison in a file, from which the same command goes on
settings          the options of a comparison, as results tell them and depend on them
ways              ways to choose which structures stay, as options of `shrink`
structures_bench  a model with fewer structures, measured
with_data         EMP with scores and repair from data
choices           how many weights each control keeps of each group
plot              a comparison as a figure

A control prunes the same tensors as EMP, and keeps exactly as many weights of them. Of structures,
as many stay by every score.
"""
