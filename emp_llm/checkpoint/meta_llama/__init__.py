"""Llamas in Meta's original format, seen as checkpoints of Hugging Face.

params      params.json as a config
part_files  the files of such a checkpoint
layout      the tensors of consolidated.*.pth by Hugging Face's names
original    the same as shards of safetensors
tokenizer   tokenizer.model, converted in a process of its own
"""
