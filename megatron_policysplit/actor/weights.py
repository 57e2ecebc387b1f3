"""Loads weights from a Hugging Face directory, and exports them under their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from checkpoints_conv import SafetensorsReader, find_architecture, read_hf_config
from checkpoints_conv.architectures import in_hf_order
from checkpoints_conv.mapping import Sizes
from checkpoints_conv.reader import check_shape
from megatron_policysplit.actor.export_buckets import Bucket, export_plan
from megatron_policysplit.distributed.agree import ExportError, PeerFailed
from megatron_policysplit.distributed.device import training_device
from megatron_policysplit.errors import ModelError

Destination = Literal["every_rank", "leader", "stage_leader", "nowhere"]
Read = Callable[[nn.Parameter], Tensor]
Result = TypeVar("Result")
CPU = torch.device("cpu")
# Matches the number of an expert in a parameter's name: of Megatron's own layers, or of Transformer
# Engine's grouped ones.
_EXPERT = re.compile(
    r"(?<=\.experts\.local_experts\.)\d+|(?<=\.experts\.linear_fc[12]\.weight)\d+$"
)

# Export plans by model; an entry goes with its model.
_plans: WeakKeyDictionary[nn.Module, list[Bucket]] = WeakKeyDictionary()


def load_weights(model: nn.Module, hf_path: str | Path) -> None:
    """Fill this rank's parameters from safetensors, reading only the rows and columns it holds.

    Not a collective. Padding rows of the vocabulary become zero; values are cast to the parameters'
    dtype. Raises ModelError naming the tensor if one is missing or its shape does not follow from
    config.json.
    """
    hf_config = read_hf_config(hf_path)
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    table = architecture.by_megatron_name(hf_config)
    rank, tensor = _tensor_rank(), _tensor_size()
    with SafetensorsReader(hf_path) as reader, torch.no_grad():
        for name, parameter in global_parameters(model, sizes).items():
            if name not in table:
                raise ModelError(
                    f"Megatron parameter {name} has no row in the table of {architecture.name}"
                )
            mapping = table[name]
            check_shape(
                name,
                mapping.local_shape(sizes, tensor),
                tuple(parameter.shape),
                "the mapping table",
            )
            for src in mapping.sources:
                if src.name not in reader.tensors:
                    raise ModelError(
                        f"{hf_path} lacks tensor {src.name} that {architecture.name} needs"
                    )
                info = reader.tensors[src.name]
                check_shape(src.name, info.shape, src.shape(sizes), info.file)
            # First: no piece covers the padding rows of the vocabulary.
            parameter.zero_()
            for piece in mapping.pieces(sizes, rank, tensor):
                block = parameter.narrow(piece.dim, piece.offset, piece.stop - piece.start)
                block.copy_(reader.slice(piece.source, piece.dim, piece.start, piece.stop))


def global_parameters(model: nn.Module, sizes: Sizes) -> dict[str, nn.Parameter]:
    """This rank's parameters by their names in the whole model.

    Wrappers' `module.` is removed; layers and experts are numbered over all stages and all
    expert-parallel ranks.
    """
    layers = sizes.layers // parallel_state.get_pipeline_model_parallel_world_size()
    first = parallel_state.get_pipeline_model_parallel_rank() * layers
    first_expert = _expert_rank() * (sizes.experts // _expert_size())
    parameters = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        while parts[0] == "module":
            parts.pop(0)
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + first)
        name = _EXPERT.sub(lambda number: str(int(number[0]) + first_expert), ".".join(parts))
        parameters[name] = parameter
    return parameters


def export_weights(
    model: nn.Module,
    hf_config: Mapping[str, Any],
    destination: Destination,
    *,
    device: torch.device = CPU,
    read: Read = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield full Hugging Face tensors on `device`, in transformers' order.

    They have the parameters' dtype; a tied head comes once, as the embedding; vocabulary padding is
    cut. Collective over the TP x PP ranks of a replica and over those of all replicas that share
    experts with it: all of them must iterate to the end.

    Weights travel in buckets known beforehand: the embedding, each layer, and the final norm with
    the head; experts in buckets of their own, each of one expert-parallel rank and of at most
    EXPERT_BUCKET_ELEMENTS. No more than one bucket is held at a time. The collectives of a bucket:

    - one all-reduce of a flag over all the ranks above;
    - for experts, if EP > 1, one broadcast from the owning rank over the expert-parallel group of
      its stage;
    - if PP > 1 and not for "stage_leader", one broadcast from the owning stage;
    - if TP > 1, one all-gather.

    Raises PeerFailed at the next bucket if another rank's consumer failed (see `consume_weights`),
    and ExportFailed if this rank could not read its weights.

    destination: which ranks get tensors; the others' iterators yield nothing. "leader": the
        replica's leader (TP rank 0 of the last stage). "stage_leader": TP rank 0 of each stage gets
        those of its stage. "nowhere": no rank of the replica, which only gives its experts.
    read: returns a parameter's values on the rank's own device; needed where parameters wait in
        host memory.
    """
    if destination not in get_args(Destination):
        raise ValueError(f"destination={destination!r} is not one of {get_args(Destination)}")
    sizes = find_architecture(hf_config).sizes(hf_config)
    parameters = global_parameters(model, sizes)
    example = next(iter(parameters.values()))
    own_stage = parallel_state.get_pipeline_model_parallel_rank()
    by_stage = destination == "stage_leader"
    last_stage = parallel_state.get_pipeline_model_parallel_world_size() - 1
    for bucket in _cached_plan(model, hf_config):
        is_own_stage, receives = bucket.stage == own_stage, destination != "nowhere"
        holds = receives if bucket.owner is None else bucket.owner == _expert_rank()
        local = _read_and_agree(bucket, parameters, read, reads=is_own_stage and holds)
        # Ranks that receive nothing still give their experts.
        if is_own_stage and bucket.owner is not None:
            local = _from_owner(bucket, local, example)
        if not receives or (by_stage and not is_own_stage):
            continue
        shards = _gather(bucket, local, example, over_stages=not by_stage)
        if destination == "every_rank" or (
            _tensor_rank() == 0 and (by_stage or own_stage == last_stage)
        ):
            yield from _assemble(bucket, shards, sizes, device).items()


def _read_and_agree(
    bucket: Bucket, parameters: dict[str, nn.Parameter], read: Read, *, reads: bool
) -> Tensor | None:
    """Read this rank's part of the bucket if it `reads`; raise on all ranks if one could not."""
    local, error = None, None
    if reads:
        try:
            local = _read(bucket, parameters, read)
        except Exception as raised:  # raised again below, once all ranks know
            error = raised
    _agree(failed=error is not None, raises=error is None)
    if error is not None:
        raise ExportFailed(
            f"this rank could not read its weights ({type(error).__name__}: {error})"
        ) from error
    return local


def consume_weights(
    model: nn.Module,
    hf_config: Mapping[str, Any],
    destination: Destination,
    consumer: Callable[[Iterator[tuple[str, Tensor]]], Result],
    *,
    device: torch.device = CPU,
    read: Read = Tensor.detach,
) -> Result:
    """Hand `consumer` the stream of `export_weights`; if it fails on any rank, all ranks raise.

    The rank that failed raises its own error, the others PeerFailed, at their next bucket or at the
    end, so no rank waits for one that is gone. A consumer need not take all tensors. Costs one
    all-reduce of a flag more than `export_weights`. Returns what the consumer returns.
    """
    stream = export_weights(model, hf_config, destination, device=device, read=read)
    try:
        result = consumer(stream)
        # Other ranks are in the collectives of the buckets that the consumer did not take.
        for _ in stream:
            pass
    except ExportError:  # all ranks know already
        raise
    except BaseException:
        _agree(failed=True, raises=False)
        raise
    _agree(failed=False)
    return result


def _cached_plan(model: nn.Module, hf_config: Mapping[str, Any]) -> list[Bucket]:
    """`export_plan` at this rank's layout; made once per model, for many experts take a while."""
    if model not in _plans:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        _plans[model] = export_plan(hf_config, _tensor_size(), stages, _expert_size())
    return _plans[model]


def _read(bucket: Bucket, parameters: dict[str, nn.Parameter], read: Read) -> Tensor:
    """Read this rank's parameters of the bucket into one flat tensor of bucket.numel elements."""
    owned = [
        next(parameters[name] for name in mapping.megatron if name in parameters)
        for mapping in bucket.mappings
    ]
    return torch.cat([read(parameter).reshape(-1) for parameter in owned])


def _from_owner(bucket: Bucket, local: Tensor | None, example: Tensor) -> Tensor:
    """Broadcast the experts of a bucket, flat, from the rank of this stage that has them.

    Each tensor-parallel rank broadcasts its shard. local: None on ranks that do not have them.
    """
    flat = _flat_buffer(bucket, example) if local is None else local
    if _expert_size() > 1:
        group = parallel_state.get_expert_model_parallel_group()
        dist.broadcast(flat, src=dist.get_global_rank(group, bucket.owner), group=group)
    return flat


def _gather(
    bucket: Bucket, local: Tensor | None, example: Tensor, *, over_stages: bool
) -> list[Tensor]:
    """Gather the bucket's parameters, flat, of every tensor-parallel rank: shards[TP].

    local: this rank's; None on stages that do not hold the bucket. over_stages: broadcast from the
    stage that holds it first.
    """
    flat = _flat_buffer(bucket, example) if local is None else local
    if over_stages and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(flat, src=dist.get_global_rank(group, bucket.stage), group=group)
    if _tensor_size() == 1:
        return [flat]
    shards = [torch.empty_like(flat) for _ in range(_tensor_size())]
    dist.all_gather(shards, flat, group=parallel_state.get_tensor_model_parallel_group())
    return shards


def _flat_buffer(bucket: Bucket, example: Tensor) -> Tensor:
    """Room for one tensor-parallel rank's parameters of a bucket, in the dtype of `example`."""
    return torch.empty(bucket.numel, dtype=example.dtype, device=training_device())


def _assemble(
    bucket: Bucket, shards: list[Tensor], sizes: Sizes, device: torch.device
) -> dict[str, Tensor]:
    """Assemble full Hugging Face tensors of a bucket from all tensor-parallel ranks' shards."""
    full = {
        src.name: torch.empty(src.shape(sizes), dtype=shards[0].dtype, device=shards[0].device)
        for src in in_hf_order(list(bucket.mappings))
    }
    for rank, flat in enumerate(shards):
        parameters = flat.split([prod(shape) for shape in bucket.shapes])
        for mapping, shape, values in zip(bucket.mappings, bucket.shapes, parameters, strict=True):
            local = values.view(shape)
            for piece in mapping.pieces(sizes, rank, len(shards)):
                length = piece.stop - piece.start
                target = full[piece.source].narrow(piece.dim, piece.start, length)
                target.copy_(local.narrow(piece.dim, piece.offset, length))
    return {name: tensor.to(device) for name, tensor in full.items()}


class ExportFailed(ExportError):
    """This rank could not read its own weights."""


def _agree(*, failed: bool, raises: bool = True) -> None:
    """Tell all ranks that take part whether one of them failed (one all-reduce).

    If one did this raises PeerFailed, unless `raises` is False.
    """
    flag = torch.tensor([int(failed)], dtype=torch.int32, device=training_device())
    dist.all_reduce(
        flag,
        op=dist.ReduceOp.MAX,
        group=parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
    if raises and flag.item():
        raise PeerFailed(
            "another rank failed while it took the exported weights; its own message says why"
        )


def _tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def _tensor_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def _expert_rank() -> int:
    return parallel_state.get_expert_model_parallel_rank()


def _expert_size() -> int:
    return parallel_state.get_expert_model_parallel_world_size()
