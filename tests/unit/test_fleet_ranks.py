"""Fleets of several ranks: an engine's owner is not the chief, whose router must hear of it, and weights need all."""

from contextlib import ExitStack
from datetime import timedelta

import pytest

from megatron_policysplit.errors import EngineError
from tests.support.dist import run_distributed

WORLD, CHIEF = 3, 1
ALL = {f"http://engine-{index}" for index in range(WORLD)}


def story(rank: int) -> dict:
    """Engine r is owned by rank r; rank 1 is the chief. What each scenario leaves on this rank."""
    import torch.distributed as dist

    from megatron_policysplit.serving import fleet as fleets
    from tests.support.fake_fleet import PAUSES, make_layout

    for name, seconds in PAUSES.items():
        setattr(fleets, name, seconds)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    layout = make_layout(rank, WORLD, CHIEF)
    scenarios = (killed, two_at_once, restarts, first_sync, later_sync, cannot_open, one_engine)
    found = {scenario.__name__: scenario(rank, layout) for scenario in scenarios}
    dist.destroy_process_group()
    return found


def opened(rank: int, layout, **options):
    """A rig that serves version 7, its log empty."""
    from tests.support.fake_fleet import Turns, make_rig

    rig = make_rig(layout, range(WORLD), turns=Turns(), **options)
    rig.open()
    rig.fleet.sync(7)
    rig.log.clear()
    rig.weights.pushes.clear()
    return rig


def left(rig, **more) -> dict:
    """What a rig has seen, and after it is closed."""
    import torch.distributed as dist

    found = {
        "log": list(rig.log),
        "pushes": list(rig.weights.pushes),
        "told": list(rig.told),
        "states": [state.value for state in rig.states()],
        "workers": rig.router and set(rig.router.workers),
    }
    rig.close()
    dist.barrier()
    return found | more | {"ended": rig.log[len(found["log"]) :]}


def taken(rig, rank: int, version: int = 7):
    return lambda: f"weights {version} {rank}" in rig.log


def raised(work) -> str:
    with pytest.raises(EngineError) as caught:
        work()
    return str(caught.value)


def killed(rank: int, layout) -> dict:
    """Rank 0's server dies, and is not ready before a service without it has told the chief's router."""
    rig = opened(rank, layout)
    serve = rig.serve

    def noted():
        serve()
        rig.log.append("served")

    rig.serve = noted
    if rank == 0:
        rig.servers[0].ready_when = lambda: "served" in rig.log
        rig.servers[0].kill()
    condition = {0: taken(rig, 0), CHIEF: lambda: "remove 0" in rig.log and rig.router.workers == ALL}.get(rank)
    rig.attend(condition)
    return left(rig)


def two_at_once(rank: int, layout) -> dict:
    """Ranks 0 and 2 both want weights at the same heartbeat."""
    from megatron_policysplit.serving.members import State
    from tests.support.fake_fleet import until

    rig = opened(rank, layout)
    if rank != CHIEF:
        rig.servers[rank].kill()
        rig.control.run(until(lambda: rig.members[0].state is State.WAITING))
    layout.barrier()
    rig.attend(None if rank == CHIEF else taken(rig, rank))
    return left(rig)


def restarts(rank: int, layout) -> dict:
    rig = opened(rank, layout, restarts=0)
    if rank == 2:
        rig.servers[2].kill()
    return left(rig, error=raised(lambda: rig.attend(lambda: False)))


def first_sync(rank: int, layout) -> dict:
    from tests.support.fake_fleet import make_rig

    rig = make_rig(layout, range(WORLD))
    rig.open()
    rig.weights.failing.append({0: "shapes differ", 2: "no memory"})
    return left(rig, error=raised(lambda: rig.fleet.sync(0)))


def later_sync(rank: int, layout) -> dict:
    """All but the chief's own engine fail; then that one too."""
    rig = opened(rank, layout)
    rig.weights.failing.append({0: "half-way", 2: "half-way"})
    rig.fleet.sync(8)
    behind = rig.router and set(rig.router.workers)
    rig.attend(taken(rig, rank, 8))
    rig.weights.failing.append(dict.fromkeys(range(WORLD), "half-way"))
    rig.fleet.sync(9)
    behind_nothing = rig.router and set(rig.router.workers)
    rig.attend(taken(rig, rank, 9))
    return left(rig, behind=[behind, behind_nothing])


def cannot_open(rank: int, layout) -> dict:
    from tests.support.fake_fleet import make_rig

    rig = make_rig(layout, range(WORLD))
    if rank == 2:
        rig.servers[2].failing.append(EngineError("CUDA out of memory"))
    else:
        rig.servers[rank].ready_when = lambda: False
    return left(rig, error=raised(rig.open))


def one_engine(rank: int, layout) -> dict:
    """One engine that spans all ranks stands on the first, which need not be the chief."""
    from megatron_policysplit.serving.build import open_fleet
    from tests.support.fake_fleet import make_rig

    rig = make_rig(layout, [0])
    with ExitStack() as resources:
        url = open_fleet(rig.fleet, layout, rig.control, resources)
    return left(rig, url=url)


@pytest.fixture(scope="module")
def seen():
    """seen(scenario) -> what it left on each rank."""
    found = run_distributed(story, WORLD)
    return lambda scenario: [of_rank[scenario.__name__] for of_rank in found]


def test_the_chief_hears_of_an_engine_that_another_rank_lost(seen):
    ranks = seen(killed)
    assert ranks[0]["log"].index("served") < ranks[0]["log"].index("pause 0")
    assert [entry for entry in ranks[0]["log"] if entry != "served"] == ["start 0", "pause 0", "weights 7 0"]
    assert ranks[CHIEF]["log"] == ["remove 0", "served", "add 0", "served"]
    assert ranks[2]["log"] == ["served", "served"]
    assert [rank["pushes"] for rank in ranks] == [[(7, [0])]] * WORLD
    assert [rank["states"] for rank in ranks] == [["serving"]] * WORLD


def test_two_engines_are_given_weights_by_one_service(seen):
    ranks = seen(two_at_once)
    assert [rank["pushes"] for rank in ranks] == [[(7, [0, 2])]] * WORLD
    assert [rank["told"] for rank in ranks] == [[7]] * WORLD
    assert [rank["states"] for rank in ranks] == [["serving"]] * WORLD
    assert ranks[CHIEF]["workers"] == ALL


def test_an_engine_that_cannot_be_brought_back_ends_every_rank(seen):
    (error,) = {rank["error"] for rank in seen(restarts)}
    assert "engine 2 (http://engine-2) was started again 0 times (rollout.server.restarts)" in error


def test_the_first_sync_fails_on_every_rank(seen):
    assert {rank["error"] for rank in seen(first_sync)} == {"engine 0: shapes differ; engine 2: no memory"}


def test_later_syncs_may_fail_on_some_or_all(seen):
    ranks = seen(later_sync)
    assert ranks[CHIEF]["behind"] == [{"http://engine-1"}, set()]
    assert [rank["states"] for rank in ranks] == [["serving"]] * WORLD
    assert ranks[CHIEF]["workers"] == ALL
    versions = [version for version, engines in ranks[0]["pushes"] for _ in engines]
    assert versions == [8] * 5 + [9] * 6
    assert all(rank["pushes"] == ranks[0]["pushes"] for rank in ranks)


def test_an_engine_that_cannot_start_ends_every_rank_and_nothing_is_left(seen):
    ranks = seen(cannot_open)
    assert {rank["error"] for rank in ranks} == {"CUDA out of memory"}
    assert [set(rank["ended"]) for rank in ranks] == [{"stop 0"}, {"stop 1", "stop router"}, {"stop 2"}]


def test_all_ranks_know_the_only_engines_address(seen):
    assert [rank["url"] for rank in seen(one_engine)] == ["http://engine-0"] * WORLD
