"""Checks that Megatron-Core and transformers compute the same logits from the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conv import read_hf_config
from megatron_policysplit.errors import ModelError, cannot_load

TOLERANCE = 1e-4  # of the largest logit, or of 1 if that is smaller
ROWS, TOKENS = 2, 32


@dataclass(frozen=True)
class Compared:
    """What `check_logits` found."""

    difference: float  # largest absolute difference of any logit
    largest: float  # largest absolute value of transformers' logits


def check_logits(hf: str | Path, megatron: str | Path) -> Compared:
    """Compare the logits of random tokens in float32, in one process, one model after the other.

    transformers loads the Hugging Face directory `hf`. Megatron-Core loads the torch_dist
    checkpoint `megatron` with the config of `hf`. Raises ModelError if logits differ by more than
    TOLERANCE, or if transformers cannot load `hf`.
    """
    hf_config = read_hf_config(hf)
    length = min(TOKENS, hf_config.get("max_position_embeddings") or TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, hf_config["vocab_size"], (ROWS, length), generator=generator)
    expected = _transformers_logits(hf, ids)
    actual = _megatron_logits(hf_config, megatron, ids)
    compared = Compared((actual - expected).abs().max().item(), expected.abs().max().item())
    # `not <=` instead of `>`: NaN is a difference too.
    if not compared.difference <= TOLERANCE * max(1.0, compared.largest):
        raise ModelError(
            f"logits of {megatron} differ from those of {hf} by {compared.difference:.3g} "
            f"(the largest is {compared.largest:.3g}; allowed is {TOLERANCE} of it); "
            "convert the model again"
        )
    return compared


@torch.no_grad()
def _transformers_logits(hf: str | Path, ids: Tensor) -> Tensor:
    """Logits [B, S, V] by transformers on the CPU."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            hf,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        ).eval()
    except Exception as error:  # many kinds; each means a model that transformers cannot read
        raise cannot_load("model", hf, error) from error
    return model(ids).logits


@torch.no_grad()
def _megatron_logits(hf_config, megatron: str | Path, ids: Tensor) -> Tensor:
    """Logits [B, S, V] by Megatron-Core in a world of one process."""
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config import ParallelConfig
    from megatron_policysplit.distributed.device import training_device

    try:
        # No rank of several, whatever launcher's variables are set.
        parallel.initialize(ParallelConfig(), seed=0, environ={})
        from megatron_policysplit.actor.megatron_weights import load_megatron_weights
        from megatron_policysplit.actor.model import build_model

        # Transformer Engine multiplies float32 in TF32, which is off by more than TOLERANCE.
        model = build_model(hf_config, dtype=torch.float32, transformer_engine=False)
        model = model.to(training_device()).eval()
        load_megatron_weights(model, megatron)
        ids = ids.to(training_device())
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = model(input_ids=ids, position_ids=positions, attention_mask=None)
        return (hidden @ model.head(1).weight.t()).transpose(0, 1).cpu()
    finally:
        parallel.shutdown()
