"""Token statistics over a vocabulary sharded across tensor-parallel ranks."""

from megatron_policysplit.vocab_parallel.statistics import VocabularyShard, kl_divergence, token_statistics

__all__ = ["VocabularyShard", "kl_divergence", "token_statistics"]
