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
streamed_model      parameters loaded from the checkpoint's tensors, and released again
input_statistics    statistics of what each matrix is multiplied by
session             a model, its samples and their walks
backward_walk       gradients of the loss, one decoder block at a time
masks               scores to masks, by the rule
repair              kept weights and biases that restore a layer's outputs
target_judge        one target: scored, masked, repaired
sinks               where a decoder block's results go: masks, or scores that wait
forward_walk        the walk on which decoder blocks are pruned as samples reach them
calibrate           all of it, in order
beta_search         the β that a bound on the loss allows

Everything else stays what it is: only masks and repaired weights come from here.
"""
