"""A conversion killed at any of its write operations leaves nothing that is taken for a checkpoint."""

import builtins
import io
import os
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from checkpoints_conv import check_safetensors
from checkpoints_conv.describe import describe
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from checkpoints_conv.quantize import import_modelopt, quantize
from megatron_policysplit.errors import CheckpointError, ModelError
from tests.support.conversion import assert_same_model, make_tree
from tests.support.hf_models import make_model

KILLED = 9
MOMENTS = 10


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def original(request, tmp_path_factory):
    few = {"num_experts": 2, "num_experts_per_tok": 2} if request.param == "qwen3_moe" else {}
    root = tmp_path_factory.mktemp("models")
    return make_tree(make_model(root / "hf", request.param, tied=True, num_hidden_layers=1, **few))


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "megatron"
    hf_to_megatron(original, out)
    return out


class Operations:
    """Counts what changes the disk in this process: files made and written, syncs, directories, renames.

    It ends the process before number `last` (from 0); `last` None lets all happen.
    """

    def __init__(self, last=None):
        self.count, self.last = 0, last

    def happens(self):
        if self.count == self.last:
            os._exit(KILLED)
        self.count += 1

    def watch(self):
        for module, name in ((os, "mkdir"), (os, "rename"), (os, "pwrite"), (os, "fsync"), (shutil, "copyfile")):
            setattr(module, name, self._counted(getattr(module, name)))
        for module in (builtins, io):
            module.open = self._counted_files(module.open)

    def _counted(self, function):
        def counted(*arguments, **options):
            self.happens()
            return function(*arguments, **options)

        return counted

    def _counted_files(self, function):
        def opened(file, mode="r", *arguments, **options):
            if not set(mode) & set("wxa"):
                return function(file, mode, *arguments, **options)
            self.happens()
            stream = function(file, mode, *arguments, **options)
            stream_write = stream.write

            class Counted:
                def __getattr__(_, name):
                    return getattr(stream, name)

                def __enter__(counted):
                    return counted

                def __exit__(_, *exc_info):
                    stream.close()

                def write(_, data):
                    self.happens()
                    written = stream_write(data)
                    stream.flush()  # a killed process must not be saved by what it had not written yet
                    return written

            return Counted()

        return opened


def in_child(work, last):
    """Run `work` in a forked process that is killed at operation `last`; (operations, exit code)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            operations = Operations(last)
            operations.watch()
            work()
            os.write(writing, str(operations.count).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    return int(text or 0), os.waitstatus_to_exitcode(status)


def directories(root):
    return [path for path in Path(root).rglob("*") if path.is_dir()]


def to_fp8(source, out):
    quantize(source, out, "fp8", input_maxima=lambda: defaultdict(lambda: 1.0), max_shard_bytes=30_000)


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf", "quantize"])
def test_killed_at_any_write_operation(original, converted, tmp_path, direction):
    source, convert = {
        "hf-to-megatron": (original, hf_to_megatron),
        "megatron-to-hf": (converted, lambda source, out: megatron_to_hf(source, out, max_shard_bytes=60_000)),
        "quantize": (original, to_fp8),
    }[direction]
    if direction == "quantize":
        import_modelopt()  # before the fork, so that its own files do not count
    count, code = in_child(lambda: convert(source, tmp_path / "whole"), None)
    assert code == 0 and count >= 2 * MOMENTS
    describe(tmp_path / "whole")
    moments = sorted(
        {round(moment * (count - 1) / (MOMENTS - 1)) for moment in range(MOMENTS)} | {count - 2, count - 3}
    )
    renamed = 0
    for moment in moments:
        root = tmp_path / f"killed-{moment}"
        root.mkdir()
        out = root / "out"
        _, code = in_child(lambda out=out: convert(source, out), moment)
        assert code == KILLED, moment
        renamed += out.exists()
        for path in directories(root):
            if path == out:
                continue
            with pytest.raises((ModelError, CheckpointError)):
                describe(path)
            with pytest.raises(ModelError):
                check_safetensors(path)
        if out.exists():  # only the sync of its parent directory was to come
            assert moment == count - 1
            describe(out)
            shutil.rmtree(out)
        convert(source, out)
        assert [path.name for path in root.iterdir()] == ["out"]
        if direction == "megatron-to-hf":
            assert_same_model(original, out)
    assert len(moments) >= MOMENTS and renamed == 1
