"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import enum
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from megatron_policysplit import __version__
from megatron_policysplit.errors import ConfigError, UserError
from megatron_policysplit.launch import BAD_INPUT, STOPPED

app = typer.Typer(
    help="Policy Split reinforcement learning of language models on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Modes(enum.Enum):
    both = "both"
    normal = "normal"
    high_entropy = "high_entropy"


class Precision(enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; see docs/configuration.md.")]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="KEY=VALUE", help="Keys that win over the file.", show_default=False),
]
ModelDir = Annotated[str, typer.Option("--model", metavar="DIR", help="Directory of a Hugging Face model.")]
ModeChoice = Annotated[Modes, typer.Option("--mode", help="Which policy answers.")]
Temperature = Annotated[float, typer.Option(min=1e-6, help="Sampling temperature of both modes.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest response, end-of-sequence token included.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same responses.")]
Prompt = Annotated[Optional[str], typer.Option(help="System prompt of the high-entropy mode instead of ours.")]
PromptFile = Annotated[Optional[str], typer.Option(help="Read the high-entropy prompt from this UTF-8 file.")]
Dtype = Annotated[Precision, typer.Option(help="Precision of the model.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")]
BatchSamples = Annotated[int, typer.Option(min=1, help="Responses generated together.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"policysplit {__version__}")
        raise typer.Exit()


@app.callback()
def policysplit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, or go on with the run in run.dir.

    Starts the local ranks itself where the layout has more than one and neither torchrun nor srun has started them.

    Exit codes: 0 done; 1 failed; 2 bad input, nothing was started; 75 stopped by SIGTERM or SIGINT with its state
    saved, and the same command goes on.
    """
    with _exit_on_signals():
        code = run_training([config, *(overrides or [])])
    raise typer.Exit(code)


def run_training(argv: list[str]) -> int:
    """Checks the input, then trains in this process or in local ranks; returns the exit code."""
    from megatron_policysplit.config_load import load_config, world_size
    from megatron_policysplit.launch import check_world, free_port, launch, rank_environment, started_environment
    from megatron_policysplit.preflight import preflight, prepare_run_dir

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
    from megatron_policysplit import worker

    return worker.main(argv)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end this process with the documented code until ranks, which save first, handle them."""
    before = {number: signal.signal(number, _exit_stopped) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_stopped(number: int, frame) -> None:
    sys.exit(STOPPED)


@app.command()
def generate(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelDir,
    mode: ModeChoice = Modes.both,
    samples: Annotated[int, typer.Option(min=1, help="Responses per mode.")] = 1,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    high_entropy_prompt: Prompt = None,
    high_entropy_prompt_file: PromptFile = None,
    dtype: Dtype = Precision.float32,
    device: Device = "cpu",
) -> None:
    """Ask one question; the two modes answer side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.data import Question
    from megatron_policysplit.offline import Responder
    from megatron_policysplit.rollout.engine import Sampling

    prompts = ModesConfig(high_entropy_prompt=high_entropy_prompt, high_entropy_prompt_file=high_entropy_prompt_file)
    responder = Responder(model, prompts, dtype=dtype.value, device=device)
    asked = Question(0, [{"role": "user", "content": question}], None, {})
    modes = _chosen(mode)
    responses = responder.respond([asked], modes, samples, Sampling(temperature, 1.0, -1, max_tokens), seed)
    table = Table(*(chosen.value for chosen in modes), show_lines=True, expand=True)
    for sample in range(samples):
        row = []
        for chosen in modes:
            response = next(r for r in responses if r.mode is chosen and r.sample == sample)
            surprisal = sum(response.surprisals) / len(response.surprisals)
            cut = ", cut" if response.truncated else ""
            row.append(
                Text(response.text.strip()).append(
                    f"\n[{len(response.surprisals)} tokens{cut}, {surprisal:.2f} nats/token]", style="dim"
                )
            )
        table.add_row(*row)
    Console().print(table)


@app.command("eval")
def evaluate(
    model: ModelDir,
    data: Annotated[str, typer.Option(metavar="PATH", help="A .jsonl or .parquet file, or reasoning_gym:NAME.")],
    reward: Annotated[str, typer.Option(help="math, reasoning_gym, exact or package.module:function.")] = "math",
    samples: Annotated[int, typer.Option(min=1, help="Responses per question and mode.")] = 8,
    questions: Annotated[Optional[int], typer.Option(min=1, help="Only the first so many questions.")] = None,
    mode: ModeChoice = Modes.both,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 1024,
    seed: Seed = 0,
    high_entropy_prompt: Prompt = None,
    high_entropy_prompt_file: PromptFile = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that grade.")] = 2,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="Time limit for grading one response.")] = 10.0,
    batch_samples: BatchSamples = 64,
    dtype: Dtype = Precision.float32,
    device: Device = "cpu",
    output: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the numbers here, too.")] = None,
) -> None:
    """Measure a model in both modes: accuracy, best-of-k, unique right answers, surprisal."""
    from rich.console import Console
    from rich.progress import Progress

    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.data import load_questions
    from megatron_policysplit.offline import Responder, score, scores_table
    from megatron_policysplit.rewards import RewardPool
    from megatron_policysplit.rollout.engine import Sampling

    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: the directory {output.parent} does not exist; create it first")
    chosen = load_questions(data, {})[:questions]
    prompts = ModesConfig(high_entropy_prompt=high_entropy_prompt, high_entropy_prompt_file=high_entropy_prompt_file)
    with RewardPool(reward, workers, timeout_seconds) as pool:
        responder = Responder(model, prompts, dtype=dtype.value, device=device, max_batch_samples=batch_samples)
        sampling, modes = Sampling(temperature, 1.0, -1, max_tokens), _chosen(mode)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("generating", total=len(chosen) * len(modes) * samples)
            responses = responder.respond(chosen, modes, samples, sampling, seed, lambda: progress.advance(task))
        by_id = {question.id: question for question in chosen}
        graded = pool.grade([(response.text, by_id[response.question]) for response in responses])
    scores = score(responses, graded)
    Console().print(scores_table(scores, samples))
    if output is not None:
        settings = {"model": model, "data": data, "reward": reward, "questions": len(chosen), "samples": samples}
        settings |= {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        by_mode = {name: asdict(mode_scores) for name, mode_scores in scores.items()}
        output.write_text(json.dumps(settings | {"modes": by_mode}, indent=2) + "\n")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    output: Annotated[
        Optional[Path], typer.Option(metavar="FILE.html", help="Default: report.html in the (first) run.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run, or about several side by side."""
    from megatron_policysplit.report import write_report

    names = [run.resolve().name for run in runs]
    named = {name if names.count(name) == 1 else str(run): run for name, run in zip(names, runs, strict=True)}
    output = output or runs[0] / "report.html"
    write_report(named, output)
    print(output)


@app.command("config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration and both prompts of the first question."""
    from megatron_policysplit.config_load import check_config, load_config, to_yaml
    from megatron_policysplit.data import load_questions
    from megatron_policysplit.modes import PromptBuilder
    from megatron_policysplit.offline import load_tokenizer

    loaded = load_config(config, overrides or [])
    warnings = check_config(loaded)
    print(to_yaml(loaded), end="")
    first = load_questions(loaded.data.path, loaded.data.options)[0]
    texts = PromptBuilder(load_tokenizer(loaded.model.path), loaded.modes).render(first.messages)
    for mode, text in texts.items():
        print(f"\n--- {mode.value} prompt of the first question ---\n{text}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _chosen(mode: Modes) -> list:
    from megatron_policysplit.rows import MODES, Mode

    return list(MODES) if mode is Modes.both else [Mode(mode.value)]


def main() -> None:
    """Entry point of `policysplit`: a UserError is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
