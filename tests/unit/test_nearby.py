"""A directory near the right one is told with the one that is meant: runs, lists of checkpoints, caches."""

import pytest

from checkpoints_conv.describe import describe
from checkpoints_conv.errors import CheckpointError, ModelError
from checkpoints_conv.megatron_reader import MegatronCheckpoint
from checkpoints_conv.reader import read_hf_config


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints, one that was interrupted, and an exported model."""
    run = tmp_path / "mine"
    names = ("step_000009", "step_000010", "step_000011.partial")
    touch(run / "config.yaml", *(run / "checkpoints" / name / "metadata.json" for name in names))
    touch(run / "checkpoints" / "step_000010" / "common.pt", run / "hf" / "model.safetensors")
    (run / "hf" / "config.json").write_text("{}")
    return run


def refused_megatron(path) -> str:
    with pytest.raises(CheckpointError) as error:
        MegatronCheckpoint(path, None)
    return str(error.value)


def refused_hf(path) -> str:
    with pytest.raises(ModelError) as error:
        read_hf_config(path)
    return str(error.value)


def test_a_run_instead_of_a_checkpoint(run):
    newest = run / "checkpoints" / "step_000010"
    assert refused_megatron(run) == f"{run} is a run; give one of its checkpoints, such as {newest}"
    checkpoints = run / "checkpoints"
    assert refused_megatron(checkpoints) == (
        f"{checkpoints} holds checkpoints; give one of its checkpoints, such as {newest}"
    )


def test_a_directory_of_megatron_lms(tmp_path):
    touch(*(tmp_path / f"iter_{number:07}" / ".metadata" for number in (900, 1000)), tmp_path / "latest.txt")
    assert refused_megatron(tmp_path).endswith(f"such as {tmp_path / 'iter_0001000'}")


def test_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert refused_megatron(tmp_path) == (
        f"{tmp_path} is a run that has no checkpoint yet; give a checkpoint of another run"
    )


def test_a_hugging_face_directory_instead_of_a_checkpoint(run):
    hf = run / "hf"
    assert refused_megatron(hf) == (
        f"{hf} is a Hugging Face directory, not a Megatron-Core checkpoint; make one of it with "
        f"`policysplit convert hf-to-megatron --hf {hf} --out DIR`"
    )


def test_the_hugging_face_files_of_a_converted_checkpoint(tmp_path):
    touch(tmp_path / "metadata.json", tmp_path / "hf" / "config.json")
    assert refused_megatron(tmp_path / "hf") == f"{tmp_path / 'hf'} is a part of a checkpoint; give {tmp_path}"


def test_pickled_checkpoints_are_still_told(tmp_path):
    touch(tmp_path / "iter_1" / "mp_rank_00" / "model.pt")
    assert "pickled checkpoints (.pt, .pth, .bin) are not read" in refused_megatron(tmp_path)


def test_a_run_instead_of_a_model(run):
    expected = f"{run / 'config.json'} is missing; give {run / 'hf'}, which is a Hugging Face model directory"
    assert refused_hf(run) == expected
    with pytest.raises(ModelError) as error:
        describe(run)
    assert str(error.value) == expected


def test_a_checkpoint_instead_of_a_model(run):
    newest = run / "checkpoints" / "step_000010"
    convert = (
        f"make a Hugging Face directory of it with `policysplit convert megatron-to-hf --megatron {newest} --out DIR`"
    )
    assert refused_hf(newest) == f"{newest / 'config.json'} is missing; this is a Megatron-Core checkpoint; {convert}"
    checkpoints = run / "checkpoints"
    assert refused_hf(checkpoints).endswith(f" is missing; {newest} is a Megatron-Core checkpoint; {convert}")


def test_a_model_of_the_hubs_cache(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0a1b"
    touch(snapshot / "config.json", snapshot / "model.safetensors")
    assert refused_hf(tmp_path / "models--a--b").endswith(f"give {snapshot}, which is a Hugging Face model directory")


def test_a_file_instead_of_its_directory(run):
    file = run / "hf" / "model.safetensors"
    assert refused_hf(file) == f"model directory {file} is a file; give its directory {run / 'hf'}"


def test_a_directory_with_nothing_near(tmp_path):
    assert refused_hf(tmp_path) == f"{tmp_path / 'config.json'} is missing; a Hugging Face model directory needs it"
    assert refused_megatron(tmp_path) == f"{tmp_path} has no metadata.json of a torch_dist checkpoint"
