"""Questions and the prompts made of them. `Question`, which rewards of users' own take, is handed
on from here.
"""

from megatron_policysplit.data.questions import Question

__all__ = ["Question"]
