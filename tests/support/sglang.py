"""A real SGLang server for tests, and transformers as the reference of what it must answer.

The server environment is not the tests' own: POLICYSPLIT_SGLANG_PYTHON names its interpreter, else `.venv-sglang`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rollout.seeds import sample_seed
from megatron_policysplit.rollout.sglang import SglangEngine
from megatron_policysplit.rollout.sglang_http import EngineRefused, SglangClient
from megatron_policysplit.rows import Mode, Rollout
from megatron_policysplit.serving.servers import Server, ServerSpec

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "POLICYSPLIT_SGLANG_PYTHON"
REQUIRED = "POLICYSPLIT_SGLANG_REQUIRED"  # set by the Makefile: a missing environment is then a failure
PORTS = range(31500, 31600)
START_SECONDS = 240.0
CACHE_TOKENS = 8192
TOLERANCE = 1e-4  # nats, float32


def interpreter() -> Path:
    """Python of the environment that has SGLang, there or not."""
    return Path(os.environ.get(VARIABLE) or ROOT / ".venv-sglang" / "bin" / "python")


def require_server_environment() -> None:
    """Fail where the server environment is required, skip elsewhere, if it is not there."""
    if not interpreter().exists():
        missing = f"{interpreter()} does not exist: `make sglang-cpu` makes it, {VARIABLE} names another interpreter"
        pytest.fail(missing) if os.environ.get(REQUIRED) else pytest.skip(missing)


def free_port() -> int:
    """A port of ours that nothing listens on, SGLang's own inner ports (at most 1000 further) apart."""
    for port in PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port of {PORTS.start}-{PORTS.stop - 1} is free")


@dataclass
class LiveServer:
    """A server that answers. model: the directory it was started with, and what `reset` loads as version 0."""

    server: Server
    model: Path

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def address(self) -> str:
        return self.server.address

    def client(self, timeout_seconds: float = 30.0) -> SglangClient:
        return SglangClient(self.address, timeout_seconds=timeout_seconds)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """One call of the client, from code that is not asynchronous."""

        async def run() -> Any:
            client = self.client()
            try:
                return await getattr(client, method)(*arguments, **keywords)
            finally:
                await client.close()

        return asyncio.run(run())

    def start_again(self) -> None:
        """Start the server, on the same port if it was started before, and wait for its first token."""
        self.server.start()

        async def ready() -> None:
            client = self.client()
            try:
                await self.server.ready(client)
            finally:
                await client.close()

        asyncio.run(ready())

    def reset(self) -> None:
        """As after the start: nothing in flight, no session open, the first weights, version 0."""

        async def run() -> None:
            client = self.client()
            try:
                await client.pause()
                try:
                    await client.end_update()
                except EngineRefused as error:
                    assert "no weight-update session is open" in str(error), error
                await client.update_from_disk(str(self.model))
                await client.flush()
                await client.set_version("0")
                await client.proceed()
            finally:
                await client.close()

        asyncio.run(run())


@contextmanager
def live_server(model: Path, log: Path, **arguments: Any) -> Iterator[LiveServer]:
    """A server that has generated a token, started as a run starts it; ended at the exit.

    arguments: flags of sglang.launch_server, underscores for dashes.
    """
    require_server_environment()
    flags = {"max-total-tokens": CACHE_TOKENS, "max-running-requests": 16}
    flags |= {name.replace("_", "-"): value for name, value in arguments.items()}
    spec = ServerSpec(
        index=0,
        python=str(interpreter()),
        model=str(model),
        dtype="float32",
        tensor=1,
        host="127.0.0.1",
        port=free_port(),
        seed=0,
        log=log,
        start_seconds=START_SECONDS,
        arguments=flags,
        environment={"OMP_NUM_THREADS": "1"},
    )
    live = LiveServer(Server(spec), model)
    try:
        live.start_again()
        yield live
    finally:
        live.server.close()


STOP_TOKENS = (5,)  # `<|end|>` of `make_model`
VOCABULARY = 32
SHORT = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=12)


def prompt_of(question: int, mode: Mode = Mode.NORMAL, length: int = 12) -> list[int]:
    """Ids of a question, different in each; the high-entropy mode has the same system turn before every question."""
    system = [2, 27, 28, 27, 28, 27, 28, 5] if mode == Mode.HIGH_ENTROPY else []
    digits = [6 + (question // 20**place) % 20 for place in range(3)]
    return [*system, 3, *digits, *([26] * (length - 5)), 4]


def ask(
    questions: Iterable[int],
    samples: int = 2,
    *,
    modes: Sequence[Mode] = (Mode.NORMAL,),
    sampling: Sampling = SHORT,
    batch: int = 0,
    length: int = 12,
) -> list[Request]:
    """Requests as the run makes them."""
    return [
        Request(
            batch=batch,
            question=question,
            mode=mode,
            prompt=prompt_of(question, mode, length),
            sampling=sampling,
            samples=range(samples),
            seeds=[sample_seed(0, batch, question, mode, sample) for sample in range(samples)],
        )
        for question in questions
        for mode in modes
    ]


def keys(requests: Iterable[Request]) -> list[tuple]:
    """Of every rollout that the requests ask for, sorted."""
    return sorted((r.batch, r.question, r.mode.value, sample) for r in requests for sample in r.samples)


@asynccontextmanager
async def connected(address: str, version: int = 0, **settings: Any) -> AsyncIterator[SglangEngine]:
    """An engine with short limits, told that `version` is served."""
    defaults = {
        "api_key": None,
        "stop_token_ids": STOP_TOKENS,
        "vocab_size": VOCABULARY,
        "concurrency": 8,
        "request_seconds": 10.0,
        "retries": 4,
        "unavailable_seconds": 20.0,
        "backoff_seconds": 0.05,
    }
    engine = SglangEngine(address, **{**defaults, **settings})
    engine.serve_version(version)
    try:
        yield engine
    finally:
        await engine.aclose()


async def rollouts_of(engine: SglangEngine, requests: Sequence[Request]) -> list[Rollout]:
    """All of them, sorted by key; each sample came exactly once."""
    rollouts = [rollout async for rollout in engine.submit(requests)]
    rollouts.sort(key=lambda rollout: rollout.key)
    assert [rollout.key for rollout in rollouts] == keys(requests)
    return rollouts


def make_model(path: Path, **overrides: Any) -> Path:
    """A Qwen3-shaped model of 4 MB (several buckets of 1 MiB) over the quickstart's 32 tokens; `<|end|>` ends.

    overrides: of its configuration.
    """
    from examples.quickstart.make_model import make_tokenizer
    from tests.support import hf_models

    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 512, **overrides}
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    hf_models.make_model(path, "qwen3", tied=True, vocab=len(tokenizer), **sizes, **end)
    tokenizer.save_pretrained(path)
    return path


class Reference:
    """What transformers answers for every weight version: 0 is the model on disk, others are random steps away."""

    def __init__(self, path: Path):
        from transformers import AutoModelForCausalLM

        self.path = path
        self._model = AutoModelForCausalLM.from_pretrained(path)
        self._loaded = 0
        self._first = {name: tensor.clone() for name, tensor in self._model.named_parameters()}

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """Hugging Face tensors of a version, the tied head once."""
        import torch

        generator = torch.Generator().manual_seed(version)
        scale = 0.02 if version else 0.0
        return {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in self._first.items()
        }

    def save(self, version: int, directory: Path) -> None:
        """Write the weights of a version into a copy of the model's directory."""
        from safetensors.torch import save_file

        save_file(self.weights(version), directory / "model.safetensors", metadata={"format": "pt"})

    def distributions(
        self, version: int, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
    ) -> torch.Tensor:
        """log_softmax(logits / temperature) before every response token [T, V], from one pass over the sequence."""
        import torch

        with torch.no_grad():
            if version != self._loaded:
                for name, tensor in self.weights(version).items():
                    self._model.get_parameter(name).copy_(tensor)
                self._loaded = version
            logits = self._model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            return (logits / temperature).log_softmax(-1)

    def logprobs(
        self, version: int, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
    ) -> list[float]:
        """The response tokens' own log-probs of `distributions`."""
        scores = self.distributions(version, prompt, response, temperature)
        return [scores[position, token].item() for position, token in enumerate(response)]

    def difference(self, rollout: Rollout, request: Request) -> float:
        """Largest |log-prob - reference| (nats), each span of the response under the version it claims."""
        expected: list[float] = []
        ends = [start for start, _ in rollout.weight_versions[1:]] + [len(rollout.tokens)]
        for (start, version), end in zip(rollout.weight_versions, ends, strict=True):
            scores = self.logprobs(version, request.prompt, rollout.tokens, request.sampling.temperature)
            expected += scores[start:end]
        return max(abs(a - b) for a, b in zip(rollout.engine_logprobs, expected, strict=True))

    def assert_agrees(self, rollouts: Sequence[Rollout], requests: Sequence[Request]) -> None:
        """Every rollout was sampled by exactly the weights whose version it carries. Other versions are nats away."""
        of = {(request.batch, request.question, request.mode): request for request in requests}
        for rollout in rollouts:
            difference = self.difference(rollout, of[rollout.batch, rollout.question, rollout.mode])
            assert difference < TOLERANCE, (rollout.key, rollout.weight_versions, difference)
