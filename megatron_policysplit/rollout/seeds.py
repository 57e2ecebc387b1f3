"""Seeds of samples: a response depends on what was asked, never on which leader or engine produced it."""

from __future__ import annotations

import hashlib

from megatron_policysplit.rows import MODES, Mode

PURPOSES = ("train", "evaluation")


def sample_seed(run_seed: int, batch: int, question: int, mode: Mode, sample: int, purpose: str = "train") -> int:
    """A seed in [0, 2**63), the same on every machine and Python version.

    Bits 62 and 61 name the purpose and the mode, so training and evaluation, and the two modes, never
    share a seed; the other 61 bits are a hash of the numbers. Raises ValueError for another purpose.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose={purpose!r} of a sample seed is unknown; use one of {', '.join(PURPOSES)}")
    words = f"{purpose}/{run_seed}/{batch}/{question}/{mode.value}/{sample}"
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    tag = PURPOSES.index(purpose) << 1 | MODES.index(mode)
    return tag << 61 | int.from_bytes(digest, "big") >> 3
