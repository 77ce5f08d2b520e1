"""Llamas in Meta's original format, seen as checkpoints of Hugging Face.

params     params.json as a config
layout     consolidated.*.pth as shards
tokenizer  tokenizer.model, converted in a process of its own
"""
