"""Each cause of a disagreement, made on purpose with a real engine beside a real actor, is what the gate names."""

import asyncio
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_policysplit.training.agreement.gate import AgreementGate
from megatron_policysplit.training.agreement.diagnosis import Probe
from megatron_policysplit.config import Config, RunConfig
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rows import MODES, Mode, share_rollouts
from megatron_policysplit.training.journal import SilentLog
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model


@dataclass(frozen=True)
class Case:
    """An engine class of tests/support/sabotage.py and what the gate must say. temperatures: normal, high-entropy.

    by_scoring: the samples are older than the weights. replica: only this one has the sabotaged engine, others a
    sound one. max_difference: agreement.max_difference, with max_k3 out of the way.
    """

    engine: str
    temperatures: tuple[float, float]
    cause: str
    says: str = ""
    by_scoring: bool = False
    replica: int | None = None
    max_difference: float | None = None

    def __str__(self):
        how = " by scoring" * self.by_scoring + (f" replica {self.replica}" if self.replica is not None else "")
        how += f" within {self.max_difference}" if self.max_difference is not None else ""
        return f"{self.engine} at {self.temperatures[0]} and {self.temperatures[1]}{how}"


ONE, COLD_AND_HOT = (1.0, 1.0), (0.7, 1.3)
AGAIN, STILL = "once the weights have been sent again", "also after they have been sent again"
CASES = [
    Case("OtherTemperature", ONE, "temperature", "those of temperature 0.8, not of rollout.normal.temperature=1 "),
    Case("OtherTemperature", COLD_AND_HOT, "temperature", "of temperature 0.56, not of rollout.normal.temperature=0.7"),
    Case(
        "SwappedTemperatures",
        COLD_AND_HOT,
        "temperature",
        "of temperature (1.3|0.7), that of the (normal|high_entropy) mode, not of",
    ),
    Case("Untempered", (0.7, 1.0), "temperature", "of temperature 1, that of the high_entropy mode, not of"),
    Case("SwappedPrompts", ONE, "template", "behind the prompt of the (normal|high_entropy) mode"),
    Case("SwappedPrompts", COLD_AND_HOT, "template", "behind the prompt of the (normal|high_entropy) mode"),
    Case("NewTemplate", ONE, "template", "no temperature explains the samples"),
    Case("NewTemplate", COLD_AND_HOT, "template", "no temperature explains the samples"),
    Case("AddsBos", ONE, "template", "puts the beginning-of-sequence token 1 before the prompt"),
    Case("AddsBos", COLD_AND_HOT, "template", "puts the beginning-of-sequence token 1 before the prompt"),
    Case("AddsBos", COLD_AND_HOT, "template", "also when it only scores", by_scoring=True),
    Case("DamagedOnce", ONE, "weights", AGAIN),
    Case("DamagedOnce", COLD_AND_HOT, "weights", AGAIN),
    Case("DamagedOnce", COLD_AND_HOT, "weights", AGAIN, by_scoring=True),
    Case("StaleOnce", ONE, "weights", AGAIN),
    Case("StaleOnce", COLD_AND_HOT, "weights", AGAIN),
    Case("WrongMapping", ONE, "weights", STILL),
    Case("WrongMapping", COLD_AND_HOT, "weights", STILL),
    Case("WrongMapping", ONE, "weights", STILL, by_scoring=True),
    Case("TwoServers", ONE, "weights", "12 of 24 responses disagree and the others do not"),
    Case("TwoServers", COLD_AND_HOT, "weights", "12 of 24 responses disagree and the others do not"),
    Case("Bfloat16", ONE, "precision", "where rounding the weights to bfloat16 makes"),
    Case("Bfloat16", COLD_AND_HOT, "precision", "where rounding the weights to bfloat16 makes"),
    Case("Bfloat16", ONE, "precision", "where rounding the weights to bfloat16 makes", by_scoring=True),
    # Rounding is within the bound at temperature 1, and past it at a half: the samples are not to blame for that.
    Case("Bfloat16", (0.5, 1.0), "precision", "where rounding the weights to bfloat16 makes", max_difference=0.023),
]
SOUND = [
    Case("LocalEngine", ONE, ""),
    Case("LocalEngine", COLD_AND_HOT, ""),
    Case("LocalEngine", ONE, "", by_scoring=True),
]
SECOND_REPLICA = [
    Case("OtherTemperature", COLD_AND_HOT, "temperature", "of temperature 0.56, not of", replica=1),
    Case("DamagedOnce", COLD_AND_HOT, "weights", AGAIN, replica=1),
    Case("WrongMapping", ONE, "weights", STILL, by_scoring=True, replica=1),
    Case("Bfloat16", ONE, "precision", "where rounding the weights to bfloat16 makes", replica=1),
]


def run_cases(rank, shape, path, cases):
    """Per case: what the gate raised (None if nothing) and the metrics it gave; whether the actor kept its weights."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, data = shape
    layout = initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=data), seed=1, timeout_seconds=100)
    actor = Actor(configured(path, ONE), read_hf_config(path), layout)
    before = [parameter.clone() for parameter in actor.model.parameters()]
    outcomes = {str(case): run_case(case, path, actor) for case in cases}
    unchanged = all(torch.equal(a, b) for a, b in zip(before, actor.model.parameters(), strict=True))
    return outcomes, unchanged


def configured(path, temperatures):
    config = Config()
    config.model.dtype, config.agreement.breaches = "float32", 1
    config.model.path = str(path)
    config.rollout.normal.temperature, config.rollout.high_entropy.temperature = temperatures
    config.rollout.max_response_tokens = 12
    return config


def run_case(case, path, actor):
    import tests.support.sabotage as sabotage
    from megatron_policysplit.actor.weights import consume_weights
    from megatron_policysplit.rollout.collect import build_requests, request_settings

    layout, config = actor.layout, configured(path, case.temperatures)
    if case.max_difference is not None:
        config.agreement.max_difference, config.agreement.max_k3 = case.max_difference, 1.0
    actor.config, engine = config, None
    if layout.is_leader:
        kind = case.engine if case.replica in (None, layout.data_rank) else "LocalEngine"
        # The engine starts from other weights than the actor's, so that a sync matters.
        engine = getattr(sabotage, kind)(f"{path}-other", [0])
    prompts = {
        question: {Mode.NORMAL: [2, 20 + question, 3], Mode.HIGH_ENTROPY: [8, 4, 9, 2, 20 + question, 3]}
        for question in range(6)
    }

    def sync(version=5):
        def take(stream):
            if engine is not None:
                asyncio.run(engine.load(stream, version))

        consume_weights(actor.model, actor.hf_config, "leader", take)

    def score(sequences):
        return asyncio.run(engine.log_probs(sequences)) if engine is not None else []

    async def sample():
        mine = range(layout.data_rank, 6, layout.data)
        settings = request_settings(config.rollout, config.modes, seed=3)
        requests = build_requests(0, mine, prompts, settings, dict.fromkeys(MODES, 4))
        return [rollout async for rollout in engine.submit(requests)]

    sync()
    parts = layout.all_gather_leaders(asyncio.run(sample()) if engine is not None else [])
    rows = share_rollouts([rollout for part in parts for rollout in part], prompts)
    old = actor.log_probs(actor.place(rows, [False] * len(rows), seed=0))
    gate = AgreementGate.of(config, Probe(layout, actor, score, sync), SilentLog())
    version = 6 if case.by_scoring else 5
    try:
        return None, gate.check(0, rows, old, version=version, served=version)
    except TrainingError as error:
        return str(error), {}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The actor's model; beside it, under `...-other`, the weights that engines start from."""
    path = tmp_path_factory.mktemp("agreement") / "model"
    make_model(path.with_name("model-other"), "qwen3", tied=True, vocab=96, bos_token_id=1, seed=1)
    return make_model(path, "qwen3", tied=True, vocab=96, bos_token_id=1)


def outcomes_of(shape, model, cases):
    """The same on every rank of TP x PP x DP; the actor's weights survive."""
    ranks = run_distributed(run_cases, math.prod(shape), shape, model, cases, timeout_seconds=250)
    assert all(unchanged for _, unchanged in ranks)
    assert all(outcomes == ranks[0][0] for outcomes, _ in ranks)
    return ranks[0][0]


@pytest.fixture(scope="module")
def outcomes(model):
    return outcomes_of((2, 1, 1), model, CASES + SOUND)


def assert_found(case, outcome):
    error, _ = outcome
    assert error is not None and f"likely cause: {case.cause}: " in error, error
    assert re.search(case.says, error), error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cause_is_found(outcomes, case):
    assert_found(case, outcomes[str(case)])


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_a_sound_engine_agrees(outcomes, case):
    error, metrics = outcomes[str(case)]
    assert error is None
    assert metrics["agreement/difference"] < 1e-5 and metrics["agreement/breaches"] == 0
    assert metrics["agreement/tokens"] > 200 and metrics["agreement/normal/tokens"] > 100


@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 1, 2)], ids=["PP=2", "DP=2"])
def test_at_other_layouts(model, shape):
    cases = SECOND_REPLICA if shape[2] == 2 else [CASES[0], CASES[8], CASES[13], CASES[-1]]
    found = outcomes_of(shape, model, cases)
    for case in cases:
        assert_found(case, found[str(case)])
