"""Which tensors an export gives, and in which buckets; known before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

from checkpoints_conv import find_architecture
from checkpoints_conv.architectures import in_hf_order
from checkpoints_conv.mapping import ParamMapping, Sizes

EXPERT_BUCKET_ELEMENTS = 2**26  # elements of the experts that are exported together, at most


@dataclass(frozen=True)
class Exported:
    """One tensor that `export_weights` yields."""

    name: str
    shape: tuple[int, ...]
    stage: int  # pipeline stage that holds it


def exported_tensors(hf_config: Mapping[str, Any], pipeline: int) -> list[Exported]:
    """List what `export_weights` yields over all stages, in its order; the same on every rank."""
    sizes = find_architecture(hf_config).sizes(hf_config)
    return [
        Exported(src.name, src.shape(sizes), bucket.stage)
        for bucket in export_plan(hf_config, 1, pipeline)
        for src in in_hf_order(list(bucket.mappings))
    ]


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together in `export_weights`; `export_plan` makes it.

    owner: the expert-parallel rank that has these experts; None for parameters that all of them
    have.
    """

    stage: int  # pipeline stage that holds them
    owner: int | None
    mappings: tuple[ParamMapping, ...]  # their rows of the mapping table
    shapes: tuple[tuple[int, ...], ...]  # of each parameter on one rank

    @cached_property
    def numel(self) -> int:
        """Elements that one tensor-parallel rank contributes."""
        return sum(prod(shape) for shape in self.shapes)


def export_plan(
    hf_config: Mapping[str, Any], tensor: int, pipeline: int, expert: int = 1
) -> list[Bucket]:
    """Plan the buckets of `export_weights` and the ranks that own each; the same on every rank.

    The order of the tensors does not depend on the layout.
    """
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    parts = architecture.mappings(hf_config)
    plan = []
    for index, (layer, mappings) in enumerate(parts):
        if layer is None:
            stage = 0 if index == 0 else pipeline - 1
        else:
            stage = layer // (sizes.layers // pipeline)
        for owner, rows in _by_owner(mappings, sizes, expert):
            plan.append(
                Bucket(
                    stage,
                    owner,
                    tuple(rows),
                    tuple(mapping.local_shape(sizes, tensor) for mapping in rows),
                )
            )
    return plan


def _by_owner(
    mappings: Sequence[ParamMapping], sizes: Sizes, expert: int
) -> Iterator[tuple[int | None, list[ParamMapping]]]:
    """Split rows of the mapping table into buckets, each with its owner.

    Rows of experts: consecutive ones of one expert-parallel rank, of at most EXPERT_BUCKET_ELEMENTS
    elements. All other rows: one bucket without an owner.
    """

    def owner(mapping: ParamMapping) -> int | None:
        return None if mapping.expert is None else mapping.expert // (sizes.experts // expert)

    for rank, rows in groupby(mappings, key=owner):
        if rank is None:
            yield None, list(rows)
            continue
        held: list[ParamMapping] = []
        elements = 0
        for mapping in rows:
            more = prod(mapping.local_shape(sizes, 1))
            if held and elements + more > EXPERT_BUCKET_ELEMENTS:
                yield rank, held
                held, elements = [], 0
            held.append(mapping)
            elements += more
        yield rank, held
