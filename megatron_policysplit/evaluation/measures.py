"""Measures of a question's samples: pass@k, and how varied free text is. Pure functions of numbers
and strings.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+|[^\w\s]")
BLEU_ORDER = 4


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of `samples` responses, drawn without return, hold a right one: 1 - C(n-c,
    k) / C(n, k).

    Unbiased for the pass@k of the policy (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Raises
    ValueError unless 1 <= k <= samples and 0 <= right <= samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {right} of them right, is not defined")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length())]


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other visible character by itself; case is kept."""
    return WORD.findall(text)


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words over all of them, both counted over all texts (Li et al. 2016,
    arXiv 1510.03055).

    None where no text has n words.
    """
    counts = sum((_ngrams(words(text), n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else None


def ngram_diversity(texts: Sequence[str], n: int = 2) -> float | None:
    """Mean over texts of distinct / all n-grams of words of that text: the Policy Split paper's
    Div-N-Gram.

    The paper prints the sum over its 8 samples; its values are those of a mean. Its words are not
    described, ours are those of `words`. Texts of fewer than n words are left out; None if all are.
    """
    counts = [counted for text in texts if (counted := _ngrams(words(text), n))]
    return (
        sum(len(counted) / counted.total() for counted in counts) / len(counts) if counts else None
    )


def self_bleu_diversity(texts: Sequence[str]) -> float | None:
    """1 - mean over texts of BLEU-4(text; the other texts): the Policy Split paper's Div-BLEU; 0
    where all agree.

    The paper names neither words nor smoothing; ours is `bleu`. Texts without words are left out;
    None where fewer than two are left.
    """
    tokens = [found for text in texts if (found := words(text))]
    if len(tokens) < 2:
        return None
    scores = [bleu(one, tokens[:i] + tokens[i + 1 :]) for i, one in enumerate(tokens)]
    return 1 - sum(scores) / len(scores)


def bleu(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Sentence BLEU (Papineni et al. 2002) of words against several references, in [0, 1].

    Without smoothing: 0 where an order has no match. Orders up to 4, or up to the hypothesis's
    length if that is shorter (sacrebleu's effective_order). The brevity penalty takes the reference
    nearest in length, of two the shorter.
    """
    orders = range(1, min(BLEU_ORDER, len(hypothesis)) + 1)
    logs = []
    for n in orders:
        most: Counter = Counter()
        for reference in references:
            most |= _ngrams(reference, n)
        own = _ngrams(hypothesis, n)
        matched = (own & most).total()
        if not matched:
            return 0.0
        logs.append(math.log(matched / own.total()))
    nearest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    penalty = min(0.0, 1 - nearest / len(hypothesis))
    return math.exp(penalty + sum(logs) / len(logs))


def answer_measures(
    answers: Sequence[Sequence[tuple[str, bool]]], samples: int
) -> dict[str, float]:
    """Over questions, each with `samples` pairs of response text and whether it is right; means
    over questions.

    best_of_<samples>: a right one among all. pass_at_<k>: for powers of two up to `samples`.
    unique_correct: different right texts.
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
    """distinct_1, distinct_2, ngram_diversity_2, self_bleu_diversity of each question's texts,
    means over questions.

    A measure that no question's texts are long or many enough for is left out.
    """
    measures = {
        "distinct_1": lambda samples: distinct_n(samples, 1),
        "distinct_2": lambda samples: distinct_n(samples, 2),
        "ngram_diversity_2": ngram_diversity,
        "self_bleu_diversity": self_bleu_diversity,
    }
    values = {
        name: [v for samples in texts if (v := of(samples)) is not None]
        for name, of in measures.items()
    }
    return {name: _mean(found) for name, found in values.items() if found}


def _ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
