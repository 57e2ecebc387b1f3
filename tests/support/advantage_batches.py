"""Small batches of rows with statistics, for tests of sharing and advantages."""

import random

import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics, make_batch
from megatron_policysplit.rows import MODES, Mode, Rollout, share_rollouts

EOS = 99


def rollout(question, mode, sample, tokens, reward=0.0, mask=None, auxiliary=False):
    return Rollout(
        batch=0,
        question=question,
        mode=mode,
        sample=sample,
        tokens=list(tokens),
        engine_logprobs=[-1.0] * len(tokens),
        finish_reason="stop",
        weight_versions=[(0, 0)],
        loss_mask=list(mask or []),
        reward=reward,
        auxiliary=auxiliary,
    )


def prompts(questions):
    """Normal: two ids; high-entropy: the system turn [7, 7, 7] before the same ids."""
    normal = {question: [10 + question, 5] for question in questions}
    return {q: {Mode.NORMAL: ids, Mode.HIGH_ENTROPY: [7, 7, 7, *ids]} for q, ids in normal.items()}


def other(mode):
    """Of the two modes."""
    return next(each for each in MODES if each != mode)


def partner(key):
    """The same response under the other of the two modes."""
    return key.under(other(Mode(key.training_mode)))


def random_batch(seed=0, questions=3, per_mode=2, masked=True, auxiliary=0):
    """Rows, statistics and masks with unequal lengths and rewards; one question answered all alike.

    auxiliary: so many of the first questions have a right answer of a second rollout too.
    """
    draw = random.Random(seed)
    rollouts = [
        rollout(
            question,
            mode,
            sample,
            [draw.randrange(90) for _ in range(draw.randint(1, 8))] + [EOS],
            reward=1.0 if question == 1 else draw.choice([0.0, 0.3, 1.0]),
        )
        for question in range(questions)
        for mode in MODES
        for sample in range(per_mode)
    ]
    rollouts[0].reward, rollouts[1].reward = 1.0, 0.0  # question 0 is mixed
    if masked:
        rollouts[0].loss_mask[1] = 0
        rollouts[1].loss_mask[:] = [0] * len(rollouts[1].tokens)
    rollouts += [
        rollout(question, Mode.NORMAL, per_mode, range(30 + question, 34), reward=1.0, auxiliary=True)
        for question in range(auxiliary)
    ]
    rows = share_rollouts(rollouts, prompts(range(questions)))
    tokens = torch.Generator().manual_seed(seed)
    scored = [
        TokenStatistics(
            -4 * torch.rand(row.response_length, generator=tokens),
            3 * torch.rand(row.response_length, generator=tokens),
            prompt_logprob=-3 * draw.random(),
            nucleus_entropy=torch.tensor([2 * draw.random() for _ in range(row.response_length)]),
        )
        for row in rows
    ]
    masks = [torch.tensor(row.rollout.loss_mask, dtype=torch.bool) for row in rows]
    return rows, make_batch(rows, scored, masks)
