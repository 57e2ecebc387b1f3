"""Stand-ins for Transformer Engine's modules: their parameters and extra states, and nothing that computes.

Megatron-Core's own layers around them, its layer specs and `sharded_state_dict` are real. What a module of Transformer
Engine registers is taken from its source (version 2.9, transformer_engine/pytorch: module/linear.py,
module/layernorm_linear.py, module/grouped_linear.py, module/rmsnorm.py, ops/op.py, module/base.py,
attention/dot_product_attention/). Without FP8 every extra state is an empty byte tensor.
"""

import importlib.machinery
import sys
import types

import torch

VERSION = "2.9.0"


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        """Of an unquantized module there is nothing to set; None is an older version's."""
        assert state is None or state.numel() == 0

    def _weight(self, out_features, in_features, parallel_mode, tp_size, device, dtype):
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        return torch.nn.Parameter(torch.zeros(out_features, in_features, device=device, dtype=dtype))


class Linear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        bias,
        params_dtype,
        device,
        parallel_mode=None,
        tp_size=1,
        fuse_wgrad_accumulation=False,
        **unused,
    ):
        super().__init__()
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.weight = self._weight(out_features, in_features, parallel_mode, tp_size, device, params_dtype)
        # Without a bias there is an empty tensor, which is no parameter.
        self.bias = torch.nn.Parameter(self.weight.new_zeros(len(self.weight))) if bias else torch.Tensor()


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, normalization, **options):
        super().__init__(in_features, out_features, **options)
        self.layer_norm_weight = torch.nn.Parameter(self.weight.new_ones(in_features))
        if normalization != "RMSNorm":
            self.layer_norm_bias = torch.nn.Parameter(self.weight.new_zeros(in_features))


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        *,
        bias,
        params_dtype,
        device,
        parallel_mode=None,
        tp_size=1,
        fuse_wgrad_accumulation=False,
        **unused,
    ):
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        for number in range(num_gemms):
            weight = self._weight(out_features, in_features, parallel_mode, tp_size, device, params_dtype)
            self.register_parameter(f"weight{number}", weight)
            bias_of = torch.nn.Parameter(weight.new_zeros(len(weight))) if bias else torch.Tensor()
            setattr(self, f"bias{number}", bias_of)

    def init_fp8_metadata(self, num_gemms=1):
        """Nothing is quantized."""


class RMSNorm(_Module):
    def __init__(self, hidden_size=None, *, normalized_shape=None, params_dtype, device, **unused):
        super().__init__()  # Megatron-Core 0.16 says hidden_size, 0.19 the name of newer releases
        size = normalized_shape if hidden_size is None else hidden_size
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=params_dtype))


class DotProductAttention(_Module):
    """Has an extra state that checkpoints may lack, and no parameters but for a learnable softmax offset."""

    def __init__(self, num_attention_heads, kv_channels, **unused):
        super().__init__()
        self.register_load_state_dict_post_hook(self._may_lack_extra_state)

    @staticmethod
    def _may_lack_extra_state(module, incompatible):
        for key in list(incompatible.missing_keys):
            if key.endswith("core_attention._extra_state"):
                incompatible.missing_keys.remove(key)


class _Anything(types.ModuleType):
    """Names that Megatron-Core takes as bases or annotations of classes which are not built here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def install():
    """Make `import transformer_engine` find the stand-ins; call it before Megatron-Core is imported."""
    assert not any(name.startswith("megatron.core") for name in sys.modules)

    def module(name, kind=types.ModuleType):
        made = kind(name)
        made.__spec__, made.__path__ = importlib.machinery.ModuleSpec(name, None, is_package=True), []
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, made)
        return made

    module("transformer_engine").__version__ = VERSION
    pytorch = module("transformer_engine.pytorch")
    for stand_in in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
        setattr(pytorch, stand_in.__name__, stand_in)
    for name in ("ops", "fp8", "distributed", "router", "tensor", "tensor.utils"):
        module(f"transformer_engine.pytorch.{name}", _Anything)
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", _Anything)
