"""What can be known of a run's prompts without starting it; `policysplit config` prints it.

A run itself builds the prompts of all questions on its leaders (`training/questions.py`), with the
same checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoints_conv import read_hf_config
from megatron_policysplit.config import Config, DataConfig, ModesConfig
from megatron_policysplit.data.prompts import PromptBuilder, Prompts, read_eval_prompts
from megatron_policysplit.data.questions import Question, drop_overlong, load_questions
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import Mode

CHECKED = 1000  # questions of a data set


@dataclass(frozen=True)
class PromptCheck:
    """The prompts of a run that may start. Made by `check_prompts`."""

    first: Mapping[Mode, str]  # of the first question, by mode
    checked: int  # training questions whose prompts were built
    questions: int  # all training questions
    dropped: int  # of those checked, for their length

    def line(self, data: DataConfig) -> str:
        """How many questions were checked, and what becomes of them."""
        is_part = self.checked < self.questions
        of = f"of the first {self.checked:,} questions, " if is_part else ""
        return (
            f"prompts  {of}{self.checked - self.dropped:,} fit "
            f"data.max_prompt_tokens={data.max_prompt_tokens}, {self.dropped:,} do not"
        )


def check_prompts(config: Config) -> PromptCheck:
    """Build the prompts of the first questions for training and evaluation, in every mode.

    Raises a UserError for a chat template or a question that cannot be used, and where too few
    questions are short enough.
    """
    tokenizer, data = load_tokenizer(config.model.path), config.data
    builder = prompt_builder(config, config.modes, tokenizer, None)
    questions = load_questions(data.path, data.options)
    prompts = builder.build_all(questions[:CHECKED], source=data.path)
    fitting = fitting_questions(questions[:CHECKED], prompts, data)
    checked = min(CHECKED, len(questions))
    if checked == len(questions):
        check_batch(data, len(fitting))
    if config.eval.path is not None:
        evaluated = load_questions(config.eval.path, config.eval.options)[:CHECKED]
        eval_prompts = builder.build_all(evaluated, source=config.eval.path)
        evaluated = fitting_questions(evaluated, eval_prompts, data)
        build_other_prompts(config, evaluated[: config.eval.questions], tokenizer, builder.date)
    return PromptCheck(
        builder.render(questions[0].messages, questions[0].tools),
        checked,
        len(questions),
        checked - len(fitting),
    )


def prompt_builder(
    config: Config, modes: ModesConfig, tokenizer: Any, date: str | None
) -> PromptBuilder:
    """What builds a run's prompts. date: see `PromptBuilder`."""
    vocab_size = read_hf_config(config.model.path)["vocab_size"]
    return PromptBuilder(tokenizer, modes, date, vocab_size=vocab_size)


def fitting_questions(
    questions: Sequence[Question], prompts: Prompts, data: DataConfig
) -> list[Question]:
    """The questions whose longest prompt fits data.max_prompt_tokens; DataError if none does."""
    lengths = {id: {mode: len(ids) for mode, ids in modes.items()} for id, modes in prompts.items()}
    return drop_overlong(questions, lengths, data.max_prompt_tokens)[0]


def check_batch(data: DataConfig, fitting: int) -> None:
    """Raise ConfigError if fewer questions fit than a batch has."""
    if fitting < data.batch_questions:
        raise ConfigError(
            f"data.batch_questions={data.batch_questions} is more than the {fitting} questions of "
            f"{data.path} that fit data.max_prompt_tokens={data.max_prompt_tokens}; lower the one "
            "or raise the other"
        )


def build_other_prompts(
    config: Config, questions: Sequence[Question], tokenizer: Any, date: str
) -> dict[str, Prompts]:
    """The questions' prompts under each of eval.prompts, by name, as those of the normal mode.

    Raises ConfigError for one that is longer than data.max_prompt_tokens.
    """
    result: dict[str, Prompts] = {}
    for name, text in read_eval_prompts(config.eval.prompts, config.modes).items():
        # A prompt of this kind stands where the high-entropy one would.
        modes = replace(
            config.modes, high_entropy_prompt=text, high_entropy_prompt_file=None, others={}
        )
        builder = prompt_builder(config, modes, tokenizer, date)
        result[name] = {}
        for id, prompts in builder.build_all(questions, source=config.eval.path).items():
            ids = prompts[Mode.HIGH_ENTROPY]
            if len(ids) > config.data.max_prompt_tokens:
                raise ConfigError(
                    f"eval.prompts.{name} makes a prompt of {len(ids)} tokens, more than "
                    f"data.max_prompt_tokens={config.data.max_prompt_tokens}; shorten it or raise "
                    "that"
                )
            result[name][id] = {Mode.NORMAL: ids}
    return result
