"""A whole training step of GRPO and Policy Split in plain torch on a transformers model: one process, loops.

The reference that the Megatron actor, the advantages and the losses are tested against. It shares
nothing with them but the row and configuration dataclasses: one row at a time, no padding, no
packing, no parallelism. Run it on an fp32 or fp64 model; everything follows the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.methods.policy_split import Options
from megatron_policysplit.config import AlgorithmConfig, TrainConfig
from megatron_policysplit.rows import Mode, Row, RowKey
from tests.reference.plain_methods import Seen, Terms, terms

EPS = 1e-6
ONES = {Mode.NORMAL: 1.0, Mode.HIGH_ENTROPY: 1.0}


@dataclass
class Scored:
    """Of one row's response tokens under its own prompt: log-probs [T], entropy [T] (nats), all log-probs [T, V].
    prompt: mean log-prob of the prompt's tokens but the first."""

    logprobs: Tensor
    entropy: Tensor
    distribution: Tensor
    prompt: float


@dataclass
class StepResult:
    """One optimizer step: the loss before it and the global gradient norm before clipping."""

    loss: float
    grad_norm: float


# --- scoring -----------------------------------------------------------------------------------------


def score_row(model, row: Row, temperature: float = 1.0) -> Scored:
    """One unpadded forward of prompt + response; differentiable unless called under no_grad."""
    tokens = torch.tensor([[*row.prompt, *row.rollout.tokens]])
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    first = len(row.prompt) - 1  # the logits at a token predict the next one
    distribution = (logits[first:-1] / temperature).log_softmax(-1)
    response = torch.tensor(row.rollout.tokens)
    logprobs = distribution[torch.arange(len(response)), response]
    entropy = -(distribution.exp() * distribution).sum(-1)
    before = (logits[:first] / temperature).log_softmax(-1)
    prompt = [before[t, token].item() for t, token in enumerate(row.prompt[1:])]
    return Scored(logprobs, entropy, distribution, sum(prompt) / max(1, len(prompt)))


@torch.no_grad()
def score(model, rows: Sequence[Row], temperatures: Mapping[Mode, float] = ONES) -> dict[RowKey, Scored]:
    """Every row scored at the sampling temperature of its training mode."""
    return {row.key: score_row(model, row, temperatures[row.mode]) for row in rows}


def before_step(model, rows: Sequence[Row], algorithm: AlgorithmConfig, temperatures=ONES) -> dict[RowKey, Scored]:
    """`score` before a batch; with old_logprobs=engine, the engine's log-probs where a row has the sampling prompt."""
    found = score(model, rows, temperatures)
    if algorithm.old_logprobs == "engine":
        for row in rows:
            if row.key.training_mode == row.key.sampling_mode and not row.rollout.auxiliary:
                engine = torch.tensor(row.rollout.engine_logprobs, dtype=found[row.key].logprobs.dtype)
                found[row.key] = replace(found[row.key], logprobs=engine)
    return found


def mode_kl(scored: Mapping[RowKey, Scored], key: RowKey) -> dict[str, Tensor]:
    """Exact KL(mode of `key` || other mode) by the other's name, full vocabulary, nats, at each response token [T].

    Of the normal mode, to every other; of another mode, to the normal one.
    """
    own, normal = scored[key].distribution, Mode.NORMAL.value
    return {
        name: (own.exp() * (own - other.distribution)).sum(-1)
        for name, other in others(scored, key).items()
        if normal in (name, key.training_mode)
    }


def others(scored: Mapping[RowKey, Scored], key: RowKey) -> dict[str, Scored]:
    """The same response under the other modes, by their names."""
    same = (*key[:2], *key[3:])
    return {
        other.training_mode: found
        for other, found in scored.items()
        if (*other[:2], *other[3:]) == same and other != key
    }


def nucleus(distribution: Tensor, mass: float) -> Tensor:
    """[T, V] bool from log-probs [T, V]: the most likely tokens, until they hold `mass`."""
    p, order = distribution.exp().sort(dim=-1, descending=True)
    return torch.zeros_like(distribution, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p < mass)


def nucleus_entropy(distribution: Tensor, kept: Tensor) -> Tensor:
    """Entropy [T] of log-probs [T, V] renormalised over `kept`."""
    log_q = distribution.masked_fill(~kept, -torch.inf).log_softmax(-1).masked_fill(~kept, 0.0)
    return -(kept * log_q.exp() * log_q).sum(-1)


# --- advantages --------------------------------------------------------------------------------------


def grpo_advantages(rewards: Sequence[float]) -> list[float]:
    """A_i = (r_i - mean r) / (std r + 1e-6), the standard deviation unbiased."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + EPS) for r in rewards]


def normalised(values: Tensor, how: str) -> Tensor:
    """`values` [N], all tokens of a group, by z-score (unbiased), by range, or untouched."""
    if how == "none":
        return values
    centred = values - values.mean()
    if how == "mean":
        return centred / (values.max() - values.min() + EPS)
    return centred / (values.std(unbiased=True) + EPS)


def surprise(scored: Mapping[RowKey, Scored], key: RowKey, config: Options) -> Tensor:
    """b [T] of Eq. 6: alpha x the row's own mode + (1 - alpha) x the others, by surprisal or by entropy."""
    alpha = config.modes.get(key.training_mode, {}).get("alpha", config.alpha)
    by_entropy = config.entropy_estimate == "entropy"
    own, *rest = [s.entropy if by_entropy else -s.logprobs for s in (scored[key], *others(scored, key).values())]
    return alpha * own + (1 - alpha) * sum(rest) / len(rest)


def bonus(normalised_surprise: Tensor, advantage: float, eta: float, kappa: float, config: Options) -> Tensor:
    """Eq. 3's second term [T] for one response: eta clip(B, |A|/kappa), or the authors' clip(eta B, |A|/kappa)."""
    bound = abs(advantage) / kappa
    from_code = config.variant == "authors_code"
    order = config.clamp_order or ("code" if from_code else "paper")
    double = from_code if config.double_bonus is None else config.double_bonus
    if order == "paper":
        once = eta * normalised_surprise.clamp(-bound, bound)
    else:
        once = (eta * normalised_surprise).clamp(-bound, bound)
    return 2 * once if double else once


def advantages(rows: Sequence[Row], scored: Mapping[RowKey, Scored], config: AlgorithmConfig) -> dict[RowKey, Tensor]:
    """Per-token advantage [T] of every row: A_i, and under Policy Split plus the bonus of the row's mode."""
    options = Options(**config.options.get("policy_split", {}))
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((*row.key[:3], row.rollout.auxiliary), []).append(row)
    result = {}
    for group in groups.values():
        second = group[0].rollout.auxiliary  # right answers of a second rollout
        correctness = [1.0] * len(group) if second else grpo_advantages([row.rollout.reward for row in group])
        shaped = [torch.full_like(scored[row.key].logprobs, a) for row, a in zip(group, correctness, strict=True)]
        own = options.modes.get(group[0].key.training_mode, {})
        eta = own.get("eta", options.eta_normal if group[0].mode == Mode.NORMAL else options.eta)
        kappa = own.get("kappa", options.kappa)
        if config.name == "policy_split" and eta != 0:
            masks = [trained(row) for row in group]
            tokens = [surprise(scored, row.key, options)[mask] for row, mask in zip(group, masks, strict=True)]
            pieces = normalised(torch.cat(tokens), options.normalization).split([len(piece) for piece in tokens])
            for values, mask, piece, a in zip(shaped, masks, pieces, correctness, strict=True):
                values[mask] += bonus(piece, a, eta, kappa, options)
        result.update({row.key: values for row, values in zip(group, shaped, strict=True)})
    return result


# --- loss --------------------------------------------------------------------------------------------


def trained(row: Row) -> Tensor:
    """[T] bool: the response tokens that count in statistics and loss."""
    return torch.tensor(row.rollout.loss_mask, dtype=torch.bool)


def clipped_losses(logprobs: Tensor, old: Tensor, advantage: Tensor, config: AlgorithmConfig) -> Tensor:
    """[T]: minus PPO's min(r A, clip(r) A), token by token; for A < 0 never above dual_clip |A|."""
    losses = []
    for new, before, a in zip(logprobs, old, advantage, strict=True):
        ratio = (new - before).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * a)
        if config.dual_clip is not None and a < 0:
            gain = torch.maximum(gain, config.dual_clip * a)
        losses.append(-gain)
    return torch.stack(losses)


def importance(row: Row, scored: Mapping[RowKey, Scored], config: AlgorithmConfig) -> Tensor:
    """[T]: min(actor / engine probability, cap), both under the prompt the response was sampled under."""
    sampling = row.key._replace(training_mode=row.key.sampling_mode)
    actor = scored[sampling].logprobs
    if config.importance_cap is None or row.rollout.auxiliary:
        return torch.ones_like(actor)
    difference = actor - torch.tensor(row.rollout.engine_logprobs, dtype=actor.dtype)
    if config.importance_level == "sequence":
        difference = difference[trained(row)].sum().expand_as(actor)
    return difference.exp().clamp(max=config.importance_cap)


def row_losses(
    model,
    row: Row,
    old: Mapping[RowKey, Scored],
    advantage: Tensor,
    config: AlgorithmConfig,
    temperature: float = 1.0,
    reference: Mapping[RowKey, Scored] | None = None,
    terms: Sequence[Terms] | None = None,
) -> Tensor:
    """[T] token losses of one row: clipped loss, entropy bonus, k3 KL to the reference policy, a method's `terms`."""
    now = score_row(model, row, temperature)
    losses = clipped_losses(now.logprobs, old[row.key].logprobs, advantage, config) * importance(row, old, config)
    if terms is not None:
        drift = (now.logprobs - old[row.key].logprobs).abs()
        extra = zip(losses, terms, now.entropy, drift, strict=True)
        losses = torch.stack([loss * t.scale - t.entropy * h + t.drift * d for loss, t, h, d in extra])
    if config.entropy_coef:
        losses = losses - config.entropy_coef * now.entropy
    if config.kl_coef:
        log_ratio = reference[row.key].logprobs - now.logprobs
        losses = losses + config.kl_coef * (log_ratio.exp() - 1 - log_ratio)
    return losses


def aggregate(token_losses: Sequence[Tensor], masks: Sequence[Tensor], how: str, max_response_tokens: int) -> Tensor:
    """The loss of one optimizer step from all its rows; a row without a trained token does not count."""
    kept = [losses[mask] for losses, mask in zip(token_losses, masks, strict=True) if mask.any()]
    if how == "token_mean":
        return torch.cat(kept).mean()
    if how == "sequence_mean_token_mean":
        return torch.stack([losses.mean() for losses in kept]).mean()
    if how == "sequence_mean_token_sum_norm":
        return torch.stack([losses.sum() / max_response_tokens for losses in kept]).mean()
    raise ValueError(how)


def step_loss(
    rows: Sequence[Row], losses: Sequence[Tensor], algorithm: AlgorithmConfig, max_response_tokens: int
) -> Tensor:
    """`aggregate`; SCOPE's auxiliary rows add their token means, each over the number of the other rows."""
    together = [i for i, row in enumerate(rows) if algorithm.name != "scope" or not row.rollout.auxiliary]
    masks = [trained(row) for row in rows]
    loss = aggregate(
        [losses[i] for i in together], [masks[i] for i in together], algorithm.loss_aggregation, max_response_tokens
    )
    others = sum(bool(masks[i].any()) for i in together)
    for i in set(range(len(rows))) - set(together):
        loss = loss + losses[i][masks[i]].mean() / others
    return loss


# --- other methods -----------------------------------------------------------------------------------


class PlainMethod:
    """`plain_methods.terms` of a batch, one optimizer step after the other."""

    def __init__(self, rows: Sequence[Row], old: Mapping[RowKey, Scored], config: AlgorithmConfig):
        self.rows, self.config = rows, config
        self.options = build_algorithm(config).options
        self.state = {"coef": 0.0} if config.name == "adaptive_entropy" else {}
        self.scored = dict(old)
        self.old, self.prompts = self._tokens(old), {key: scored.prompt for key, scored in old.items()}

    def step(self, now: Mapping[RowKey, Scored] | None) -> dict[RowKey, list[Terms]]:
        """Terms of every row. now: new scores of the step's rows, over which alone statistics then are."""
        counted = {(row.key, t) for row in self.rows for t in trained(row).nonzero().flatten().tolist()}
        if now is not None:
            counted = {token for token in counted if token[0] in now}
        prompts = self.prompts | {key: scored.prompt for key, scored in (now or {}).items()}
        self.scored |= now or {}
        seen = Seen(self.rows, self.old, self.old | self._tokens(now or {}), counted, prompts, self._nuclei())
        found, self.state = terms(self.config.name, seen, self.options, self.state)
        return {row.key: [found[row.key, t] for t in range(row.response_length)] for row in self.rows}

    def nucleus_loss(self, model, rows: Sequence[Row], shares, temperatures: Mapping[Mode, float]) -> Tensor:
        """What the nuclei's entropies add to the loss of a step over `rows`; the nuclei are those of the scores."""
        total = 0.0
        for row in rows:
            now = score_row(model, row, temperatures[row.mode]).distribution
            entropy = nucleus_entropy(now, nucleus(self.scored[row.key].distribution, self.options.mass))
            total = total - (torch.tensor([term.nucleus for term in shares[row.key]]) * entropy).sum()
        return total / sum(bool(trained(row).any()) for row in rows)

    def _nuclei(self) -> dict:
        """Token -> entropy of its nucleus."""
        if not hasattr(self.options, "mass"):
            return {}
        entropies = {
            key: nucleus_entropy(s.distribution, nucleus(s.distribution, self.options.mass))
            for key, s in self.scored.items()
        }
        return {(key, t): value.item() for key, values in entropies.items() for t, value in enumerate(values)}

    @staticmethod
    def _tokens(scored: Mapping[RowKey, Scored]) -> dict:
        return {
            (key, t): (s.logprobs[t].item(), s.entropy[t].item())
            for key, s in scored.items()
            for t in range(len(s.logprobs))
        }


# --- optimisation ------------------------------------------------------------------------------------


def make_optimizer(model, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW; as in Megatron, vectors (norms, biases) are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_eps)


def clip_gradients(model, bound: float) -> float:
    """Scales all gradients by bound / (norm + 1e-6) if that is below 1; returns the norm before. 0 is off."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(gradient.double().pow(2).sum().item() for gradient in gradients))
    coefficient = bound / (norm + EPS)
    if bound > 0 and coefficient < 1:
        for gradient in gradients:
            gradient.mul_(coefficient)
    return norm


def train_batch(
    model,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    partition: Sequence[Sequence[RowKey]],
    algorithm: AlgorithmConfig,
    train: TrainConfig,
    max_response_tokens: int,
    temperatures: Mapping[Mode, float] = ONES,
    reference_model=None,
) -> list[StepResult]:
    """One rollout batch: scores and advantages once, then an optimizer step for each part of `partition`.

    The parts must hold every row key exactly once. The model is changed in place.
    """
    by_key = {row.key: row for row in rows}
    if sorted(key for part in partition for key in part) != sorted(by_key):
        raise ValueError("the partition does not hold every row exactly once")
    old = before_step(model, rows, algorithm, temperatures)
    shaped = advantages(rows, old, algorithm)
    method = None if algorithm.name in ("grpo", "policy_split") else PlainMethod(rows, old, algorithm)
    reference = score(reference_model, rows, temperatures) if algorithm.kl_coef else None
    results = []
    for part in partition:
        step_rows = [by_key[key] for key in part]
        shares: dict = {}
        if method is not None:
            fresh = algorithm.statistics == "step" and results
            shares = method.step(score(model, step_rows, temperatures) if fresh else None)
            shaped = {key: torch.tensor([term.advantage for term in shares[key]]).to(shaped[key]) for key in shares}
        losses = [
            row_losses(
                model, row, old, shaped[row.key], algorithm, temperatures[row.mode], reference, shares.get(row.key)
            )
            for row in step_rows
        ]
        loss = step_loss(step_rows, losses, algorithm, max_response_tokens)
        if algorithm.name == "siren":
            loss = loss + method.nucleus_loss(model, step_rows, shares, temperatures)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(model, train.clip_grad)
        optimizer.step()
        results.append(StepResult(loss.item(), norm))
    return results
