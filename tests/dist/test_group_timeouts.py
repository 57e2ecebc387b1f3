"""parallel.timeout_seconds reaches every group but the control group, which keeps its own."""

from tests.support.dist import run_distributed


def seconds_of_groups(rank: int) -> dict[str, float]:
    import torch
    from megatron.core import parallel_state

    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    layout = initialize(ParallelConfig(data=2, timeout_seconds=130.0), seed=1)
    groups = {name: getattr(layout, name) for name in ("world", "control", "replica", "leaders")}
    for name in ("tensor_model_parallel", "pipeline_model_parallel", "data_parallel", "model_parallel"):
        groups[name] = getattr(parallel_state, f"get_{name}_group")()
    cpu = torch.device("cpu")
    return {name: group._get_backend(cpu).options._timeout.total_seconds() for name, group in groups.items()}


def test_one_key_for_all_groups_but_the_control_group():
    for seconds in run_distributed(seconds_of_groups, 2):
        assert seconds.pop("control") == 45
        assert {seconds.pop(name) for name in ("world", "replica", "leaders")} == {130}
        # Megatron's groups: it takes whole minutes, which are rounded up.
        assert len(seconds) == 4 and set(seconds.values()) == {180}
