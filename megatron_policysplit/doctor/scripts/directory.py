"""Prints how the file system of a directory behaves, as one JSON object.

`python directory.py PATH`: an existing directory. What it writes there has a name of its own and
is removed.
"""

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time


def attempt(call):
    """None if a call succeeds, else what the file system says."""
    try:
        call()
    except OSError as error:
        return error.strerror or str(error)
    return None


def write(path, text):
    """Write a file and have it on the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_file(probe):
    """A file takes the place of another in one step."""
    old, new = os.path.join(probe, "old"), os.path.join(probe, "new")
    write(old, "old")
    write(new, "new")
    os.replace(new, old)
    with open(old) as file:
        if file.read() != "new" or os.path.exists(new):
            raise OSError(0, "the file that was replaced has its old content")


def rename_directory(probe):
    """A directory with a file in it is renamed, and its name is on the disk."""
    before, after = os.path.join(probe, "before"), os.path.join(probe, "after")
    os.mkdir(before)
    write(os.path.join(before, "file"), "text")
    os.rename(before, after)
    descriptor = os.open(probe, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if os.listdir(after) != ["file"] or os.path.exists(before):
        raise OSError(0, "the renamed directory is not complete")


def lock(probe):
    """A lock is given, and a second one is refused while the first is held."""
    path = os.path.join(probe, "lock")
    with open(path, "w") as first, open(path) as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise OSError(0, "two locks of one file were given at once")


def clock(probe):
    """Seconds by which the file system's clock is ahead of this machine's."""
    path = os.path.join(probe, "clock")
    before = time.time()
    write(path, "now")
    after = time.time()
    # A modification time is of the kernel's last tick, or of a whole second on some file systems.
    modified = os.stat(path).st_mtime
    return modified - after if modified > after else min(0.0, modified - before)


def main(path):
    usage = shutil.disk_usage(path)
    facts = {"free": usage.free, "total": usage.total, "write": None}
    probe = None
    try:
        probe = tempfile.mkdtemp(prefix=".policysplit-doctor-", dir=path)
        facts["replace"] = attempt(lambda: replace_file(probe))
        facts["rename"] = attempt(lambda: rename_directory(probe))
        facts["lock"] = attempt(lambda: lock(probe))
        facts["clock"] = clock(probe)
    except OSError as error:
        facts["write"] = error.strerror or str(error)
    finally:
        if probe is not None:
            shutil.rmtree(probe, ignore_errors=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
