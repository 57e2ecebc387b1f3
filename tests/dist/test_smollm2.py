"""A real instruct model, SmolLM2-135M-Instruct: the actor at pipeline parallelism 2 against transformers."""

import torch

from examples.smollm2.make_model import make_model
from tests.support.dist import run_distributed

QUESTION = [{"role": "user", "content": "Name three rivers of Europe, and say in a sentence where each begins."}]


def test_logits_equal_transformers_at_pipeline_2(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model(tmp_path / "model")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    first, last = run_distributed(logits_of, 2, str(tmp_path / "model"), prompt, timeout_seconds=240)
    assert first is None
    assert len(prompt) > 30 and expected.std() > 1
    assert (last - expected).abs().max() < 1e-4


def logits_of(rank, path, prompt):
    """The last stage's logits [T, vocabulary]; None on the first."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config import ParallelConfig

    parallel.initialize(ParallelConfig(pipeline=2), seed=0)
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_policysplit.actor.model import build_model
    from megatron_policysplit.actor.weights import load_weights

    model = build_model(read_hf_config(path), dtype=torch.float32)
    load_weights(model, path)
    tokens = torch.tensor([prompt])
    found = []

    def step(iterator, model):
        hidden = model(input_ids=tokens, position_ids=torch.arange(len(prompt))[None], attention_mask=None)
        return hidden, lambda hidden, non_loss_data: found.append(hidden[:, 0] @ model.head(1).weight.t())

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=len(prompt),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    parallel.shutdown()
    return found[0] if found else None
