"""The LM head's Triton kernels before a run's first step: tuned once, compiled, kept in run.dir.

Which blocks a kernel works in is found by timing, and another choice changes the last bits of what
it computes. So a run makes it once, and finds it again when it is resumed, on whatever nodes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.device import return_freed_memory
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.vocab_parallel import Head

CACHE = "triton"  # in run.dir


def keep_triton_cache(run_dir: Path) -> None:
    """Let this process keep Triton's compiled kernels and choices in run.dir.

    A directory that the user named in TRITON_CACHE_DIR is left. The variable itself is not set:
    servers that this process starts would inherit it. Call this before anything is compiled, for
    torch.compile sets the variable where it finds none, to a directory of the machine's own.
    """
    from triton import knobs

    if os.environ.get("TRITON_CACHE_DIR"):
        return
    # Triton writes what a knob is set to into the environment, unless told not to.
    propagates, knobs.propagate_env = knobs.propagate_env, False
    knobs.cache.dir = str((run_dir / CACHE).absolute())
    knobs.propagate_env = propagates


def warm_up_kernels(
    layout: Layout,
    head: Head | None,
    nucleus: bool,
    message: Callable[[str], None],
    warm_up: Callable[[Head, bool], None] | None = None,
) -> None:
    """Run the head's kernels once on every rank that has a head, in turns.

    The first of these ranks tunes them, then the first of each other node, which finds the choice
    where nodes share the cache, then the rest, which find it in any case. `message` gets the
    seconds that this took. Collective over all ranks: four all-gathers of an object. If a rank
    fails all raise.

    head: None on ranks without one.
    nucleus: whether the run's method has nuclei, which have kernels of their own.
    warm_up: what a rank does in its turn; `triton_warm_up.warm_up` if not given.
    """
    if warm_up is None:
        from megatron_policysplit.vocab_parallel.triton_warm_up import warm_up

    began = time.monotonic()
    nodes: list[str | None] = [None] * dist.get_world_size(layout.world)
    dist.all_gather_object(nodes, None if head is None else socket.gethostname(), layout.world)
    turn = _turns(nodes)[layout.rank]
    for number in range(3):

        def work(number: int = number) -> None:
            if head is not None and number == turn:
                warm_up(head, nucleus)
                # Timing the kernels took a buffer of some hundred MB.
                return_freed_memory()

        raise_on_all_ranks(layout.world, work)
    seconds = time.monotonic() - began
    message(f"the LM head's Triton kernels were compiled and tuned, or loaded, in {seconds:.0f} s")


def _turns(nodes: Sequence[str | None]) -> list[int | None]:
    """The turn of every rank: 0, 1 or 2; None without a head.

    nodes: of every rank with a head; None of one without.
    """
    turns: list[int | None] = []
    for rank, node in enumerate(nodes):
        if node is None:
            turns.append(None)
        elif not any(nodes[:rank]):
            turns.append(0)
        else:
            turns.append(2 if node in nodes[:rank] else 1)
    return turns
