"""pass@k, distinct-n and self-BLEU against counting by hand and by enumeration."""

import itertools
import math
import random

import pytest

from megatron_policysplit.evaluation.measures import (
    answer_measures,
    bleu,
    distinct_n,
    ngram_diversity,
    pass_at_k,
    powers_of_two,
    self_bleu_diversity,
    variety_measures,
    words,
)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        flags = [i < right for i in range(samples)]
        subsets = list(itertools.combinations(flags, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    """Its expectation over right ~ Binomial(n, p) is 1 - (1 - p)^k."""
    n, p = 10, 0.3
    for k in range(1, n + 1):
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        expected = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
        assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_outside_its_range(samples, right, k):
    with pytest.raises(ValueError, match="is not defined"):
        pass_at_k(samples, right, k)


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 7, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_words():
    assert words("It's 3+4=7,\n she said.") == ["It", "'", "s", "3", "+", "4", "=", "7", ",", "she", "said", "."]


def test_distinct_n():
    texts = ["a b a b", "a b c"]  # pairs: ab ba ab ab bc
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 3 / 5
    assert ngram_diversity(texts) == pytest.approx((2 / 3 + 2 / 2) / 2)
    assert distinct_n(["a", ""], 2) is None and ngram_diversity(["a", ""]) is None
    assert ngram_diversity(["a b", "a"]) == 1.0


def test_bleu_by_hand():
    """Papineni et al.'s clipping, the brevity penalty and the nearest reference's length."""
    the = ["the"] * 7
    reference = "the cat is on the mat".split()
    assert bleu(the[:1], [reference]) == pytest.approx(math.exp(1 - 6))
    assert bleu(the, [reference]) == 0.0  # no pair matches
    hypothesis = "the cat sat on the mat".split()
    # matches: 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, no 4 in a row
    assert bleu(hypothesis, [reference]) == 0.0
    other = "a cat sat on the mat today".split()
    # with both references all words and pairs; "the cat sat" is in neither, nor is "the cat sat on"
    expected = math.exp((math.log(6 / 6) + math.log(5 / 5) + math.log(3 / 4) + math.log(2 / 3)) / 4)
    assert bleu(hypothesis, [reference, other]) == pytest.approx(expected)
    assert bleu(hypothesis, [hypothesis, other]) == 1.0
    assert bleu("a b".split(), ["a b c".split()]) == pytest.approx(math.exp(1 - 3 / 2))
    assert bleu("a b".split(), ["a b c".split(), ["a"]]) == 1.0  # both differ by one; the shorter counts


def test_self_bleu_diversity():
    assert self_bleu_diversity(["the same four words"] * 3) == 0.0
    assert self_bleu_diversity(["a b c d", "e f g h"]) == 1.0
    assert self_bleu_diversity(["a b", ""]) is None
    three = ["a b c d e", "a b c d f", "x y z"]
    tokens = [text.split() for text in three]
    scores = [bleu(tokens[i], tokens[:i] + tokens[i + 1 :]) for i in range(3)]
    # against the other: 4/5, 3/4, 2/3, 1/2, equally long
    assert scores == pytest.approx([(4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25] * 2 + [0.0])
    assert self_bleu_diversity(three) == pytest.approx(1 - sum(scores) / 3)


def test_bleu_agrees_with_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(0)
    scorer = sacrebleu.metrics.BLEU(smooth_method="none", effective_order=True, tokenize="none")
    for _ in range(50):
        texts = [[rng.choice("ab") for _ in range(rng.randint(1, 9))] for _ in range(4)]
        wanted = scorer.sentence_score(" ".join(texts[0]), [" ".join(text) for text in texts[1:]]).score / 100
        assert bleu(texts[0], texts[1:]) == pytest.approx(wanted)


def test_answer_measures():
    answers = [[("a", True), (" a", True), ("b", False), ("c", True)], [("x", False)] * 3 + [("y", True)]]
    assert answer_measures(answers, 4) == pytest.approx(
        {"best_of_4": 1.0, "unique_correct": 1.5, "pass_at_1": 0.5, "pass_at_2": (1 + 0.5) / 2, "pass_at_4": 1.0}
    )


def test_variety_leaves_out_what_nothing_is_long_enough_for():
    assert variety_measures([["a", "a"], ["b", "c"]]) == {"distinct_1": 0.75, "self_bleu_diversity": 0.5}
