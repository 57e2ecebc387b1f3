"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import enum
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_policysplit import __version__
from megatron_policysplit.cli import convert
from megatron_policysplit.cli.app import Command, run_app
from megatron_policysplit.errors import STOPPED, ConfigError

if TYPE_CHECKING:
    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.rows import Mode

app = typer.Typer(
    help="Policy Split reinforcement learning of language models on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(
    convert.app,
    name="convert",
    short_help="Hugging Face to Megatron-Core and back; verify, inspect.",
)


class Modes(enum.Enum):
    both = "both"
    normal = "normal"
    high_entropy = "high_entropy"


class Precision(enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _keeps_a_token(value: int) -> int:
    if value == 0:
        raise typer.BadParameter("0 keeps no token; use -1 to keep all, or at least 1")
    return value


ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file; see docs/configuration.md.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys that win over the file.", show_default=False),
]
ModelDir = Annotated[
    str, typer.Option("--model", metavar="DIR", help="Directory of a Hugging Face model.")
]
ModeChoice = Annotated[
    Modes,
    typer.Option(
        "--mode", help="Which policy answers; both: those of modes.others in --config too."
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="X", min=1e-6, callback=_finite, help="Sampling temperature of all modes."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="X", min=1e-6, max=1.0, callback=_finite, help="Nucleus mass of all modes."
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=-1,
        callback=_keeps_a_token,
        help="Keep the N most likely tokens only; -1 keeps all.",
    ),
]
MaxTokens = Annotated[
    int, typer.Option(metavar="N", min=1, help="Longest response, end-of-sequence token included.")
]
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, help="The same seed gives the same responses.")
]
RunConfig = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Prompts of all modes as in this YAML file, such as config.yaml of a run; only its modes.* are used. "
        "A chat template that writes the date gets today's, not the run's.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="System prompt of the high-entropy mode instead of ours."),
]
PromptFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Read the high-entropy prompt from this UTF-8 file."),
]
Dtype = Annotated[Precision, typer.Option(help="Precision of the model.")]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where the model runs: cpu, cuda, cuda:1 ...")
]
JudgeKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        metavar="KEY=VALUE",
        help="Have a model score responses: a key of eval.judge in docs/configuration.md, such as "
        "url=http://host:port/v1 and model=NAME; once for each key.",
    ),
]
BatchSamples = Annotated[
    int, typer.Option(metavar="N", min=1, help="Responses generated together.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"policysplit {__version__}")
        raise typer.Exit()


@app.callback()
def policysplit(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, or go on with the run in run.dir.

    Starts the local ranks itself where the layout has more than one and neither torchrun nor srun
    has started them.

    Exit codes: 0 done; 1 failed; 2 bad input, nothing was started; 75 stopped by SIGTERM or SIGINT
    with its state saved, and the same command goes on.
    """
    with _exit_on_signals():
        code = run_training([config, *(overrides or [])])
    raise typer.Exit(code)


@app.command(cls=Command)
def serve(config: ConfigPath, overrides: Overrides = None) -> None:
    """Start SGLang servers here, for runs on other nodes.

    Such a run names them in rollout.addresses.

    Prints the address of each once it has generated a token, watches them, and ends them all on
    SIGTERM or SIGINT.
    """
    from megatron_policysplit.config.checks import check_config
    from megatron_policysplit.config.load import load_config

    with _exit_on_signals():
        loaded = load_config(config, overrides or [])
        check_config(loaded)
        from megatron_policysplit.serving.serve import serve as run_servers

        code = run_servers(loaded)
    raise typer.Exit(code)


def run_training(argv: list[str]) -> int:
    """Checks the input, then trains in this process or in local ranks; returns the exit code."""
    from megatron_policysplit.config.load import load_config, world_size
    from megatron_policysplit.distributed.launch import (
        check_world,
        free_port,
        launch,
        rank_environment,
        started_environment,
    )
    from megatron_policysplit.training.preflight import preflight, prepare_run_dir

    started = started_environment(os.environ)
    os.environ.update(started or {})
    config = load_config(argv[0], argv[1:])
    if started:
        check_world(config, started)
    found = preflight(config)
    if os.environ.get("RANK", "0") == "0":
        for line in found.lines(config):
            print(line, flush=True)
        prepare_run_dir(config)
    if not started and world_size(config) > 1:
        return launch(argv, world_size(config))
    os.environ.update(started or rank_environment(0, 1, free_port()))
    from megatron_policysplit.training import worker

    code = worker.main(argv)
    if started:
        worker.leave(code)
    return code


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end this process with the documented code until ranks, which save first,
    handle them.
    """
    before = {
        number: signal.signal(number, _exit_stopped) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_stopped(number: int, frame) -> None:
    sys.exit(STOPPED)


@app.command(cls=Command)
def generate(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    model: ModelDir,
    mode: ModeChoice = Modes.both,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Responses per mode.")] = 1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    config: RunConfig = None,
    high_entropy_prompt: Prompt = None,
    high_entropy_prompt_file: PromptFile = None,
    dtype: Dtype = Precision.float32,
    device: Device = "cpu",
) -> None:
    """Ask one question; the modes answer side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from megatron_policysplit.config.modes import mode_label
    from megatron_policysplit.data.questions import Question
    from megatron_policysplit.evaluation.responder import Responder, prompts_asked_for
    from megatron_policysplit.evaluation.scores import variety_lines
    from megatron_policysplit.rollout.engine import Sampling

    prompts = prompts_asked_for(config, high_entropy_prompt, high_entropy_prompt_file)
    responder = Responder(model, prompts, dtype=dtype.value, device=device)
    asked = Question(0, [{"role": "user", "content": question}], None, {})
    modes = _chosen(mode, prompts)
    responses = responder.respond(
        [asked], modes, samples, Sampling(temperature, top_p, top_k, max_tokens), seed
    )
    table = Table(*(mode_label(chosen.value) for chosen in modes), show_lines=True, expand=True)
    for sample in range(samples):
        row = []
        for chosen in modes:
            response = next(r for r in responses if r.mode == chosen and r.sample == sample)
            count = len(response.tokens)
            length = (
                f"{count} token{'' if count == 1 else 's'}{', cut' if response.truncated else ''}"
            )
            surprisal = sum(response.surprisals) / count
            row.append(
                Text(response.text.strip()).append(
                    f"\n[{length}, {surprisal:.2f} nats/token]", style="dim"
                )
            )
        table.add_row(*row)
    Console().print(table)
    for line in variety_lines(responses):
        print(line)


@app.command("eval", cls=Command, short_help="Measure a model's accuracy and variety in its modes.")
def evaluate(
    model: ModelDir,
    data: Annotated[
        str, typer.Option(metavar="PATH", help="A .jsonl or .parquet file, or reasoning_gym:NAME.")
    ],
    reward: Annotated[
        str,
        typer.Option(metavar="NAME", help="math, reasoning_gym, exact or package.module:function."),
    ] = "math",
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Responses per question and mode.")
    ] = 8,
    questions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N questions.")
    ] = None,
    mode: ModeChoice = Modes.both,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    max_tokens: MaxTokens = 1024,
    seed: Seed = 0,
    config: RunConfig = None,
    high_entropy_prompt: Prompt = None,
    high_entropy_prompt_file: PromptFile = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that grade.")] = 2,
    timeout_seconds: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.1, callback=_finite, help="Time limit for grading one response."
        ),
    ] = 10.0,
    batch_samples: BatchSamples = 64,
    judge: JudgeKeys = None,
    dtype: Dtype = Precision.float32,
    device: Device = "cpu",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the numbers here, too.")
    ] = None,
) -> None:
    """Measure a model in its modes: accuracy, pass@k, unique right answers, variety of the texts,
    surprisal.
    """
    from rich.console import Console
    from rich.progress import Progress

    from megatron_policysplit.data.questions import load_questions
    from megatron_policysplit.evaluation.responder import Responder, prompts_asked_for
    from megatron_policysplit.evaluation.scores import scores_by_mode, scores_table
    from megatron_policysplit.evaluation.verdicts import OfflineJudge
    from megatron_policysplit.rewards import RewardPool
    from megatron_policysplit.rollout.engine import Sampling

    if output is not None:
        _check_output(output)
    prompts = prompts_asked_for(config, high_entropy_prompt, high_entropy_prompt_file)
    chosen = load_questions(data, {})[:questions]
    judging = OfflineJudge(judge) if judge else None
    with RewardPool(reward, workers, timeout_seconds) as pool:
        responder = Responder(
            model, prompts, dtype=dtype.value, device=device, max_batch_samples=batch_samples
        )
        sampling, modes = Sampling(temperature, top_p, top_k, max_tokens), _chosen(mode, prompts)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("generating", total=len(chosen) * len(modes) * samples)
            responses = responder.respond(
                chosen, modes, samples, sampling, seed, lambda: progress.advance(task)
            )
        by_id = {question.id: question for question in chosen}
        graded = pool.grade([(response.text, by_id[response.question]) for response in responses])
    scores = scores_by_mode(responses, graded)
    if judging is not None:
        scores = judging.judge(scores, responses, chosen)
    Console().print(scores_table(scores, samples))
    if output is not None:
        settings = {
            "model": model,
            "data": data,
            "reward": reward,
            "questions": len(chosen),
            "samples": samples,
        }
        settings |= asdict(sampling) | {"seed": seed, "prompts": asdict(prompts)}
        settings |= {} if judging is None else {"judge": asdict(judging.settings)}
        by_mode = {name: asdict(mode_scores) for name, mode_scores in scores.items()}
        output.write_text(json.dumps(settings | {"modes": by_mode}, indent=2) + "\n")


@app.command(cls=Command, short_help="Write one HTML page about one run or several.")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Default: report.html in the (first) run."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run, or about several side by side."""
    from megatron_policysplit.reports.run_report import write_report

    names = [run.resolve().name for run in runs]
    named = {
        name if names.count(name) == 1 else str(run): run
        for name, run in zip(names, runs, strict=True)
    }
    target = output or runs[0] / "report.html"
    if (
        output is not None or runs[0].is_dir()
    ):  # else it is the run that is missing, and write_report says so
        _check_output(target)
    write_report(named, target)
    print(target)


@app.command(
    cls=Command, short_help="Train several methods over several seeds, and report on them together."
)
def study(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="YAML file; see docs/study.md.")],
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Start nothing; report on what there is.")
    ] = False,
) -> None:
    """Train every method with every seed, what is finished never again, and write one report of
    all.

    Exit codes: as of `train`; 1 where a run failed, the others having gone on.
    """
    from megatron_policysplit.study.config import load_study

    loaded, code = load_study(study), 0
    if not report_only:
        from megatron_policysplit.study.runner import run_study

        code = run_study(loaded, say=partial(print, flush=True))
    from megatron_policysplit.study.report import write_study_report

    for path in write_study_report(loaded):
        print(path)
    raise typer.Exit(code)


@app.command("config", cls=Command, short_help="Print the resolved configuration and all prompts.")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration and every mode's prompt of the first question."""
    from megatron_policysplit.config.checks import check_config
    from megatron_policysplit.config.load import load_config, to_yaml
    from megatron_policysplit.data.prompts import PromptBuilder
    from megatron_policysplit.data.questions import load_questions
    from megatron_policysplit.data.tokenizer import load_tokenizer

    loaded = load_config(config, overrides or [])
    warnings = check_config(loaded)
    print(to_yaml(loaded), end="")
    first = load_questions(loaded.data.path, loaded.data.options)[0]
    texts = PromptBuilder(load_tokenizer(loaded.model.path), loaded.modes).render(first.messages)
    for mode, text in texts.items():
        print(f"\n--- {mode.value} prompt of the first question ---\n{text}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _chosen(mode: Modes, prompts: ModesConfig) -> list[Mode]:
    from megatron_policysplit.config.modes import modes_of
    from megatron_policysplit.rows import Mode

    return list(modes_of(prompts)) if mode is Modes.both else [Mode(mode.value)]


def _check_output(output: Path) -> None:
    """Before the work whose result goes there. Raises ConfigError."""
    directory = output.absolute().parent
    if not directory.is_dir():
        raise ConfigError(
            f"--output {output}: the directory {output.parent} does not exist; create it first"
        )
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory; give the name of a file")
    if not os.access(output if output.exists() else directory, os.W_OK):
        raise ConfigError(f"--output {output} cannot be written: no permission; give another file")


def main() -> None:
    """Entry point of `policysplit`."""
    run_app(app)


if __name__ == "__main__":
    main()
