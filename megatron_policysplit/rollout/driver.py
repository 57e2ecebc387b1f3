"""From questions to graded rollouts: leaders generate from one queue, and every rank waits."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_policysplit.config import RolloutConfig
from megatron_policysplit.data.questions import Question
from megatron_policysplit.data.response_text import response_text
from megatron_policysplit.distributed.control import Control, Service, Work
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rewards import Graded, RewardPool
from megatron_policysplit.rollout.collect import (
    QuestionQueue,
    RequestSettings,
    build_requests,
    collect,
    split_lots,
)
from megatron_policysplit.rollout.engine import Engine
from megatron_policysplit.rows import Mode, Rollout, SecondRollout

Prompts = Mapping[int, Mapping[Mode, Sequence[int]]]  # question id -> mode -> prompt ids


@dataclass
class Leader:
    """What only a replica's leader holds."""

    engine: Engine
    rewards: RewardPool  # grades in worker processes
    tokenizer: Any  # transformers' tokenizer of the model
    ends: frozenset[int]  # ids of stop tokens and padding, `data.response_text.end_token_ids`

    def text(self, rollout: Rollout) -> str:
        """The response as text, for grading and reading only; training never sees it."""
        return response_text(self.tokenizer, rollout.tokens, self.ends)


@dataclass
class Batch:
    """A rollout batch that is being generated."""

    number: int
    work: Work | None = None  # generation and grading on the control loop; on leaders
    phases: Phases = field(default_factory=Phases)  # seconds that these took on this rank
    metrics: dict[str, float] = field(default_factory=dict)  # of the leader's engine
    # All rollouts of all leaders, on leaders ([] elsewhere), once `Driver.finish` has run.
    rollouts: list[Rollout] | None = None

    def cancel(self) -> None:
        """Stop generating it, if it is being generated, and wait until the engine has been told."""
        if self.work is not None:
            self.work.cancel()


class Driver:
    """Has batches of questions answered. Every method is collective over all ranks."""

    def __init__(
        self,
        rollout: RolloutConfig,
        requests: RequestSettings,
        layout: Layout,
        control: Control,
        leader: Leader | None,
        service: Service | None = None,
    ):
        """leader: None on ranks that only wait. service: served in all ranks' name meanwhile."""
        self.rollout, self.requests, self.layout = rollout, requests, layout
        self.control, self.leader, self.service = control, leader, service
        self._calls = 0

    def generate(
        self,
        batch: int,
        questions: Sequence[Question],
        prompts: Prompts,
        samples_per_mode: Mapping[Mode, int],
        purpose: str,
        phases: Phases,
    ) -> list[Rollout]:
        """`begin` and `finish` at once."""
        return self.finish(self.begin(batch, questions, prompts, samples_per_mode, purpose), phases)

    def begin(
        self,
        batch: int,
        questions: Sequence[Question],
        prompts: Prompts,
        samples_per_mode: Mapping[Mode, int],
        purpose: str,
        second: SecondRollout | None = None,
    ) -> Batch:
        """Start to generate and grade, in the background until `finish` or `Batch.cancel`.

        purpose: "train" or "evaluation", whose seeds never meet.
        second: what is sampled besides; its rollouts are marked as auxiliary.
        """
        self._calls += 1
        pending = Batch(batch)
        if self.leader is None:
            return pending
        ids = [question.id for question in questions]
        requests = build_requests(
            batch, ids, prompts, self.requests, samples_per_mode, purpose, second
        )
        lots = split_lots(requests, self.rollout.lot_questions)
        # With one leader nobody shares the queue; the store is asked only where several do.
        store = dist.distributed_c10d._get_default_store() if self.layout.data > 1 else None
        queue = QuestionQueue(store, f"policysplit/lots/{purpose}/{batch}/{self._calls}", len(lots))
        by_id = {question.id: question for question in questions}
        work = self._generate_and_grade(queue, lots, by_id, samples_per_mode, pending)
        pending.work = self.control.start(work)
        return pending

    def finish(self, batch: Batch, phases: Phases) -> list[Rollout]:
        """Graded rollouts of all questions, sorted by key, on every leader; [] on other ranks.

        phases takes the time spent here as "wait", and what generation and grading took. May be
        called again. Raises StopRequested on every rank when a stop signal arrives meanwhile.
        """
        if batch.rollouts is None:
            with phases.measure("wait"):
                # The control group's short time-out begins when the last rank is here.
                self.layout.barrier()
                rollouts = self.control.attend(batch.work, self.service) or []
                by_leader = self.layout.all_gather_leaders(rollouts)
            gathered = [rollout for rollouts in by_leader for rollout in rollouts]
            batch.rollouts = sorted(gathered, key=lambda rollout: rollout.key)
        phases.add(batch.phases)
        return batch.rollouts

    async def _generate_and_grade(
        self,
        queue: QuestionQueue,
        lots: Sequence,
        questions: Mapping[int, Question],
        samples_per_mode: Mapping[Mode, int],
        batch: Batch,
    ) -> list[Rollout]:
        """The leader's part: lots from the queue until it is empty, then all their grades."""

        def next_lot():
            number = queue.next()
            return None if number is None else lots[number]

        engine = self.leader.engine
        with batch.phases.measure("generate"):
            rollouts, stats = await collect(engine, next_lot, concurrency=self._lots_at_once())
        batch.metrics = stats.named() | engine.metrics()
        with batch.phases.measure("reward"):
            grades = await asyncio.to_thread(self._grade, rollouts, questions)
        for rollout, graded in zip(rollouts, grades, strict=True):
            rollout.reward, rollout.reward_error = graded.reward, graded.error
            # Samples of a second rollout are numbered on from the others.
            rollout.auxiliary = rollout.sample >= samples_per_mode[rollout.mode]
        return rollouts

    def _lots_at_once(self) -> int:
        """Two, so that an engine in this process never idles; for SGLang what its limit needs."""
        if self.rollout.engine != "sglang":
            return 2
        return 1 + -(-self.rollout.concurrency // self.rollout.lot_questions)

    def _grade(
        self, rollouts: Sequence[Rollout], questions: Mapping[int, Question]
    ) -> list[Graded]:
        items = [(self.leader.text(rollout), questions[rollout.question]) for rollout in rollouts]
        return self.leader.rewards.grade(items)
