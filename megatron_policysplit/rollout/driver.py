"""From questions to graded rollouts: leaders generate from one queue, every rank takes part in the waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_policysplit.actor.parallel import Layout
from megatron_policysplit.config import Config
from megatron_policysplit.control import Control
from megatron_policysplit.data import Question
from megatron_policysplit.rewards import Graded, RewardPool
from megatron_policysplit.rollout.collect import CollectStats, QuestionQueue, build_requests, collect, split_lots
from megatron_policysplit.rollout.engine import Engine
from megatron_policysplit.rows import Mode, Rollout
from megatron_policysplit.timing import Phases


@dataclass
class Leader:
    """What only a replica's leader holds: an engine, reward workers, and the tokenizer that makes text for them."""

    engine: Engine
    rewards: RewardPool
    tokenizer: "transformers.PreTrainedTokenizerBase"  # noqa: F821

    def text(self, rollout: Rollout) -> str:
        """The response as text, for grading and reading only; training never sees it."""
        return self.tokenizer.decode(rollout.tokens, skip_special_tokens=True)


class Driver:
    """Collective over all ranks; `leader` is None on ranks that only wait."""

    def __init__(self, config: Config, layout: Layout, control: Control, leader: Leader | None):
        self.config, self.layout, self.control, self.leader = config, layout, control, leader
        self.stats = CollectStats()
        self._calls = 0

    def generate(
        self,
        batch: int,
        questions: Sequence[Question],
        prompts: Mapping[int, Mapping[Mode, Sequence[int]]],
        samples_per_mode: Mapping[Mode, int],
        purpose: str,
        phases: Phases,
    ) -> list[Rollout]:
        """Graded rollouts of all questions, sorted by key, on every leader; [] on other ranks.

        prompts: question id -> mode -> prompt ids. purpose: "train" or "evaluation" (their seeds never meet).
        Raises StopRequested on every rank when a stop signal arrives meanwhile.
        """
        self._calls += 1
        work = None
        if self.leader is not None:
            requests = build_requests(
                batch,
                [question.id for question in questions],
                prompts,
                self.config.rollout,
                samples_per_mode,
                self.config.run.seed,
                purpose,
            )
            lots = split_lots(requests, self.config.rollout.lot_questions)
            # With one leader nobody shares the queue; the store is asked only where several do.
            store = dist.distributed_c10d._get_default_store() if self.layout.data > 1 else None
            queue = QuestionQueue(store, f"policysplit/lots/{purpose}/{batch}/{self._calls}", len(lots))
            work = self._lead(queue, lots, {question.id: question for question in questions}, phases)
        self.layout.meet()  # the control group's short time-out begins when the last rank is here
        rollouts = self.control.attend(work) or []
        everywhere = self.layout.gather_leaders(rollouts)
        return sorted((r for part in everywhere for r in part), key=lambda rollout: rollout.key)

    async def _lead(self, queue: QuestionQueue, lots: Sequence, questions: Mapping, phases: Phases) -> list[Rollout]:
        def next_lot():
            number = queue.next()
            return None if number is None else lots[number]

        with phases.measure("generate"):
            rollouts, self.stats = await collect(self.leader.engine, next_lot)
        with phases.measure("reward"):
            grades = await asyncio.to_thread(self._grade, rollouts, questions)
        for rollout, graded in zip(rollouts, grades, strict=True):
            rollout.reward, rollout.reward_error = graded.reward, graded.error
        return rollouts

    def _grade(self, rollouts: Sequence[Rollout], questions: Mapping) -> list[Graded]:
        items = [(self.leader.text(rollout), questions[rollout.question]) for rollout in rollouts]
        return self.leader.rewards.grade(items)
