"""A whole run with train.deterministic: on the CPU it is the same run, and its log says what was set."""

from tests.support import e2e

VARIABLES = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


def test_a_deterministic_run_is_the_same_run(config, straight, tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    run = e2e.train(config, tmp_path / "run", "train.deterministic=true")
    e2e.assert_same_run(run.directory, straight.directory)
    said = "environment: NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, CUBLAS_WORKSPACE_CONFIG=:4096:8, NCCL_ALGO=Ring"
    assert run.text().count(said) == (run.directory / "messages.log").read_text().count(said) == 1
    assert "environment:" not in straight.text()
