"""Scores and repair from data. The model is streamed: one decoder block in memory at a time.

statistics          the statistics of one matrix that calibration gathers
hessian             the sum of x xᵀ over a matrix's inputs, damped and factored
criteria            scores from weights and statistics
class_registry      classes that users can add to, by name
criterion_registry  criteria by name
option_checks       which options can be combined
samples             the tokens a calibration runs on
freed_memory        returns freed memory to the operating system
activations         activations between decoder blocks, in memory or on disk
sample_walk         the model's own forward, stopped at each decoder block for all samples
tensor_loading      tensors of the checkpoint, read when they are needed
parameter_map       which parameters the checkpoint's tensors become
remembered          outputs of what comes before the targets in a decoder block
streamed_model      a model of which one decoder block at a time has its weights
input_statistics    statistics of each matrix's inputs
session             a model, its samples and the walks over them
lanes               samples that go through the model several times, side by side
backward_walk       gradients of the loss, one decoder block at a time
masks               the mask of one matrix from its scores, by the rule
stored_scores       scores on disk, and the masks computed from all of them
repair              kept weights and biases that restore a layer's outputs
swaps               repair that exchanges kept and pruned weights as well
target_pruner       prunes one target: scores, mask, repair
sinks               what becomes of a decoder block's statistics: masks, or stored scores
forward_walk        the walk on which decoder blocks are pruned as samples reach them
distortion          what pruning a matrix changes in its outputs, at several β
sensitivity         how much predictions change when one part of a unit is pruned
loss_allocation     a β for each target, so that the loss rises the least
gradient_walk       the walk forward and back, for criteria that need gradients
calibrate           all steps, in order
beta_search         the smallest β whose loss stays within a bound

A unit is what is loaded and pruned at a time: a decoder block, or a module outside of decoder
blocks that holds targets. Only masks, repaired weights and repaired biases come from here; the rule
and the writing of shards are the same without data.
"""
