"""Every configuration key, with its default, its meaning and its allowed values.

The dataclasses below are the single source: the YAML loader (`config_load.py`), the command line's
`key=value` overrides and `docs/configuration.md` are all derived from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING = "???"  # OmegaConf's marker for a value the user must give


def key(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    minimum: float | None = None,
    above: float | None = None,
):
    """A configuration field: its default, one sentence of documentation and its allowed values."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "above": above}
    if isinstance(default, (type, dict, list)):
        factory = default if isinstance(default, type) else default.copy
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = key(
        MISSING, "Directory of a Hugging Face model (config.json, safetensors, tokenizer)."
    )
    megatron: str | None = key(
        None,
        "torch_dist checkpoint of the same architecture whose weights the actor starts from: a "
        "converted one, or checkpoints/step_NNNNNN of another run. null takes those of model.path.",
    )
    dtype: str = key(
        "bfloat16", "Precision of parameters and activations.", choices=("float32", "bfloat16")
    )


@dataclass
class ParallelConfig:
    tensor: int = key(1, "Tensor-parallel size.", minimum=1)
    pipeline: int = key(1, "Pipeline-parallel size.", minimum=1)
    data: int = key(1, "Data-parallel size: number of model replicas.", minimum=1)
    expert: int = key(
        1,
        "Expert-parallel size of a mixture of experts: so many replicas in a row share its "
        "experts.",
        minimum=1,
    )
    sequence: bool = key(
        False,
        "Sequence parallelism: between tensor-parallel layers, each rank holds its part of the "
        "tokens.",
    )


@dataclass
class DataConfig:
    path: str = key(
        MISSING, "Training questions: a .jsonl or .parquet file, or `reasoning_gym:NAME`."
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
    high_entropy_prompt: str | None = key(
        None, "System prompt of the high-entropy mode; null uses our own default."
    )
    high_entropy_prompt_file: str | None = key(
        None, "Read the high-entropy prompt from this UTF-8 file instead."
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
    )


@dataclass
class SamplingConfig:
    temperature: float = key(
        1.0, "Sampling temperature; log-probs of this mode are taken at it.", above=0.0
    )
    top_p: float = key(
        1.0, "Nucleus mass; below 1 the log-probs are no longer those of the sampling.", above=0.0
    )
    top_k: int = key(-1, "Keep only the k most likely tokens; -1 keeps all.", minimum=-1)
    share: int = key(
        1,
        "Share of this mode in a question's samples, by proportion to the other modes'.",
        minimum=0,
    )


@dataclass
class OtherModeConfig(SamplingConfig):
    """An entry of `modes.others`."""

    prompt: str | None = key(None, "System prompt of the mode.")
    prompt_file: str | None = key(None, "Read the prompt from this UTF-8 file instead.")


@dataclass
class ServerConfig:
    python: str | None = key(
        None, "Interpreter of the environment that has SGLang; null is the run's own."
    )
    count: int | None = key(
        None,
        "SGLang servers to start, several behind sglang-router; null: one, or what fits if "
        "colocated.",
        minimum=1,
    )
    tensor: int = key(1, "Tensor-parallel size of one server.", minimum=1)
    dtype: str | None = key(
        None,
        "Precision of the served weights; null is model.dtype.",
        choices=("float32", "bfloat16"),
    )
    host: str = key(
        "127.0.0.1",
        "Address the servers listen on; anything but loopback needs rollout.api_key_variable.",
    )
    port: int = key(
        0,
        "Port of the first server; the others and the router follow it. 0 takes free ports.",
        minimum=0,
    )
    devices: list[int] = key(
        list, "GPUs of the servers, in order; empty: the actor's if colocated, else the next."
    )
    arguments: dict[str, Any] = key(
        dict,
        "Further flags of sglang.launch_server, such as {mem-fraction-static: 0.6}; true is a flag "
        "alone.",
    )
    environment: dict[str, Any] = key(dict, "Environment variables of the servers.")
    start_seconds: float = key(900.0, "Time a server has to answer its first request.", above=0.0)
    health_seconds: float = key(
        120.0, "A server that makes no token for so long while asked for one hangs.", above=0.0
    )
    restarts: int = key(
        3, "How often one server is started again in a run before the run ends.", minimum=0
    )


@dataclass
class RolloutConfig:
    engine: str = key(
        "local",
        "Where responses come from: transformers in process, SGLang servers, or a dump of an "
        "earlier run.",
        choices=("local", "sglang", "replay"),
    )
    samples_per_question: int = key(
        8,
        "Responses per question over all sampling modes (Policy Split takes them by the modes' "
        "shares).",
        minimum=2,
    )
    max_response_tokens: int = key(
        1024, "Longest response, end-of-sequence token included.", minimum=1
    )
    normal: SamplingConfig = key(SamplingConfig, "Sampling of the normal mode.")
    high_entropy: SamplingConfig = key(SamplingConfig, "Sampling of the high-entropy mode.")
    lot_questions: int = key(
        16, "Questions a replica's leader takes from the queue at a time.", minimum=1
    )
    max_batch_samples: int = key(256, "Samples the local engine generates together.", minimum=1)
    replay_dir: str | None = key(
        None, "Directory of rollout dumps (`rollouts/` of a run) for engine=replay."
    )
    addresses: list[str] = key(
        list,
        "SGLang servers that run already, such as http://node1:30000; empty: the run starts "
        "rollout.server.count.",
    )
    api_key_variable: str | None = key(
        None, "Environment variable that holds the API key of the SGLang servers."
    )
    concurrency: int = key(
        64,
        "Requests in flight per leader; one holds all samples of a question in a mode.",
        minimum=1,
    )
    request_seconds: float = key(
        1800.0, "Time limit of one request; past it, it is sent again.", above=0.0
    )
    retries: int = key(
        4, "How often a request is sent again after a time limit or a damaged answer.", minimum=0
    )
    unavailable_seconds: float = key(
        1200.0,
        "How long requests wait for a server that is down or starting before the run ends.",
        above=0.0,
    )
    colocated: bool = key(
        False, "Servers on the actor's own GPUs: each side frees its memory while the other works."
    )
    overlap: bool = key(
        False, "Generate the next batch while this one is trained (one step off-policy)."
    )
    max_staleness: int = key(
        1,
        "With overlap: optimizer batches a sample's weights may be behind; older samples end the "
        "run.",
        minimum=1,
    )
    server: ServerConfig = key(ServerConfig, "Servers that the run starts itself.")


@dataclass
class WeightSyncConfig:
    transport: str = key(
        "tensor",
        "How weights reach SGLang: shared memory on one machine, a broadcast between nodes, or "
        "files that both see.",
        choices=("tensor", "distributed", "disk"),
    )
    bucket_mib: int = key(
        512, "Weights sent with one request; a larger tensor goes alone.", minimum=1
    )
    timeout_seconds: float = key(
        300.0, "Time limit of one request or broadcast of a weight sync.", above=0.0
    )
    directory: str | None = key(
        None, "Where transport=disk writes snapshots; null is weights/ in run.dir."
    )
    master_address: str | None = key(
        None,
        "Address of the sending nodes for transport=distributed; null: each one's own, loopback "
        "where all is.",
    )


@dataclass
class AgreementConfig:
    every: int = key(
        10,
        "Compare engine and actor log-probs after the first sync and every so many steps; 0 is "
        "off.",
        minimum=0,
    )
    max_difference: float | None = key(
        None,
        "Bound of the mean |difference| in nats; null follows the precisions (docs/sglang.md).",
        above=0.0,
    )
    max_k3: float | None = key(
        None,
        "Bound of the mean k3 KL in nats; null follows the precisions (docs/sglang.md).",
        above=0.0,
    )
    breaches: int = key(
        2, "Stop after so many comparisons in a row past a bound; the earlier ones warn.", minimum=1
    )


@dataclass
class RewardConfig:
    function: str = key(
        "math", "`math`, `reasoning_gym`, `exact`, or the path `package.module:function`."
    )
    workers: int = key(2, "Processes that grade responses.", minimum=1)
    timeout_seconds: float = key(
        10.0, "Time limit for one response; past it the reward is 0.", above=0.0
    )


METHOD_NAMES = tuple(
    sorted(
        file.stem
        for file in (Path(__file__).parents[1] / "algorithms" / "methods").glob("[a-z]*.py")
    )
)


@dataclass
class AlgorithmConfig:
    name: str = key("policy_split", "The method (docs/methods.md).", choices=METHOD_NAMES)
    options: dict[str, Any] = key(
        dict,
        "Each method's own keys, `METHOD: {KEY: VALUE}` (docs/methods.md); left out, the defaults "
        "of its paper.",
    )
    statistics: str = key(
        "batch",
        "What a method's statistics are of: the weights before the batch, or before each optimizer "
        "step, for which every one but the first costs a pass of its own.",
        choices=("batch", "step"),
    )
    scope: str = key(
        "global",
        "Which tokens a method's quantiles, covariances and means are over: all that are trained, "
        "or those of a micro-batch, as in some authors' code.",
        choices=("global", "micro"),
    )
    clip_low: float | None = key(
        None,
        "PPO clip: the ratio counts down to 1 - clip_low; null: the method's, or 0.2.",
        above=0.0,
    )
    clip_high: float | None = key(
        None,
        "PPO clip: the ratio counts up to 1 + clip_high; null: the method's, or 0.2.",
        above=0.0,
    )
    dual_clip: float | None = key(
        None,
        "Bound of a negative advantage's loss, times |A|; null: the method's, or none.",
        above=1.0,
    )
    loss_aggregation: str | None = key(
        None,
        "How token losses become one number; null: the method's, or token_mean.",
        choices=("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"),
    )
    kl_coef: float = key(
        0.0, "Weight of the k3 KL to the initial policy; 0 keeps no reference weights.", minimum=0.0
    )
    entropy_coef: float = key(
        0.0, "Weight of a differentiable entropy bonus; 0 is off.", minimum=0.0
    )
    old_logprobs: str = key(
        "actor",
        "Denominator of the ratio where a response was sampled behind the row's own prompt: the "
        "actor's log-probs, or those that the engine returned; then such rows are scored for the "
        "logs alone (log.kl_tokens).",
        choices=("actor", "engine"),
    )
    importance_cap: float | None = key(
        None,
        "Truncation of the actor/engine importance weights; null takes no such weights.",
        above=0.0,
    )
    importance_level: str = key(
        "token",
        "Importance weights per token, or their product per response.",
        choices=("token", "sequence"),
    )


@dataclass
class TrainConfig:
    steps: int = key(100, "Rollout batches to train on.", minimum=1)
    optimizer_steps_per_batch: int = key(
        1, "Optimizer steps a rollout batch is split into.", minimum=1
    )
    max_tokens_per_micro_batch: int = key(
        8192, "Bound of a micro-batch, padding included.", minimum=1
    )
    head_chunk_tokens: int | None = key(
        None, "Tokens whose logits exist at a time; null takes 256, on a GPU 1024.", minimum=1
    )
    learning_rate: float = key(1e-6, "Peak learning rate of AdamW.", minimum=0.0)
    min_learning_rate: float = key(0.0, "Learning rate at the end of a decay.", minimum=0.0)
    lr_decay: str = key(
        "constant",
        "Learning-rate schedule after warm-up.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = key(0, "Optimizer steps of linear warm-up.", minimum=0)
    weight_decay: float = key(0.01, "AdamW weight decay.", minimum=0.0)
    adam_beta1: float = key(0.9, "AdamW beta1.", minimum=0.0)
    adam_beta2: float = key(0.999, "AdamW beta2.", minimum=0.0)
    adam_eps: float = key(1e-8, "AdamW epsilon.", above=0.0)
    clip_grad: float = key(1.0, "Bound of the global gradient norm; 0 is off.", minimum=0.0)
    distributed_optimizer: bool = key(False, "Shard optimizer state over data-parallel replicas.")
    overlong: str = key(
        "grade",
        "A response cut at max_response_tokens: grade it as it is, or mask it out of the loss.",
        choices=("grade", "mask"),
    )
    max_bad_steps: int = key(
        3, "Stop after so many batches in a row with a loss or gradient not finite.", minimum=1
    )


@dataclass
class JudgeConfig:
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
    prompt_file: str | None = key(None, "Read that prompt from this UTF-8 file instead.")
    questions: int = key(
        16, "Judge responses to the first so many evaluation questions.", minimum=1
    )
    samples: int = key(2, "Responses judged per question and mode, the first ones.", minimum=1)
    concurrency: int = key(8, "Requests in flight at once.", minimum=1)
    timeout_seconds: float = key(120.0, "Time limit of one request.", above=0.0)
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
class EvalConfig:
    path: str | None = key(None, "Evaluation questions, as data.path; null turns evaluation off.")
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
    )
    variety: bool = key(
        False, "Measure how varied the responses' texts are, too: distinct n-grams, self-BLEU."
    )
    judge: JudgeConfig = key(JudgeConfig, "A model that scores responses.")


@dataclass
class CheckpointConfig:
    every: int = key(0, "Save every so many steps, and at the end; 0 only at the end.", minimum=0)
    keep: int = key(2, "Checkpoints kept.", minimum=1)
    hugging_face: bool = key(
        True,
        "Export Hugging Face directories: hf/ at the end, best/ at the best normal-mode accuracy "
        "since the start.",
    )


@dataclass
class LogConfig:
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
    dir: str = key(MISSING, "Directory of everything the run writes; a run found there is resumed.")
    seed: int = key(0, "Seed of data order, sampling and initialisation.", minimum=0)


@dataclass
class Config:
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
