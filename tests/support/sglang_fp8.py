"""Runs in SGLang's own interpreter: what its loader and its model make of an FP8 directory, on a CPU.

    python sglang_fp8.py MODEL PROMPTS.json OUT.safetensors

Configuration, model, weight loading and the pass are SGLang's. Its FP8 kernels exist for GPUs only, so plain torch
stands in for three: rounding with a given scale; the linear map of ModelOpt's FP8, whose input is rounded with its
fixed scale; and that of block FP8, whose weight is SGLang's own dequantization and whose input is not rounded. OUT:
`logits` [prompts, vocabulary] after each prompt, and all parameters as loaded, before SGLang changes them. The last
line of stdout is JSON: the name of SGLang's quantization and the kernels that were called, with their number.
"""

import json
import sys
from array import array
from collections import Counter

import torch
from safetensors.torch import save_file

loaded = {}
called = Counter()


def rounded(values, scale):
    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def modelopt_linear(self, layer, x, bias=None):
    called["modelopt"] += 1
    y = (rounded(x, layer.input_scale).float() * layer.input_scale) @ (layer.weight.float() * layer.weight_scale)
    return (y if bias is None else y + bias).to(x.dtype)


def block_linear(self, layer, x, bias=None):
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    called["block"] += 1
    weight = block_quant_dequant(layer.weight, layer.weight_scale_inv, self.weight_block_size, torch.float32)
    y = x.float() @ weight.t()
    return (y if bias is None else y + bias).to(x.dtype)


def replace_kernels():
    from sglang.srt.layers.quantization import utils
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8LinearMethod

    utils.scaled_fp8_quant = lambda values, scale: (rounded(values, scale), scale)
    ModelOptFp8LinearMethod.apply = modelopt_linear
    Fp8LinearMethod.apply = block_linear
    Fp8LinearMethod.process_weights_after_loading = lambda self, layer: None  # on a CPU it wants AMX kernels


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
