"""The commands that run a model without training it: `generate` and `eval`.

`main.py` registers both, so that `policysplit --help` lists them where they belong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_policysplit.cli.app import expand_option
from megatron_policysplit.cli.options import (
    BatchSamples,
    Device,
    Dtype,
    JudgeKeys,
    MaxTokens,
    ModeChoice,
    ModelDir,
    Modes,
    Precision,
    Prompt,
    PromptFile,
    RunConfig,
    Seed,
    Temperature,
    TopK,
    TopP,
    check_output,
    finite,
)
from megatron_policysplit.config.keys import LARGEST_INTEGER, LARGEST_SECONDS
from megatron_policysplit.errors import FAILED

if TYPE_CHECKING:
    from rich.text import Text

    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.evaluation.responder import Response
    from megatron_policysplit.rows import Mode


def generate(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    model: ModelDir,
    mode: ModeChoice = Modes.both,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, max=LARGEST_INTEGER, help="Responses per mode.")
    ] = 1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    max_tokens: MaxTokens = None,
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

    from megatron_policysplit.config.modes import mode_label
    from megatron_policysplit.data.questions import Question
    from megatron_policysplit.data.text import check_text
    from megatron_policysplit.errors import ConfigError
    from megatron_policysplit.evaluation.responder import Responder, prompts_asked_for
    from megatron_policysplit.evaluation.scores import variety_lines
    from megatron_policysplit.rollout.engine import Sampling

    check_text(question, "QUESTION", ConfigError)
    if not question.strip():
        raise ConfigError("QUESTION is empty; ask something")
    prompts = prompts_asked_for(config, high_entropy_prompt, high_entropy_prompt_file)
    responder = Responder(model, prompts, dtype=dtype.value, device=device)
    dataset = [Question(0, [{"role": "user", "content": question}], None, {})]
    modes = _modes(mode, prompts)
    longest = max_tokens or responder.max_tokens(dataset, modes, 512)
    sampling = Sampling(temperature, top_p, top_k, longest)
    responses = responder.respond(dataset, modes, samples, sampling, seed)
    by_mode_and_sample = {(response.mode, response.sample): response for response in responses}
    table = Table(*(mode_label(mode.value) for mode in modes), show_lines=True, expand=True)
    for sample in range(samples):
        table.add_row(*(_cell(by_mode_and_sample[mode, sample]) for mode in modes))
    Console().print(table)
    for line in variety_lines(responses):
        print(line)


def evaluate(
    model: ModelDir,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            callback=expand_option,
            help="A .jsonl or .parquet file, or reasoning_gym:NAME.",
        ),
    ],
    reward: Annotated[
        str,
        typer.Option(metavar="NAME", help="math, reasoning_gym, exact or package.module:function."),
    ] = "math",
    samples: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=LARGEST_INTEGER, help="Responses per question and mode."
        ),
    ] = 8,
    questions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=LARGEST_INTEGER, help="Only the first N questions."),
    ] = None,
    mode: ModeChoice = Modes.both,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = -1,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    config: RunConfig = None,
    high_entropy_prompt: Prompt = None,
    high_entropy_prompt_file: PromptFile = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, max=1024, help="Processes that grade.")
    ] = 2,
    timeout_seconds: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0.1,
            max=LARGEST_SECONDS,
            callback=finite,
            help="Time limit for grading one response.",
        ),
    ] = 10.0,
    batch_samples: BatchSamples = 64,
    judge: JudgeKeys = None,
    dtype: Dtype = Precision.float32,
    device: Device = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", callback=expand_option, help="Write the numbers here, too."
        ),
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
    from megatron_policysplit.files import replace_text
    from megatron_policysplit.rewards import RewardPool, all_failed
    from megatron_policysplit.rewards.trial import check_questions
    from megatron_policysplit.rollout.engine import Sampling

    prompts = prompts_asked_for(config, high_entropy_prompt, high_entropy_prompt_file)
    if output is not None:
        inputs = [data, *([config] if config is not None else []), *_prompt_files(prompts)]
        check_output(output, inputs, _is_result)
    dataset = load_questions(data, {})[:questions]
    check_questions(reward, f"--data {data}", dataset)
    # Tried out before the model is loaded: a judge that cannot be used ends the command at once.
    offline_judge = OfflineJudge(judge) if judge else None
    with RewardPool(reward, workers, timeout_seconds) as pool:
        responder = Responder(
            model, prompts, dtype=dtype.value, device=device, max_batch_samples=batch_samples
        )
        modes = _modes(mode, prompts)
        longest = max_tokens or responder.max_tokens(dataset, modes, 1024)
        sampling = Sampling(temperature, top_p, top_k, longest)
        # The progress bar goes to stderr, so that stdout holds the table alone.
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("generating", total=len(dataset) * len(modes) * samples)
            responses = responder.respond(
                dataset, modes, samples, sampling, seed, lambda: progress.advance(task)
            )
        by_id = {question.id: question for question in dataset}
        graded = pool.grade([(response.text, by_id[response.question]) for response in responses])
    scores = scores_by_mode(responses, graded)
    if offline_judge is not None:
        scores = offline_judge.judge(scores, responses, dataset)
    # Before anything is printed: the terminal may be gone by now.
    if output is not None:
        settings = {
            "model": model,
            "data": data,
            "reward": reward,
            "questions": len(dataset),
            "samples": samples,
        }
        settings |= asdict(sampling) | {"seed": seed, "prompts": asdict(prompts)}
        settings |= {} if offline_judge is None else {"judge": asdict(offline_judge.settings)}
        by_mode = {name: asdict(mode_scores) for name, mode_scores in scores.items()}
        replace_text(output, json.dumps(settings | {"modes": by_mode}, indent=2) + "\n")
    Console().print(scores_table(scores, samples))
    failure = all_failed([grade.error for grade in graded])
    if failure is not None:
        print(f"error: --reward {reward} failed on {failure}", file=sys.stderr)
        raise typer.Exit(FAILED)


def _is_result(file: Path) -> bool:
    """Whether a file is what `eval --output` writes."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"model", "data", "reward", "modes"} <= content.keys()


def _prompt_files(prompts: ModesConfig) -> list[str]:
    """The files that the prompts are read from."""
    others = [e.get("prompt_file") for e in prompts.others.values() if isinstance(e, dict)]
    return [path for path in (prompts.high_entropy_prompt_file, *others) if path is not None]


def _modes(mode: Modes, prompts: ModesConfig) -> list[Mode]:
    """The modes that --mode asks for; `both` means every mode that has a prompt."""
    from megatron_policysplit.config.modes import modes_of
    from megatron_policysplit.rows import Mode

    return list(modes_of(prompts)) if mode is Modes.both else [Mode(mode.value)]


def _cell(response: Response) -> Text:
    """A response's text with its length in tokens and its mean surprisal below."""
    from rich.text import Text

    count = len(response.tokens)
    length = f"{count} token{'' if count == 1 else 's'}{', cut' if response.truncated else ''}"
    figures = f"\n[{length}, {sum(response.surprisals) / count:.2f} nats/token]"
    return Text(response.text.strip()).append(figures, style="dim")
