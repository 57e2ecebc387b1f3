"""What every rank raises when one of them fails, in real processes; and that nobody waits for a rank that failed."""

import time
from datetime import timedelta

import pytest

from tests.support.dist import run_distributed

RANKS = 3
GROUP_SECONDS = 60
TOLD = "TrainingError: rank 1 failed in a test (KeyError: 'lost')"


def cases() -> dict[str, tuple]:
    """name -> what each rank's work raises (an exception) or returns."""
    from megatron_policysplit.distributed.agree import PeerFailed
    from megatron_policysplit.distributed.stop_signal import StopRequested
    from megatron_policysplit.errors import DataError, EngineError
    from megatron_policysplit.rollout.sglang_http import EngineRefused

    class Two(DataError):  # neither this class nor an instance can be sent
        def __init__(self, text, number):
            super().__init__(f"{text} {number}")

    peer = PeerFailed("another rank failed")
    return {
        "none": ("a", "b", "c"),
        "user": ("a", DataError("no rows"), "c"),
        "refused": ("a", EngineRefused("no", 400), "c"),
        "other": ("a", KeyError("lost"), "c"),
        "signal": ("a", StopRequested(), "c"),
        "two": (DataError("no rows"), KeyError("lost"), "c"),
        "two engines": ("a", EngineError("of rank 1"), EngineError("of rank 2")),
        "peer": (peer, KeyError("lost"), peer),
        "peer of a user error": (peer, peer, DataError("no rows")),
        "peers alone": ("a", peer, peer),
        "cannot be sent": ("a", Two("no rows", 2), "c"),
    }


def heard(rank: int) -> dict:
    """Outcome of each case on this rank, by each function."""
    import torch.distributed as dist

    from megatron_policysplit.distributed.agree import all_gather_results, exchange, raise_on_all_ranks

    dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_SECONDS))
    group, text = dist.group.WORLD, "rank {rank} failed in a test ({error})"
    gather, gathered = dist.all_gather_object, []

    def counted(*arguments, **options):
        gathered.append(1)
        gather(*arguments, **options)

    dist.all_gather_object = counted

    def outcome(call) -> object:
        began, before = time.monotonic(), len(gathered)
        try:
            answer = call()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        assert time.monotonic() - began < GROUP_SECONDS / 2
        assert len(gathered) - before == 1  # on failure as on success
        dist.barrier()  # every rank came out of it, and they can go on together
        return answer

    found = {}
    for name, works in cases().items():

        def work(given=works[rank]):
            if isinstance(given, Exception):
                raise given
            return given

        error = works[rank] if isinstance(works[rank], Exception) else None
        found[name] = {
            "raise_on_all_ranks": outcome(lambda work=work: raise_on_all_ranks(group, work, text)),
            "all_gather_results": outcome(lambda work=work: all_gather_results(group, work, text)),
            "exchange": outcome(lambda error=error: exchange(group, rank, error, text)),
        }
    found["unnamed"] = outcome(lambda: raise_on_all_ranks(group, lambda: {}[rank] if rank == 1 else rank))
    found["lambda stays"] = outcome(lambda: raise_on_all_ranks(group, lambda: lambda: rank)())
    found["lambda goes"] = outcome(lambda: all_gather_results(group, lambda: (lambda: rank) if rank == 1 else rank))

    def interrupted():
        raise KeyboardInterrupt

    before = len(gathered)
    with pytest.raises(KeyboardInterrupt):
        raise_on_all_ranks(group, interrupted)
    assert len(gathered) == before
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_distributed(heard, RANKS, timeout_seconds=180)


def test_without_an_error_ranks_have_their_results(found):
    results = [rank["none"] for rank in found]
    assert [result["raise_on_all_ranks"] for result in results] == ["a", "b", "c"]
    assert [result["all_gather_results"] for result in results] == [["a", "b", "c"]] * 3
    assert [result["exchange"] for result in results] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("function", ["raise_on_all_ranks", "all_gather_results", "exchange"])
@pytest.mark.parametrize(
    ("case", "raised"),
    {
        "user": ["DataError: no rows"] * 3,
        "refused": ["EngineRefused: no"] * 3,
        "other": [TOLD, "KeyError: 'lost'", TOLD],
        "signal": [
            "TrainingError: rank 1 failed in a test (StopRequested: )",
            "StopRequested: ",
            "TrainingError: rank 1 failed in a test (StopRequested: )",
        ],
        "two": ["DataError: no rows", "KeyError: 'lost'", "DataError: no rows"],
        "two engines": ["EngineError: of rank 1", "EngineError: of rank 1", "EngineError: of rank 2"],
        "peer": [TOLD, "KeyError: 'lost'", TOLD],
        "peer of a user error": ["DataError: no rows"] * 3,
        "peers alone": ["PeerFailed: another rank failed"] * 3,
        "cannot be sent": [
            "TrainingError: rank 1 failed in a test (Two: no rows 2)",
            "Two: no rows 2",
            "TrainingError: rank 1 failed in a test (Two: no rows 2)",
        ],
    }.items(),
)
def test_what_each_rank_raises(found, case, raised, function):
    assert [rank[case][function] for rank in found] == raised


def test_a_failure_without_a_text_of_its_own(found):
    told = "TrainingError: rank 1 failed (KeyError: 1)"
    assert [rank["unnamed"] for rank in found] == [told, "KeyError: 1", told]


def test_a_result_that_cannot_be_sent(found):
    """It is this rank's own where results stay, and its error where they are exchanged."""
    assert [rank["lambda stays"] for rank in found] == [0, 1, 2]
    assert all("pickle" in rank["lambda goes"] for rank in found)
    assert [rank["lambda goes"].startswith("TrainingError: rank 1 failed (") for rank in found] == [True, False, True]
