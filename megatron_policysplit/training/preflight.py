"""Everything that can be checked before a process starts or a weight is read.

To be fast, it imports torch only for model.megatron, algorithm.options,
algorithm.old_logprobs=engine and rollout.engine=replay.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_policysplit.actor.checkpoint_files import (
    check_files,
    check_model,
    complete,
    read_trainer_json,
)
from megatron_policysplit.algorithms.checks import check_method
from megatron_policysplit.config import Config
from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.engine_checks import check_actor_allocator
from megatron_policysplit.config.load import world_size
from megatron_policysplit.config.secrets import api_key
from megatron_policysplit.distributed.environment import check_deterministic
from megatron_policysplit.errors import ConfigError, ModelError, UserError
from megatron_policysplit.evaluation.judge_prompt import judge_api_key, read_judge_prompt
from megatron_policysplit.serving.interpreter import check_interpreter, server_count
from megatron_policysplit.training.places import check_places
from megatron_policysplit.training.run_dir import check_run_dir

if TYPE_CHECKING:
    from megatron_policysplit.data.questions import Question


@dataclass(frozen=True)
class Preflight:
    """A run that may start, in numbers. Made by `preflight`, printed by `policysplit train`."""

    architecture: str
    parameters: int  # every stored weight counts
    train_questions: int
    eval_questions: int  # 0 without evaluation
    ranks: int
    resumes: bool  # whether run.dir holds this very run already
    warnings: list[str]
    reward: str | None = None  # what it gives the questions' own answers; None where not tried

    def lines(self, config: Config) -> list[str]:
        """The lines that a run prints at its start, warnings last."""
        layout = config.parallel
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        evaluation = f", {self.eval_questions} for evaluation" if self.eval_questions else ""
        start = f", weights of {config.model.megatron}" if config.model.megatron is not None else ""
        return [
            f"model    {config.model.path} ({self.architecture}, {self.parameters / 1e6:,.1f} M "
            f"parameters){start}",
            f"data     {self.train_questions} questions{evaluation}",
            f"layout   tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} = "
            f"{ranks}" + f", experts over {layout.expert} replicas" * (layout.expert > 1),
            f"engine   {_engines(config)}",
            *([] if self.reward is None else [f"reward   {self.reward}"]),
            *_judge(config),
            "run      "
            f"{config.run.dir}{' (resumed if it holds a checkpoint)' if self.resumes else ''}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]


def _engines(config: Config) -> str:
    """What generates, and how new weights reach it, in one line."""
    rollout, server = config.rollout, config.rollout.server
    if rollout.engine != "sglang":
        return rollout.engine
    if rollout.addresses:
        servers = ", ".join(rollout.addresses)
    else:
        count = server_count(config)
        place = " on the actor's GPUs" * rollout.colocated
        servers = f"{count} of tensor parallelism {server.tensor}{place}"
    return f"sglang ({servers}), weights by {config.weight_sync.transport}"


def _judge(config: Config) -> list[str]:
    """The line about the judge; [] without one."""
    judge = config.eval.judge
    if judge.url is None:
        return []
    each = f"{judge.samples} response{'s' * (judge.samples > 1)} per mode"
    return [
        f"judge    {judge.model} at {judge.url}, {each} to {judge.questions} questions of an "
        "evaluation at most"
    ]


def preflight(config: Config, *, tries_reward: bool = True) -> Preflight:
    """Check keys, model, data, reward, servers, judge, run directory and checkpoint.

    Writes nothing and starts nothing but, with `tries_reward`, a process in which the reward grades
    the first questions' own answers (`rewards.trial.try_reward`). Raises a UserError for the first
    thing that is wrong.
    """
    warnings = check_config(config)
    if config.train.deterministic:
        check_deterministic(os.environ)
    check_method(config)
    architecture, parameters, model_warnings = _check_model(config)
    train, evaluation = _check_data(config)
    _check_reward(config, train, evaluation)
    _check_servers(config)
    if config.eval.judge.url is not None:
        read_judge_prompt(config.eval.judge)
        judge_api_key(config.eval.judge)
    check_places(config)
    resumes = check_run_dir(config)
    _check_checkpoint(config)
    reward = None
    if tries_reward:
        reward, of_reward = _try_reward(config, train, evaluation)
        warnings = [*warnings, *of_reward]
    return Preflight(
        architecture,
        parameters,
        len(train),
        len(evaluation),
        world_size(config),
        resumes,
        [*warnings, *model_warnings],
        reward,
    )


def _check_model(config: Config) -> tuple[str, int, list[str]]:
    """The name of the model's architecture, its number of weights, and warnings about it.

    Raises a UserError.
    """
    from checkpoints_conv import check_safetensors, find_architecture, read_hf_config
    from megatron_policysplit.config.model_layout import check_layout, check_positions
    from megatron_policysplit.data.chat_template import check_template_files
    from megatron_policysplit.data.prompts import read_eval_prompts, read_prompts
    from megatron_policysplit.data.stop_tokens import check_stop_tokens
    from megatron_policysplit.data.tokenizer import check_tokenizer_files, has_chat_template

    path = config.model.path
    hf_config = read_hf_config(path)
    architecture = find_architecture(hf_config)
    parallel = config.parallel
    check_layout(
        hf_config, parallel.tensor, parallel.pipeline, parallel.expert, sequence=parallel.sequence
    )
    check_positions(hf_config, config.data.max_prompt_tokens, config.rollout.max_response_tokens)
    tensors = check_safetensors(path)
    _check_start(config, hf_config)
    check_tokenizer_files(path)
    if not has_chat_template(path):
        raise ModelError(
            f"the tokenizer of model.path={path} has no chat template; put a chat_template.jinja "
            "into that directory or use an instruction-tuned model"
        )
    check_template_files(path, config.modes.chat_template_kwargs)
    check_stop_tokens(path)
    read_prompts(config.modes)
    read_eval_prompts(config.eval.prompts, config.modes)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return architecture.name, parameters, _tokens_without_embedding(path, hf_config["vocab_size"])


def _tokens_without_embedding(path: str, vocab_size: int) -> list[str]:
    """A warning where the tokenizer has tokens that the model has no embedding for; else []."""
    from megatron_policysplit.data.tokenizer import tokens_beyond

    beyond = tokens_beyond(path, vocab_size)
    if not beyond:
        return []
    token, id = beyond[0]
    count = "1 token" if len(beyond) == 1 else f"{len(beyond)} tokens"
    return [
        f"the tokenizer of model.path={path} has {count} that the model has no embedding for, such "
        f"as {token!r} of id {id} with vocab_size={vocab_size}; a prompt with one is refused"
    ]


def _check_start(config: Config, hf_config: dict[str, Any]) -> None:
    """Raise a UserError unless model.megatron, if given, is complete and of model.path's model."""
    if config.model.megatron is None:
        return
    from checkpoints_conv.megatron_reader import MegatronCheckpoint
    from checkpoints_conv.verify import check_config

    path = Path(config.model.megatron)
    try:
        MegatronCheckpoint(path, config.model.path)
        if (path / "trainer.json").is_file():
            check_model(
                read_trainer_json(path)["model"],
                hf_config,
                path,
                remedy="set model.path to that model",
            )
        check_config(path, config.model.path)
    except UserError as error:
        raise type(error)(f"model.megatron: {error}") from error


def _check_data(config: Config) -> tuple[list[Question], list[Question]]:
    """The questions for training and for evaluation. Raises a UserError."""
    from megatron_policysplit.data.questions import load_questions

    questions = load_questions(config.data.path, config.data.options)
    if config.data.batch_questions > len(questions):
        raise ConfigError(
            f"data.batch_questions={config.data.batch_questions} is more than the "
            f"{len(questions)} questions of data.path={config.data.path}; use at most "
            f"{len(questions)}"
        )
    replay = config.rollout.replay_dir
    if config.rollout.engine == "replay" and not Path(replay).is_dir():
        raise ConfigError(
            f"rollout.replay_dir={replay} is not a directory; give the rollouts/ directory of a run"
        )
    if config.eval.path is None:
        return questions, []
    evaluation = load_questions(config.eval.path, config.eval.options)
    return questions, evaluation[: config.eval.questions]


def _check_reward(
    config: Config, questions: Sequence[Question], evaluation: Sequence[Question]
) -> None:
    """Raise ConfigError for a reward that cannot be called, or that cannot grade this data."""
    from megatron_policysplit.rewards import load_reward
    from megatron_policysplit.rewards.trial import check_questions

    load_reward(config.reward.function)
    check_questions(config.reward.function, f"data.path={config.data.path}", questions)
    if evaluation:
        check_questions(config.reward.function, f"eval.path={config.eval.path}", evaluation)


def _try_reward(
    config: Config, questions: Sequence[Question], evaluation: Sequence[Question]
) -> tuple[str, list[str]]:
    """What the reward gives the questions' own answers, and warnings. Raises a UserError."""
    from megatron_policysplit.rewards.trial import try_reward

    data = {f"data.path={config.data.path}": questions}
    if evaluation and config.eval.path != config.data.path:
        data[f"eval.path={config.eval.path}"] = evaluation
    reward = config.reward
    trials = try_reward(reward.function, reward.timeout_seconds, data)
    return trials[0].line(), [warning for trial in trials for warning in trial.warnings()]


def _check_servers(config: Config) -> None:
    """Raise ConfigError if the run's own servers could not be started here."""
    rollout, server = config.rollout, config.rollout.server
    if rollout.engine != "sglang":
        return
    api_key(rollout)
    check_actor_allocator(config, os.environ)
    if rollout.addresses:
        return
    if server.python is not None and shutil.which(server.python) is None:
        raise ConfigError(
            f"rollout.server.python={server.python} is not an executable; give the interpreter of "
            "an environment with SGLang (on a machine without a GPU `make sglang-cpu` makes one: "
            ".venv-sglang/bin/python)"
        )
    modules = ["sglang", "sglang_router"][: 1 + (server_count(config) > 1)]
    check_interpreter(server.python, modules, server.environment)


def _check_checkpoint(config: Config) -> None:
    """Raise CheckpointError if run.dir's newest checkpoint is of another model, or damaged."""
    from checkpoints_conv import read_hf_config

    for path in complete(Path(config.run.dir) / "checkpoints")[-1:]:
        check_model(read_trainer_json(path)["model"], read_hf_config(config.model.path), path)
        check_files(path)
