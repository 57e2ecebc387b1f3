"""What it takes to have Transformer Engine's layers add weight gradients to the fp32 sum.

`TransformerConfig.gradient_accumulation_fusion` is one switch for all layers. Transformer Engine's
then write each product into the parameter's `main_grad`, which Megatron's DDP makes when it wraps
the model, and mark the parameter (`grad_added_to_main_grad`), so that DDP's hook adds nothing. What
autograd gets in its stead is a buffer without meaning, one for all weights of a shape.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def idle_output_layer() -> Iterator[None]:
    """Let GPTModel be built with the switch on although Apex is not installed.

    Its output layer is Megatron's own in every case, and its constructor insists on Apex's kernel.
    That kernel would run in the layer's backward, but the layer only holds the head's weight here:
    `PolicyModel` ends before it, and `vocab_parallel` computes the head.
    """
    from megatron.core.tensor_parallel import layers

    is_available = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = is_available


def drop_placeholders() -> None:
    """Free the buffers that autograd was given in place of gradients; later ones are made anew."""
    base = sys.modules.get("transformer_engine.pytorch.module.base")
    getattr(base, "_dummy_wgrads", {}).clear()
