"""The `local` engine: transformers' generation in this process, without an inference server."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from megatron_policysplit.distributed.device import device_of_thread
from megatron_policysplit.errors import ModelError, TrainingError
from megatron_policysplit.rollout.engine import EnginePaused, Request
from megatron_policysplit.rollout.local_model import check_device, read_model
from megatron_policysplit.rollout.local_weights import copy_weights, weights_by_file_name
from megatron_policysplit.rollout.sampler import Finish, SeededSampler
from megatron_policysplit.rollout.teacher_forcing import teacher_forced
from megatron_policysplit.rows import Rollout


@dataclass(frozen=True)
class _Sample:
    request: Request
    index: int
    seed: int


class LocalEngine:
    """Generates with a transformers model in this process, in a worker thread, one batch at a time.

    Implements `engine.InProcessEngine`.
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
        """Read the model; its weights are version 0.

        model_path: a Hugging Face directory with safetensors.
        stop_token_ids: ids that end a response.
        dtype: "float32" or "bfloat16".
        max_batch_samples: samples generated together, over all modes.
        device: a device of torch.

        Raises ModelError when the directory cannot be loaded in full, ConfigError when torch cannot
        use the device.
        """
        self._path = model_path
        self._max_batch_samples = max_batch_samples
        self._device = check_device(device)
        self._dtype = getattr(torch, dtype)
        self._model = read_model(model_path, self._dtype).to(self._device)
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
        self._defect: str | None = None  # why the weights cannot be used, if they cannot
        self._paused = False
        # Counted: a submit that began before the latest pause must end, even after a resume.
        self._pauses = 0
        # Held while the weights are read or written. Not of asyncio: it is bound to no event loop,
        # and the worker thread takes it.
        self._busy = threading.Lock()

    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Yield finished rollouts, a batch of samples at a time.

        Raises EnginePaused when `pause` is called meanwhile, TrainingError when the model's logits
        are not finite.
        """
        # The thread cannot be cancelled; it looks at this event after every token.
        pauses, is_closed = self._pauses, threading.Event()

        def is_interrupted() -> bool:
            return self._paused or self._pauses != pauses or is_closed.is_set()

        samples = [
            _Sample(request, index, seed)
            for request in requests
            for index, seed in zip(request.samples, request.seeds, strict=True)
        ]
        # By length, so that the prompts of a batch need the least padding.
        samples.sort(key=lambda sample: len(sample.request.prompt))
        try:
            for start in range(0, len(samples), self._max_batch_samples):
                batch = samples[start : start + self._max_batch_samples]
                for rollout in await asyncio.to_thread(self._generate, batch, is_interrupted):
                    yield rollout
        finally:
            is_closed.set()

    def _generate(
        self, batch: Sequence[_Sample], is_interrupted: Callable[[], bool]
    ) -> list[Rollout]:
        with self._busy:
            # The pause may have come while this thread waited for the lock.
            if is_interrupted():
                raise EnginePaused(
                    "the engine is paused; call resume() and submit the requests again"
                )
            self._check_usable()
            with device_of_thread(self._device):
                return self._generate_batch(batch, is_interrupted)

    @torch.inference_mode()
    def _generate_batch(
        self, batch: Sequence[_Sample], is_interrupted: Callable[[], bool]
    ) -> list[Rollout]:
        # Padded on the left: every row's next token then stands at the same position.
        width = max(len(sample.request.prompt) for sample in batch)
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sample in enumerate(batch):
            if not len(sample.request.prompt):
                raise ValueError(f"question {sample.request.question} has an empty prompt")
            ids[row, width - len(sample.request.prompt) :] = sample.request.prompt
            mask[row, width - len(sample.request.prompt) :] = 1
        sampler, limits = self._sampler(batch)
        finish = Finish(sampler, self._is_stop, limits, is_interrupted)
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
        if is_interrupted():
            raise EnginePaused(
                "the engine was paused while it generated; submit the requests again after resume()"
            )
        return self._rollouts(batch, sampler, finish.lengths)

    def _sampler(self, batch: Sequence[_Sample]) -> tuple[SeededSampler, torch.Tensor]:
        """Build the sampler of a batch; with it max_tokens of each row, [B] long."""
        plans = [sample.request.sampling for sample in batch]
        vocab = len(self._is_stop)
        longest = max(plan.max_tokens for plan in plans)
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(s.seed)).random(longest) for s in batch]
        )  # one stream a row, whatever else is in the batch

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
        last_tokens = sampler.tokens.gather(1, lengths[:, None] - 1)[:, 0]
        is_stopped = self._is_stop[last_tokens].tolist()
        return [
            Rollout(
                batch=sample.request.batch,
                question=sample.request.question,
                mode=sample.request.mode,
                sample=sample.index,
                tokens=tokens[row][:length],
                engine_logprobs=logprobs[row][:length],
                finish_reason="stop" if is_stopped[row] else "length",
                weight_versions=[(0, self._version)],
            )
            for row, (sample, length) in enumerate(zip(batch, lengths.tolist(), strict=True))
        ]

    def _not_finite(self) -> TrainingError:
        remedy = "lower train.learning_rate or go back to an earlier checkpoint"
        if self._version == 0:
            remedy = (
                f"the weights in {self._path} are not finite themselves: use another copy of the "
                "model"
            )
        return TrainingError(
            f"the logits of the local engine's model (weight version {self._version}) are not "
            f"finite; {remedy}"
        )

    async def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[float]]:
        """Score given responses: log-probs (nats, temperature 1) of all response tokens.

        sequences: (prompt ids, response ids). Waits until the model is free. Raises EnginePaused
        after `pause`, TrainingError as `submit` does.
        """
        return await asyncio.to_thread(self._score, sequences)

    def _score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        with self._busy:
            if self._paused:
                raise EnginePaused(
                    "the engine is paused; call resume() and ask for the scores again"
                )
            self._check_usable()
            with device_of_thread(self._device):
                scores = teacher_forced(self._model, sequences)
        if not all(math.isfinite(logprob) for logprobs in scores for logprob in logprobs):
            raise self._not_finite()
        return scores

    def metrics(self) -> dict[str, float]:
        """Return nothing: this engine counts nothing of its own."""
        return {}

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy new weights in place; the engine serves `version` once all have been copied.

        The tensors are read to the end, in the calling thread, even after a wrong one: they may
        come from a generator whose collectives other ranks take part in. Raises ValueError naming
        the missing, unexpected, repeated or misshapen tensors; the engine then refuses requests
        until a load succeeds.
        """
        async with self._lock_weights():
            # Before the first copy: if it fails half-way, even by an exception of `tensors`, the
            # weights are mixed and stay unusable.
            self._defect = f"loading weight version {version} has not succeeded"
            self._allocate()
            problems = copy_weights(self._model, tensors)
            if problems:
                raise ValueError(
                    f"weights of version {version} do not fit {self._path}: {'; '.join(problems)}"
                )
            self._version, self._defect = version, None

    async def pause(self) -> None:
        """Return once generation has ended, at most a token later; submits raise EnginePaused."""
        self._paused = True
        self._pauses += 1
        async with self._lock_weights():
            pass

    async def resume(self) -> None:
        """Accept requests again."""
        self._paused = False

    async def release(self) -> None:
        """Free the weights. Version 0 is read again by `restore`; later versions need a `load`."""
        async with self._lock_weights():
            for parameter in self._model.parameters():
                parameter.data = torch.empty(0, dtype=self._dtype, device=self._device)
            self._defect = f"the weights of version {self._version} have been released"

    async def restore(self) -> None:
        """Take the memory again after `release`, with the weights of version 0 if they served."""
        async with self._lock_weights():
            if not self._allocate():
                return
            if self._version == 0:
                weights = weights_by_file_name(read_model(self._path, self._dtype))
                copy_weights(self._model, weights.items())
                self._defect = None

    async def health(self) -> int:
        """Return the version of the weights; raises TrainingError if they cannot be used."""
        self._check_usable()
        return self._version

    def _check_usable(self) -> None:
        if self._defect:
            raise TrainingError(
                f"the local engine cannot generate: {self._defect}; load weights into it first"
            )

    def _allocate(self) -> bool:
        """Give released parameters memory again; False if nothing had been released."""
        released = [
            (name, p) for name, p in self._model.named_parameters() if p.shape != self._shapes[name]
        ]
        for name, parameter in released:
            parameter.data = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        return bool(released)

    @asynccontextmanager
    async def _lock_weights(self):
        """Wait until no batch is being generated, and let none begin meanwhile."""
        # Polled: a blocking acquire would stop the event loop for as long as a batch takes.
        while not self._busy.acquire(blocking=False):
            await asyncio.sleep(0.002)
        try:
            yield
        finally:
            self._busy.release()
