"""Questions and the prompts made of them.

`Question` is handed on from here for users' own reward functions.
"""

from megatron_policysplit.data.questions import Question

__all__ = ["Question"]
