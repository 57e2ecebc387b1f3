"""Log-probs, entropies, KL and losses over a vocabulary sharded across tensor-parallel ranks.

Logits exist for one chunk of tokens at a time. docs/vocab_parallel.md derives the formulas.
"""

from megatron_policysplit.vocab_parallel.fused_loss import FusedLoss, fused_loss
from megatron_policysplit.vocab_parallel.head import (
    Scores,
    head_pair_statistics,
    head_statistics,
    score,
)
from megatron_policysplit.vocab_parallel.pairs import Pairs
from megatron_policysplit.vocab_parallel.shard import TILE_ELEMENTS, Head, VocabularyShard
from megatron_policysplit.vocab_parallel.statistics import (
    PairStatistics,
    pair_statistics,
    token_statistics,
)

__all__ = [
    "TILE_ELEMENTS",
    "FusedLoss",
    "Head",
    "PairStatistics",
    "Pairs",
    "Scores",
    "VocabularyShard",
    "fused_loss",
    "head_pair_statistics",
    "head_statistics",
    "pair_statistics",
    "score",
    "token_statistics",
]
