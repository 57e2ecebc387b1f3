"""Training checkpoints: Megatron's torch_dist for weights and optimizer, JSON and safetensors for
the rest.

A checkpoint is written beside its place and renamed, so a directory named `step_NNNNNN` is
complete. It loads at any TP x PP x EP x DP layout; the RNG states come back only at the layout that
saved them.
"""

from __future__ import annotations

import json
import queue
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from checkpoints_conv import model_keys
from checkpoints_conv.metadata import check_metadata
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.checkpoint_files import (
    check_model,
    checkpoint_path,
    complete,
    read_trainer_json,
)
from megatron_policysplit.actor.checkpoint_optimizer import param_groups_by_optimizer, regrouped
from megatron_policysplit.distributed.device import restore_rng_states, rng_states
from megatron_policysplit.distributed.layout import Layout

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass
class TrainerState:
    """Where a run stands. Everything after `step` is made again on resume.

    step: rollout batches trained. optimizer_steps: taken so far. stream: the data cursor after the
    last trained batch. bad_steps_in_a_row, bad_steps: skipped for a NaN or infinite loss or
    gradient.
    evaluated: step of the last evaluation; -1 before the first. best: best evaluation so far.
    method: its state.
    date: the day the chat template is pinned to.
    """

    step: int = 0
    optimizer_steps: int = 0
    weight_version: int = 0
    stream: dict[str, int] = field(default_factory=dict)
    bad_steps_in_a_row: int = 0
    bad_steps: int = 0
    evaluated: int = -1
    best: float = -1.0
    method: dict[str, float] = field(default_factory=dict)
    date: str = ""


def save(actor: Actor, state: TrainerState, directory: Path, keep: int) -> Path:
    """Save under `directory` (collective over all ranks) and drop all but the newest `keep`."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    layout = actor.layout
    final = checkpoint_path(directory, state.step)
    partial = final.with_name(final.name + ".partial")
    if layout.rank == 0:
        for left in directory.glob("*.partial"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier(group=layout.world)
    _keep_results_in_process()
    # Every replica writes its part, not only the first.
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    dist_checkpointing.save(
        _sharded_state(actor, is_loading=False), str(partial), strategy, content_metadata=METADATA
    )
    save_file(_rng_states(), partial / f"rng_rank{layout.rank:05d}.safetensors")
    dist.barrier(group=layout.world)
    if layout.rank == 0:
        meta = {
            "state": asdict(state),
            "model": model_keys(actor.hf_config),
            "layout": _layout(layout),
        }
        (partial / "trainer.json").write_text(json.dumps(meta, indent=2))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in complete(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier(group=layout.world)
    return final


def load(actor: Actor, path: Path) -> TrainerState:
    """Restore weights, optimizer, schedule and (at the same layout) RNG states; returns the
    trainer's state.

    Raises CheckpointError if the checkpoint is damaged or belongs to another model.
    """
    from megatron.core import dist_checkpointing

    meta = read_trainer_json(path)
    check_model(meta["model"], actor.hf_config, path)
    check_metadata(path / ".metadata")
    own = _sharded_state(actor, is_loading=True)
    groups = param_groups_by_optimizer(own["optimizer"])
    loaded = dist_checkpointing.load(own, str(path))
    actor.model.load_state_dict(loaded["model"])
    state = TrainerState(**meta["state"])
    actor.optimizer.load_state_dict(regrouped(loaded["optimizer"], groups), state.optimizer_steps)
    if meta["layout"] == _layout(actor.layout):
        _restore_rng(load_file(path / f"rng_rank{actor.layout.rank:05d}.safetensors"))
    return state


def _keep_results_in_process() -> None:
    """Give Megatron's writer a plain queue for its results, which a synchronous save puts and gets
    in this process.

    Left to itself it starts a manager process for that, which takes seconds and outlives a rank
    that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def _sharded_state(actor: Actor, is_loading: bool) -> dict[str, Any]:
    model = actor.model.sharded_state_dict(metadata=METADATA)
    optimizer = actor.optimizer.megatron.sharded_state_dict(
        model, is_loading=is_loading, metadata=METADATA
    )
    return {"model": model, "optimizer": optimizer}


def _rng_states():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = {
        f"tracker/{name}": state for name, state in get_cuda_rng_tracker().get_states().items()
    }
    return {**rng_states(), **tracker}


def _restore_rng(states) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = {
        name.removeprefix("tracker/"): s
        for name, s in states.items()
        if name.startswith("tracker/")
    }
    get_cuda_rng_tracker().set_states(tracker)
    restore_rng_states(states)


def _layout(layout: Layout) -> dict[str, int]:
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}
    return sizes if layout.expert == 1 else {**sizes, "expert": layout.expert}
