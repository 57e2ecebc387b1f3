"""Keys of SGLang engines, weight sync and overlap that do not fit each other."""

import pytest

from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.load import load_config
from megatron_policysplit.config.secrets import api_key
from megatron_policysplit.errors import ConfigError

GIVEN = ["model.path=m", "data.path=d", "run.dir=r", "train.max_tokens_per_micro_batch=9999"]
SGLANG = "rollout.engine=sglang"


def checked(*overrides):
    config = load_config(None, [*GIVEN, *overrides])
    check_config(config)
    return config


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.addresses=[http://a:1]"], "rollout.engine=local"),
        ([SGLANG, "rollout.addresses=[a:1]"], "'a:1'"),
        ([SGLANG, "rollout.addresses=[http://127.0.0.1:1,http://127.0.0.1:1]"], "names a server twice"),
        ([SGLANG, "rollout.addresses=[http://127.0.0.1:1]", "rollout.colocated=true"], "rollout.colocated=true"),
        (["rollout.colocated=true"], "rollout.engine=sglang"),
        ([SGLANG, "rollout.server.host=0.0.0.0"], "rollout.api_key_variable"),
        ([SGLANG, "rollout.server.count=2", "rollout.server.tensor=2", "rollout.server.devices=[0,1]"], "need 4"),
        ([SGLANG, "rollout.addresses=[http://node7:1]"], "weight_sync.transport=distributed"),
        (
            [SGLANG, "rollout.colocated=true", "weight_sync.transport=distributed"],
            "weight_sync.transport=tensor",
        ),
        (
            [SGLANG, "rollout.colocated=true", "rollout.server.start_seconds=1800"],
            "parallel.timeout_seconds=1800 must be above rollout.server.start_seconds=1800",
        ),
        (["rollout.overlap=true"], "algorithm.importance_cap"),
        ([SGLANG, "rollout.overlap=true", "rollout.colocated=true", "algorithm.importance_cap=2"], "colocated"),
        (
            ["rollout.engine=replay", "rollout.replay_dir=x", "rollout.overlap=true", "algorithm.importance_cap=2"],
            "replay",
        ),
        (["algorithm.old_logprobs=engine", "algorithm.importance_cap=2"], "importance_cap=null"),
        (["algorithm.old_logprobs=engine", "algorithm.statistics=step"], "statistics=batch"),
        (["train.deterministic=true", "rollout.overlap=true", "algorithm.importance_cap=2"], "rollout.engine=local"),
        (["algorithm.old_logprobs=engine", "rollout.overlap=true", "algorithm.importance_cap=2"], "old_logprobs=actor"),
        (["algorithm.old_logprobs=engine", "rollout.overlap=true"], "old_logprobs=actor and algorithm.importance_cap"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides, named):
    with pytest.raises(ConfigError, match=named.replace("[", r"\[")):
        checked(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [SGLANG],
        [SGLANG, "rollout.addresses=[http://node7:1,http://node8:1]", "weight_sync.transport=distributed"],
        [SGLANG, "rollout.addresses=[http://node7:1]", "weight_sync.transport=disk"],
        [SGLANG, "rollout.server.host=0.0.0.0", "rollout.api_key_variable=KEY"],
        [SGLANG, "rollout.colocated=true"],
        ["rollout.overlap=true", "algorithm.importance_cap=2"],
        [SGLANG, "rollout.overlap=true", "algorithm.importance_cap=2", "train.deterministic=true"],
        ["algorithm.old_logprobs=engine"],
    ],
)
def test_what_fits_is_taken(overrides):
    checked(*overrides)


def test_the_api_key_comes_from_the_environment(monkeypatch):
    config = checked(SGLANG, "rollout.api_key_variable=POLICYSPLIT_TEST_KEY")
    monkeypatch.delenv("POLICYSPLIT_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="POLICYSPLIT_TEST_KEY: that environment variable is not set"):
        api_key(config.rollout)
    monkeypatch.setenv("POLICYSPLIT_TEST_KEY", "secret")
    assert api_key(config.rollout) == "secret"
    assert api_key(checked(SGLANG).rollout) is None
