"""Hugging Face checkpoints for Megatron-Core and back: tables of names, readers and a writer. Needs
no Megatron.
"""

from checkpoints_conv.architectures import Architecture, MegatronArguments, find_architecture
from checkpoints_conv.reader import SafetensorsReader, check_safetensors, model_keys, read_hf_config
from checkpoints_conv.writer import write_hf

__all__ = [
    "Architecture",
    "MegatronArguments",
    "SafetensorsReader",
    "find_architecture",
    "check_safetensors",
    "model_keys",
    "read_hf_config",
    "write_hf",
]
