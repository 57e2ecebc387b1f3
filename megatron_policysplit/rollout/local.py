"""The `local` engine: transformers' generation in this process, for machines without an inference
server.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megatron_policysplit.errors import ConfigError, ModelError, TrainingError
from megatron_policysplit.rollout.engine import EnginePaused, Request
from megatron_policysplit.rollout.local_weights import weights_by_file_name
from megatron_policysplit.rollout.teacher_forcing import teacher_forced
from megatron_policysplit.rows import Rollout

BLOCK_ELEMENTS = (
    2**20
)  # logits sampled at a time: their float64 copies stay in the processor's cache


class SeededSampler(LogitsProcessor):
    """Samples from the scores itself and hands greedy search a row with one finite entry, the
    chosen token.

    Token t of row i is the inverse CDF, in vocabulary order and float64, at `uniforms[i, t]`, so it
    depends on the row's seed and logits only. Filters act on the tempered distribution by its
    unfiltered mass: the top_k most likely tokens, and of them those before which less than top_p
    has accumulated.

    uniforms: [B, max_tokens] float64 in [0, 1). temperature, top_p: [B] float64. top_k: [B] long, V
    or more keeps all. Fills tokens [B, max_tokens] long and logprobs [B, max_tokens] float32:
    log_softmax(logits / temperature) of the chosen token over the unfiltered vocabulary, nats.
    """

    def __init__(
        self,
        uniforms: torch.Tensor,
        temperature: torch.Tensor,
        top_p: torch.Tensor,
        top_k: torch.Tensor,
        vocab: int,
    ):
        self.uniforms, self.temperature, self.top_p, self.top_k = (
            uniforms,
            temperature,
            top_p,
            top_k,
        )
        self.tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=uniforms.device)
        self.logprobs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        self.step = 0
        height = max(1, BLOCK_ELEMENTS // vocab)
        self.blocks = [slice(first, first + height) for first in range(0, len(uniforms), height)]
        # Found once, not at every step: which rows of each block have a filter.
        filtered = (top_p < 1) | (top_k < vocab)
        self.filtered = [filtered[rows].nonzero()[:, 0] for rows in self.blocks]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for rows, filtered in zip(self.blocks, self.filtered, strict=True):
            self._sample(scores[rows], rows, filtered)
        chosen = self.tokens[:, self.step, None]
        self.step += 1
        return scores.fill_(-torch.inf).scatter_(1, chosen, 0.0)

    def _sample(self, scores: torch.Tensor, rows: slice, filtered: torch.Tensor) -> None:
        temperature = self.temperature[rows, None]
        weights = scores.double().div_(temperature)
        peak = weights.amax(dim=1, keepdim=True)
        weights.sub_(peak).exp_()
        log_total = weights.sum(dim=1, keepdim=True).log_()
        if len(filtered):
            weights[filtered] = self._filter(
                weights[filtered], self.top_p[rows][filtered], self.top_k[rows][filtered]
            )
        cdf = weights.cumsum_(dim=1)
        total = cdf[:, -1:].contiguous()
        token = torch.searchsorted(cdf, self.uniforms[rows, self.step, None] * total, right=True)
        # Where rounding puts the target on the total itself, the last token that has any mass is
        # meant.
        token = torch.minimum(token, torch.searchsorted(cdf, total))
        token.clamp_(
            max=scores.shape[1] - 1
        )  # NaN logits compare with nothing; the caller finds them
        self.tokens[rows, self.step] = token[:, 0]
        self.logprobs[rows, self.step] = (scores.gather(1, token) / temperature - peak - log_total)[
            :, 0
        ].float()

    @staticmethod
    def _filter(weights: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        ordered, order = weights.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(dim=1) - ordered
        rank = torch.arange(weights.shape[1], device=weights.device)
        keep = (rank < top_k[:, None]) & (
            before < top_p[:, None] * weights.sum(dim=1, keepdim=True)
        )
        return torch.zeros_like(weights).scatter_(1, order, ordered * keep)


class Finish(StoppingCriteria):
    """A row ends with a stop token or at its own max_tokens; every row ends when `interrupted` says
    so.
    """

    def __init__(
        self,
        sampler: SeededSampler,
        is_stop: torch.Tensor,
        limits: torch.Tensor,
        interrupted: Callable[[], bool],
    ):
        self.sampler, self.is_stop, self.limits, self.interrupted = (
            sampler,
            is_stop,
            limits,
            interrupted,
        )
        self.lengths = torch.zeros_like(limits)  # 0 while the row is unfinished

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        step = self.sampler.step
        ends = self.is_stop[self.sampler.tokens[:, step - 1]] | (self.limits <= step)
        self.lengths = torch.where((self.lengths == 0) & ends, step, self.lengths)
        return torch.ones_like(ends) if self.interrupted() else self.lengths > 0


@dataclass(frozen=True)
class _Sample:
    request: Request
    index: int
    seed: int


class LocalEngine:
    """Generates with a transformers model in this process, in a worker thread, one batch at a time.

    model_path: a Hugging Face directory with safetensors; its weights are version 0.
    stop_token_ids: ids that end a response. dtype: "float32" or "bfloat16".
    max_batch_samples: samples generated together, over all modes. Raises ModelError when the
    directory cannot be loaded in full, ConfigError when torch cannot use the device.
    """

    def __init__(
        self,
        model_path: str,
        stop_token_ids: Sequence[int],
        *,
        dtype: str = "float32",
        max_batch_samples: int = 256,
        device: str | torch.device = "cpu",
    ):
        self._path = model_path
        self._max_batch_samples = max_batch_samples
        self._device = _usable(device)
        self._dtype = getattr(torch, dtype)
        self._model = _read_model(model_path, self._dtype).to(self._device)
        self._shapes = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        vocab = self._model.config.vocab_size
        outside = [token for token in stop_token_ids if not 0 <= token < vocab]
        if outside:
            raise ModelError(
                f"stop tokens {outside} of {model_path} are outside its vocabulary of {vocab}"
            )
        self._is_stop = torch.zeros(vocab, dtype=torch.bool, device=self._device)
        self._is_stop[list(stop_token_ids)] = True
        self._version = 0
        self._unusable: str | None = None  # why the weights cannot be used, if they cannot
        self._paused = False
        self._pauses = (
            0  # a submit that began before the latest pause must end, even after a resume
        )
        self._busy = (
            threading.Lock()
        )  # held while the weights are read or written; bound to no event loop

    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Finished rollouts, a batch of samples at a time; raises EnginePaused when `pause` is
        called meanwhile.

        Raises TrainingError when the model's logits are not finite.
        """
        began, abandoned = self._pauses, threading.Event()

        def interrupted() -> bool:
            return self._paused or self._pauses != began or abandoned.is_set()

        samples = [
            _Sample(request, index, seed)
            for request in requests
            for index, seed in zip(request.samples, request.seeds, strict=True)
        ]
        samples.sort(
            key=lambda sample: len(sample.request.prompt)
        )  # stable: like lengths together, least padding
        try:
            for start in range(0, len(samples), self._max_batch_samples):
                batch = samples[start : start + self._max_batch_samples]
                for rollout in await asyncio.to_thread(self._generate, batch, interrupted):
                    yield rollout
        finally:
            abandoned.set()

    def _generate(self, batch: Sequence[_Sample], interrupted: Callable[[], bool]) -> list[Rollout]:
        with self._busy:
            if interrupted():
                raise EnginePaused(
                    "the engine is paused; call resume() and submit the requests again"
                )
            self._check_usable()
            return self._generate_batch(batch, interrupted)

    @torch.inference_mode()
    def _generate_batch(
        self, batch: Sequence[_Sample], interrupted: Callable[[], bool]
    ) -> list[Rollout]:
        width = max(len(sample.request.prompt) for sample in batch)
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sample in enumerate(batch):
            if not len(sample.request.prompt):
                raise ValueError(f"question {sample.request.question} has an empty prompt")
            ids[row, width - len(sample.request.prompt) :] = sample.request.prompt
            mask[row, width - len(sample.request.prompt) :] = 1
        sampler, limits = self._sampler(batch)
        finish = Finish(sampler, self._is_stop, limits, interrupted)
        longest = int(limits.max())
        self._model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=longest, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([finish]),
        )
        if interrupted():
            raise EnginePaused(
                "the engine was paused while it generated; submit the requests again after resume()"
            )
        return self._rollouts(batch, sampler, finish.lengths)

    def _sampler(self, batch: Sequence[_Sample]) -> tuple[SeededSampler, torch.Tensor]:
        """The sampler of a batch, and the longest response allowed for each row."""
        plans = [sample.request.sampling for sample in batch]
        vocab = len(self._is_stop)
        longest = max(plan.max_tokens for plan in plans)
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(s.seed)).random(longest) for s in batch]
        )

        def column(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        sampler = SeededSampler(
            uniforms=torch.from_numpy(uniforms).to(self._device),
            temperature=column([plan.temperature for plan in plans], torch.float64),
            top_p=column([plan.top_p for plan in plans], torch.float64),
            top_k=column([plan.top_k if plan.top_k > 0 else vocab for plan in plans], torch.long),
            vocab=vocab,
        )
        return sampler, column([plan.max_tokens for plan in plans], torch.long)

    def _rollouts(
        self, batch: Sequence[_Sample], sampler: SeededSampler, lengths: torch.Tensor
    ) -> list[Rollout]:
        if not sampler.logprobs.isfinite().all():
            raise self._not_finite()
        tokens, logprobs = sampler.tokens.tolist(), sampler.logprobs.tolist()
        stopped = self._is_stop[sampler.tokens.gather(1, lengths[:, None] - 1)[:, 0]].tolist()
        return [
            Rollout(
                batch=sample.request.batch,
                question=sample.request.question,
                mode=sample.request.mode,
                sample=sample.index,
                tokens=tokens[row][:length],
                engine_logprobs=logprobs[row][:length],
                finish_reason="stop" if stopped[row] else "length",
                weight_versions=[(0, self._version)],
            )
            for row, (sample, length) in enumerate(zip(batch, lengths.tolist(), strict=True))
        ]

    def _not_finite(self) -> TrainingError:
        remedy = "lower train.learning_rate or go back to an earlier checkpoint"
        if self._version == 0:
            remedy = f"the weights in {self._path} are not finite themselves: use another copy of the model"
        return TrainingError(
            f"the logits of the local engine's model (weight version {self._version}) are not "
            f"finite; {remedy}"
        )

    async def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[float]]:
        """Log-probs of the response tokens of (prompt ids, response ids) at temperature 1, nats.

        Waits until the model is free. Raises EnginePaused after `pause`, TrainingError as `submit`
        does.
        """
        return await asyncio.to_thread(self._score, sequences)

    def _score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        with self._busy:
            if self._paused:
                raise EnginePaused(
                    "the engine is paused; call resume() and ask for the scores again"
                )
            self._check_usable()
            scores = teacher_forced(self._model, sequences)
        if not all(math.isfinite(logprob) for logprobs in scores for logprob in logprobs):
            raise self._not_finite()
        return scores

    def metrics(self) -> dict[str, float]:
        """It counts nothing of its own."""
        return {}

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy new weights in place; `version` counts only after all have been taken.

        The tensors are read to the end, in the calling thread, even after a wrong one: they may
        come from a generator whose collectives other ranks take part in. Raises ValueError naming
        the missing, unexpected, repeated or misshapen tensors; the engine then refuses requests
        until a load succeeds.
        """
        async with self._quiet():
            self._unusable = f"loading weight version {version} has not succeeded"
            self._allocate()
            problems = self._copy(tensors)
            if problems:
                raise ValueError(
                    f"weights of version {version} do not fit {self._path}: {'; '.join(problems)}"
                )
            self._version, self._unusable = version, None

    @torch.no_grad()
    def _copy(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        parameters = weights_by_file_name(self._model)
        taken: dict[
            int, str
        ] = {}  # parameter -> the name it came under; a tied head may come under both
        seen, problems = set(), []
        for name, tensor in tensors:
            parameter = parameters.get(name)
            if parameter is None:
                problems.append(f"unexpected {name}")
            elif name in seen:
                problems.append(f"repeated {name}")
            elif parameter.shape != tensor.shape:
                problems.append(
                    f"{name} has shape {list(tensor.shape)} instead of {list(parameter.shape)}"
                )
            elif id(parameter) not in taken:
                parameter.copy_(tensor)
                taken[id(parameter)] = name
            elif not torch.equal(parameter, tensor.to(parameter)):
                problems.append(f"{name} is tied to {taken[id(parameter)]} and differs from it")
            seen.add(name)
        absent = [
            name for name in parameters if id(parameters[name]) not in taken and name not in seen
        ]
        missing = {id(parameters[name]): name for name in reversed(absent)}  # a tied head once
        return problems + [f"missing {name}" for name in reversed(missing.values())]

    async def pause(self) -> None:
        """Returns once generation has ended, at most a token later; running submits raise
        EnginePaused.
        """
        self._paused = True
        self._pauses += 1
        async with self._quiet():
            pass

    async def resume(self) -> None:
        self._paused = False

    async def release(self) -> None:
        """Free the weights. Version 0 is read again by `restore`; later versions need a `load`."""
        async with self._quiet():
            for parameter in self._model.parameters():
                parameter.data = torch.empty(0, dtype=self._dtype, device=self._device)
            self._unusable = f"the weights of version {self._version} have been released"

    async def restore(self) -> None:
        async with self._quiet():
            if not self._allocate():
                return
            if self._version == 0:
                self._copy(weights_by_file_name(_read_model(self._path, self._dtype)).items())
                self._unusable = None

    async def health(self) -> int:
        self._check_usable()
        return self._version

    def _check_usable(self) -> None:
        if self._unusable:
            raise TrainingError(
                f"the local engine cannot generate: {self._unusable}; load weights into it first"
            )

    def _allocate(self) -> bool:
        """Give released parameters memory of their shapes again; False if nothing had been
        released.
        """
        released = [
            (name, p) for name, p in self._model.named_parameters() if p.shape != self._shapes[name]
        ]
        for name, parameter in released:
            parameter.data = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        return bool(released)

    @asynccontextmanager
    async def _quiet(self):
        """Wait, without holding the event loop, until no batch is being generated; keep it so."""
        while not self._busy.acquire(blocking=False):
            await asyncio.sleep(0.002)
        try:
            yield
        finally:
            self._busy.release()


def _usable(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} is not a name that torch knows; use cpu, cuda or cuda:1"
        ) from error
    try:
        torch.ones(1, device=chosen).item()  # what torch raises differs from device to device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used on this machine ({reason}); use cpu, "
            "or cuda where there is a GPU and a torch built for it"
        ) from error
    return chosen


def _read_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Hugging Face directory, every tensor from its safetensors, generation defaults
    neutral.
    """
    if not (Path(path) / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json; model.path must be the directory of a Hugging Face model"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (
        Exception
    ) as error:  # transformers and safetensors raise many kinds; each means an unreadable model
        raise ModelError(f"cannot load the model in {path}: {error}") from error
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{path} lacks or has misshapen weights: {', '.join(absent[:8])}; fetch the model again"
        )
    # Whatever the model's author set (top_k, penalties, forced tokens) would bend the sampled
    # distribution.
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)
