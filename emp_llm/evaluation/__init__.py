"""What pruning cost: perplexity and zero-shot answers of a model.

perplexity     the protocols behind published perplexities
tasks          tasks of lm-eval, found by name
zero_shot      a model's answers to them, scored
found_model    a model that is to be evaluated, found and verified
model_loading  the same, loaded with its tokenizer
options        what a user can ask for
scores         what was measured
saving         results, saved beside the model and in its card
"""
