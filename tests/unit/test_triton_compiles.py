"""The LM head's Triton kernels through Triton's compiler, for GPUs that need not be here."""

import pytest

KERNELS = ["reduce_kernel", "reduce_pair_kernel", "nucleus_kernel", "logits_kernel", "gradient_kernel"]
LEAST_SHARED_BYTES = 99 * 1024  # what a block of a consumer card may have
OPERANDS = {"hidden_ptr", "hidden_a_ptr", "hidden_b_ptr", "weight_ptr"}


def compiled(name, capability, blocks, nucleus, directory):
    """A kernel for bf16 operands of 4096 features, as PTX and machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_policysplit.vocab_parallel import triton_kernels

    function = getattr(triton_kernels, name)
    tokens, columns, features, warps, stages = blocks
    constants = {"H": 4096, "UPCAST": False, "FEW": False, "NUCLEUS": nucleus}
    constants |= {"BLOCK_T": tokens, "BLOCK_V": columns, "BLOCK_H": features}
    constants |= {argument: 1 for argument in function.arg_names if argument in ("stride_hh", "stride_wh")}
    signature = {}
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            is_16_bits = argument in OPERANDS or (argument, name) == ("out_ptr", "gradient_kernel")
            signature[argument] = "*bf16" if is_16_bits else "*i64" if argument == "targets_ptr" else "*fp32"
        else:
            signature[argument] = "i32"
    places = {argument: (place,) for place, argument in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        signature,
        {places[argument]: value for argument, value in constants.items() if argument in places},
        {place: [["tt.divisibility", 16]] for argument, place in places.items() if signature[argument][0] == "*"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(directory))
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
        )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_the_smallest_candidate_fits_every_gpu(tmp_path, name, capability):
    from megatron_policysplit.vocab_parallel.triton_launch import ONE_PRODUCT, TWO_PRODUCTS

    blocks = (TWO_PRODUCTS if name == "reduce_pair_kernel" else ONE_PRODUCT)[-1]
    kernel = compiled(name, capability, blocks, True, tmp_path)
    assert 0 < kernel.metadata.shared <= LEAST_SHARED_BYTES
    assert len(kernel.asm["cubin"]) > 0


def test_the_nucleus_costs_a_gradient_without_one_nothing(tmp_path):
    """Its code is left out, not skipped."""
    from megatron_policysplit.vocab_parallel.triton_launch import ONE_PRODUCT

    without, with_nucleus = (
        compiled("gradient_kernel", 90, ONE_PRODUCT[-1], nucleus, tmp_path).asm["ptx"].count("ex2.approx")
        for nucleus in (False, True)
    )
    assert with_nucleus == 2 * without > 0
