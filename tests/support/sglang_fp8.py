"""Runs in SGLang's own interpreter: what its loader and its model make of an FP8 directory, on a CPU.

    python -P sglang_fp8.py MODEL PROMPTS.json OUT.safetensors

Configuration, model, weight loading and the pass are SGLang's. Its FP8 kernels exist for GPUs only, so plain torch
stands in for them: rounding with a given scale; linear maps and experts with dequantized weights and inputs as they
are. OUT: `logits` [prompts, vocabulary] after each prompt, and all parameters as loaded, before SGLang changes them.
The last line of stdout is JSON: the name of SGLang's quantization, and how often each stand-in was called.
"""

import json
import sys
from array import array
from collections import Counter
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

loaded = {}
called = Counter()


def rounded(values, scale):
    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def modelopt_linear(self, layer, x, bias=None):
    called["modelopt"] += 1
    y = x.float() @ (layer.weight.float() * layer.weight_scale)
    return (y if bias is None else y + bias).to(x.dtype)


def blocks(values, scales):
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    return block_quant_dequant(values, scales, [128, 128], torch.float32)


def block_linear(self, layer, x, bias=None):
    called["block"] += 1
    y = x.float() @ blocks(layer.weight, layer.weight_scale_inv).t()
    return (y if bias is None else y + bias).to(x.dtype)


def experts(layer, inner, outer, dispatched):
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native

    dtype = dispatched.hidden_states.dtype
    weights = SimpleNamespace(
        moe_runner_config=layer.moe_runner_config, w13_weight=inner.to(dtype), w2_weight=outer.to(dtype)
    )
    return fused_moe_forward_native(weights, dispatched)


def modelopt_experts(self, layer, dispatch_output):
    called["modelopt experts"] += 1
    inner = layer.w13_weight.float() * layer.w13_weight_scale[:, None, None]
    return experts(layer, inner, layer.w2_weight.float() * layer.w2_weight_scale[:, None, None], dispatch_output)


def block_experts(self, layer, dispatch_output):
    called["block experts"] += 1
    inner = blocks(layer.w13_weight, layer.w13_weight_scale_inv)
    return experts(layer, inner, blocks(layer.w2_weight, layer.w2_weight_scale_inv), dispatch_output)


def replace_kernels():
    from sglang.srt.layers.quantization import fp8, modelopt_quant, utils

    utils.scaled_fp8_quant = modelopt_quant.scaled_fp8_quant = lambda values, scale: (rounded(values, scale), scale)
    modelopt_quant.ModelOptFp8LinearMethod.apply = modelopt_linear
    modelopt_quant.ModelOptFp8MoEMethod.apply = modelopt_experts
    for method, apply in ((fp8.Fp8LinearMethod, block_linear), (fp8.Fp8MoEMethod, block_experts)):
        method.apply = apply
        method.process_weights_after_loading = lambda self, layer: None  # on a CPU it packs for AMX kernels


def keep_what_is_loaded():
    from sglang.srt.model_loader.loader import DefaultModelLoader

    postprocess = DefaultModelLoader.postprocess_weights

    def keep(model, device):
        loaded.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        postprocess(model, device)

    DefaultModelLoader.postprocess_weights = staticmethod(keep)


def requests(prompts):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0, max_new_tokens=1)
        request = Req(rid=number, origin_input_text="", origin_input_ids=array("q", prompt), sampling_params=sampling)
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.extend_end = len(prompt)
        yield request


def main(model, prompts, out):
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(
        model_path=model,
        dtype="float16",
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        max_total_tokens=1024,
        max_running_requests=8,
        log_level="error",
    )
    arguments.resolve_once()
    replace_kernels()
    keep_what_is_loaded()
    ranks = one_batch.SpawnRanks(
        world_rank=one_batch.spawn_world_rank(arguments, tp_rank=0, pp_rank=0),
        gpu_id=0,
    )
    one_batch.publish(arguments, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)
    with open(prompts, encoding="utf-8") as file:
        _, logits, _ = runner.extend(list(requests(json.load(file))))
    save_file({"logits": logits.float().contiguous(), **{f"loaded.{name}": t for name, t in loaded.items()}}, out)
    config = runner.torch_runner if hasattr(runner, "torch_runner") else runner
    print(json.dumps({"quantization": config.model_config.quantization, "called": called}))


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
