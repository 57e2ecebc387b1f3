"""The example configurations load and pass every check that needs no files; the Slurm script parses."""

import subprocess
from pathlib import Path

import pytest

from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.load import load_config, world_size
from megatron_policysplit.study.config import load_study

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDIES = sorted(EXAMPLES.rglob("study.yaml"))
CONFIGS = sorted(set(EXAMPLES.rglob("*.yaml")) - set(STUDIES))


def test_there_are_examples():
    assert {path.relative_to(EXAMPLES).parts[0] for path in CONFIGS} == {
        "quickstart",
        "quickstart_sglang",
        "smollm2",
        "qwen3_8b",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_loads_without_warnings(path):
    assert check_config(load_config(str(path), [])) == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_study_loads(path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    study = load_study(path)
    by_method = {run.method: run for run in study.runs}
    assert len({run.directory for run in study.runs}) == len(study.runs) > len(by_method)
    for run in study.runs:
        assert f"run.dir={run.directory}" in study.settings(run)
        assert study.preparation(run)[-1] == str(run.seed)
    for run in by_method.values():  # of all runs it would take seconds
        assert load_config(study.config, study.settings(run)).run.dir == str(run.directory)


def test_qwen3_8b_has_the_papers_hyper_parameters():
    """Tables 8 and 9 and section 4.1 of arXiv 2604.11510."""
    config = load_config(str(EXAMPLES / "qwen3_8b" / "config.yaml"), [])
    algorithm, train, rollout = config.algorithm, config.train, config.rollout
    options = build_algorithm(algorithm).options
    assert (algorithm.name, options.variant) == ("policy_split", "paper")
    assert (options.alpha, options.eta, options.eta_normal, options.kappa) == (0.5, 0.03, 0.0, 2.0)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef) == (0.2, 0.2, 0.0)
    assert (config.data.batch_questions, rollout.samples_per_question, rollout.max_response_tokens) == (256, 8, 12288)
    assert (train.learning_rate, train.lr_decay, train.weight_decay, train.clip_grad) == (3e-6, "constant", 0.01, 1.0)
    assert train.steps == 20_000 // config.data.batch_questions


def test_qwen3_8b_layout_divides_the_model():
    from megatron_policysplit.config.model_layout import check_layout

    config = load_config(str(EXAMPLES / "qwen3_8b" / "config.yaml"), [])
    qwen3_8b = {  # as its config.json says
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    check_layout(qwen3_8b, config.parallel.tensor, config.parallel.pipeline)
    options = [line.split("=") for line in script().splitlines() if line.startswith("#SBATCH --")]
    slurm = {name.removeprefix("#SBATCH --"): rest[-1] for name, *rest in options if rest}
    assert world_size(config) == int(slurm["nodes"]) * int(slurm["ntasks-per-node"])
    assert slurm["ntasks-per-node"] == slurm["gpus-per-node"]


@pytest.mark.parametrize(
    ("code", "says", "requeues"),
    [(0, "done", False), (75, "requeued", True), (2, "bad input", False), (1, "failed with exit code 1", False)],
)
def test_slurm_script_follows_the_exit_code(tmp_path, code, says, requeues):
    """With stand-ins for Slurm's commands: what is started, and what becomes of each documented exit code."""
    stand_ins = {
        "policysplit": 'echo "policysplit 0.0"',
        "srun": f'echo "srun $*"; exit {code}',
        "scontrol": 'echo "scontrol $*"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_CPUS_PER_TASK": "8",
    }
    result = subprocess.run(
        ["bash", EXAMPLES / "slurm" / "train.sbatch", "run.yaml", "train.steps=3"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (code, "")
    assert "policysplit train run.yaml train.steps=3\n" in result.stdout
    assert says in result.stdout.splitlines()[-1 - requeues]
    assert ("scontrol requeue 7" in result.stdout) == requeues


def test_slurm_script_without_a_config_or_policysplit():
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for arguments, message in (([], "usage: sbatch"), (["run.yaml"], "policysplit is not on PATH")):
        command = ["bash", EXAMPLES / "slurm" / "train.sbatch", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and message in result.stderr


def script() -> str:
    return (EXAMPLES / "slurm" / "train.sbatch").read_text(encoding="utf-8")
