"""Every configuration key, with its default, its meaning and its allowed values: `Config`.

The dataclasses here, in `rollout_schema` and in `training_schema` are the single source: the YAML
loader (`load`), the command line's `key=value` overrides and `docs/configuration.md` are all
derived from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_policysplit.config.keys import LARGEST_SECONDS, LARGEST_SEED, MISSING, key
from megatron_policysplit.config.rollout_schema import (
    AgreementConfig,
    OtherModeConfig,
    RolloutConfig,
    WeightSyncConfig,
)
from megatron_policysplit.config.training_schema import AlgorithmConfig, RewardConfig, TrainConfig

CONFIG_FILE = "config.yaml"  # in the run directory


@dataclass
class ModelConfig:
    """The model: `model`."""

    path: str = key(
        MISSING,
        "Directory of a Hugging Face model (config.json, safetensors, tokenizer).",
        path=True,
    )
    megatron: str | None = key(
        None,
        "torch_dist checkpoint of the same architecture whose weights the actor starts from: a "
        "converted one, or checkpoints/step_NNNNNN of another run. null takes those of model.path.",
        path=True,
    )
    layers: str = key(
        "auto",
        "Layers of the actor: Transformer Engine's, or Megatron-Core's own (local). auto takes "
        "Transformer Engine's where it can be imported and there is a GPU; the log says which.",
        choices=("auto", "local", "transformer_engine"),
    )
    dtype: str = key(
        "bfloat16", "Precision of parameters and activations.", choices=("float32", "bfloat16")
    )


@dataclass
class ParallelConfig:
    """The layout of the actor's ranks: `parallel`."""

    tensor: int = key(1, "Tensor-parallel size.", minimum=1, maximum=4096)
    pipeline: int = key(1, "Pipeline-parallel size.", minimum=1, maximum=4096)
    data: int = key(1, "Data-parallel size: number of model replicas.", minimum=1, maximum=4096)
    expert: int = key(
        1,
        "Expert-parallel size of a mixture of experts: so many replicas in a row share its "
        "experts.",
        minimum=1,
        maximum=4096,
    )
    sequence: bool = key(
        False,
        "Sequence parallelism: between tensor-parallel layers, each rank holds its part of the "
        "tokens.",
    )
    timeout_seconds: float = key(
        1800.0,
        "Time limit of a collective of all groups but the control group's (45 s). Longer than one "
        "rank may work while others wait: a server's start, the writing of a checkpoint.",
        minimum=60.0,
        maximum=LARGEST_SECONDS,
    )
    silent_seconds: float = key(
        30.0,
        "A rank that gives no sign of life for so long is taken for dead, and the run ends.",
        minimum=3.0,
        maximum=LARGEST_SECONDS,
    )


@dataclass
class DataConfig:
    """Training questions: `data`."""

    path: str = key(
        MISSING,
        "Training questions: a .jsonl or .parquet file, or `reasoning_gym:NAME`.",
        path=True,
    )
    options: dict[str, Any] = key(
        dict, "Options of a reasoning_gym dataset (size, seed and the task's own)."
    )
    batch_questions: int = key(32, "Questions per rollout batch.", minimum=1)
    max_prompt_tokens: int = key(
        2048,
        "Questions whose longest prompt (of all modes) exceeds this are dropped and counted.",
        minimum=1,
    )


@dataclass
class ModesConfig:
    """Prompts of the modes: `modes`."""

    high_entropy_prompt: str | None = key(
        None, "System prompt of the high-entropy mode; null uses our own default."
    )
    high_entropy_prompt_file: str | None = key(
        None, "Read the high-entropy prompt from this UTF-8 file instead.", path=True
    )
    template_system: str = key(
        "keep",
        "What to do with a system text the chat template inserts by itself: keep it in all modes, "
        "or drop it.",
        choices=("keep", "drop"),
    )
    chat_template_kwargs: dict[str, Any] = key(
        dict, "Passed to the chat template, for example enable_thinking."
    )
    others: dict[str, Any] = key(
        dict,
        "Further modes, `NAME: {prompt: TEXT, ...}`, which algorithm.name=policy_split samples and "
        "trains as it does the two (docs/modes.md).",
        entries=OtherModeConfig,
    )


@dataclass
class JudgeConfig:
    """The model that scores evaluation responses: `eval.judge`."""

    url: str | None = key(
        None,
        "Base of an OpenAI-compatible server, such as http://host:port/v1; null: no judge, nothing "
        "is sent.",
    )
    model: str | None = key(None, "The judge's name on that server.")
    api_key_variable: str | None = key(
        None, "Environment variable that holds the API key; null sends none."
    )
    prompt: str | None = key(
        None,
        "What the judge is asked, with {question} and {response} where these belong; its reply "
        "must end in a line `Score: N`, N from 1 to 10. null uses our own, which asks for "
        "creativity.",
    )
    prompt_file: str | None = key(None, "Read that prompt from this UTF-8 file instead.", path=True)
    questions: int = key(
        16, "Judge responses to the first so many evaluation questions.", minimum=1
    )
    samples: int = key(2, "Responses judged per question and mode, the first ones.", minimum=1)
    concurrency: int = key(8, "Requests in flight at once.", minimum=1)
    timeout_seconds: float = key(
        120.0, "Time limit of one request.", above=0.0, maximum=LARGEST_SECONDS
    )
    retries: int = key(
        4,
        "How often a request is sent again after 408, 429, 5xx, a time limit or a lost connection.",
        minimum=0,
    )
    max_tokens: int | None = key(
        1024, "Longest reply; a longer one has no score. null sends no limit.", minimum=1
    )
    temperature: float | None = key(
        0.0, "The judge's temperature; null leaves it to the server.", minimum=0.0
    )


@dataclass
class EvalPromptConfig:
    """An entry of `eval.prompts` that is not a text."""

    file: str | None = key(None, "Read the prompt from this UTF-8 file.", path=True)


@dataclass
class EvalConfig:
    """Evaluation: `eval`."""

    path: str | None = key(
        None, "Evaluation questions, as data.path; null turns evaluation off.", path=True
    )
    options: dict[str, Any] = key(dict, "As data.options.")
    questions: int | None = key(None, "Evaluate only the first so many; null takes all.", minimum=1)
    every: int = key(
        0, "Evaluate every so many steps, and at both ends; 0 only at both ends.", minimum=0
    )
    samples: int = key(
        8, "Samples per question and mode (the k of best-of-k; pass@k up to it).", minimum=1
    )
    prompts: dict[str, Any] = key(
        dict,
        "System prompts to evaluate under, too: `NAME: TEXT`, or `NAME: {file: PATH}`; sampled as "
        "the normal mode, logged as `eval/NAME/...`.",
        entries=EvalPromptConfig,
    )
    variety: bool = key(
        False, "Measure how varied the responses' texts are, too: distinct n-grams, self-BLEU."
    )
    judge: JudgeConfig = key(JudgeConfig, "A model that scores responses.")


@dataclass
class CheckpointConfig:
    """Checkpoints and exports: `checkpoint`."""

    every: int = key(0, "Save every so many steps, and at the end; 0 only at the end.", minimum=0)
    keep: int = key(2, "Checkpoints kept.", minimum=1)
    hugging_face: bool = key(
        True,
        "Export Hugging Face directories: hf/ at the end, best/ at the best normal-mode accuracy "
        "since the start.",
    )


@dataclass
class LogConfig:
    """Logs: `log`."""

    console: bool = key(True, "Progress on the terminal.")
    tensorboard: bool = key(False, "Write TensorBoard event files into the run directory.")
    wandb_project: str | None = key(None, "Log to this wandb project; null is off.")
    wandb_mode: str = key("online", "wandb's mode.", choices=("online", "offline"))
    rollouts: bool = key(True, "Dump every rollout as JSONL into the run directory.")
    kl_tokens: str = key(
        "all",
        "Exact KL between the modes (and, with algorithm.old_logprobs=engine, entropies) for: all "
        "responses, one per question and sampling mode, or none. Less of it is less to score.",
        choices=("all", "sample", "none"),
    )


@dataclass
class RunConfig:
    """The run's directory and seed: `run`."""

    dir: str = key(
        MISSING, "Directory of everything the run writes; a run found there is resumed.", path=True
    )
    seed: int = key(
        0, "Seed of data order, sampling and initialisation.", minimum=0, maximum=LARGEST_SEED
    )


@dataclass
class Config:
    """The whole configuration of a run, a field for each group of keys. Made by `load_config`."""

    model: ModelConfig = key(ModelConfig, "The model.")
    parallel: ParallelConfig = key(
        ParallelConfig, "Layout of the actor; the world size is the product."
    )
    data: DataConfig = key(DataConfig, "Training questions.")
    modes: ModesConfig = key(ModesConfig, "The modes' prompts.")
    rollout: RolloutConfig = key(RolloutConfig, "Generation.")
    weight_sync: WeightSyncConfig = key(
        WeightSyncConfig, "New weights for SGLang servers after every batch."
    )
    agreement: AgreementConfig = key(
        AgreementConfig, "Do engine and actor give the same log-probs?"
    )
    reward: RewardConfig = key(RewardConfig, "Grading.")
    algorithm: AlgorithmConfig = key(AlgorithmConfig, "The method and its loss.")
    train: TrainConfig = key(TrainConfig, "Optimisation.")
    eval: EvalConfig = key(EvalConfig, "Evaluation in all modes.")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "Checkpoints.")
    log: LogConfig = key(LogConfig, "Logs.")
    run: RunConfig = key(RunConfig, "The run.")
