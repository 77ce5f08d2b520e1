"""Fewer experts, and with them a smaller ordinary model: which stay, and how it is written.

    scores → choice → config and cuts, checked on the meta device → shards → index and config

choice                     the structures of a model, and those that stay
config_fields              fields of a config, wherever in it they are
kind                       what a kind of structures says of itself
experts                    experts of a mixture
kinds                      all kinds
axes                       how each tensor depends on structures
cuts                       what is kept of each tensor
structures_process         asks a process of its own for all this
plan                       the structures of a checkpoint, and what is written of it
cut_parts                  reads what is kept of a tensor
cut_job                    writes it
writing                    writes shards, index and config
routed_outputs             what the experts of a decoder block give on data
routed_walk                the same for all blocks, one at a time in memory
expert_criteria            scores of experts, from their weights or from what they give
expert_criterion_registry  criteria of experts by name
expert_matrices            the matrices of single experts
expert_scores              scores of all experts of a checkpoint
"""
