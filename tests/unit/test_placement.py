"""Which engine stands on which ranks and GPUs, against an enumeration of Megatron's layout made here."""

import itertools

import pytest

from megatron_policysplit.config.engine_checks import check_allocator
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.members import Placement
from megatron_policysplit.serving.placement import devices, place_engines


def layouts(world_size):
    """Every (TP, PP, DP) with TP 1, 2 or 4 that fills the world."""
    for tensor, pipeline in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        if world_size % (tensor * pipeline) == 0:
            yield tensor, pipeline, world_size // (tensor * pipeline)


def coordinates(tensor, pipeline, data):
    """(stage, replica, tensor rank) by global rank: Megatron counts tensor ranks first, then replicas, then stages."""
    return list(itertools.product(range(pipeline), range(data), range(tensor)))


FULL_MAP = [
    (world, layout, engine_tensor)
    for world in (4, 8)
    for layout in layouts(world)
    for engine_tensor in (1, 2, 4)
]  # fmt: skip


def test_the_map_covers_every_pair_of_tensor_sizes():
    assert {(world, layout[0], engine) for world, layout, engine in FULL_MAP} == set(
        itertools.product((4, 8), (1, 2, 4), (1, 2, 4))
    )
    assert {layout[1] for _, layout, _ in FULL_MAP} >= {1, 2, 4}
    assert {layout[2] for _, layout, _ in FULL_MAP} >= {1, 2, 4, 8}


@pytest.mark.parametrize(("world", "layout", "engine_tensor"), FULL_MAP)
def test_colocated_engines_tile_the_gpus(world, layout, engine_tensor):
    places = coordinates(*layout)
    chief = places.index((layout[1] - 1, 0, 0))  # tensor rank 0 of the last stage of replica 0
    placements = place_engines(world, chief, count=None, tensor=engine_tensor, colocated=True)

    # Walk over the GPUs in order and open a new engine whenever the last one is full.
    expected = []
    for gpu in range(world):
        if not expected or len(expected[-1]) == engine_tensor:
            expected.append([])
        expected[-1].append(gpu)
    assert [list(placement.ranks) for placement in placements] == expected
    assert [placement.index for placement in placements] == list(range(len(expected)))
    assert [placement.owner for placement in placements] == [min(ranks) for ranks in expected]
    assert [gpu for p in placements for gpu in devices(p, [], range(world), tensor=engine_tensor, colocated=True)] == [
        *range(world)
    ]
    assert place_engines(world, chief, count=len(expected), tensor=engine_tensor, colocated=True) == placements


@pytest.mark.parametrize(("world", "layout", "engine_tensor"), FULL_MAP)
def test_ranks_of_an_engine_hold_the_shards_they_should(world, layout, engine_tensor):
    """What the actor has on an engine's GPUs: runs of its tensor ranks, or whole groups of them."""
    tensor, _, _ = layout
    places = coordinates(*layout)
    for placement in place_engines(world, 0, count=None, tensor=engine_tensor, colocated=True):
        shards = [places[rank] for rank in placement.ranks]
        groups = {(stage, replica) for stage, replica, _ in shards}
        if engine_tensor <= tensor:
            assert len(groups) == 1
            assert [shard[2] for shard in shards] == list(range(shards[0][2], shards[0][2] + engine_tensor))
            assert shards[0][2] % engine_tensor == 0
        else:
            assert len(groups) == engine_tensor // tensor
            assert [shard[2] for shard in shards] == list(range(tensor)) * len(groups)


def test_a_map_written_out():
    """Actor TP 2, PP 2, DP 2 and two engines of TP 4 on two nodes of four GPUs: a stage under each engine."""
    placements = place_engines(8, 4, count=None, tensor=4, colocated=True, local_world_size=4)
    assert placements == [Placement(0, 0, (0, 1, 2, 3)), Placement(1, 4, (4, 5, 6, 7))]
    places = coordinates(2, 2, 2)
    assert [{places[rank][0] for rank in placement.ranks} for placement in placements] == [{0}, {1}]
    local_ranks = [0, 1, 2, 3, 0, 1, 2, 3]
    assert devices(placements[1], [], local_ranks, tensor=4, colocated=True) == [0, 1, 2, 3]


def test_engines_apart_belong_to_the_chief():
    assert place_engines(8, 6, count=3, tensor=2, colocated=False) == [
        Placement(0, 6, (6,)),
        Placement(1, 6, (6,)),
        Placement(2, 6, (6,)),
    ]
    assert place_engines(1, 0, count=None, tensor=1, colocated=False) == [Placement(0, 0, (0,))]


def test_gpus_of_engines_apart():
    placements = place_engines(2, 0, count=2, tensor=2, colocated=False)
    given = [devices(p, [7, 6, 5, 4], [0, 1], tensor=2, colocated=False) for p in placements]
    assert given == [[7, 6], [5, 4]]
    assert [devices(p, [], [0, 1], tensor=2, colocated=False) for p in placements] == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match=r"rollout\.server\.devices=\[7, 6, 5\] .* server 1 .* name 4 or more"):
        devices(placements[1], [7, 6, 5], [0, 1], tensor=2, colocated=False)


def test_colocated_engines_take_no_other_gpus():
    with pytest.raises(ConfigError, match=r"devices=\[0, 1\] .* GPUs \[2, 3\]; set rollout\.server\.devices=\[\]"):
        devices(Placement(1, 2, (2, 3)), [0, 1], [0, 1, 2, 3], tensor=2, colocated=True)


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        (8, {"tensor": 3}, r"rollout\.server\.tensor=3 .* 8 ranks \(parallel\.tensor .* use 1, 2, 4 or 8,"),
        (4, {"tensor": 8}, r"rollout\.server\.tensor=8 .* 4 ranks .* use 1, 2 or 4,"),
        (1, {"tensor": 2}, r"rollout\.server\.tensor=2 .* use 1, or"),
        (8, {"tensor": 8, "local_world_size": 4}, r"tensor=8 would put a server on two nodes, .* use 1, 2 or 4"),
        (12, {"tensor": 4, "local_world_size": 6}, r"tensor=4 would .* 6 ranks each; .* use 1, 2, 3 or 6"),
        (
            8,
            {"tensor": 2, "count": 3},
            r"rollout\.server\.count=3 .* 8 GPUs of parallel.* set rollout\.server\.count=4",
        ),
    ],
)
def test_engines_that_do_not_fit_are_refused(world, arguments, message):
    with pytest.raises(ConfigError, match=message):
        place_engines(world, 0, **{"count": None, "colocated": True, **arguments})


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["expandable_segments:True", "max_split_size_mb:128, expandable_segments:true"])
def test_expandable_segments_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"^rollout.server.environment has {name}={value}, .*rollout.colocated=true"):
        check_allocator({"OTHER": 1, name: value})
    for allowed in ("max_split_size_mb:128,expandable_segments:False", "", None):
        check_allocator({name: allowed})
    check_allocator({})
