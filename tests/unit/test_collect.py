"""Collecting rollouts from engines that lose, delay and repeat them; the queue of several leaders; seeds."""

import asyncio
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import threading

import pytest

from megatron_policysplit.config import ModesConfig, RolloutConfig, SamplingConfig
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rollout.collect import QuestionQueue, build_requests, collect, request_settings, split_lots
from megatron_policysplit.rollout.engine import EnginePaused, Sampling
from megatron_policysplit.rollout.replay import ReplayEngine
from megatron_policysplit.rollout.seeds import sample_seed
from megatron_policysplit.rows import MODES, Mode, SecondRollout
from tests.support.scripted_engine import ScriptedEngine

BATCH = 7
ROLLOUT = RolloutConfig(
    max_response_tokens=6,
    normal=SamplingConfig(temperature=0.6, top_p=0.9, top_k=5),
    high_entropy=SamplingConfig(temperature=1.2),
)
SETTINGS = request_settings(ROLLOUT, ModesConfig(), seed=0)
HALF = {Mode.NORMAL: 2, Mode.HIGH_ENTROPY: 2}
LOST, LATE = (BATCH, 3, "normal", 1), (BATCH, 5, "high_entropy", 0)


def requests(questions=range(8), samples_per_mode=HALF, **changes):
    prompts = {q: {Mode.NORMAL: [q, 1], Mode.HIGH_ENTROPY: [q, 2, 2]} for q in questions}
    return build_requests(BATCH, questions, prompts, SETTINGS, samples_per_mode, **changes)


def keys(asked):
    return sorted((BATCH, r.question, r.mode.value, sample) for r in asked for sample in r.samples)


def run(engine, asked, lot_questions=3, **options):
    lots = split_lots(asked, lot_questions)
    queue = QuestionQueue(None, "", len(lots))

    def next_lot():
        number = queue.next()
        return None if number is None else lots[number]

    return asyncio.run(collect(engine, next_lot, **options))


def test_requests_cover_every_question_and_mode():
    asked = requests([4, 2])
    assert [(r.question, r.mode) for r in asked] == [(q, mode) for q in (4, 2) for mode in MODES]
    assert asked[0].sampling == Sampling(0.6, 0.9, 5, 6) and asked[1].sampling == Sampling(1.2, 1.0, -1, 6)
    assert asked[3].prompt == [2, 2, 2] and list(asked[3].samples) == [0, 1]
    assert asked[3].seeds == [sample_seed(0, BATCH, 2, Mode.HIGH_ENTROPY, i) for i in (0, 1)]
    only_normal = requests([4, 2], {Mode.NORMAL: 4})
    assert [(r.question, r.mode, len(r.samples)) for r in only_normal] == [(4, Mode.NORMAL, 4), (2, Mode.NORMAL, 4)]
    evaluation = requests([4], purpose="evaluation")
    assert not set(evaluation[0].seeds) & set(asked[0].seeds)


def test_a_second_rollout_is_of_the_first_questions_at_its_own_temperature_with_its_own_samples():
    second = SecondRollout(1.5, questions=2, samples=3)
    asked = requests([4, 2, 6], second=second)
    plain = requests([4, 2, 6])
    added = [r for r in asked if r not in plain]
    assert [r for r in asked if r in plain] == plain
    assert [(r.question, r.mode, list(r.samples)) for r in added] == [
        (q, mode, [2, 3, 4]) for q in (4, 2) for mode in MODES
    ]
    assert [r.sampling.temperature for r in added] == pytest.approx([0.9, 1.8] * 2)
    assert added[0].sampling == dataclasses.replace(plain[0].sampling, temperature=added[0].sampling.temperature)
    assert added[0].seeds == [sample_seed(0, BATCH, 4, Mode.NORMAL, i) for i in (2, 3, 4)]
    lots = split_lots(asked, 1)
    assert [{r.question for r in lot} for lot in lots] == [{4}, {2}, {6}]
    rollouts, _ = run(ScriptedEngine(), asked)
    assert [made.key for made in rollouts] == keys(asked)


def test_lots_keep_a_question_together():
    lots = split_lots(requests(range(8)), 3)
    assert [[r.question for r in lot] for lot in lots] == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [6, 6, 7, 7]]


def test_everything_arrives_once_in_the_order_of_keys():
    asked, engine = requests(), ScriptedEngine(order_seed=1)
    rollouts, stats = run(engine, asked)
    assert [r.key for r in rollouts] == keys(asked)
    assert (stats.lots, stats.retried, stats.duplicates) == (3, 0, 0)
    assert stats.generated_tokens == sum(len(r.tokens) for r in rollouts) and stats.seconds > 0
    assert engine.most_running == 2
    engine = ScriptedEngine(order_seed=2)
    again, _ = run(engine, asked, lot_questions=1, concurrency=1)
    assert again == rollouts and engine.most_running == 1


@pytest.mark.parametrize(
    "script, retried, duplicates",
    [
        ({LOST: ["drop"]}, 1, 0),
        ({LOST: ["drop", "drop"], LATE: ["drop"]}, 3, 0),
        ({LOST: ["duplicate"], LATE: ["duplicate"]}, 0, 2),
        ({LOST: ["drop", "duplicate"]}, 1, 1),
    ],
)
def test_lost_samples_are_requested_again_and_repeated_ones_dropped(script, retried, duplicates):
    engine, asked = ScriptedEngine(script), requests()
    rollouts, stats = run(engine, asked)
    assert [r.key for r in rollouts] == keys(asked)
    assert (stats.retried, stats.duplicates) == (retried, duplicates)
    assert len(engine.requested) == len(rollouts) + retried  # nothing that had arrived was asked for again
    assert rollouts == run(ScriptedEngine(), asked)[0]  # with the seed it had at first


def test_what_never_arrives_is_named():
    with pytest.raises(TrainingError, match=r"1 of 12 responses .* in 3 attempts; missing .*\(7, 3, 'normal', 1\)"):
        run(ScriptedEngine({LOST: ["drop"] * 3}), requests())


def test_a_stalled_sample_is_requested_again():
    asked = requests()
    rollouts, stats = run(ScriptedEngine({LATE: ["stall"]}), asked, timeout_seconds=0.3)
    assert [r.key for r in rollouts] == keys(asked) and stats.retried >= 1


def test_a_sample_that_stays_stalled_is_named():
    with pytest.raises(TrainingError, match=r"in 2 attempts; the last attempt ran past 0.1 seconds; .*'high_entropy'"):
        run(ScriptedEngine({LATE: ["stall"] * 2}), requests(), timeout_seconds=0.1, retries=1)


def test_a_response_nobody_asked_for_is_an_error():
    with pytest.raises(TrainingError, match=r"returned \(7, 3, 'normal', 1000001\), which was not requested"):
        run(ScriptedEngine({LOST: ["stray"]}), requests())


def test_an_engines_own_timeout_is_not_taken_for_ours():
    class Broken(ScriptedEngine):
        async def submit(self, asked):
            raise TimeoutError("connection")
            yield

    with pytest.raises(TimeoutError, match="connection"):
        run(Broken(), requests(), timeout_seconds=60)


def test_pause_ends_a_stalled_collection_and_what_was_asked_can_be_asked_again():
    asked = requests()
    lots = [asked]

    async def scenario():
        engine = ScriptedEngine({LATE: ["stall"]})
        task = asyncio.create_task(collect(engine, lambda: lots.pop() if lots else None))
        await asyncio.sleep(0.1)
        assert not task.done() and engine.running == 1
        await engine.pause()
        with pytest.raises(EnginePaused):
            await task
        await engine.resume()
        assert engine.running == 0
        lots.append(asked)
        return await collect(engine, lambda: lots.pop() if lots else None)

    rollouts, _ = asyncio.run(scenario())
    assert [r.key for r in rollouts] == keys(asked)


@pytest.fixture(params=["scripted", "replay", "local"])
def engine(request, tmp_path):
    """Every engine, able to answer `requests()` (the replay engine from a dump of the scripted one)."""
    if request.param == "scripted":
        return ScriptedEngine()
    if request.param == "replay":
        lines = []
        for rollout in run(ScriptedEngine(), requests())[0]:
            lines.append(json.dumps({**dataclasses.asdict(rollout), "mode": rollout.mode.value}))
        (tmp_path / "step_000007.jsonl").write_text("\n".join(lines) + "\n")
        return ReplayEngine(tmp_path)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_policysplit.rollout.local import LocalEngine

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path)
    return LocalEngine(str(tmp_path), [3], max_batch_samples=5)


def weights_of(engine):
    model = getattr(engine, "_model", None)
    return [] if model is None else [(name, p.detach().clone()) for name, p in model.named_parameters()]


def test_every_engine_keeps_the_protocol(engine):
    asked = requests()

    async def answers():
        return [r async for r in engine.submit(asked)]

    async def scenario():
        weights = weights_of(engine)
        assert await engine.health() == 0
        assert sorted(r.key for r in await answers()) == keys(asked)
        await engine.pause()
        with pytest.raises(EnginePaused):
            await answers()
        await engine.resume()
        await engine.release()
        await engine.restore()
        assert sorted(r.key for r in await answers()) == keys(asked)
        drained = []

        def tensors():
            yield from weights
            drained.append(True)

        await engine.release()
        await engine.load(tensors(), 3)
        assert drained and await engine.health() == 3
        rollouts = await answers()
        assert sorted(r.key for r in rollouts) == keys(asked)
        assert all(len(r.tokens) <= ROLLOUT.max_response_tokens for r in rollouts)

    asyncio.run(scenario())
    rollouts, stats = run(engine, asked)  # in another event loop
    assert [r.key for r in rollouts] == keys(asked) and stats.duplicates == 0


def _take_all(port, key, lots, results):
    from torch.distributed import TCPStore

    queue = QuestionQueue(TCPStore("127.0.0.1", port, is_master=False), key, lots)
    results.put(list(iter(queue.next, None)))


def test_several_leaders_take_each_lot_once():
    from torch.distributed import TCPStore

    lots = 500
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    leaders = [context.Process(target=_take_all, args=(store.port, "lots/7", lots, results)) for _ in range(2)]
    for leader in leaders:
        leader.start()
    taken = [results.get(timeout=120) for _ in leaders]
    for leader in leaders:
        leader.join()
    assert sorted(sum(taken, [])) == list(range(lots))
    assert QuestionQueue(store, "lots/7", lots).next() is None
    assert QuestionQueue(store, "lots/8", lots).next() == 0  # another batch, another counter


def test_threads_of_one_leader_take_each_lot_once():
    queue, taken = QuestionQueue(None, "", 2000), []
    threads = [threading.Thread(target=lambda: taken.extend(iter(queue.next, None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(2000)) and queue.next() is None


def test_seeds_are_distinct_and_tell_purpose_and_mode_apart():
    seeds = {}
    for purpose in ("train", "evaluation"):
        for mode in MODES:
            seeds[purpose, mode] = {
                sample_seed(run_seed, batch, question, mode, sample, purpose)
                for run_seed in range(3)
                for batch in range(5)
                for question in range(20)
                for sample in range(8)
            }
    assert all(len(values) == 3 * 5 * 20 * 8 for values in seeds.values())
    everything = set().union(*seeds.values())
    assert len(everything) == 4 * 3 * 5 * 20 * 8 and 0 <= min(everything) and max(everything) < 2**63
    # By construction, not by luck: the two top bits differ.
    assert len({frozenset(seed >> 61 for seed in values) for values in seeds.values()}) == 4
    with pytest.raises(ValueError, match="purpose='test'"):
        sample_seed(0, 0, 0, Mode.NORMAL, 0, "test")


def test_seeds_are_the_same_in_another_process():
    code = (
        "from megatron_policysplit.rollout.seeds import sample_seed; from megatron_policysplit.rows import Mode; "
        "print(sample_seed(1, 2, 3, Mode.HIGH_ENTROPY, 4))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == sample_seed(1, 2, 3, Mode.HIGH_ENTROPY, 4)
