"""What pruning cost: perplexity and zero-shot accuracy of a model.

perplexity     perplexity, by the protocols of published results
tasks          tasks of lm-eval, found by name
zero_shot      a model's accuracy on them
found_model    finds and verifies a model that is to be run
model_loading  loads it and its tokenizer
options        the options of an evaluation
scores         the results
saving         results, saved beside the model and in its card
"""
