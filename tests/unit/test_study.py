"""The study runner with a stub in place of `policysplit train`: order, resumption, failures, signals, bad files."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from megatron_policysplit.errors import DONE, FAILED, STOPPED, ConfigError
from megatron_policysplit.study.config import Study, StudyRun, fill, load_study, parse_study
from megatron_policysplit.study.runner import run_study
from tests.support import stub_trainer

ROOT = Path(__file__).parents[2]
TRAINER = [sys.executable, str(ROOT / "tests" / "support" / "stub_trainer.py")]


def make_study(directory: Path, **changes) -> Study:
    config = directory / "run.yaml"
    config.write_text("model: {path: m}\ndata: {path: d}\ntrain: {steps: 3}\n")
    methods = {"grpo": ["algorithm.name=grpo"], "policy_split": ["algorithm.name=policy_split"]}
    given = {"config": str(config), "dir": str(directory / "out"), "seeds": [0, 3], "methods": methods}
    return Study(**{**given, "baseline": "grpo", **changes})


def run(study: Study) -> tuple[int, list[str]]:
    said = []
    return run_study(study, trainer=TRAINER, say=said.append), said


def starts(study: Study) -> dict[str, list[str]]:
    return {
        one.name: (one.directory / "starts").read_text().split() if one.directory.exists() else [] for one in study.runs
    }


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_run_once_and_never_again(tmp_path, at_once):
    study = make_study(tmp_path, at_once=at_once)
    code, said = run(study)
    assert code == DONE
    assert starts(study) == {f"{m}/seed_{s}": ["-"] for m in ("grpo", "policy_split") for s in (0, 3)}
    assert said[0] == f"study of 4 runs in {study.dir}: 0 finished, 4 to run"
    code, said = run(study)
    assert (code, said) == (DONE, [f"study of 4 runs in {study.dir}: 4 finished, 0 to run"])
    assert set(map(len, starts(study).values())) == {1}


def test_a_changed_method_runs_again_and_the_others_do_not(tmp_path):
    study = make_study(tmp_path)
    run(study)
    changed = make_study(tmp_path, methods={**study.methods, "grpo": ["algorithm.name=grpo", "train.steps=4"]})
    assert run(changed)[0] == DONE
    assert {name: len(found) for name, found in starts(study).items()} == {
        "grpo/seed_0": 2, "grpo/seed_3": 2, "policy_split/seed_0": 1, "policy_split/seed_3": 1,
    }  # fmt: skip


def test_a_failed_run_is_told_and_does_not_stop_the_others(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    monkeypatch.setenv("STUB_FAILS", "grpo")
    code, said = run(study)
    assert code == FAILED
    log = study.runs[0].log
    assert any(f"grpo/seed_0: failed: the stub was told to fail (exit code 1; {log})" in line for line in said)
    assert set(map(len, starts(study).values())) == {1}
    monkeypatch.delenv("STUB_FAILS")
    assert run(study)[0] == DONE
    assert {name: len(found) for name, found in starts(study).items()} == {
        "grpo/seed_0": 2, "grpo/seed_3": 2, "policy_split/seed_0": 1, "policy_split/seed_3": 1,
    }  # fmt: skip


def test_a_failed_run_stops_the_study_where_asked(tmp_path, monkeypatch):
    study = make_study(tmp_path, stop_on_failure=True)
    monkeypatch.setenv("STUB_FAILS", "grpo")
    assert run(study)[0] == FAILED
    assert {name: len(found) for name, found in starts(study).items()} == {
        "grpo/seed_0": 1, "grpo/seed_3": 0, "policy_split/seed_0": 0, "policy_split/seed_3": 0,
    }  # fmt: skip


def test_a_run_that_stopped_by_itself_is_left_for_later(tmp_path):
    study = make_study(tmp_path, seeds=[0], methods={"grpo": []})
    assert run_study(study, trainer=[sys.executable, "-c", "import sys; sys.exit(75)"], say=lambda _: None) == STOPPED
    code, said = run(make_study(tmp_path, seeds=[0], methods={"grpo": ["algorithm.name=grpo"]}))
    assert (code, said[0]) == (DONE, f"study of 1 runs in {study.dir}: 0 finished, 1 to run")


def test_preparation_once_a_seed_before_its_runs(tmp_path):
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(parents=True); print(sys.argv[1])"
    prepare = f'{{python}} -c "{script}" {{dir}}/prepared_{{seed}}'
    study = make_study(tmp_path, prepare=prepare, at_once=2)
    assert run(study)[0] == DONE  # a second mkdir would have failed
    assert sorted(path.name for path in Path(study.dir).glob("prepared_*")) == ["prepared_0", "prepared_3"]
    assert run(make_study(tmp_path, prepare=prepare, seeds=[0, 3, 4]))[0] == DONE
    assert (Path(study.dir) / "prepared_4").exists()


def test_a_preparation_that_fails_fails_its_runs_alone(tmp_path):
    prepare = "{python} -c \"import sys; sys.exit('no model' if {seed} else 0)\""
    study = make_study(tmp_path, prepare=prepare)
    code, said = run(study)
    assert code == FAILED
    assert {name: len(found) for name, found in starts(study).items()} == {
        "grpo/seed_0": 1, "grpo/seed_3": 0, "policy_split/seed_0": 1, "policy_split/seed_3": 0,
    }  # fmt: skip
    assert "grpo/seed_3: failed: its preparation failed: no model (exit code 1; " in "\n".join(said)


def test_environment_with_a_slot(tmp_path):
    study = make_study(tmp_path, environment={"STUB_VARIABLE": "{run}-{seed}-{slot}"}, at_once=4)
    assert run(study)[0] == DONE
    found = [value for values in starts(study).values() for value in values]
    assert sorted(value.rsplit("-", 1)[1] for value in found) == ["0", "1", "2", "3"]
    assert {value.rsplit("-", 1)[0] for value in found} == {f"{m}-{s}" for m in study.methods for s in (0, 3)}


def test_runs_do_not_inherit_the_variables_of_a_launcher(tmp_path, monkeypatch):
    left = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (left | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}).items():
        monkeypatch.setenv(name, value)
    names = [*left, "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_JOB_ID"]
    code = f"import os; found = [n for n in {names} if n in os.environ]; raise SystemExit(f'error: {{found}}')"
    study = make_study(tmp_path, environment={"WORLD_SIZE": "{seed}"}, seeds=[3])
    said = []
    assert run_study(study, trainer=[sys.executable, "-c", code], say=said.append) == FAILED
    # What the study itself names is the run's; the job is no rank's.
    assert sum("failed: ['WORLD_SIZE', 'SLURM_JOB_ID'] (exit code 1; " in line for line in said) == 2


def start_process(study: Study, **environ) -> subprocess.Popen:
    code = f"""
        import sys
        from megatron_policysplit.study.config import Study
        from megatron_policysplit.study.runner import run_study
        sys.exit(run_study(Study(**{study.__dict__!r}), trainer={TRAINER!r}, say=print))
    """
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environ, stdout=subprocess.DEVNULL)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(run: StudyRun) -> int:
    file = run.directory / "metrics.jsonl"
    return len(file.read_text().splitlines()) // 2 if file.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_in_the_middle_it_goes_on(tmp_path, number):
    """grpo of both seeds is done or waits; policy_split of seed 0 hangs before its last step."""
    study = make_study(tmp_path)
    process = start_process(study, STUB_HANGS="policy_split")
    hanging = study.runs[1]
    wait_for(lambda: steps(hanging) == stub_trainer.STEPS - 1)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == (STOPPED if number != signal.SIGKILL else -signal.SIGKILL)
    children = ["pgrep", "-f", f"run.dir={study.dir}/"]
    wait_for(lambda: subprocess.run(children, capture_output=True).returncode == 1)
    assert {name: len(found) for name, found in starts(study).items()} == {
        "grpo/seed_0": 1, "policy_split/seed_0": 1, "grpo/seed_3": 0, "policy_split/seed_3": 0,
    }  # fmt: skip
    assert run(study)[0] == DONE
    assert {name: len(found) for name, found in starts(study).items()} == {
        "grpo/seed_0": 1, "policy_split/seed_0": 2, "grpo/seed_3": 1, "policy_split/seed_3": 1,
    }  # fmt: skip
    assert {steps(one) for one in study.runs} == {stub_trainer.STEPS}


def test_two_studies_in_one_directory(tmp_path):
    study = make_study(tmp_path)
    process = start_process(study, STUB_HANGS="grpo")
    wait_for(lambda: study.runs[0].directory.exists())
    with pytest.raises(ConfigError, match="^dir=.*out is in use by process .*, or give another dir$"):
        run(study)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == STOPPED


def test_a_damaged_state_and_a_directory_that_is_a_file(tmp_path):
    study = make_study(tmp_path)
    Path(study.dir).mkdir()
    (Path(study.dir) / "study_state.json").write_text("{")
    with pytest.raises(ConfigError, match="study_state.json is damaged; delete it"):
        run(study)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^dir=.*file cannot be written: File exists; give another dir$"):
        run(make_study(tmp_path, dir=str(tmp_path / "file")))


def test_placeholders_and_settings(tmp_path):
    study = make_study(
        tmp_path,
        overrides=["model.path={dir}/seed_{seed}/model"],
        methods={"a": ["algorithm.options={policy_split: {eta: 0}}", "data.path={run}.jsonl"]},
    )
    one = study.runs[1]
    assert study.settings(one) == [
        f"model.path={study.dir}/seed_3/model",
        "algorithm.options={policy_split: {eta: 0}}",
        "data.path=a.jsonl",
        "run.seed=3",
        f"run.dir={study.dir}/a/seed_3",
    ]
    assert fill("{python} {slot} {other}", "d", one, 2) == f"{sys.executable} 2 {{other}}"


def test_what_yaml_takes_for_something_else_in_a_study(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {path: d}\n")
    file = tmp_path / "s.yaml"

    def load(**changes: str) -> Study:
        lines = {"config": "~/c.yaml", "dir": "~/out", "seeds": "[0]", "methods": "{grpo: }", "baseline": "grpo"}
        file.write_text("".join(f"{name}: {text}\n" for name, text in (lines | changes).items()))
        return load_study(file)

    study = load(environment="{A: 010, B: 1.10, C: yes, D: '1'}", prepare="'{python} ~/make.py --to=~/x'")
    assert (study.config, study.dir) == (f"{tmp_path}/c.yaml", f"{tmp_path}/out")
    assert study.environment == {"A": "010", "B": "1.10", "C": "yes", "D": "1"}
    assert study.preparation(study.runs[0]) == [sys.executable, f"{tmp_path}/make.py", "--to=~/x"]
    assert load(methods="{010: }", baseline="'010'").runs[0].name == "010/seed_0"
    for change, message in [
        ({"dir": "1.10"}, f"dir=1.10 is not a string but a number to YAML ({file}, line 2); put it in quotes"),
        ({"baseline": "010"}, f"baseline=010 is not a string but a number to YAML ({file}, line 5); put it in quotes"),
        ({"seeds": "[010]"}, f"seeds=010 is 8 to YAML ({file}, line 3); write the number you mean"),
        ({"seeds": "[1.0]"}, "seeds=1.0 is not an integer; write 1"),
        ({"at_once": "2.0"}, "at_once=2.0 is not an integer; write 2"),
        ({"stop_on_failure": "1"}, "stop_on_failure=1 is not true or false"),
    ]:
        with pytest.raises(ConfigError) as error:
            load(**change)
        assert str(error.value) == message


GOOD = {
    "config": "c.yaml",
    "dir": "out",
    "seeds": [0, 1],
    "methods": {"grpo": ["algorithm.name=grpo"], "split": None},
    "baseline": "grpo",
}


def test_a_minimal_study():
    study = parse_study(GOOD, "s.yaml")
    assert study.methods == {"grpo": ["algorithm.name=grpo"], "split": []}
    assert (study.at_once, study.prepare, study.stop_on_failure, study.measures) == (1, None, False, [])
    assert [one.name for one in study.runs] == ["grpo/seed_0", "split/seed_0", "grpo/seed_1", "split/seed_1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [1]}, "s.yaml: unknown key seed; did you mean seeds?"),
        ({"xyz": 1}, "s.yaml: unknown key xyz; the keys are config, dir, seeds, methods, baseline, overrides, "),
        ({"seeds": None}, "s.yaml: seeds is missing; give a list of seeds such as [0, 1, 2]"),
        ({"seeds": 5}, "s.yaml: seeds=5 is not a list of whole numbers from 0; write one such as [0, 1, 2]"),
        ({"seeds": [-1]}, "s.yaml: seeds=[-1] is not a list of whole numbers from 0; write one"),
        ({"seeds": [True]}, "s.yaml: seeds=[True] is not a list of whole numbers"),
        ({"seeds": [2, 2]}, "s.yaml: seeds=[2, 2] names 2 twice; remove one of them"),
        ({"methods": {"a/b": []}, "baseline": "a/b"}, "s.yaml: methods.a/b cannot name a directory; use letters"),
        ({"methods": {"a": "x=1"}}, "s.yaml: methods={'a': 'x=1'} is not a mapping of names to lists of key=value; "),
        ({"methods": {}}, "s.yaml: methods={} is not a mapping of names"),
        ({"baseline": "x"}, "s.yaml: baseline=x is none of the methods; use one of grpo, split"),
        ({"at_once": 0}, "s.yaml: at_once=0 is not a whole number from 1; use 1 to run one after the other"),
        ({"at_once": True}, "s.yaml: at_once=true is not a whole number"),
        ({"overrides": ["run.seed=1"]}, "s.yaml: overrides sets run.seed, which the study sets for every run; remove"),
        ({"methods": {"grpo": ["run.dir=x"]}}, "s.yaml: methods.grpo sets run.dir, which the study sets"),
        ({"overrides": ["a={slot}"]}, "s.yaml: overrides holds a={slot}, but {slot} stands in environment only"),
        ({"overrides": [{"a": 1}]}, "s.yaml: overrides=[{'a': 1}] is not a list of key=value texts"),
        ({"prepare": "echo 'x"}, "s.yaml: prepare=echo 'x is no command line (No closing quotation); fix it"),
        ({"prepare": " "}, "s.yaml: prepare is empty; write a command or remove the key"),
        ({"prepare": "nosuchprogram {seed}"}, "s.yaml: prepare=nosuchprogram {seed} starts with nosuchprogram, which"),
        ({"environment": {"A": [1]}}, "s.yaml: environment={'A': [1]} is not a mapping of variables to values"),
        ({"figures": ["grpo"]}, "s.yaml: figures=['grpo'] is not a mapping of titles to lists of methods"),
        (
            {"figures": {"A": ["grpo", "gpro"]}},
            "s.yaml: figures.A shows gpro, which is none of the methods; use some of",
        ),
        ({"measures": "x"}, "s.yaml: measures=x is not a list of names of metrics.jsonl"),
        ({"stop_on_failure": "no"}, "s.yaml: stop_on_failure=no is not true or false"),
        ({"config": 3}, "s.yaml: config=3 is not a text; write one"),
        (
            {"seeds": [0, 2**63]},
            f"s.yaml: seeds=[0, {2**63}] has {2**63}, which is no run.seed; it must be at ",
        ),
        ({"dir": "~nobody-here/x"}, "s.yaml: dir=~nobody-here/x: there is no home directory for ~nobody-here; give "),
    ],
)
def test_bad_keys_are_one_sentence(change, message):
    with pytest.raises(ConfigError) as error:
        parse_study({**GOOD, **change}, "s.yaml")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_bad_files_and_bad_runs(tmp_path):
    file = tmp_path / "s.yaml"
    with pytest.raises(ConfigError, match=f"^study {file} does not exist$"):
        load_study(file)
    with pytest.raises(ConfigError, match=f"^study {tmp_path} is a directory; give the path of a YAML file$"):
        load_study(tmp_path)
    file.write_text("a: [")
    with pytest.raises(ConfigError, match=r"^study .*s.yaml, line 1 is not valid YAML: "):
        load_study(file)
    file.write_text("- a")
    with pytest.raises(ConfigError, match="is not a mapping of keys to values; docs/study.md shows one"):
        load_study(file)
    config = tmp_path / "c.yaml"
    config.write_text("model: {path: m}\ndata: {path: d}\n")
    for methods, message in (
        (["algorithm.name=gpro"], "methods.grpo: algorithm.name=gpro is not allowed"),
        (["algorithm.options={policy_split: {etta: 1}}"], "methods.grpo: unknown key algorithm.options.policy_split.e"),
        (["parallel.sequence=true"], "methods.grpo: parallel.sequence=true splits tokens"),
        (
            ["algorithm.options={policy_split: {modes: {third: {eta: 1}}}}"],
            "methods.grpo: algorithm.options.policy_split.modes.third: the modes of this run are normal, high_entropy",
        ),
    ):
        file.write_text(yaml.safe_dump({**GOOD, "config": str(config), "methods": {"grpo": methods}}))
        with pytest.raises(ConfigError, match=f"^{file}: {message}"):
            load_study(file)
