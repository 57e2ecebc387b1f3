"""From questions to graded rollouts: leaders generate from one queue, every rank takes part in the
waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_policysplit.config import Config
from megatron_policysplit.data.questions import Question
from megatron_policysplit.distributed.control import Control, Service, Work
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rewards import Graded, RewardPool
from megatron_policysplit.rollout.collect import QuestionQueue, build_requests, collect, split_lots
from megatron_policysplit.rollout.engine import Engine
from megatron_policysplit.rows import Mode, Rollout, SecondRollout


@dataclass
class Leader:
    """What only a replica's leader holds: an engine, reward workers, and the tokenizer that makes
    text for them.
    """

    engine: Engine
    rewards: RewardPool
    tokenizer: transformers.PreTrainedTokenizerBase  # noqa: F821

    def text(self, rollout: Rollout) -> str:
        """The response as text, for grading and reading only; training never sees it."""
        return self.tokenizer.decode(rollout.tokens, skip_special_tokens=True)


@dataclass
class Batch:
    """A rollout batch that was asked for. rollouts: all of them, on leaders, once `Driver.finish`
    has run.
    phases: how long generation and grading took on this rank. metrics: what the leader's engine did
    for it.
    """

    number: int
    work: Work | None = None
    phases: Phases = field(default_factory=Phases)
    metrics: dict[str, float] = field(default_factory=dict)
    rollouts: list[Rollout] | None = None

    def cancel(self) -> None:
        """Stop generating it, if it is being generated, and wait until the engine has been told."""
        if self.work is not None:
            self.work.cancel()


class Driver:
    """Collective over all ranks; `leader` is None on ranks that only wait."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        control: Control,
        leader: Leader | None,
        service: Service | None = None,
    ):
        self.config, self.layout, self.control, self.leader, self.service = (
            config,
            layout,
            control,
            leader,
            service,
        )
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
        """`begin` and `finish` at once."""
        return self.finish(self.begin(batch, questions, prompts, samples_per_mode, purpose), phases)

    def begin(
        self,
        batch: int,
        questions: Sequence[Question],
        prompts: Mapping[int, Mapping[Mode, Sequence[int]]],
        samples_per_mode: Mapping[Mode, int],
        purpose: str,
        second: SecondRollout | None = None,
    ) -> Batch:
        """Start to generate and grade; leaders do so in the background until `finish` or
        `Batch.cancel`.

        prompts: question id -> mode -> prompt ids. purpose: "train" or "evaluation" (their seeds
        never meet). second: what is sampled besides, marked as auxiliary.
        """
        self._calls += 1
        asked = Batch(batch)
        if self.leader is None:
            return asked
        requests = build_requests(
            batch,
            [question.id for question in questions],
            prompts,
            self.config,
            samples_per_mode,
            purpose,
            second,
        )
        lots = split_lots(requests, self.config.rollout.lot_questions)
        # With one leader nobody shares the queue; the store is asked only where several do.
        store = dist.distributed_c10d._get_default_store() if self.layout.data > 1 else None
        queue = QuestionQueue(store, f"policysplit/lots/{purpose}/{batch}/{self._calls}", len(lots))
        work = self._lead(
            queue, lots, {question.id: question for question in questions}, samples_per_mode, asked
        )
        asked.work = self.control.start(work)
        return asked

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
                everywhere = self.layout.all_gather_leaders(rollouts)
            batch.rollouts = sorted(
                (r for part in everywhere for r in part), key=lambda rollout: rollout.key
            )
        phases.add(batch.phases)
        return batch.rollouts

    async def _lead(
        self,
        queue: QuestionQueue,
        lots: Sequence,
        questions: Mapping,
        samples: Mapping[Mode, int],
        asked: Batch,
    ) -> list[Rollout]:
        def next_lot():
            number = queue.next()
            return None if number is None else lots[number]

        with asked.phases.measure("generate"):
            rollouts, stats = await collect(
                self.leader.engine, next_lot, concurrency=self._lots_at_once()
            )
        asked.metrics = stats.named() | self.leader.engine.metrics()
        with asked.phases.measure("reward"):
            grades = await asyncio.to_thread(self._grade, rollouts, questions)
        for rollout, graded in zip(rollouts, grades, strict=True):
            rollout.reward, rollout.reward_error = graded.reward, graded.error
            rollout.auxiliary = rollout.sample >= samples[rollout.mode]
        return rollouts

    def _lots_at_once(self) -> int:
        """Two, so that an engine in this process never idles; as many as its limit on requests
        needs for SGLang.
        """
        rollout = self.config.rollout
        if rollout.engine != "sglang":
            return 2
        return 1 + -(-rollout.concurrency // rollout.lot_questions)

    def _grade(self, rollouts: Sequence[Rollout], questions: Mapping) -> list[Graded]:
        items = [(self.leader.text(rollout), questions[rollout.question]) for rollout in rollouts]
        return self.leader.rewards.grade(items)
