"""Two leaders and a rank that only waits, with the scripted engine: one batch, each rollout once, alike on both."""

import asyncio
import os
import signal
import time
from datetime import timedelta

import pytest

from tests.support.dist import run_distributed

QUESTIONS, SAMPLES = 7, 4


class WordTokenizer:
    def decode(self, tokens, skip_special_tokens):
        assert not skip_special_tokens
        return " ".join(map(str, tokens))


def make_driver(rank: int, script: dict):
    """Ranks 0 and 1 lead a replica each; rank 2 belongs to replica 1."""
    import torch.distributed as dist

    from megatron_policysplit.config import Config
    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.layout import Layout
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.rewards import RewardPool
    from megatron_policysplit.rollout.collect import request_settings
    from megatron_policysplit.rollout.driver import Driver, Leader
    from tests.support.scripted_engine import ScriptedEngine

    class UnhurriedEngine(ScriptedEngine):
        """Takes its time for each lot, so that the other leader gets some too."""

        async def submit(self, requests):
            await asyncio.sleep(0.3)
            async for rollout in super().submit(requests):
                yield rollout

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world, control = dist.new_group(backend="gloo"), dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
    leaders = dist.new_group([0, 1], backend="gloo")
    layout = Layout(
        rank=rank,
        tensor=1,
        pipeline=1,
        data=2,
        tensor_rank=0,
        pipeline_rank=0,
        data_rank=min(rank, 1),
        world=world,
        control=control,
        replica=world,
        leaders=leaders if rank < 2 else None,
        leader_ranks=[0, 1],
    )
    config = Config()
    config.rollout.max_response_tokens, config.rollout.lot_questions = 6, 1
    leader = None
    if rank < 2:
        pool = RewardPool("tests.support.e2e:picky_reward", workers=1, timeout_seconds=60)
        leader = Leader(UnhurriedEngine(script, order_seed=rank), pool, WordTokenizer(), frozenset())
    requests = request_settings(config.rollout, config.modes, config.run.seed)
    control = Control(control, StopSignal().install(), heartbeat_seconds=0.2)
    return Driver(config.rollout, requests, layout, control, leader)


class PendingBatch:
    """A service that wants nothing and counts how often it was asked."""

    count = 0

    def wanted(self) -> bool:
        self.count += 1
        return False


def begin(driver, batch: int, purpose: str = "train"):
    from megatron_policysplit.data.questions import Question
    from megatron_policysplit.rows import MODES

    questions = [Question(number, [{"role": "user", "content": "?"}], "1", {}) for number in range(QUESTIONS)]
    prompts = {question.id: {mode: [1, 2] for mode in MODES} for question in questions}
    return driver.begin(batch, questions, prompts, dict.fromkeys(MODES, SAMPLES), purpose)


def generate(driver, batch: int, purpose: str = "train") -> list:
    from megatron_policysplit.logs.timing import Phases

    return driver.finish(begin(driver, batch, purpose), Phases())


def story(rank: int) -> dict:
    """A batch with mishaps, an evaluation, a batch that a signal stops on rank 1, and the same batch again."""
    from megatron_policysplit.distributed.stop_signal import StopRequested

    mishaps = {(0, 2, "normal", 1): ["drop"], (0, 5, "high_entropy", 0): ["duplicate"]}
    stalls = {(1, number, "normal", 0): ["stall"] for number in range(QUESTIONS)}
    driver = make_driver(rank, mishaps | stalls)
    engine = driver.leader and driver.leader.engine
    found = {"first": generate(driver, 0)}
    if engine is not None:
        found["requested"] = list(engine.requested)
    found["evaluation"] = generate(driver, 0, "evaluation")

    stop = driver.control.stop
    if rank == 1:
        driver.control.loop.call_later(0.5, os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested):
        generate(driver, 1)
    found["running_after_stop"] = engine.running if engine else 0
    stop.received = None
    if engine is not None:
        engine._script.clear()
    found["again"] = generate(driver, 1)
    found |= halves(driver, engine)
    if driver.leader is not None:
        driver.leader.rewards.close()
    driver.control.close()
    return found


def halves(driver, engine) -> dict:
    """`begin` and `finish` apart: finished twice, under way beside another batch, cancelled, finished after that."""
    from megatron_policysplit.logs.timing import Phases

    driver.service = PendingBatch()
    batch, first, second = begin(driver, 2), Phases(), Phases()
    beside = generate(driver, 0, "evaluation")
    once = driver.finish(batch, first)
    asked = driver.service.count
    twice = driver.finish(batch, second)
    found = {
        "finished": once,
        "the same": twice is once,
        "asked again": driver.service.count - asked,
        "asked": asked,
        "phases": [set(first.seconds), set(second.seconds)],
        "generate": [phases.seconds.get("generate") for phases in (batch.phases, first, second)],
        "metrics": batch.metrics,
        "beside": beside,
    }
    if engine is not None:
        engine._script.update({(3, number, "normal", 0): ["stall"] * 2 for number in range(QUESTIONS)})
    batch = begin(driver, 3)
    if engine is not None:
        while not engine.running:
            time.sleep(0.01)
    batch.cancel()
    found["running after cancel"] = engine.running if engine else 0
    batch.cancel()  # again, and nothing happens
    try:
        driver.finish(batch, Phases())
    except Exception as error:
        found["finish after cancel"] = f"{type(error).__name__}: {error}"
    if engine is not None:
        engine._script.clear()
    found["begun again"] = generate(driver, 3)
    return found


@pytest.fixture(scope="module")
def told() -> list[dict]:
    return run_distributed(story, 3)


def expected_keys(batch: int) -> list[tuple]:
    modes = ("high_entropy", "normal")
    return [(batch, q, mode, sample) for q in range(QUESTIONS) for mode in modes for sample in range(SAMPLES)]


def test_every_rollout_once_and_the_same_list_on_both_leaders(told):
    assert [rollout.key for rollout in told[0]["first"]] == expected_keys(0)
    assert told[0]["first"] == told[1]["first"]
    assert told[2]["first"] == []


def test_the_leaders_share_the_questions(told):
    taken = [{key[1] for key in told[rank]["requested"]} for rank in (0, 1)]
    assert taken[0] and taken[1]
    assert not taken[0] & taken[1]
    assert taken[0] | taken[1] == set(range(QUESTIONS))


def test_responses_do_not_depend_on_who_made_them(told):
    """The scripted engine answers by the seed alone, so one process can say what the answers must be."""
    from megatron_policysplit.config import Config
    from megatron_policysplit.rollout.collect import build_requests, request_settings
    from megatron_policysplit.rows import MODES
    from tests.support.scripted_engine import ScriptedEngine

    config = Config()
    config.rollout.max_response_tokens = 6
    settings = request_settings(config.rollout, config.modes, config.run.seed)
    prompts = {number: {mode: [1, 2] for mode in MODES} for number in range(QUESTIONS)}
    requests = build_requests(0, range(QUESTIONS), prompts, settings, dict.fromkeys(MODES, SAMPLES))

    async def answers():
        return {made.key: made.tokens async for made in ScriptedEngine().submit(requests)}

    assert {made.key: made.tokens for made in told[0]["first"]} == asyncio.run(answers())


def test_an_evaluation_of_the_same_batch_has_other_samples(told):
    train, evaluation = told[0]["first"], told[0]["evaluation"]
    assert [made.key for made in train] == [made.key for made in evaluation]
    assert [made.tokens for made in train] != [made.tokens for made in evaluation]


def test_a_reward_that_raises_scores_zero_and_says_why(told):
    for made in told[0]["first"]:
        wrong = made.question == 3
        assert made.reward == (0.0 if wrong else 1.0)
        assert made.reward_error == ("ValueError: question 3 is not mine" if wrong else None)


def test_a_stop_leaves_nothing_running_and_the_batch_can_be_generated_again(told):
    assert [found["running_after_stop"] for found in told] == [0, 0, 0]
    assert [made.key for made in told[0]["again"]] == expected_keys(1)
    assert told[0]["again"] == told[1]["again"]


def test_a_batch_may_be_finished_twice(told):
    assert [made.key for made in told[0]["finished"]] == expected_keys(2)
    assert told[0]["finished"] == told[1]["finished"] and told[2]["finished"] == []
    assert all(found["the same"] and found["asked"] > 0 and found["asked again"] == 0 for found in told)


def test_phases_say_what_generation_took_and_who_waited(told):
    for rank, found in enumerate(told):
        made = {"generate", "reward"} if rank < 2 else set()
        assert found["phases"] == [made | {"wait"}, made]
        first, *others = found["generate"]
        assert others == [first, first] and (first is None) == (rank == 2)


def test_metrics_come_with_the_batch(told):
    assert told[0]["metrics"] and told[1]["metrics"] and told[2]["metrics"] == {}


def test_a_batch_in_flight_leaves_others_alone(told):
    assert told[0]["beside"] == told[0]["evaluation"]


def test_a_cancelled_batch_can_be_asked_for_again(told):
    """All questions, though leaders had taken some of them before; and its end is no secret to any rank."""
    assert [found["running after cancel"] for found in told] == [0, 0, 0]
    assert [made.key for made in told[0]["begun again"]] == expected_keys(3)
    assert told[0]["begun again"] == told[1]["begun again"]
    elsewhere = "TrainingError: generation failed on rank 0 (CancelledError: )"
    assert [found["finish after cancel"] for found in told] == ["CancelledError: ", "CancelledError: ", elsewhere]
