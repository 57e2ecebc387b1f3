"""The core attention of local layers against Megatron's own, plain torch in fp64, and padded rows against packed ones."""

import math

import pytest
import torch

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.megatron_models import Shape, start

# s, b, heads, groups, width
SHAPES = [(37, 3, 4, 2, 16), (64, 1, 8, 8, 32), (1, 2, 4, 1, 8), (50, 2, 9, 3, 24)]
LENGTHS = [17, 1, 40, 9]


def inputs(shape, dtype):
    s, b, heads, groups, width = shape
    draw = torch.Generator().manual_seed(s)
    parts = [torch.randn(s, b, n, width, generator=draw, dtype=torch.float64) for n in (heads, groups, groups, heads)]
    *parts, gradient = [part.to(dtype) for part in parts]
    return [part.requires_grad_() for part in parts], gradient.flatten(2)


def attention_config(shape, dtype):
    from megatron.core.transformer import TransformerConfig

    _, _, heads, groups, width = shape
    return TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
    )


def modules(shape, dtype):
    """Megatron's core attention and ours."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_policysplit.actor.attention import CoreAttention

    arguments = dict(layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    config = attention_config(shape, dtype)
    return DotProductAttention(config=config, **arguments), CoreAttention(config=config, **arguments)


def with_gradients(attend, parts, gradient):
    result = attend(*parts)
    return [result, *torch.autograd.grad(result, parts, gradient)]


def same_bits_as_megatron(rank):
    start()
    same = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            parts, gradient = inputs(shape, dtype)
            theirs, ours = (
                with_gradients(lambda q, k, v, module=module: module(q, k, v, None), parts, gradient)
                for module in modules(shape, dtype)
            )
            same.append(all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)))
    return same


def test_padded_rows_have_the_bits_of_megatrons_attention():
    """Outputs and the gradients of queries, keys and values, in three precisions."""
    assert run_distributed(same_bits_as_megatron, 1) == [[True] * 3 * len(SHAPES)]


def by_definition(query, key, value):
    """Causal attention one query at a time, [s, b, heads * d]."""
    s, b, heads, width = query.shape
    out = torch.zeros_like(query)
    for row in range(b):
        for head in range(heads):
            group = head * key.shape[2] // heads
            for t in range(s):
                scores = key[: t + 1, row, group] @ query[t, row, head] / math.sqrt(width)
                out[t, row, head] = scores.softmax(0) @ value[: t + 1, row, group]
    return out.flatten(2)


@pytest.mark.parametrize("kernel", ["plain_attention", "fused_attention"])
def test_both_kernels_compute_causal_attention(kernel):
    from megatron_policysplit.actor import attention

    for shape in SHAPES:
        parts, gradient = inputs(shape, torch.float64)
        scale = 1 / math.sqrt(shape[-1])
        expected = with_gradients(by_definition, parts, gradient)
        computed = with_gradients(
            lambda q, k, v, scale=scale: getattr(attention, kernel)(q, k, v, scale).flatten(2), parts, gradient
        )
        for a, b in zip(computed, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def refusals(rank):
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_policysplit.actor.attention import CoreAttention

    start()
    config, said = attention_config(SHAPES[0], torch.float32), []
    good = dict(layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    for wrong in (
        {"attention_dropout": 0.1},
        {"attn_mask_type": AttnMaskType.padding},
        {"attention_type": "cross"},
    ):
        with pytest.raises(ValueError) as error:
            CoreAttention(config=config, **good | wrong)
        said.append(str(error.value).rpartition("does not have ")[2])
    attention, rows = CoreAttention(config=config, **good), torch.zeros(5, 4, 16)
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError) as error:
        attention(rows, rows, rows, None, packed_seq_params=PackedSeqParams("thd", bounds, bounds))
    with pytest.raises(ValueError, match="takes no mask"):
        attention(rows[:, None], rows[:, None], rows[:, None], torch.ones(5, 5))
    return [*said, str(error.value)]


def test_what_it_does_not_do_is_refused():
    (said,) = run_distributed(refusals, 1)
    assert said == [
        "attention dropout",
        "a mask that is not causal",
        "cross attention",
        "segments end at 4, the pack has 5 tokens",
    ]


def packed_and_padded(rank, shape, path):
    """How far a model's hidden states and gradients are apart, packed against padded, in fp64."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.model import build_model
    from megatron_policysplit.actor.weights import load_weights

    layout = start(shape)
    model = build_model(read_hf_config(path), dtype=torch.float64, sequence=layout.sequence)
    load_weights(model, path)
    model = model.double()
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 131, (length,), generator=draw) for length in LENGTHS]
    width = max(LENGTHS)
    padded = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=7) for row in rows])
    weights = [torch.randn(len(row), 64, generator=draw, dtype=torch.float64) for row in rows]

    def run(tokens, positions, select, packed=None):
        model.zero_grad()
        hidden = model.whole(
            model(input_ids=tokens, position_ids=positions, attention_mask=None, packed_seq_params=packed)
        )
        states = select(hidden)
        sum((state * weight).sum() for state, weight in zip(states, weights, strict=True)).backward()
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False):  # of this rank's tokens, as yet
                torch.distributed.all_reduce(parameter.grad)
        return [state.detach() for state in states], [parameter.grad.clone() for parameter in model.parameters()]

    of_rows = run(
        padded,
        torch.arange(width).expand_as(padded),
        lambda hidden: [hidden[: len(row), index] for index, row in enumerate(rows)],
    )
    # The tail of the pack is a segment of its own, which makes its length a multiple of TP.
    tokens = torch.cat([*rows, torch.full((5,), 3)])
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist(), len(tokens)], dtype=torch.int32)
    of_pack = run(
        tokens[None],
        torch.cat([torch.arange(length) for length in (*LENGTHS, 5)])[None],
        lambda hidden: [hidden[a:b, 0] for a, b in zip(bounds[:-2], bounds[1:-1], strict=True)],
        PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(LENGTHS),
            max_seqlen_kv=max(LENGTHS),
        ),
    )
    return [
        max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*parts, strict=True))
        for parts in zip(of_pack, of_rows, strict=True)
    ]


@pytest.mark.parametrize("shape", [Shape(), Shape(tensor=2)], ids=str)
def test_packed_rows_are_computed_like_padded_ones(tmp_path, shape):
    """Through all layers, rotary positions included: hidden states, and the gradient of every parameter."""
    path = str(make_model(tmp_path / "model", "qwen3", tied=True))
    for states, gradients in run_distributed(packed_and_padded, shape.world, shape, path):
        assert states < 1e-12 and gradients < 1e-12
