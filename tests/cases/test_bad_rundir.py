"""Run directories, checkpoints, results and consoles that are in use, damaged, full or gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest


def trained(work, name: str = "r", *overrides: str) -> Path:
    """The directory of a run of two steps."""
    work.accepted("train", "base.yaml", f"run.dir={name}", *overrides)
    return work / name


def wait_for(condition, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_a_configuration_of_the_users_own(work):
    notes = "# my notes\n" + (work / "base.yaml").read_text().replace("runs/base", "exp1")
    (work / "exp1").mkdir()
    (work / "exp1" / "config.yaml").write_text(notes)
    said = work.refused("train", "exp1/config.yaml")
    assert said == (
        "error: run.dir=exp1 holds a config.yaml that no run has written, and training would replace it; give another "
        "run.dir, or rename exp1/config.yaml"
    )
    (work / "config.yaml").write_text(notes)
    assert "run.dir=. holds a config.yaml" in work.refused("train", "config.yaml", "run.dir=.")
    (work / "exp2").mkdir()
    (work / "exp2" / "config.yaml").write_text("lr: 1\n")
    assert "run.dir=exp2 holds a config.yaml" in work.refused("train", "base.yaml", "run.dir=exp2")
    assert (work / "exp1" / "config.yaml").read_text() == (work / "config.yaml").read_text() == notes
    assert (work / "exp2" / "config.yaml").read_text() == "lr: 1\n"
    assert [path.name for path in (work / "exp1").iterdir()] == ["config.yaml"]


def test_two_trainings_in_one_directory(work):
    long = ("base.yaml", "run.dir=r", "train.steps=4000", "checkpoint.every=0")
    first = work.start("train", *long)
    try:
        wait_for((work / "r" / "run.lock").exists, first)
        said = work.refused("train", *long, "train.learning_rate=5e-3")
        assert said.startswith(f"error: run.dir=r is in use by process {first.pid} on ")
        assert said.endswith(", or give another run.dir") and f"(kill {first.pid} on " in said
        variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
        assert f"is in use by process {first.pid} " in work.refused("train", *long, **variables)
        work.accepted("config", *long)
        wait_for(
            lambda: (work / "r" / "metrics.jsonl").exists() and (work / "r" / "metrics.jsonl").stat().st_size, first
        )
        work.accepted("report", "r")
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 75
    assert not (work / "r" / "run.lock").exists()
    assert "learning_rate: 0.001" in (work / "r" / "config.yaml").read_text()


def test_a_launcher_that_was_killed(work):
    """Its ranks end with it, and the next training follows at once."""
    long = ("base.yaml", "run.dir=r", "parallel.tensor=2", "train.steps=4000", "checkpoint.every=0")
    first = work.start("train", *long)
    wait_for((work / "r" / "run.lock").exists, first)
    first.kill()
    first.communicate()
    assert (work / "r" / "run.lock").exists()
    work.accepted("train", "base.yaml", "run.dir=r")
    assert not (work / "r" / "run.lock").exists()


def test_a_requeued_job_on_another_node(work):
    """Its predecessor was killed on its node a minute ago and left its name."""
    trained(work)
    holder = {"host": "node7", "pid": 4711, "since": "2026-01-01 00:00:00 UTC", "boot": "b", "pid_space": "p"}
    lock = work / "r" / "run.lock"
    lock.write_text(json.dumps(holder | {"started": "1"}) + "\n")
    os.utime(lock, (time.time() - 70, time.time() - 70))
    assert "resumed" in work.accepted("train", "base.yaml", "run.dir=r", "train.steps=3")


def test_fewer_steps_than_are_done(work):
    trained(work)
    assert "nothing to train: all 2 steps" in work.accepted("train", "base.yaml", "run.dir=r")
    said = work.refused("train", "base.yaml", "run.dir=r", "train.steps=1")
    assert said == (
        "error: train.steps=1 is fewer than the 2 steps that the run in run.dir=r has trained "
        "(r/checkpoints/step_000002); raise train.steps, or give another run.dir"
    )


def test_a_damaged_newest_checkpoint(work):
    directory = trained(work) / "checkpoints" / "step_000002"
    whole = shutil.copytree(directory, work / "whole")

    def refused(damage) -> str:
        damage()
        said = work.refused("train", "base.yaml", "run.dir=r", "train.steps=3")
        shutil.rmtree(directory)
        shutil.copytree(whole, directory)
        assert said.startswith("error: r/checkpoints/step_000002 is damaged (")
        assert said.endswith("); move it away to resume from step_000001")
        return said

    size = (directory / "__0_0.distcp").stat().st_size
    assert f"(__0_0.distcp has 100 bytes, saved were {size})" in refused(
        lambda: os.truncate(directory / "__0_0.distcp", 100)
    )
    assert "(__0_0.distcp is missing)" in refused((directory / "__0_0.distcp").unlink)
    assert "(common.pt has 1 bytes, " in refused(lambda: (directory / "common.pt").write_text("x"))
    assert "(trainer.json has no 'layout')" in refused(
        lambda: (directory / "trainer.json").write_text('{"state": {"step": 2}, "model": {}}')
    )
    shutil.move(directory, work / "away")
    assert "resumed from r/checkpoints/step_000001" in work.accepted("train", "base.yaml", "run.dir=r")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("__0_0.distcp", 100, "__0_0.distcp has 100 bytes, at least "),
        ("__0_1.distcp", None, "__0_1.distcp is missing"),
        ("common.pt", "x", "a pickle in it cannot be read"),
        ("rng_rank00000.safetensors", 10, "rng_rank00000.safetensors: "),
    ],
)
def test_a_damaged_checkpoint_without_sizes(work, file, content, reason):
    """As versions before wrote them: found by the ranks."""
    directory = trained(work) / "checkpoints" / "step_000002"
    meta = json.loads((directory / "trainer.json").read_text())
    del meta["files"]
    (directory / "trainer.json").write_text(json.dumps(meta))
    if content is None:
        (directory / file).unlink()
    elif isinstance(content, int):
        os.truncate(directory / file, content)
    else:
        (directory / file).write_text(content)
    said = work.refused("train", "base.yaml", "run.dir=r", "train.steps=3")
    assert said.startswith(f"error: r/checkpoints/step_000002 is damaged ({reason}")
    assert said.endswith("); move it away to resume from step_000001")


@contextmanager
def small_disk(path: Path, nbytes: int):
    """A file system of a few megabytes."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize(
    ("room", "file", "overrides"),
    [
        (20_000, "rollouts/step_000001.jsonl", []),
        (200_000, "checkpoints/step_000001", []),
        (200_000, "checkpoints/step_000001", ["parallel.tensor=2"]),
        (600_000, "hf", ["checkpoint.every=0", "train.steps=1"]),
    ],
)
def test_a_disk_that_is_full(work, room, file, overrides):
    """Which file comes upon it differs; the last line names it, and the same command goes on."""
    size, command = 3 * 2**20, ("train", "base.yaml", "run.dir=s/r", *overrides)
    with small_disk(work / "s", size) as disk:
        if file == "hf":  # with the checkpoint there already
            work.accepted(*command)
            shutil.rmtree(disk / "r" / "hf")
        used = shutil.disk_usage(disk).used
        (disk / "f").write_bytes(bytes(size - used - (room if file != "hf" else 50_000)))
        process = work.start(*command)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1, stderr
        assert stderr.splitlines()[-1] == (
            f"error: s/r/{file} cannot be written: No space left on device; free some space, or write to another disk, "
            "and run the same command again"
        )
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        work.accepted(*command)
        assert (disk / "r" / "hf" / "config.json").exists()


def test_results_on_a_full_disk(work):
    directory = trained(work)
    with small_disk(work / "s", 64 * 1024) as disk:
        (disk / "old.json").write_text('{"model": 1, "data": 1, "reward": 1, "modes": 1}')
        with (disk / "f").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        evaluation = ("eval", "--model", "model", "--data", "q.jsonl", "--reward", "exact", "--samples", "4")
        said = work.refused(*evaluation, "--max-tokens", "4", "--output", "s/x.json", code=1)
        assert said.startswith("error: s/x.json cannot be written: No space left on device; free some space")
        work.refused(*evaluation, "--max-tokens", "4", "--output", "s/old.json", code=1)
        said = work.refused("report", "r", "--output", "s/x.html", code=1)
        assert said.startswith("error: s/x.html cannot be written: No space left on device")
        assert sorted(path.name for path in disk.iterdir()) == ["f", "old.json"]
        assert json.loads((disk / "old.json").read_text())["model"] == 1
    assert not (directory / "report.html").exists()


def test_an_output_that_is_an_input(work):
    directory = trained(work)
    questions, metrics = (work / "q.jsonl").read_bytes(), (directory / "metrics.jsonl").read_bytes()
    evaluation = ("eval", "--model", "model", "--data", "q.jsonl", "--reward", "exact", "--samples", "4")
    said = work.refused(*evaluation, "--output", "q.jsonl")
    assert said == "error: --output q.jsonl is q.jsonl, which the command reads; give another file"
    (work / "link.json").symlink_to("q.jsonl")
    assert "link.json is q.jsonl, which the command reads" in work.refused(*evaluation, "--output", "link.json")
    os.link(work / "base.yaml", work / "hard.json")
    said = work.refused(*evaluation, "--config", "base.yaml", "--output", "hard.json")
    assert "hard.json is base.yaml, which the command reads" in said
    for path in ("model/config.json", "base.yaml"):
        said = work.refused(*evaluation, "--output", path)
        assert said == (
            f"error: --output {path} exists and is no older result of this command; give another file, or remove it"
        )
    assert "metrics.jsonl exists and is no older result" in work.refused("report", "r", "--output", "r/metrics.jsonl")
    assert (work / "q.jsonl").read_bytes() == questions
    assert (directory / "metrics.jsonl").read_bytes() == metrics
    for _ in range(2):  # an older result may be replaced
        work.accepted(*evaluation, "--max-tokens", "4", "--output", "x.json")
        work.accepted("report", "r")


def test_a_report_on_an_odd_run(work):
    directory = trained(work)
    dump = directory / "rollouts" / "step_000002.jsonl"
    shutil.copy(dump, directory / "rollouts" / "step_2 copy.jsonl")
    dump.write_text('{"x": 1}\n')
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "train", "my/note": "a text"}\n')
    result = work.run("report", "r")
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "note: r/metrics.jsonl:3: my/note=a text is no number and is left out",
        "note: r/rollouts/step_2 copy.jsonl is no dump of a step and is left out",
        "note: r/rollouts/step_000002.jsonl:1 is no rollout and is left out",
    ]
    (directory / "config.yaml").unlink()
    (directory / "config.yaml").mkdir()
    assert "r/config.yaml is not a YAML mapping" in work.refused("report", "r")
    (directory / "metrics.jsonl").unlink()
    (directory / "metrics.jsonl").mkdir()
    assert "r/metrics.jsonl cannot be read (Is a directory)" in work.refused("report", "r")


def with_lost_output(work, *arguments: str, output: str = "pipe") -> tuple[int, str]:
    """Exit code and stderr of a command whose output's reader has ended, or that writes to a full disk."""
    if output == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_policysplit.cli", *arguments],
            cwd=work.path,
            env=work.environ({}),
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_console_that_goes_away(work):
    for output, reason in (("pipe", "Broken pipe"), ("full", "No space left on device")):
        code, stderr = with_lost_output(work, "train", "base.yaml", f"run.dir={output}", "train.steps=3", output=output)
        assert code == 0, stderr
        assert stderr.count(f"the console is gone ({reason}); the training goes on without it") == 1
        assert f"the console is gone ({reason})" in (work / output / "messages.log").read_text()
        assert len((work / output / "metrics.jsonl").read_text().splitlines()) == 3
        assert (work / output / "hf").is_dir()
    assert with_lost_output(work, "config", "base.yaml") == (141, "")
    full = (1, "error: standard output cannot be written: No space left on device; send it elsewhere\n")
    assert with_lost_output(work, "config", "base.yaml", output="full") == full
    assert with_lost_output(work, "report", "pipe", output="full") == full
