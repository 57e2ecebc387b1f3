"""Saves and loads training checkpoints.

Weights and optimizer are in Megatron's torch_dist format, the trainer's state in JSON, RNG states
in safetensors. A checkpoint is written under another name and renamed when it is complete, so a
directory named `step_NNNNNN` is never half written. It loads at any TP x PP x EP x DP layout; the
RNG states come back only at the layout and on the kind of device that saved them.
"""

from __future__ import annotations

import json
import pickle
import queue
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints_conv import model_keys
from checkpoints_conv.metadata import check_metadata, read_metadata
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.checkpoint_files import (
    check_files,
    check_model,
    checkpoint_path,
    complete,
    damaged,
    file_sizes,
    read_trainer_json,
)
from megatron_policysplit.actor.checkpoint_optimizer import OptimizerRequest, filled
from megatron_policysplit.actor.megatron_weights import load_parameters, without_extra_states
from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.device import restore_rng_states, rng_states
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.files import disk_error, replace_text, write_error

# "fully_reshardable": the optimizer's state does not depend on the layout that saved it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# What reading a file of a checkpoint raises where the file is missing, cut short or garbled.
_DAMAGE = (OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass
class TrainerState:
    """How far a run has come, as a checkpoint stores it. Whatever came after `step` is done again.

    The trainer keeps it; the field names are the keys in trainer.json.
    """

    step: int = 0  # rollout batches trained
    optimizer_steps: int = 0  # optimizer steps taken
    weight_version: int = 0  # of the weights that engines hold
    stream: dict[str, int] = field(default_factory=dict)  # data cursor after the last trained batch
    # Optimizer steps that were skipped for a NaN or infinite loss or gradient.
    bad_steps_in_a_row: int = 0
    bad_steps: int = 0
    evaluated: int = -1  # step of the last evaluation; -1 before the first
    best: float = -1.0  # best evaluation so far
    method: dict[str, float] = field(default_factory=dict)  # state of the training method
    date: str = ""  # day that the chat template is pinned to


def save(actor: Actor, state: TrainerState, directory: Path, keep: int) -> Path:
    """Save a checkpoint under `directory` and delete all but the newest `keep`.

    Collective over all ranks. Returns the checkpoint's directory. Raises WriteError where the disk
    takes no more: on every rank that notices, and older checkpoints stay as they are.
    """
    path = checkpoint_path(directory, state.step)
    try:
        return _save(actor, state, directory, keep)
    except (Exception, CheckpointException) as error:
        # Megatron and torch report a full disk in their own words, and the ranks beside the one
        # that wrote learn only that something failed. So each of them asks the disk.
        refusal = disk_error(error, directory)
        if refusal is None:
            raise
        raise write_error(path, refusal) from error


def _save(actor: Actor, state: TrainerState, directory: Path, keep: int) -> Path:
    """`save` without the words for a disk that takes no more."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    layout = actor.layout
    final = checkpoint_path(directory, state.step)
    partial = final.with_name(final.name + ".partial")
    if layout.rank == 0:
        for leftover in directory.glob("*.partial"):  # of a save that was cut off
            shutil.rmtree(leftover)
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
            "files": file_sizes(partial),
        }
        replace_text(partial / "trainer.json", json.dumps(meta, indent=2))
        # The rename comes last, after the barrier at which every rank's files are written: it is
        # what makes the checkpoint count. Old ones go only after it.
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in complete(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier(group=layout.world)
    return final


def load(
    actor: Actor, path: Path, note: Callable[[str | None], None] = lambda text: None
) -> TrainerState:
    """Restore weights, optimizer and schedule, and RNG states where they were saved alike.

    That is at the same layout, on the same kind of device: a GPU's generator takes no state of a
    CPU's. The optimizer may be of another class, and the layers of another kind.

    Collective over all ranks. Returns the trainer's state. Raises CheckpointError if the checkpoint
    is damaged or belongs to another model.

    note: called with what was not restored, for the log, or None.
    """
    meta = read_trainer_json(path)
    check_model(meta["model"], actor.hf_config, path)
    check_files(path)
    # Megatron unpickles this file. The check reads it with an unpickler that knows nothing but
    # torch_dist's own classes, so a checkpoint from elsewhere cannot run code here.
    check_metadata(path / ".metadata")
    sharded = _sharded_state(actor, is_loading=True)
    stored = read_metadata(path / ".metadata").state_dict_metadata
    optimizer = OptimizerRequest.of(sharded.pop("optimizer"), stored)
    # Under another name than the checkpoint's: Megatron returns what is stored there beside what
    # is asked for, and would merge an optimizer of another class into this one.
    loaded = _read(sharded | {"present": optimizer.state}, path)
    try:
        state = TrainerState(**meta["state"])
    except TypeError as error:
        raise damaged(path, f"trainer.json: {error}") from error
    weights, present = loaded["model"], filled(optimizer.state, loaded["present"])
    if not optimizer.has_masters:
        # In fp32 the distributed optimizer's master weights are the model's own memory, and so are
        # the loaded weights, which must not be overwritten with masters that were not stored.
        weights = {name: weight.clone() for name, weight in weights.items()}
    actor.optimizer.load_state_dict(present, state.optimizer_steps)
    load_parameters(actor.model, weights, path)
    if not optimizer.has_masters:
        actor.optimizer.masters_from_weights()
    note(_restore_generators(actor.layout, path, meta))
    return state


def _restore_generators(layout: Layout, path: Path, meta: dict[str, Any]) -> str | None:
    """Restore the RNG states if they are of this layout and kind of device; else say why not.

    Collective over all ranks. Raises CheckpointError if they are damaged.
    """
    fresh = "the actor's random generators begin anew: the checkpoint is of another "
    if meta["layout"] != _layout(layout):
        return f"{fresh}layout"
    file = path / f"rng_rank{layout.rank:05d}.safetensors"
    states = raise_on_all_ranks(layout.world, lambda: _read_rng(file))
    if states.keys() & {"cuda"} != rng_states().keys() & {"cuda"}:
        return f"{fresh}kind of device"
    _restore_rng(states)
    return None


def _read(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    """What Megatron reads from a checkpoint. Raises CheckpointError if a file of it is damaged."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        return dist_checkpointing.load(sharded, str(path))
    except (*_DAMAGE, CheckpointingException) as error:
        raise damaged(path, _short_file(path) or _reason(error)) from error
    except CheckpointException as error:  # what any rank met while it read its part
        causes = [failure[0] for failure in error.failures.values()]
        reasons = [cause for cause in causes if isinstance(cause, _DAMAGE) or _is_torch_file(cause)]
        if not reasons:
            raise
        raise damaged(path, _short_file(path) or _reason(reasons[0])) from error
    except RuntimeError as error:
        if not _is_torch_file(error):  # a lost peer, or no memory
            raise
        raise damaged(path, _reason(error)) from error


def _is_torch_file(error: BaseException) -> bool:
    """Whether torch says of a file that it is none of torch.save's."""
    return isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)


def _reason(error: BaseException) -> str:
    """What an exception says of a file, without torch's advice on it."""
    if isinstance(error, pickle.UnpicklingError):
        return "a pickle in it cannot be read"
    sentence = re.split(r"\. |\n", str(error).strip())[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def _short_file(path: Path) -> str | None:
    """Which of the files that a checkpoint's metadata names is missing or cut short, if any."""
    for info in read_metadata(path / ".metadata").storage_data.values():
        file, end = path / info.relative_path, info.offset + info.length
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size < end:
            return f"{file.name} has {file.stat().st_size} bytes, at least {end} are needed"
    return None


def _read_rng(file: Path) -> dict[str, torch.Tensor]:
    """The RNG states in a file of a checkpoint. Raises CheckpointError if they are damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise damaged(file.parent, f"{file.name}: {error}") from error


def _keep_results_in_process() -> None:
    """Give Megatron's writer a plain queue for its results.

    A synchronous save puts them in and takes them out in this process. Megatron by itself would
    start a manager process for that, which takes seconds and outlives a rank that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def _sharded_state(actor: Actor, is_loading: bool) -> dict[str, Any]:
    """What Megatron saves or fills: this rank's shards of weights and optimizer state."""
    model = without_extra_states(actor.model.sharded_state_dict(metadata=METADATA))
    optimizer = actor.optimizer.megatron.sharded_state_dict(
        model, is_loading=is_loading, metadata=METADATA
    )
    return {"model": model, "optimizer": optimizer}


def _rng_states():
    """RNG states of this rank, those of Megatron's tracker under "tracker/"."""
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
    """The layout as trainer.json holds it."""
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}
    # The key is absent without expert parallelism.
    return sizes if layout.expert == 1 else {**sizes, "expert": layout.expert}
