"""One call of each Triton kernel of the LM head at a run's sizes, which compiles and tunes it."""

from __future__ import annotations

import torch

from megatron_policysplit.vocab_parallel import triton_head
from megatron_policysplit.vocab_parallel.chunk_pass import States, TritonPass
from megatron_policysplit.vocab_parallel.nucleus import MergedNucleus, NucleusSlopes
from megatron_policysplit.vocab_parallel.reduction import Slopes, Tokens, merge
from megatron_policysplit.vocab_parallel.shard import Head
from megatron_policysplit.vocab_parallel.triton_launch import FEW_TOKENS


def warm_up(head: Head, nucleus: bool) -> None:
    """Run the kernels on random hidden states, with as many tokens as a chunk has and with few.

    Communicates nothing and leaves the generators of random numbers as they are.
    nucleus: whether to run those of the nucleus too.
    """
    for tokens in sorted({min(head.chunk, FEW_TOKENS), head.chunk}):
        _run_all(head, tokens, nucleus)


def _run_all(head: Head, count: int, nucleus: bool) -> None:
    weight, shard = head.weight.detach(), head.shard
    random = torch.Generator(weight.device).manual_seed(0)
    # Values that vary: a GPU multiplies zeros faster than numbers.
    hidden = weight.new_empty(count, weight.shape[1]).normal_(generator=random)
    ones = torch.ones(count, device=weight.device)
    tokens = Tokens(torch.full((count,), shard.start, device=weight.device), ones)
    passing = TritonPass(head)
    parts, _ = passing.reduce(hidden, tokens)
    passing.reduce_pair(States(hidden, ones), States(hidden, ones))
    merged, slopes = merge(parts[None], ones), Slopes(ones, ones)
    passing.gradient(hidden, None, tokens, merged, slopes)
    if nucleus:
        triton_head.head_logits(
            hidden[next(shard.tiles(count, len(weight)))], weight, shard.columns
        )
        passing.reduce_nucleus(hidden, None, parts[0], parts[0], tokens)
        of_nucleus = NucleusSlopes(parts[0], MergedNucleus(ones, ones), ones)
        passing.gradient(hidden, None, tokens, merged, slopes, of_nucleus)
