"""Tiny Hugging Face models with random weights, made by transformers itself."""

from pathlib import Path

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So small that within a few positions some frequencies are kept, some blended and some divided.
    "original_max_position_embeddings": 32,
}


def make_model(path: Path, family: str, *, tied: bool, vocab: int = 131, seed: int = 0, **overrides) -> Path:
    """Save a model of `family` (a key of FAMILIES) in float32: 4 layers, 4 heads, 2 KV heads.

    All parameters are random, norms and biases included, so that a swapped or skipped one shows.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    config_class = getattr(transformers, FAMILIES[family].replace("ForCausalLM", "Config"))
    special = {
        "llama": {"rope_parameters": dict(LLAMA3_ROPE)},
        "mistral": {"head_dim": 24, "sliding_window": None},
        "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        "qwen3": {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        "qwen3_moe": {
            "head_dim": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "moe_intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    }[family]
    config = config_class(
        **{
            "vocab_size": vocab,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
            **special,
            **overrides,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name.endswith(("norm.weight", "layernorm.weight", "bias")) else 0.15
            offset = 1.0 if name.endswith(("norm.weight", "layernorm.weight")) else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path
