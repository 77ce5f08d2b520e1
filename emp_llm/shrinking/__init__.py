"""Fewer decoder blocks, experts, neurons or heads: a smaller ordinary model.

    scores → choice → config and cuts, checked on the meta device → shards → index and config

choice                     the structures of a model, and those that stay
config_fields              fields of a config, wherever in it they are
kind                       what a kind of structures says of itself
blocks                     decoder blocks
block_likeness             whether each block is what it was, under its new number
experts                    experts of a mixture
neurons                    neurons of MLPs
kv_heads                   key-value heads with their query heads
kinds                      all kinds
axes                       how each tensor depends on structures
cuts                       what is kept of each tensor
structures_process         asks a process of its own for all this
plan                       the structures of a checkpoint, and what is written of it
cut_parts                  reads what is kept of a tensor
cut_job                    writes it
writing                    writes shards, index and config
amounts                    how many stay, and those with the best scores
unwritten                  what would be written as a checkpoint, before it is
measuring                  the loss of smaller models, before they are written
amount_search              the fewest structures that a bound on the loss allows
block_walk                 the influence of each block, and the loss without some
block_removal              blocks removed one by one, by the loss without each
block_choice               which blocks stay
routed_outputs             what the experts of a decoder block give on data
routed_walk                the same for all blocks, one at a time in memory
expert_criteria            scores of experts, from their weights or from what they give
expert_criterion_registry  criteria of experts by name
expert_weights             sums over the weights of each expert
expert_scores              scores of all experts of a checkpoint
columns                    which inputs of a matrix stay, and its new weights
column_sink                chooses neurons and heads of a decoder block, repairs what reads them
narrowing                  does so block by block
repaired                   weights that a repair has changed, as files
width_choice               which neurons and heads stay
choosing                   chooses what stays
report_on                  the report
"""
