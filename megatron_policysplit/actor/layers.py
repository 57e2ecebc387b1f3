"""Which layers the model is made of: Transformer Engine's, or Megatron's own (`model.layers`)."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.device import gpu_count, transformer_engine_problem
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import ConfigError, MachineError

_INSTALL = (
    "install it beside this torch (pip install --no-build-isolation 'transformer-engine[pytorch]', "
    "see docs/gpu.md)"
)


@dataclass(frozen=True)
class LayerChoice:
    """The layers of a rank, and why."""

    transformer_engine: bool  # else Megatron's own, called local
    reason: str

    def __str__(self) -> str:
        name = "Transformer Engine's" if self.transformer_engine else "Megatron-Core's own"
        return f"layers: {name} ({self.reason})"


def choose_layers(wanted: str) -> LayerChoice:
    """The layers that `model.layers` means on this rank's device.

    Raises MachineError for transformer_engine where it cannot run.
    """
    if wanted == "local":
        return LayerChoice(False, "model.layers=local")
    problem = transformer_engine_problem()
    if wanted == "auto":
        if problem is None:
            return LayerChoice(True, "model.layers=auto: it is installed and there is a GPU")
        return LayerChoice(False, f"model.layers=auto: {problem}")
    if problem is None:
        return LayerChoice(True, "model.layers=transformer_engine")
    remedy = f"{_INSTALL}, or" if gpu_count() else "its layers run on a GPU only;"
    raise MachineError(
        f"model.layers=transformer_engine, but {problem}; {remedy} set model.layers=auto or local"
    )


def agree_on_layers(wanted: str, layout: Layout) -> LayerChoice:
    """`choose_layers` on every rank of a run, which must come out alike.

    Two collectives over the world (an all-gather of an object, an all-reduce). Raises ConfigError
    on every rank if a node lacks what the others have.
    """
    choice = raise_on_all_ranks(layout.world, lambda: choose_layers(wanted))
    any_takes = layout.all_reduce_max(choice.transformer_engine)
    any_lacks = layout.all_reduce_max(not choice.transformer_engine)

    def check() -> None:
        if any_takes and any_lacks and not choice.transformer_engine:
            raise ConfigError(
                f"rank {layout.rank} cannot have the layers of other ranks ({choice.reason}); "
                "give all nodes the same environment, or set model.layers=local"
            )

    raise_on_all_ranks(layout.world, check)
    return choice


def transformer_engine_attention() -> str | None:
    """The attention that Transformer Engine chose in its last forward pass; None before one.

    It chooses by the device, the shapes and what is installed, and keeps its choice in a variable
    of its own (read in the source of 2.11; None where another release has it elsewhere).
    """
    module = sys.modules.get(
        "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    )
    chosen = getattr(module, "_attention_backends", {})
    if chosen.get("use_flash_attention"):
        return f"FlashAttention {chosen.get('flash_attention_backend')}"
    if chosen.get("use_fused_attention"):
        return f"cuDNN's fused attention ({chosen.get('fused_attention_backend')})"
    if chosen.get("use_unfused_attention"):
        return "Transformer Engine's unfused attention, which holds all scores"
    return None
