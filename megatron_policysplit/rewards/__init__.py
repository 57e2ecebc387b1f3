"""Rewards: `reward(response: str, question: Question) -> float`, graded in worker processes."""

from megatron_policysplit.rewards.functions import Reward, load_reward
from megatron_policysplit.rewards.pool import Graded, RewardPool, all_failed

__all__ = ["Graded", "Reward", "RewardPool", "all_failed", "load_reward"]
