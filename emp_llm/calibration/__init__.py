"""Scores and repair from data. The model is streamed: one decoder block in memory at a time.

statistics          what calibration finds of one matrix
hessian             the sum of x xᵀ over a matrix's inputs, damped and factored
criteria            weights and statistics to scores
criterion_registry  criteria by name
option_checks       which options go together
samples             the tokens a calibration runs on
freed_memory        freed memory, returned to the system
activations         what waits between decoder blocks, in memory or on disk
sample_walk         the model's own forward, stopped at each decoder block for all samples
tensor_loading      tensors of the checkpoint, read when they are needed
parameter_map       which parameters the checkpoint's tensors become
streamed_model      a model of which one decoder block at a time has its weights
input_statistics    statistics of what each matrix is multiplied by
session             a model, its samples and their walks
backward_walk       gradients of the loss, one decoder block at a time
masks               the scores of one matrix to its mask, by the rule
stored_scores       scores that wait on disk, and the masks they give together
repair              kept weights and biases that restore a layer's outputs
target_pruner       one target: scored, masked, repaired
sinks               where a decoder block's statistics go: to masks, or to scores that wait
forward_walk        the walk on which decoder blocks are pruned as samples come to them
gradient_walk       the walk forward and back, for criteria that need gradients
calibrate           all of it, in order
beta_search         the β that a bound on the loss allows

A unit is what is loaded and pruned at a time: a decoder block, or a module outside of decoder
blocks that holds targets. Only masks, repaired weights and repaired biases come from here; the rule
and the writing of shards are the same without data.
"""
