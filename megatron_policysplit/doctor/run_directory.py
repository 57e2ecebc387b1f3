"""The file system of run.dir: room, renames, locks, clock."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from megatron_policysplit.doctor.finding import FAIL, OK, WARN, Finding, gib
from megatron_policysplit.doctor.machine import Space

_NETWORK = {"nfs", "nfs4", "cifs", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "wekafs"}
SKEW_SECONDS = 5.0


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds a path; mounts: /proc/mounts."""
    best = ("", "unknown")
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = str(path) == point or str(path).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def check_run_directory(directory: Path, checkpoint_bytes: int, keep: int) -> list[Finding]:
    """checkpoint_bytes: of one checkpoint, about; keep: how many of them a run keeps.

    Writes a directory of its own beside or in run.dir, and removes it.
    """
    existing = directory
    while not existing.exists():
        existing = existing.parent
    existing = existing.resolve()
    name = "run directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Finding(name, FAIL, f"{existing} cannot be written", "give another run.dir")]
    kind = file_system(existing, Path("/proc/mounts").read_text())
    space, wanted = Space.of(existing), (keep + 1) * checkpoint_bytes
    text = f"{directory} on {kind}, {gib(space.free)} free"
    remedy = "give another run.dir, or lower checkpoint.keep"
    if space.free < checkpoint_bytes:
        value = f"{text}; a checkpoint is about {gib(checkpoint_bytes)}"
        findings = [Finding(name, FAIL, value, remedy)]
    elif space.free < wanted:
        value = f"{text}; {keep + 1} checkpoints are about {gib(wanted)}"
        findings = [Finding(name, WARN, value, remedy)]
    else:
        findings = [Finding(name, OK, text)]
    probe = Path(tempfile.mkdtemp(prefix=".policysplit-doctor-", dir=existing))
    try:
        return findings + check_semantics(probe, is_shared=kind in _NETWORK)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def check_semantics(probe: Path, *, is_shared: bool) -> list[Finding]:
    """Whether files can be replaced, directories renamed, locks taken; in an empty directory."""
    name, findings = "run directory", []
    old, new = probe / "old", probe / "new"
    old.write_text("old")
    with open(new, "w") as file:
        file.write("new")
        file.flush()
        os.fsync(file.fileno())
    age = new.stat().st_mtime - time.time()
    new.replace(old)
    (probe / "partial").mkdir()
    (probe / "partial").rename(probe / "whole")
    if old.read_text() != "new" or new.exists() or not (probe / "whole").is_dir():
        remedy = "use another file system: a checkpoint counts once it is renamed"
        findings.append(Finding(name, FAIL, "renames do not replace what is there", remedy))
    with open(old) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = f"has no locks ({error.strerror}); run.lock's heartbeat stands in for them"
            findings.append(Finding(name, OK, said))
    if abs(age) > SKEW_SECONDS:
        whose = "file server's" if is_shared else "file system's"
        remedy = "let chrony or ntpd set both"
        said = f"the {whose} clock is {age:+.1f} s off this machine's"
        findings.append(Finding("clocks", WARN, said, remedy))
    return findings
