"""Megatron-Core models of a layout, and what their parameters are called there. For processes of a distributed test."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """Ranks of tensor, pipeline and expert parallelism; there are as many replicas as the last."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.expert

    def __str__(self) -> str:
        return f"tp{self.tensor}-pp{self.pipeline}-ep{self.expert}"


def parallel_config(shape):
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, expert = shape.tensor, shape.pipeline, shape.expert
    return ParallelConfig(tensor=tensor, pipeline=pipeline, data=expert, expert=expert, sequence=tensor > 1)


def start(shape=Shape()):  # noqa: B008 (frozen)
    from megatron_policysplit.actor.parallel import initialize

    return initialize(parallel_config(shape), seed=1, timeout_seconds=60)


def nan_model(hf, dtype, transformer_engine=False):
    """A parameter or a padding row that loading skips must show."""
    from megatron.core import parallel_state

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.model import build_model

    sequence = parallel_state.get_tensor_model_parallel_world_size() > 1
    model = build_model(read_hf_config(hf), dtype=dtype, sequence=sequence, transformer_engine=transformer_engine)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def loaded_model(hf, dtype, transformer_engine=False):
    from megatron_policysplit.actor.weights import load_weights

    model = nan_model(hf, dtype, transformer_engine)
    load_weights(model, hf)
    return model


def load_as_stock_megatron_does(model, megatron):
    """Everything that the model asks for, extra states included, must be in the checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    content = dist_checkpointing.load_content_metadata(megatron)
    wanted = model.sharded_state_dict(metadata=content)
    loaded = dist_checkpointing.load({"model": wanted}, megatron, strict=StrictHandling.RAISE_UNEXPECTED)
    model.load_state_dict(loaded["model"], strict=True)


def save_as_stock_megatron_does(model, directory, **content):
    """content: what Megatron-Core's `sharded_state_dict` takes as metadata."""
    save_state(model.sharded_state_dict(metadata=content), directory)


def save_state(state, directory):
    """Write a sharded state dict of a model as torch_dist (collective)."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_policysplit.actor.checkpoint import _keep_results_in_process

    if dist.get_rank() == 0:
        Path(directory).mkdir()
    dist.barrier()
    _keep_results_in_process()
    dist_checkpointing.save({"model": state}, directory)


def assert_same_parameters(model, expected):
    """The same bits; returns how many parameters were compared."""
    import torch

    pairs = list(zip(model.named_parameters(), expected.named_parameters(), strict=True))
    for (name, parameter), (_, wanted) in pairs:
        assert torch.equal(parameter, wanted), name
    return len(pairs)


def expected_parameters(hf_config, shape, stage, expert_rank, spec=-1):
    """Name -> shape of the parameters of one rank, by the mapping tables; layers and experts numbered as in the model.

    spec: -1 for Transformer Engine's names, 0 for those of Megatron-Core's own layers.
    """
    from checkpoints_conv import find_architecture
    from checkpoints_conv.tables import TIED_HEAD

    architecture = find_architecture(hf_config)
    sizes, last = architecture.sizes(hf_config), shape.pipeline - 1
    embedding, *layers, head = architecture.mappings(hf_config)
    rows = list(embedding[1]) if stage == 0 else []
    for layer, mappings in layers:
        if layer // (sizes.layers // shape.pipeline) == stage:
            rows += [p for p in mappings if p.expert is None or p.expert * shape.expert // sizes.experts == expert_rank]
    if stage == last:
        rows += head[1]
        rows += [TIED_HEAD] if sizes.tied and last > 0 else []
    return {mapping.megatron[spec]: mapping.local_shape(sizes, shape.tensor) for mapping in rows}


@dataclass(frozen=True)
class Stored:
    """What a model would store: key -> shape of tensors, and the keys of extra states."""

    tensors: dict
    extra_states: set


def stored_by(model):
    """By Megatron-Core's `sharded_state_dict`, of this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    values = list(nested_values(state))
    objects = {value.unique_key for value in values if isinstance(value, ShardedObject)}
    tensors = {value.key: tuple(value.global_shape) for value in values if not isinstance(value, ShardedObject)}
    return Stored(tensors, objects)


def expected_tensors(hf_config, tensor, copies):
    """Key -> shape of every tensor that is stored, the vocabulary padded. copies: those for Megatron's own layers."""
    from checkpoints_conv import find_architecture
    from checkpoints_conv.stored import list_parameters

    padded = find_architecture(hf_config).sizes(hf_config).padded_vocab(tensor)
    return {
        p.place.key: (padded, *p.shape[1:]) if p.is_vocabulary else (*p.place.axes, *p.shape)
        for p in list_parameters(hf_config)
        if copies or not p.copy
    }


def capture(rank, path):
    """A model of Transformer Engine's layers on one rank, as JSON has it: parameters, stored tensors, extra states.

    The converted checkpoint beside `path` is loaded into it, too.
    """
    import torch

    start()
    from checkpoints_conv import find_architecture, read_hf_config
    from megatron_policysplit.actor.weights import global_parameters

    hf_config = read_hf_config(path)
    model, converted = (make(path, torch.bfloat16, transformer_engine=True) for make in (loaded_model, nan_model))
    load_as_stock_megatron_does(converted, f"{path}-megatron")
    assert_same_parameters(converted, model)
    parameters = global_parameters(model, find_architecture(hf_config).sizes(hf_config))
    return _listed({name: p.shape for name, p in parameters.items()}, stored_by(model))


def expected_capture(hf_config):
    """What `capture` gives if the mapping tables and `checkpoints_conv.stored` are right."""
    from checkpoints_conv.stored import extra_state_keys

    stored = Stored(expected_tensors(hf_config, 1, copies=False), set(extra_state_keys(hf_config)))
    return _listed(expected_parameters(hf_config, Shape(), 0, 0), stored)


def _listed(parameters, stored):
    return {
        "parameters": {name: list(shape) for name, shape in sorted(parameters.items())},
        "stored": {key: list(shape) for key, shape in sorted(stored.tensors.items())},
        "extra_states": sorted(stored.extra_states),
    }
