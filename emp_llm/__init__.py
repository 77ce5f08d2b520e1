"""emp-llm: Effective Model Pruning for large language models."""

__version__ = "0.1.0"
