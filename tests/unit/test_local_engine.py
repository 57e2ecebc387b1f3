"""The local engine against transformers' own forward pass and its own definition in plain numpy."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_policysplit.errors import ModelError, TrainingError
from megatron_policysplit.rollout.engine import EnginePaused, Request, Sampling
from megatron_policysplit.rollout.local import LocalEngine
from megatron_policysplit.rows import Mode
from tests.support.hf_models import make_model

VOCAB, STOPS = 40, [3, 17, 22]
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.5,  # far from uniform, so that a wrong position or mask shows
)


def build(family: str, path, tied: bool = True, seed: int = 0):
    torch.manual_seed(seed)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=tied))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    # What a model's author may set, and what must not bend the distribution.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=2, repetition_penalty=3.0, suppress_tokens=[5, 6], eos_token_id=7
    )
    model.save_pretrained(path)
    return model.eval()


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    return str(path), build("qwen3", path)


def request(question=0, mode=Mode.NORMAL, prompt=(1, 2), samples=6, max_tokens=9, temperature=1.0, top_p=1.0, top_k=-1):
    seeds = [1000 * question + 100 * (mode == Mode.NORMAL) + i for i in range(samples)]
    return Request(
        0, question, mode, list(prompt), Sampling(temperature, top_p, top_k, max_tokens), range(samples), seeds
    )


def run(engine, requests):
    async def gather():
        return {rollout.key: rollout async for rollout in engine.submit(requests)}

    return asyncio.run(gather())


@torch.no_grad()
def forward(model, prompt, tokens, temperature):
    """log-probs [T, V] of the response positions, one sequence, no padding, no cache."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def expected_token(logprobs: np.ndarray, uniform: float, top_p: float, top_k: int) -> int:
    """Inverse CDF in vocabulary order over the tokens that the filters leave, token by token."""
    probabilities = np.exp(logprobs)
    kept, before = [], 0.0
    for rank, token in enumerate(np.argsort(-probabilities, kind="stable")):
        if (top_k > 0 and rank >= top_k) or before >= top_p:
            break
        kept.append(token)
        before += probabilities[token]
    target = uniform * sum(probabilities[token] for token in kept)
    running = 0.0
    for token in sorted(kept):
        running += probabilities[token]
        if running > target:
            return token
    return max(kept)


MIXED = [
    request(0, Mode.NORMAL, [1, 2, 9], temperature=0.7, max_tokens=12),
    request(0, Mode.HIGH_ENTROPY, [8] * 17 + [1, 2, 9], temperature=1.3, max_tokens=5),
    request(1, Mode.NORMAL, [4], top_k=3, max_tokens=1),
    request(1, Mode.HIGH_ENTROPY, [30, 31], top_p=0.6, temperature=2.0, max_tokens=20),
    request(2, Mode.NORMAL, [11, 12, 13], top_p=0.8, top_k=6, max_tokens=7),
]


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)])
def test_tokens_and_logprobs_are_those_of_a_plain_forward_pass(tmp_path, family, tied):
    model = build(family, tmp_path, tied)
    engine = LocalEngine(str(tmp_path), STOPS, max_batch_samples=7)
    rollouts = run(engine, MIXED)
    assert len(rollouts) == sum(len(r.samples) for r in MIXED)
    for ask in MIXED:
        for sample, seed in zip(ask.samples, ask.seeds, strict=True):
            rollout = rollouts[(0, ask.question, ask.mode.value, sample)]
            logprobs = forward(model, ask.prompt, rollout.tokens, ask.sampling.temperature)
            chosen = logprobs.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(rollout.engine_logprobs, dtype=torch.float64), chosen, atol=1e-5, rtol=0
            )
            uniforms = np.random.Generator(np.random.Philox(seed)).random(ask.sampling.max_tokens)
            for step, token in enumerate(rollout.tokens):
                row = logprobs[step].numpy()
                assert token == expected_token(row, uniforms[step], ask.sampling.top_p, ask.sampling.top_k)
            assert not set(STOPS) & set(rollout.tokens[:-1])
            if rollout.tokens[-1] in STOPS:
                assert rollout.finish_reason == "stop"
            else:
                assert (rollout.finish_reason, len(rollout.tokens)) == ("length", ask.sampling.max_tokens)
            assert rollout.weight_versions == [(0, 0)]
    assert {r.finish_reason for r in rollouts.values()} == {"stop", "length"}


def test_a_sample_does_not_depend_on_its_neighbours(qwen3):
    together = run(LocalEngine(qwen3[0], STOPS), MIXED)
    engine = LocalEngine(qwen3[0], STOPS, max_batch_samples=1)
    for ask in reversed(MIXED):
        for key, rollout in run(engine, [ask]).items():
            assert rollout.tokens == together[key].tokens
            np.testing.assert_allclose(rollout.engine_logprobs, together[key].engine_logprobs, atol=1e-5)


def test_samples_follow_the_model_distribution(qwen3):
    path, model = qwen3
    count = 4000
    rollouts = run(LocalEngine(path, STOPS, max_batch_samples=1000), [request(samples=count, max_tokens=1)])
    drawn = np.bincount([r.tokens[0] for r in rollouts.values()], minlength=VOCAB)
    expected = forward(model, [1, 2], [0], 1.0)[0].exp().numpy() * count
    likely = expected > 5
    # Chi-square of 30-odd cells: mean = cells, standard deviation = sqrt(2 cells); five of them is far out.
    chi_square = ((drawn - expected) ** 2 / expected)[likely].sum()
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_without_stop_tokens_every_row_runs_to_its_own_limit(qwen3):
    asks = [request(0, max_tokens=3), request(1, max_tokens=11)]
    lengths = {key[1]: len(r.tokens) for key, r in run(LocalEngine(qwen3[0], []), asks).items()}
    assert lengths == {0: 3, 1: 11}


def test_load_replaces_every_weight_and_changes_the_version(qwen3, tmp_path):
    path, old = qwen3
    new = build("qwen3", tmp_path, seed=1)
    engine = LocalEngine(path, STOPS)
    names = dict(new.named_parameters())
    asyncio.run(engine.load(iter(names.items()), 7))
    assert asyncio.run(engine.health()) == 7
    fresh = run(LocalEngine(str(tmp_path), STOPS), MIXED)
    for key, rollout in run(engine, MIXED).items():
        assert rollout.tokens == fresh[key].tokens and rollout.weight_versions == [(0, 7)]
    # The tied head may come as well, if it is the same.
    asyncio.run(engine.load([*names.items(), ("lm_head.weight", names["model.embed_tokens.weight"])], 8))
    assert asyncio.run(engine.health()) == 8


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "unexpected model.extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(5)}), r"model.norm.weight has shape \[5\] instead of"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB, 32)}), "lm_head.weight is tied to model.embed"),
    ],
)
def test_an_incomplete_load_is_refused_after_reading_all(qwen3, change, message):
    path, model = qwen3
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    whole = dict(tensors)
    change(tensors)
    drained = []

    def stream():
        yield from tensors.items()
        drained.append(True)

    async def scenario():
        engine = LocalEngine(path, STOPS)
        with pytest.raises(ValueError, match=message):
            await engine.load(stream(), 1)
        assert drained
        with pytest.raises(TrainingError, match="version 1 has not succeeded"):
            await engine.health()
        with pytest.raises(TrainingError, match="cannot generate"):
            [r async for r in engine.submit([request()])]
        await engine.load(whole.items(), 2)
        assert await engine.health() == 2

    asyncio.run(scenario())


def test_a_tensor_that_comes_twice_is_refused(qwen3):
    path, model = qwen3
    tensors = [*model.named_parameters(), ("model.norm.weight", model.model.norm.weight)]
    with pytest.raises(ValueError, match="repeated model.norm.weight"):
        asyncio.run(LocalEngine(path, STOPS).load(tensors, 1))


def long_request():
    return [request(max_tokens=100_000, samples=2)]  # minutes, unless it is interrupted


def test_pause_ends_generation_at_the_next_token(qwen3):
    async def scenario():
        engine = LocalEngine(qwen3[0], [])
        task = asyncio.create_task(anext(engine.submit(long_request())))
        await asyncio.sleep(0.3)
        assert not task.done() and engine._busy.locked()  # it generates, and the event loop is alive
        began = time.monotonic()
        await engine.pause()
        assert time.monotonic() - began < 20
        await engine.resume()  # a resume must not bring the interrupted one back
        with pytest.raises(EnginePaused):
            await task
        await engine.pause()
        with pytest.raises(EnginePaused):
            [r async for r in engine.submit([request()])]
        await engine.resume()
        assert len([r async for r in engine.submit([request()])]) == 6

    asyncio.run(scenario())


def test_a_cancelled_submit_stops_generating(qwen3):
    async def scenario():
        engine = LocalEngine(qwen3[0], [])
        task = asyncio.create_task(anext(engine.submit(long_request())))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        began = time.monotonic()
        assert len([r async for r in engine.submit([request()])]) == 6  # waits for the model to be free
        assert time.monotonic() - began < 20

    asyncio.run(scenario())


def test_release_frees_the_weights_and_restore_or_load_brings_them_back(qwen3):
    path, model = qwen3
    before = run(LocalEngine(path, STOPS), MIXED)
    engine = LocalEngine(path, STOPS)

    async def release():
        await engine.release()
        assert sum(p.numel() for p in engine._model.parameters()) == 0
        with pytest.raises(TrainingError, match="have been released"):
            await engine.health()

    asyncio.run(release())
    asyncio.run(engine.restore())
    assert {k: r.tokens for k, r in run(engine, MIXED).items()} == {k: r.tokens for k, r in before.items()}
    for restore_first in (False, True):
        asyncio.run(engine.load(model.named_parameters(), 4))
        asyncio.run(release())
        if restore_first:  # memory, but version 4 is in no file
            asyncio.run(engine.restore())
            with pytest.raises(TrainingError, match="version 4 have been released"):
                asyncio.run(engine.health())
        asyncio.run(engine.load(model.named_parameters(), 5))
        assert {k: r.tokens for k, r in run(engine, MIXED).items()} == {k: r.tokens for k, r in before.items()}


def test_experts_come_one_by_one_as_in_the_files(tmp_path):
    for seed in (0, 1):
        make_model(tmp_path / str(seed), "qwen3_moe", tied=False, vocab=VOCAB, seed=seed, num_hidden_layers=1)
    files = load_file(tmp_path / "1" / "model.safetensors")
    engine = LocalEngine(str(tmp_path / "0"), STOPS)
    asyncio.run(engine.load(files.items(), 1))
    fresh = LocalEngine(str(tmp_path / "1"), STOPS)
    for (name, ours), theirs in zip(engine._model.named_parameters(), fresh._model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert run(engine, MIXED).keys() == run(fresh, MIXED).keys()
    asyncio.run(fresh.release())
    asyncio.run(fresh.restore())
    assert all(torch.equal(a, b) for a, b in zip(engine._model.parameters(), fresh._model.parameters(), strict=True))
    files.pop("model.layers.0.mlp.experts.5.up_proj.weight")
    with pytest.raises(ValueError, match="missing model.layers.0.mlp.experts.5.up_proj.weight$"):
        asyncio.run(engine.load(files.items(), 2))


def test_diverged_weights_are_an_error(qwen3):
    path, model = qwen3
    engine = LocalEngine(path, STOPS)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors["model.norm.weight"].fill_(float("nan"))
    asyncio.run(engine.load(tensors.items(), 3))
    with pytest.raises(TrainingError, match="weight version 3.* not finite"):
        run(engine, MIXED)


def test_damaged_models_are_named(qwen3, tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        LocalEngine(str(tmp_path), STOPS)
    with pytest.raises(ModelError, match=r"stop tokens \[99\]"):
        LocalEngine(qwen3[0], [99])
    build("qwen3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="model.norm.weight"):
        LocalEngine(str(tmp_path), STOPS)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        LocalEngine(str(tmp_path), STOPS)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load"):
        LocalEngine(str(tmp_path), STOPS)


SEQUENCES = [([1, 2, 9], [4, 5, 6, 7]), ([8] * 17 + [1], [3]), ([30], [31, 3, 17, 22, 0] * 5), ([4, 4], [11, 12])]


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("llama", False)])
@pytest.mark.parametrize("logits", [1, 60 * VOCAB, 2**26], ids=["one each", "some together", "all together"])
def test_scores_are_those_of_a_plain_forward_pass(tmp_path, family, tied, logits, monkeypatch):
    monkeypatch.setattr("megatron_policysplit.rollout.teacher_forcing.LOGIT_ELEMENTS", logits)
    model = build(family, tmp_path, tied)
    scores = asyncio.run(LocalEngine(str(tmp_path), STOPS).log_probs(SEQUENCES))
    for (prompt, tokens), found in zip(SEQUENCES, scores, strict=True):
        expected = forward(model, prompt, tokens, 1.0).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(found) == len(tokens)
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, atol=1e-5, rtol=0)


def test_scores_of_samples_are_their_logprobs_and_follow_the_weights(qwen3, tmp_path):
    path, _ = qwen3
    engine, asks = LocalEngine(path, STOPS), [request(0, max_tokens=9), request(1, prompt=[7] * 9, max_tokens=3)]
    prompts = {ask.question: ask.prompt for ask in asks}
    rollouts = list(run(engine, asks).values())
    sequences = [(prompts[rollout.question], rollout.tokens) for rollout in rollouts]
    for rollout, scores in zip(rollouts, asyncio.run(engine.log_probs(sequences)), strict=True):
        np.testing.assert_allclose(scores, rollout.engine_logprobs, atol=1e-5)
    new = build("qwen3", tmp_path, seed=1)
    asyncio.run(engine.load(new.named_parameters(), 7))
    ((score, *_), *_) = asyncio.run(engine.log_probs(sequences))
    assert score == pytest.approx(float(forward(new, *sequences[0], 1.0)[0, sequences[0][1][0]]), abs=1e-5)


def test_scores_are_refused_where_they_would_mean_nothing(qwen3):
    path, model = qwen3
    engine = LocalEngine(path, STOPS)
    assert asyncio.run(engine.log_probs([])) == []
    for empty in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="sequence 1 has"):
            asyncio.run(engine.log_probs([([1], [2]), empty]))

    async def scenario():
        await engine.pause()
        with pytest.raises(EnginePaused):
            await engine.log_probs([([1], [2])])
        await engine.resume()
        await engine.release()
        with pytest.raises(TrainingError, match="have been released"):
            await engine.log_probs([([1], [2])])
        tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        tensors["model.norm.weight"].fill_(float("nan"))
        await engine.load(tensors.items(), 3)
        with pytest.raises(TrainingError, match="weight version 3.* not finite"):
            await engine.log_probs([([1], [2])])

    asyncio.run(scenario())


def test_bfloat16_samples_with_finite_logprobs(qwen3):
    rollouts = run(LocalEngine(qwen3[0], STOPS, dtype="bfloat16"), MIXED)
    assert all(logprob <= 0 for r in rollouts.values() for logprob in r.engine_logprobs)


def test_its_thread_works_on_the_device_of_the_model(qwen3, monkeypatch):
    """A new thread's current GPU is the first one, whichever the engine's is."""
    from contextlib import contextmanager

    from megatron_policysplit.rollout import local

    path, _ = qwen3
    engine, seen = LocalEngine(path, STOPS), []
    generate, score = engine._generate_batch, local.teacher_forced

    @contextmanager
    def device_of_thread(device):
        seen.append((device, threading.current_thread() is threading.main_thread()))
        yield
        seen.append("left")

    def inside(work):
        return lambda *arguments: (seen.append("works"), work(*arguments))[1]

    monkeypatch.setattr(local, "device_of_thread", device_of_thread)
    monkeypatch.setattr(engine, "_generate_batch", inside(generate))
    monkeypatch.setattr(local, "teacher_forced", inside(score))
    run(engine, [request(samples=1, max_tokens=1)])
    asyncio.run(engine.log_probs([([1, 2], [3])]))
    assert seen == [(torch.device("cpu"), False), "works", "left"] * 2
