"""The core attention of local layers: causal, grouped-query, padded or packed rows.

It stands in the place of Megatron's local `DotProductAttention`, which takes neither packed rows
nor a fused kernel. On the CPU it does the same operations in the same order, so that the bits of
padded rows are the same. On a GPU it uses torch's fused kernels.

Layouts are Megatron's: padded rows are [s, b, heads, d] (`sbhd`), packed ones [t, heads, d] (`thd`)
with t the tokens of all segments. Heads are this tensor-parallel rank's; nothing communicates.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_policysplit.distributed.device import use_fused_attention


class CoreAttention(torch.nn.Module):
    """Causal attention between queries, keys and values of one layer; it has no parameters.

    Made by Megatron's SelfAttention from the layer spec. Raises ValueError for what it does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ):
        """The arguments are those of Megatron's DotProductAttention."""
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        unsupported = {
            "attention dropout": dropout,
            "a mask that is not causal": attn_mask_type.name != "causal",
            "cross attention": attention_type != "self",
            "context parallelism": config.context_parallel_size > 1,
            "sliding windows": config.window_size is not None,
            "a softmax with an offset": getattr(config, "softmax_type", "vanilla") != "vanilla",
            "scaling by layer number": config.apply_query_key_layer_scaling,
        }
        for what, is_asked in unsupported.items():
            if is_asked:
                raise ValueError(f"the core attention of local layers does not have {what}")
        self.scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.is_fused = use_fused_attention()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return [s, b, heads * d] for padded rows, [t, heads * d] for packed ones.

        query: [s, b, heads, d] or [t, heads, d]; key, value: the same with their groups of heads.
        packed_seq_params: the segments of packed rows; None: the rows are padded on the right. A
            token attends to those before it in its row or segment, and to itself.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the core attention of local layers takes no mask and no bias")
        if packed_seq_params is None:
            attend = fused_attention if self.is_fused else plain_attention
            return attend(query, key, value, self.scale).flatten(2)
        if self.is_fused and query.dtype in (torch.bfloat16, torch.float16) and _varlen_kernel():
            return _varlen_attention(query, key, value, packed_seq_params, self.scale).flatten(1)
        return self._by_segment(query, key, value, packed_seq_params).flatten(1)

    def _by_segment(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Attention [t, heads, d] of packed rows, one segment after the other."""
        attend = fused_attention if self.is_fused else plain_attention
        bounds = _bounds(packed).tolist()
        if bounds[-1] != len(query):
            raise ValueError(f"segments end at {bounds[-1]}, the pack has {len(query)} tokens")
        segments = [
            # A row alone, in the padded layout: [length, 1, heads, d].
            attend(*(part[start:end, None] for part in (query, key, value)), self.scale)[:, 0]
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        return torch.cat(segments)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention [s, b, heads, d] by plain products; scores and softmax at least in fp32.

    query: [s, b, heads, d]; key, value: [s, b, groups, d], each shared by heads / groups heads in
    a row. The scores [b * heads, s, s] are held.
    """
    length, batch, heads, width = query.shape
    shared = heads // key.shape[2]
    # [b * heads, s, d] each
    query, key, value = (
        part.repeat_interleave(times, dim=2).reshape(length, batch * heads, width).transpose(0, 1)
        for part, times in ((query, 1), (key, shared), (value, shared))
    )
    # With beta=0 the first argument only gives the result its place.
    place = query.new_empty(1, 1, 1)
    scores = torch.baddbmm(place, query, key.transpose(1, 2), beta=0.0, alpha=scale)
    is_later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights = wide.masked_fill(is_later, -torch.inf).softmax(-1).to(value.dtype)
    return torch.bmm(weights, value).view(batch, heads, length, width).permute(2, 0, 1, 3)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by torch's fused kernels, which do not hold the scores."""
    query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    shared = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=shared
    )
    return attended.permute(2, 0, 1, 3)


@functools.cache
def _varlen_kernel() -> Any:
    """torch's attention of packed rows; None where this torch has none that does what we need.

    Its earlier forms take neither a window, a scale nor shared heads.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"window_size", "scale", "enable_gqa"}
    return varlen_attn if wanted <= inspect.signature(varlen_attn).parameters.keys() else None


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float
) -> Tensor:
    """Attention [t, heads, d] of packed rows by torch's kernel for them."""
    bounds = _bounds(packed)
    longest = int(packed.max_seqlen_q)
    return _varlen_kernel()(
        *(query, key, value, bounds, bounds, longest, longest),
        window_size=(-1, 0),  # everything before a token, nothing after it
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _bounds(packed: PackedSeqParams) -> Tensor:
    """Where segments begin, and where the last one ends: int32[segments + 1].

    Padding at the end of a segment counts as part of it: it comes after all real tokens, which
    therefore do not see it.
    """
    padded = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if padded is None else padded


def attention_kernels() -> str:
    """Say which kernels a rank's local layers use for attention."""
    if not use_fused_attention():
        return "plain products"
    name = "torch's scaled_dot_product_attention"
    return f"{name}, and varlen_attn for packed rows" if _varlen_kernel() else name
