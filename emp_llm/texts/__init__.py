"""Texts and tokens: what perplexities are measured on and calibration takes its samples from.

datasets_library  reading through the library `datasets`
texts             a text by name or path
tokenizer         a checkpoint's tokenizer
tokens            a text as a model's tokens
"""
