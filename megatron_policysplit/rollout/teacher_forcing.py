"""Log-probs of given responses under a transformers model: what `LocalEngine.log_probs` returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LOGIT_ELEMENTS = 2**26  # logits held at a time: 256 MiB in float32

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


@torch.inference_mode()
def teacher_forced(model: transformers.PreTrainedModel, sequences: Sequences) -> list[list[float]]:  # noqa: F821
    """Compute log_softmax(logits) of every response token, at temperature 1, in nats.

    sequences: (prompt ids, response ids), neither of them empty; ValueError else. The result is in
    their order. Sequences of like length share a forward pass.
    """
    for number, (prompt, response) in enumerate(sequences):
        if not len(prompt) or not len(response):
            raise ValueError(
                f"sequence {number} has {len(prompt)} prompt and {len(response)} response tokens"
            )
    results: list[list[float]] = [[] for _ in sequences]
    for indices in _batches(sequences, model.config.vocab_size):
        for index, scores in zip(
            indices, _score(model, [sequences[i] for i in indices]), strict=True
        ):
            results[index] = scores
    return results


def _batches(sequences: Sequences, vocab: int) -> list[list[int]]:
    """Indices of sequences by length, in batches whose logits fit into LOGIT_ELEMENTS."""
    # Counted as if every token were one of a response; prompt tokens need no logits.
    batches: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i]))):
        longest = sum(map(len, sequences[index]))
        if batches and (len(batches[-1]) + 1) * longest * vocab <= LOGIT_ELEMENTS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _score(model, batch: Sequences) -> list[list[float]]:
    width = max(len(prompt) + len(response) for prompt, response in batch)
    # Padded on the right, where causal attention never looks, so that no mask is needed.
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (prompt, response) in enumerate(batch):
        tokens[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    # The earliest position that predicts a response token; logits before it are not computed.
    first = min(len(prompt) for prompt, _ in batch) - 1
    positions = torch.arange(first, width, device=model.device)
    logits = model(tokens.to(model.device), use_cache=False, logits_to_keep=positions).logits
    scores = []
    for row, (prompt, response) in enumerate(batch):
        start = len(prompt) - 1 - first
        targets = torch.tensor(response, device=model.device)[:, None]
        response_logits = logits[row, start : start + len(response)].float()
        target_logits = response_logits.gather(1, targets)[:, 0]
        scores.append((target_logits - response_logits.logsumexp(dim=1)).tolist())
    return scores
