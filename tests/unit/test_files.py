"""Files are replaced as a whole or not at all, and what cannot be written says why."""

import errno
import os
import stat

import pytest

from megatron_policysplit import files
from megatron_policysplit.errors import WriteError
from megatron_policysplit.files import disk_error, naming_writes, replace_text


class Full:
    """A file on a disk that takes `room` characters more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def flush(self):
        self.file.flush()

    def writelines(self, parts):
        for part in parts:
            self.write(part)

    def write(self, text):
        self.file.write(text[: self.room])
        self.room -= len(text)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """Whatever is opened from now on to be written is on a disk with room for 3 characters."""
    opened = files.Path.open

    def open_full(self, mode="r", *arguments, **names):
        file = opened(self, mode, *arguments, **names)
        return Full(file, 3) if "w" in mode else file

    monkeypatch.setattr(files.Path, "open", open_full)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x"
    replace_text(path, ["one\n", "two \ud83d\n"])
    assert path.read_text() == "one\ntwo \\ud83d\n"
    path.chmod(0o640)
    replace_text(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)
    replace_text(path, "private", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_links_and_what_is_no_file(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "link").symlink_to("x")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "x").read_text() == "new"
    replace_text(tmp_path / "new", "")  # a file of no length
    replace_text(files.Path(os.devnull), "gone")
    assert not files.Path(os.devnull).is_file()
    with pytest.raises(WriteError, match="^/dev/full cannot be written: No space left on device; free some space"):
        replace_text(files.Path("/dev/full"), "x")


def test_a_full_disk_leaves_the_old_file_and_nothing_beside(tmp_path, full_disk):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(WriteError) as error:
        replace_text(path, "longer than there is room")
    assert str(error.value) == (
        f"{path} cannot be written: No space left on device; free some space, or write to another disk, and run the "
        "same command again"
    )
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EDQUOT, "Disk quota exceeded; free some of your quota, or"),
        (errno.EROFS, "Read-only file system; see to that disk, or"),
        (errno.EIO, "Input/output error; see to that disk, or"),
    ],
)
def test_quota_read_only_and_broken_disks(number, said):
    with pytest.raises(WriteError, match=f"^runs/a cannot be written: {said} write to another disk"):
        with naming_writes("runs/a"):
            raise OSError(number, os.strerror(number))


def test_the_disks_own_error_is_found_behind_a_librarys(tmp_path, monkeypatch):
    from torch.distributed.checkpoint.api import CheckpointException

    assert disk_error(RuntimeError("unexpected pos 704 vs 598"), tmp_path / "not" / "there") is None
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("Worker failure: ...")
    wrapped.__cause__ = full
    assert disk_error(wrapped, tmp_path) is full
    assert disk_error(CheckpointException("write", {1: (wrapped, None)}), tmp_path) is full
    assert disk_error(FileNotFoundError(errno.ENOENT, "gone"), tmp_path) is None

    def refuse(*arguments, **names):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    assert disk_error(RuntimeError("basic_ios::clear: iostream error"), tmp_path).errno == errno.EROFS
