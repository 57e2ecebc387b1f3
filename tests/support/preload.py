"""What the fork server of `dist.py` imports once, so that no rank of a test need import it.

Only imports: a process that has started a thread, asked for a GPU or joined a group cannot be
forked safely.
"""

import gc
import importlib

from megatron_policysplit.actor.megatron_on_cpu import import_megatron

MODULES = (
    "aiohttp.web",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron_policysplit.actor.actor",
    "megatron_policysplit.rollout.local",
    "megatron_policysplit.training.build",
    "megatron_policysplit.training.trainer",
    "megatron_policysplit.training.worker",
    "omegaconf",
    "pebble",
    "pytest",
    "rich.progress",
    "safetensors.torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
)

# As a rank does, before anything imports Megatron-Core: Transformer Engine may be installed for a GPU that is hidden.
import_megatron()
for module in MODULES:
    importlib.import_module(module)
gc.collect()
gc.freeze()  # a collection in a rank would visit all this, and so copy memory that forks share
