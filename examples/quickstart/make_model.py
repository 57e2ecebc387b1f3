"""Makes the quickstart's tiny Qwen3-shaped model and teaches it the answer format, partly wrong.

    python -m examples.quickstart.make_model runs/quickstart/model

Partly wrong, so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.quickstart.sums import NUMBERS, random_sum

PAD, UNKNOWN, SYSTEM, USER, ASSISTANT, END = (
    "<|pad|>",
    "<|unk|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL = (PAD, UNKNOWN, SYSTEM, USER, ASSISTANT, END)
WORDS = ("explore", "widely", "think", "freely", "please")
# 32 tokens, a multiple of every small TP size.
VOCABULARY = (*SPECIAL, *map(str, range(1, 21)), "+", *WORDS)
HIGH_ENTROPY_PROMPT = "explore widely"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

WARM_UP_STEPS = 700
WARM_UP_BATCH = 128
WARM_UP_RATE = 3e-3
RIGHT_SHARE = 0.65  # of the warm-up's targets; the others miss the number by one to four


def make_tokenizer(vocabulary: Sequence[str] = VOCABULARY):
    """Make a PreTrainedTokenizerFast with a token for each number, "+", word and special token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[0-9]+|\+|[a-z]+"), behavior="removed", invert=True
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(
    directory: str | Path,
    seed: int,
    vocabulary: Sequence[str] = VOCABULARY,
    hidden_size: int = 64,
    layers: int = 2,
) -> None:
    """Save a randomly initialised Qwen3ForCausalLM (float32) and its tokenizer to `directory`.

    It becomes a Hugging Face directory. vocabulary: VOCABULARY, and further tokens after it.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(vocabulary)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def warm_up(
    directory: str | Path,
    seed: int,
    steps: int = WARM_UP_STEPS,
    progress: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train the model in `directory` on random sums, RIGHT_SHARE of them right, and save it there.

    Half of the examples stand behind a system turn of random words that says nothing about the
    target, so the model has seen a system turn and treats both modes nearly alike. The result
    depends only on the model, `seed` and `steps`. progress(step, steps, loss in nats per token) is
    called after every step. Returns the mean loss of the last tenth of the steps.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer.convert_tokens_to_ids
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=WARM_UP_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, WARM_UP_RATE, total_steps=steps, pct_start=0.1
    )
    losses = []
    for step in range(1, steps + 1):
        examples = [_example(rng) for _ in range(WARM_UP_BATCH)]
        longest = max(len(prompt) + len(answer) for prompt, answer in examples)
        tokens = torch.full((WARM_UP_BATCH, longest), tokenizer.pad_token_id)
        labels = torch.full((WARM_UP_BATCH, longest), -100)
        for row, (prompt, answer) in enumerate(examples):
            tokens[row, : len(prompt) + len(answer)] = torch.tensor(ids([*prompt, *answer]))
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(ids(answer))
        # Right padding needs no attention mask: causal attention never looks ahead to it.
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if progress is not None:
            progress(step, steps, losses[-1])
    model.save_pretrained(directory)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _example(rng: random.Random) -> tuple[list[str], list[str]]:
    """Draw a prompt, with or without a system turn, and an answer that ends its turn, as tokens."""
    number = target = rng.choice(NUMBERS)
    if rng.random() >= RIGHT_SHARE:
        target = rng.choice(
            [n for n in range(number - 4, number + 5) if n != number and n in NUMBERS]
        )
    system = [SYSTEM, *rng.choices(WORDS, k=rng.randint(1, 3)), END] if rng.random() < 0.5 else []
    answer = random_sum(target, rng).replace("+", " + ").split()
    return [*system, USER, str(number), END, ASSISTANT], [*answer, END]


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        raise SystemExit("usage: python -m examples.quickstart.make_model DIRECTORY [SEED]")
    directory, seed = Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else 0
    make_model(directory, seed)

    def show(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            print(f"warm-up {step}/{steps}: loss {loss:.3f} nats per token", flush=True)

    warm_up(directory, seed, progress=show)


if __name__ == "__main__":
    main(sys.argv[1:])
