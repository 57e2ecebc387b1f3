"""Scoring rows of three training modes: the KL of a rollout's hub with each other row, however micro-batches are cut.

In real process groups, against transformers in fp64 on unsharded logits, one row at a time.
"""

import functools
import random
from dataclasses import dataclass

import pytest
import torch

from megatron_policysplit.rows import Mode, Rollout, Row, RowKey
from tests.reference import plain_step
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import VOCAB, Case

LAYOUTS = [(1, 1), (2, 1), (2, 2)]  # ranks of tensor and pipeline parallelism
TEMPERATURES = {"normal": 1.0, "high_entropy": 0.7, "third": 1.3}
LENGTHS = (5, 9, 3, 6)  # of four rollouts; chunks of 7 tokens cut all micro-batches but the smallest
OTHERS = {"normal": {"high_entropy", "third"}, "high_entropy": {"normal"}, "third": {"normal"}}
# Rows 0 to 8 are rollouts 0 to 2 in the modes high_entropy, normal, third; 9 and 10 rollout 3 without the normal mode.
CUTS = {
    "together": [[*range(11)]],
    "alone": [[row] for row in range(11)],
    "hub_first": [[1, 4, 7, 9], [0, 2, 3], [5, 6], [8, 10]],
    "hub_last": [[0, 3, 6, 10], [2, 5, 8], [9, 1, 4], [7]],
    "hub_between": [[0, 2, 5, 6], [1, 7, 4, 10], [3, 8, 9]],
    "far_apart": [[1, 0, 3], [4, 6], [8], [5, 7], [9, 2], [10]],
}


@dataclass
class NamedRow(Row):
    """A row of a mode of any name."""

    @property
    def mode(self):
        return self.key.training_mode


def rows():
    draw, made = random.Random(4), []
    for number, length in enumerate(LENGTHS):
        tokens = [draw.randrange(VOCAB) for _ in range(length)]
        rollout = Rollout(0, number, Mode.NORMAL, 0, tokens, [-1.0] * length, "stop", [(0, 0)])
        for mode in ("high_entropy", "normal", "third"):
            if number < 3 or mode != "normal":
                prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(2, 6))]
                made.append(NamedRow(RowKey(0, number, mode, "normal", 0), prompt, rollout))
    return made


def run_cuts(rank, layout, path):
    """By cut (of the last stage's ranks): row -> (log-probs, entropy, KL by mode), and whether bits depend on pairs."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.microbatch import make_microbatch
    from megatron_policysplit.rows.kl_pairs import pairings
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.config import ParallelConfig

    layout = initialize(ParallelConfig(tensor=layout[0], pipeline=layout[1]), seed=1, timeout_seconds=60)
    config = Case("rows", settings={"train.head_chunk_tokens": 7}).config(path)
    actor = Actor(config, read_hf_config(path), layout)
    batch = rows()
    wanted = pairings(batch, "all")

    def scored(cut, pairs):
        batches = [make_microbatch(batch, indices, TEMPERATURES, pairs) for indices in cut]
        return actor.scorer.log_probs(batches)

    found = {}
    for name, cut in CUTS.items():
        with_kl, without = scored(cut, wanted), scored(cut, {})
        assert all(torch.equal(with_kl[row].logprobs, without[row].logprobs) for row in without)
        assert all(torch.equal(with_kl[row].entropy, without[row].entropy) for row in without)
        assert not any(statistics.kl for statistics in without.values())
        numbers = {
            row: (s.logprobs.tolist(), s.entropy.tolist(), {mode: kl.tolist() for mode, kl in s.kl.items()})
            for row, s in with_kl.items()
        }
        found[name] = numbers
    if layout.is_last_stage:
        with pytest.raises(RuntimeError, match=r"rows \[1, 2\] were scored without their partners"):
            scored([[1], [2]], {row: wanted[row] for row in (1, 2)} | {1: wanted[0]})
    else:
        scored([[1], [2]], wanted)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model"), "qwen3", tied=True, vocab=VOCAB, num_hidden_layers=2))


@pytest.fixture(scope="module")
def reference(path):
    """Row -> the log-probs of all tokens [T, V], fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    return {index: scored for index, scored in enumerate(plain_step.score(model, rows(), TEMPERATURES).values())}


@pytest.fixture(scope="module")
def found(path):
    return functools.cache(lambda layout: run_distributed(run_cuts, layout[0] * layout[1], layout, path))


@pytest.mark.parametrize("layout", LAYOUTS, ids="tp{0[0]}-pp{0[1]}".format)
@pytest.mark.parametrize("cut", CUTS)
def test_kl_of_the_hub_with_every_other_row(found, reference, layout, cut):
    of_ranks = [results[cut] for results in found(layout) if results[cut]]
    assert len(of_ranks) == layout[0], "the last stage's ranks know the statistics"
    batch = rows()
    index = {row.key: number for number, row in enumerate(batch)}
    for statistics in of_ranks:
        assert sorted(statistics) == list(range(len(batch)))
        for number, (logprobs, entropy, kl) in statistics.items():
            truth, key = reference[number], batch[number].key
            torch.testing.assert_close(torch.tensor(logprobs).double(), truth.logprobs, rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.tensor(entropy).double(), truth.entropy, rtol=0, atol=1e-5)
            alone = {"high_entropy": {"third"}, "third": {"high_entropy"}}
            assert set(kl) == (OTHERS if key.question < 3 else alone)[key.training_mode]
            for mode, values in kl.items():
                other = reference[index[key._replace(training_mode=mode)]]
                expected = (truth.distribution.exp() * (truth.distribution - other.distribution)).sum(-1)
                torch.testing.assert_close(torch.tensor(values).double(), expected, rtol=1e-4, atol=1e-5)
