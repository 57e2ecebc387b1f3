"""What `eval` says of graded responses, worked out by hand."""

import pytest

from megatron_policysplit.evaluation.responder import Response
from megatron_policysplit.evaluation.scores import scores_by_mode, variety_lines
from megatron_policysplit.rewards import Graded
from megatron_policysplit.rows import Mode


def test_scores_by_hand():
    def response(question, sample, text, mode=Mode.NORMAL, surprisals=(1.0,), truncated=False):
        return Response(question, mode, sample, text, [7] * len(surprisals), list(surprisals), truncated)

    responses = [
        response(0, 0, "a"),
        response(0, 1, " a\n", surprisals=(2.0, 3.0, 4.0)),
        response(0, 2, "b"),
        response(1, 0, "c", truncated=True),
        response(1, 1, "d"),
        response(1, 2, "d"),
        response(0, 0, "z", mode=Mode.HIGH_ENTROPY, surprisals=(0.5, 0.5)),
    ]
    graded = [Graded(1.0), Graded(0.9), Graded(0.51), Graded(0.5), Graded(0.0, "it raised"), Graded(-1.0), Graded(1.0)]
    scores = scores_by_mode(responses, graded)
    normal, high_entropy = scores["normal"], scores["high_entropy"]
    assert (normal.accuracy, normal.best_of_k, normal.unique_correct) == (3 / 6, 1 / 2, 2 / 2)
    assert (normal.mean_surprisal_nats, normal.mean_tokens) == (14 / 8, 8 / 6)
    assert (normal.truncated, normal.grading_errors) == (1 / 6, 1)
    assert (high_entropy.accuracy, high_entropy.unique_correct, high_entropy.mean_surprisal_nats) == (1, 1, 0.5)
    assert list(scores_by_mode(responses[:6], graded[:6])) == ["normal"]
    assert (normal.pass_at, high_entropy.pass_at) == ({1: 0.5, 2: 0.5}, {1: 1.0})  # 3 right of 3, 0 of 3
    assert normal.variety == {"distinct_1": 2 / 3, "self_bleu_diversity": pytest.approx(1 / 3)}
    lines = variety_lines([r for r in responses if r.question == 0])
    assert lines == ["normal: distinct words 0.667, 1 - self-BLEU 0.333"]
