"""Largest inputs of a model's matrices on a run's questions, for FP8's fixed activation scales."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conv.progress import Progress, silent
from checkpoints_conv.quantize import check_modelopt, import_modelopt
from checkpoints_conv.quantized import weight_groups
from checkpoints_conv.reader import read_hf_config
from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.model_layout import model_positions
from megatron_policysplit.data.questions import Question, load_questions
from megatron_policysplit.errors import DataError, ModelError, cannot_load

if TYPE_CHECKING:
    import torch

QUESTIONS = 256
_EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)$")


def input_maxima(
    hf: str | Path,
    calibration: str | Path,
    modes: ModesConfig,
    *,
    questions: int = QUESTIONS,
    progress: Progress = silent,
) -> dict[str, float]:
    """Measure, for each quantized weight, the largest absolute value of the input it multiplies.

    Every selection question goes through the model as a prompt of both modes, one at a time, so the
    scales fit both. The whole model is held in memory, on the GPU where there is one.

    Args:
        hf: directory of a Hugging Face model.
        calibration: questions, a .jsonl or .parquet file as for training.
        modes: the prompts of the modes.
        questions: how many of the file's questions are used at most, spread over the file.
        progress: counts tokens.

    Returns the maxima by weight name. All experts of a layer have the same.
    Raises DataError for the file, ModelError for a tokenizer or model that cannot be read or whose
    activations are not finite.
    """
    check_modelopt()
    selection = spread(load_questions(str(calibration)), questions)
    from megatron_policysplit.data.prompts import PromptBuilder
    from megatron_policysplit.data.tokenizer import load_tokenizer

    hf_config = read_hf_config(hf)
    builder = PromptBuilder(load_tokenizer(str(hf)), modes, vocab_size=hf_config["vocab_size"])
    prompts = [
        tokens for by_mode in builder.build_all(selection).values() for tokens in by_mode.values()
    ]
    longest = model_positions(hf_config) or math.inf
    for tokens in prompts:
        if len(tokens) > longest:
            raise DataError(
                f"{calibration} has a question whose prompt of {len(tokens)} tokens is longer than "
                f"the model's max_position_embeddings={longest}; leave it out"
            )
    measured = _measure(hf, prompts, progress)
    return {name: measured[_module(name)] for group in weight_groups(hf_config) for name in group}


def spread(questions: Sequence[Question], most: int) -> list[Question]:
    """At most `most` of the questions, evenly spaced from the first one on."""
    count = min(most, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _measure(
    hf: str | Path, prompts: Sequence[Sequence[int]], progress: Progress
) -> dict[str, float]:
    """Run the model on the prompts; return module name -> largest absolute input over all of them.

    Raises ModelError where an activation is not finite.
    """
    import torch

    import_modelopt()
    import modelopt.torch.quantization as mtq

    from megatron_policysplit.distributed.device import training_device

    model = _read_model(hf).to(training_device())

    def calibrate(model: torch.nn.Module) -> None:
        with torch.no_grad(), progress(sum(map(len, prompts))) as advance:
            for tokens in prompts:
                model(
                    input_ids=torch.tensor([tokens], device=training_device()),
                    use_cache=False,
                    logits_to_keep=1,
                )
                advance(len(tokens))

    try:
        with redirect_stdout(io.StringIO()):  # ModelOpt reports what it inserts
            mtq.quantize(model, mtq.FP8_DEFAULT_CFG, calibrate)
    except AssertionError as error:  # what ModelOpt raises for a maximum that is nan or infinite
        raise ModelError(
            f"activations of {hf} cannot be measured ({error}); its weights or questions are bad"
        ) from error
    return dict(_maxima(model))


def _maxima(model: torch.nn.Module) -> Iterator[tuple[str, float]]:
    """Yield (module name, largest absolute input) from the quantizers that ModelOpt inserted.

    They are called `MODULE.input_quantizer`; `MODULE.gate_up_proj_input_quantizer` and
    `MODULE.down_proj_input_quantizer` for fused experts. Raises ModelError for a quantizer that no
    prompt reached.
    """
    for name, module in model.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            if module.amax is None:
                raise ModelError(
                    f"no prompt reached {name.rpartition('.')[0]}; give other or more questions"
                )
            yield name.removesuffix("input_quantizer").rstrip("._"), module.amax.item()


def _module(weight: str) -> str:
    """The module whose input a weight is multiplied with, by the weight's name."""
    # transformers fuses the experts of a layer into one module.
    fused = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    return _EXPERT.sub(lambda match: f".experts.{fused[match[1]]}", weight.removesuffix(".weight"))


def _read_model(hf: str | Path) -> torch.nn.Module:
    """The transformers model in its stored dtype. Raises ModelError if it cannot be read."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # ModelOpt sees the inputs of experts only where each is a call of `linear`.
        has_experts = "num_experts_per_tok" in read_hf_config(hf)
        experts = {"experts_implementation": "eager"} if has_experts else {}
        return AutoModelForCausalLM.from_pretrained(
            hf,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **experts,
        ).eval()
    except Exception as error:  # transformers and safetensors raise many kinds of error
        raise cannot_load("model", hf, error) from error
