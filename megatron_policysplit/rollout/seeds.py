"""Seeds of samples: a response depends on its request, not on the leader or engine that made it."""

from __future__ import annotations

import hashlib

from megatron_policysplit.rows import Mode

PURPOSES = ("train", "evaluation")


def sample_seed(
    run_seed: int, batch: int, question: int, mode: Mode, sample: int, purpose: str = "train"
) -> int:
    """Return a seed in [0, 2**63), the same on every machine and Python version.

    Bit 62 names the purpose and bit 61 tells the normal mode from the others, so training and
    evaluation, and the two modes of Policy Split, never share a seed; the other 61 bits are a hash
    of the numbers and the mode's name. Raises ValueError for another purpose.
    """
    if purpose not in PURPOSES:
        raise ValueError(
            f"purpose={purpose!r} of a sample seed is unknown; use one of {', '.join(PURPOSES)}"
        )
    # Not `hash`, which Python salts in every process. No rank and no engine is in here: a lot may
    # be taken by any leader, and a sample asked for again by any engine, with the same response.
    words = f"{purpose}/{run_seed}/{batch}/{question}/{mode.value}/{sample}"
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    tag = PURPOSES.index(purpose) << 1 | (mode != Mode.NORMAL)
    return tag << 61 | int.from_bytes(digest, "big") >> 3
