"""Measures of a question's samples: pass@k, and how varied free text is.

Pure functions of numbers and strings.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+|[^\w\s]")
BLEU_ORDER = 4


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of n responses, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k) with n = samples and c = right, which is unbiased for the pass@k of
    the policy (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Raises ValueError unless 1 <= k <= n and
    0 <= c <= n.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {right} of them right, is not defined")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length())]


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, and every other visible character alone.

    Case is kept.
    """
    return WORD.findall(text)


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words over all n-grams, both counted over all texts.

    Li et al. 2016, arXiv 1510.03055. None where no text has n words.
    """
    counts = sum((_ngrams(words(text), n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else None


def ngram_diversity(texts: Sequence[str], n: int = 2) -> float | None:
    """Mean over texts of distinct / all n-grams of the text: the Policy Split paper's Div-N-Gram.

    The paper prints the sum over its 8 samples; its values are those of a mean. It does not
    describe its words; ours are those of `words`. Texts of fewer than n words are left out; None
    if all are.
    """
    counts = [ngrams for text in texts if (ngrams := _ngrams(words(text), n))]
    return _mean([len(ngrams) / ngrams.total() for ngrams in counts]) if counts else None


def self_bleu_diversity(texts: Sequence[str]) -> float | None:
    """1 - mean over texts of BLEU-4(text; the other texts): the Policy Split paper's Div-BLEU.

    0 where all texts are equal. The paper names neither words nor smoothing; ours are those of
    `bleu`. Texts without words are left out; None where fewer than two are left.
    """
    tokens = [text_words for text in texts if (text_words := words(text))]
    if len(tokens) < 2:
        return None
    scores = [bleu(hypothesis, tokens[:i] + tokens[i + 1 :]) for i, hypothesis in enumerate(tokens)]
    return 1 - sum(scores) / len(scores)


def bleu(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Sentence BLEU (Papineni et al. 2002) of words against several references, in [0, 1].

    Without smoothing: 0 where an order has no match. Orders go up to 4, or up to the hypothesis's
    length if that is shorter (sacrebleu's effective_order). The brevity penalty takes the reference
    nearest in length, the shorter one of two that are equally near.
    """
    orders = range(1, min(BLEU_ORDER, len(hypothesis)) + 1)
    logs = []
    for n in orders:
        # Clipped counts: an n-gram matches at most as often as in the reference with most of it.
        limits: Counter = Counter()
        for reference in references:
            limits |= _ngrams(reference, n)
        ngrams = _ngrams(hypothesis, n)
        matches = (ngrams & limits).total()
        if not matches:
            return 0.0
        logs.append(math.log(matches / ngrams.total()))
    nearest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    penalty = min(0.0, 1 - nearest / len(hypothesis))
    return math.exp(penalty + sum(logs) / len(logs))


def answer_measures(
    answers: Sequence[Sequence[tuple[str, bool]]], samples: int
) -> dict[str, float]:
    """Measures of right answers, means over questions.

    answers: per question `samples` pairs (response text, whether it is right).

    best_of_<samples>: share of questions with a right response.
    pass_at_<k>: `pass_at_k` for powers of two up to `samples`.
    unique_correct: number of different right texts.
    """
    right = [{text.strip() for text, is_right in pairs if is_right} for pairs in answers]
    counts = [sum(is_right for _, is_right in pairs) for pairs in answers]
    result = {
        f"best_of_{samples}": _mean([bool(texts) for texts in right]),
        "unique_correct": _mean([len(texts) for texts in right]),
    }
    for k in powers_of_two(samples):
        result[f"pass_at_{k}"] = _mean([pass_at_k(samples, count, k) for count in counts])
    return result


def variety_measures(texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Measures of how varied each question's texts are, means over questions.

    Names: distinct_1, distinct_2, ngram_diversity_2, self_bleu_diversity. A measure that no
    question's texts are long or many enough for is left out.
    """
    measures = {
        "distinct_1": lambda samples: distinct_n(samples, 1),
        "distinct_2": lambda samples: distinct_n(samples, 2),
        "ngram_diversity_2": ngram_diversity,
        "self_bleu_diversity": self_bleu_diversity,
    }
    values = {
        name: [value for samples in texts if (value := measure(samples)) is not None]
        for name, measure in measures.items()
    }
    return {name: _mean(of_questions) for name, of_questions in values.items() if of_questions}


def _ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
