"""What pruning cost: perplexity and zero-shot answers of a model.

perplexity     the protocols behind published perplexities
zero_shot      tasks of lm-eval
model_loading  the model, found, proved and loaded
options        what can be asked
scores         what was measured
saving         results saved beside the model
"""
