"""What the trainer does when: with generation beside training and without, around evaluations, stops and checkpoints.

The run is a real `Run` with a real `Generation` (its `sync`, `awake` and `engine_log_probs` are under test) of parts
that only remember what was asked of them.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.algorithms.loss import LossMetrics
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.config import Config
from megatron_policysplit.distributed.rank_watch import Failure, RankWatch
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.errors import DONE, STOPPED, EngineError, EngineLost
from megatron_policysplit.training import trainer as trainers
from megatron_policysplit.training.generation import Generation
from megatron_policysplit.training.journal import Journal, SilentLog
from megatron_policysplit.training.questions import EvaluationQuestions, TrainingQuestions
from megatron_policysplit.training.run import Run

FAR = {"live_rows": [], "check_staleness": None}


class Stream:
    def __init__(self):
        self.drawn = 0

    def next_batch(self):
        self.drawn += 1
        return [self.drawn - 1]

    def state(self):
        return {"drawn": self.drawn}


class FakeBatch:
    def __init__(self, number, log):
        self.number, self.log, self.metrics, self.finished = number, log, {}, False

    def cancel(self):
        if not self.finished:
            self.log.append(f"cancel {self.number}")
            self.finished = True


class Parts:
    """Driver, actor, fleet, control, engine and colocation in one: each call is a line of `log`.

    stop_at: the line after which a stop signal has arrived; `finish`, `generate` and `check` then raise it.
    """

    def __init__(self, log):
        self.log, self.stop_at, self.engines_turn = log, None, False
        self.optimizer = SimpleNamespace(steps_taken=0)

    def _stop_if_signalled(self):
        if self.stop_at in self.log:
            self.stop_at = None
            raise StopRequested

    def begin(self, batch, questions, prompts, samples, purpose, second=None):
        assert purpose == "train" and questions == [batch]
        self.log.append(f"ask {batch}")
        return FakeBatch(batch, self.log)

    def finish(self, batch, phases):
        if not batch.finished:
            try:
                self._stop_if_signalled()
            except StopRequested:
                batch.cancel()
                raise
            self.log.append(f"finish {batch.number}")
            batch.finished = True
        return []

    def generate(self, batch, questions, prompts, samples, purpose, phases):
        assert purpose == "evaluation"
        self._stop_if_signalled()
        self.log.append(f"evaluate {batch}")
        return []

    def place(self, rows, live, seed, scored=None, compared=None):
        return SimpleNamespace(plan=None, optimizer_steps=1)

    def log_probs(self, placed):
        self.log.append("score")
        return []

    def update(self, placed, step, signals):
        self.log.append("update")
        self.optimizer.steps_taken += 1
        result = SimpleNamespace(stepped=True, grad_norm=0.0, learning_rate=0.0)
        return SimpleNamespace(metrics=LossMetrics.of_vectors([]), result=result)

    def sync(self, version):
        self.log.append(f"sync {version}")

    def serve_version(self, version):
        self.log.append(f"serve {version}")

    def check(self):
        self._stop_if_signalled()

    def attend(self, work, service):
        assert isinstance(service, Generation) and service.fleet is self
        self._stop_if_signalled()
        return work

    def to_generation(self):
        self.log.append("to generation")
        self.engines_turn = True

    def to_training(self):
        self.log.append("to training")
        self.engines_turn = False

    def give_up_starting(self):
        self.log.append("give up starting")


LAYOUT = SimpleNamespace(
    is_chief=False,
    barrier=lambda: None,
    all_reduce_max=lambda value: value,
    broadcast_from_chief=lambda value: 0.0 if value is None else value,
)


class FakeJournal(Journal):
    """Where a run stands, without a disk: what is saved is a line of `lines`."""

    def __init__(self, config, lines, state):
        self.log, self.directory, self.state, self.lines = SilentLog(), config.run.dir, state, lines
        self.saved = set()

    def save(self):
        if self.state.step not in self.saved:
            self.saved.add(self.state.step)
            self.lines.append(f"save {self.state.step} at {self.state.stream.get('drawn', 0)}")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(overlap, steps, eval_every, ...) -> trainer, parts; `parts.log` has what happens."""
    for name, value in FAR.items():
        monkeypatch.setattr(trainers, name, lambda *_, value=value: value)

    def make(overlap=False, steps=3, *, eval_every=0, save_every=0, colocated=False, state=None):
        config = Config()
        config.run.dir = str(tmp_path)
        config.train.steps, config.rollout.overlap, config.agreement.every = steps, overlap, 0
        config.eval.every, config.checkpoint.every, config.checkpoint.hugging_face = eval_every, save_every, False
        log = []
        parts = Parts(log)
        parts.colocation = parts if colocated else None
        resources = ExitStack()
        resources.callback(log.append, "close")
        journal = FakeJournal(config, log, state or TrainerState())
        leader = SimpleNamespace(engine=parts)
        generation = Generation(config, LAYOUT, parts, parts, journal.state, leader, parts)
        for name in ("begin", "finish", "generate"):
            setattr(generation.driver, name, getattr(parts, name))
        run = Run(
            config=config,
            layout=LAYOUT,
            watch=RankWatch(lambda error: Failure(f"error: {error}", 1)),
            control=parts,
            algorithm=build_algorithm(config.algorithm),
            actor=parts,
            generation=generation,
            journal=journal,
            questions=TrainingQuestions(stream=Stream()),
            eval_questions=EvaluationQuestions({1: 1} if eval_every else {}),
            judge=None,
            resources=resources,
        )
        return trainers.Trainer(run), parts

    return make


def told(parts, *unwanted):
    """The log in one line, without some kinds of entries."""
    return ", ".join(line for line in parts.log if not line.startswith(("serve", "close", *unwanted)))


def test_without_overlap_one_thing_after_another(build):
    trainer, parts = build(steps=2, save_every=1)
    assert trainer.train() == DONE
    assert told(parts) == (
        "sync 0, ask 0, finish 0, score, update, sync 1, save 1 at 1, "
        "ask 1, finish 1, score, update, sync 2, save 2 at 2"
    )
    assert parts.log[-1] == "close"


def test_the_engine_of_a_leader_knows_what_it_serves(build):
    trainer, parts = build(steps=1)
    trainer.train()
    assert [line for line in parts.log if line.startswith(("sync", "serve"))] == [
        "sync 0",
        "serve 0",
        "sync 1",
        "serve 1",
    ]


def test_with_overlap_the_next_batch_is_asked_for_before_this_one_is_trained(build):
    trainer, parts = build(True, steps=3, save_every=1)
    assert trainer.train() == DONE
    assert told(parts) == (
        "sync 0, ask 0, finish 0, ask 1, score, update, save 1 at 1, "
        "finish 1, sync 1, ask 2, score, update, save 2 at 2, "
        "finish 2, score, update, save 3 at 3"
    )


def test_an_evaluation_finishes_the_batch_in_flight_first_and_keeps_it(build):
    trainer, parts = build(True, steps=3, eval_every=1)
    assert trainer.train() == DONE
    assert told(parts, "save") == (
        "sync 0, evaluate 0, score, "
        "ask 0, finish 0, ask 1, score, update, finish 1, sync 1, evaluate 1, score, "
        "ask 2, score, update, finish 2, sync 2, evaluate 2, score, "
        "score, update, sync 3, evaluate 3, score"
    )


def test_evaluation_without_overlap(build):
    trainer, parts = build(steps=2, eval_every=2)
    assert trainer.train() == DONE
    assert told(parts, "save") == (
        "sync 0, evaluate 0, score, ask 0, finish 0, score, update, sync 1, "
        "ask 1, finish 1, score, update, sync 2, evaluate 2, score"
    )


@pytest.mark.parametrize(
    ("stop_at", "ends"),
    [
        ("ask 1", "ask 1, score, cancel 1"),  # at the check between scoring and update
        ("finish 1", "finish 1, sync 1, ask 2, score, cancel 2, save 1 at 1"),
        ("save 1 at 1", "save 1 at 1, cancel 1"),  # in the next batch's generation
    ],
)
def test_a_stop_cancels_what_is_in_flight_and_saves_the_cursor_before_it(build, stop_at, ends):
    trainer, parts = build(True, steps=4, save_every=1 if stop_at.startswith("save") else 0)
    parts.stop_at = stop_at
    assert trainer.train() == STOPPED
    saved = ", save 0 at 0" if stop_at == "ask 1" else ""
    assert told(parts).endswith(ends + saved)
    assert parts.log.count("cancel 1") + parts.log.count("cancel 2") == 1
    assert parts.log[-1] == "close"


def test_a_stop_in_an_evaluation_leaves_it_due(build):
    trainer, parts = build(True, steps=3, eval_every=1)
    parts.stop_at = "update"
    assert trainer.train() == STOPPED
    assert told(parts).endswith("update, cancel 1, save 1 at 1")
    assert trainer.run.state.evaluated == 0


def test_a_run_that_goes_on_asks_for_the_batch_that_was_cancelled(build):
    trainer, parts = build(True, steps=4)
    parts.stop_at = "finish 1"
    trainer.train()
    state = trainer.run.state
    again, parts = build(True, steps=4, state=state)
    again.run.questions.stream.drawn = state.stream["drawn"]
    again.train()
    assert told(parts, "save").startswith("sync 1, ask 1, finish 1, ask 2, score, update, finish 2")


def test_an_error_cancels_what_is_in_flight_and_saves_nothing(build):
    trainer, parts = build(True, steps=3)

    def lost(*_):
        raise EngineLost("engine 0 is lost")

    parts.update = lost
    with pytest.raises(EngineLost, match="^engine 0 is lost$"):
        trainer.train()
    assert told(parts) == "sync 0, ask 0, finish 0, ask 1, score, cancel 1"
    assert parts.log[-1] == "close"


def test_engines_that_take_no_first_weights_end_the_run_before_anything_is_asked(build):
    trainer, parts = build(steps=1)

    def refused(version):
        raise EngineError("engine 0: shapes differ")

    parts.sync = refused
    with pytest.raises(EngineError, match="shapes differ"):
        trainer.train()
    assert parts.log == ["close"]


def test_engines_on_the_actors_gpus_are_loaded_at_the_beginning_of_their_turn(build):
    trainer, parts = build(steps=2, eval_every=1, colocated=True)
    parts.engines_turn = True  # since the servers were started
    assert trainer.train() == DONE
    assert told(parts, "save") == (
        "sync 0, evaluate 0, to training, score, "
        "to generation, sync 0, ask 0, finish 0, to training, score, update, "
        "to generation, sync 1, evaluate 1, to training, score, "
        "to generation, sync 1, ask 1, finish 1, to training, score, update, "
        "to generation, sync 2, evaluate 2, to training, score"
    )


def test_a_stop_in_the_engines_turn_gives_the_actor_its_gpus_before_it_saves(build):
    trainer, parts = build(steps=2, colocated=True)
    parts.stop_at = "ask 0"
    assert trainer.train() == STOPPED
    assert told(parts) == ("to generation, sync 0, ask 0, cancel 0, give up starting, to training, save 0 at 0")


def test_a_stop_before_the_engines_first_turn_ends(build):
    """The servers hold the GPUs from the start, and nothing has been generated yet."""
    trainer, parts = build(steps=2, colocated=True)
    parts.engines_turn, parts.stop_at = True, "sync 0"
    assert trainer.train() == STOPPED
    assert told(parts).endswith("give up starting, to training, save 0 at 0")


def test_an_engine_is_asked_for_scores_in_its_turn(build):
    trainer, parts = build(colocated=True)
    generation = trainer.run.generation
    parts.log_probs = lambda sequences: [[-0.5] for _ in sequences]
    assert generation.engine_log_probs(["a", "b"]) == [[-0.5], [-0.5]]
    assert told(parts) == "to generation, sync 0, to training"
    parts.log.clear()
    generation.colocation = None
    assert generation.engine_log_probs(["a"]) == [[-0.5]]
    generation.leader = None
    assert generation.engine_log_probs(["a"]) == []
    assert parts.log == []


def test_a_resync_forgets_the_batch_in_flight_and_sends_the_same_version_again(build):
    trainer, parts = build(True)
    trainer.sync()
    trainer.sync()
    assert told(parts) == "sync 0"
    trainer.ahead = trainer.ask(0)
    trainer.resync()
    assert told(parts) == "sync 0, ask 0, cancel 0, sync 0" and trainer.ahead is None
