"""Conversion of Hugging Face checkpoints to Megatron-Core's torch_dist and back, without Megatron.

The mapping tables say which Hugging Face tensors make up which Megatron-Core parameter; readers,
writers and both directions of the conversion are derived from them.
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
