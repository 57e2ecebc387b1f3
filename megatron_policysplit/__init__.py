"""Policy Split reinforcement learning of language models on Megatron-Core (arXiv 2604.11510)."""

__version__ = "0.1.0"
