"""The run directory's file system: whether it is shared, large enough, and renames as it should."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_policysplit.doctor.asking import ask_script
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.record import Record, fail, gib, ok, warn

PROBE_SECONDS = 30.0
CLOCK_SECONDS = 2.0  # beyond it, times in logs of two nodes cannot be put in order
# What two nodes see alike. Others, such as fuse, may be; the probe of --nodes tells.
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "wekafs", "glusterfs")
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs")


@dataclass(frozen=True)
class Directory:
    """A directory's file system. What is None worked; else it is what the file system says."""

    path: str  # what was looked at: run.dir, or the nearest directory above it that exists
    kind: str  # of its file system
    free: int = 0  # bytes
    total: int = 0
    write: str | None = None  # permission to write
    replace: str | None = None  # a file takes another's place
    rename: str | None = None  # a directory gets a new name
    lock: str | None = None  # flock
    clock: float | None = None  # seconds by which its clock is ahead of this machine's


def nearest(path: str) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    absolute = Path(path).absolute()
    return next(place for place in [absolute, *absolute.parents] if place.is_dir())


def look_at_directory(path: str) -> Directory:
    """Try it out with files of the probe's own, which are removed. Raises ProbeFailed.

    A run.dir that does not exist is not made: the directory that it would be made in is looked at.
    """
    place = nearest(path)
    answer = ask_script("directory", [str(place)], PROBE_SECONDS)
    kind = file_system(Path("/proc/self/mountinfo").read_text(), place.resolve())
    return Directory(str(place), kind, **answer)


def file_system(mounts: str, path: Path) -> str:
    """The kind of file system that a path is on, such as ext4 or nfs4.

    mounts: the text of /proc/self/mountinfo. The mount point nearest to the path counts, and of
    several at one place the last.
    """
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        if (point == path or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def check_directory(directory: Directory, needs: Needs) -> list[Record]:
    """Records about run.dir."""
    where = f"{directory.path} ({directory.kind})"
    if directory.write is not None:
        remedy = "give another run.dir, or the permission to write there"
        return [fail("run.dir", f"{where} cannot be written: {directory.write}", remedy)]
    return [
        _check_kind(directory, where, needs),
        _check_space(directory, needs),
        _check_names(directory),
        _check_lock(directory, needs),
        *_check_clock(directory),
    ]


def _check_kind(directory: Directory, where: str, needs: Needs) -> Record:
    if directory.kind in ("tmpfs", "ramfs"):
        return warn("run.dir", f"{where}: in memory, and gone after a restart", "use a disk")
    if needs.nodes > 1 and directory.kind in LOCAL:
        return warn(
            "run.dir",
            f"{where}: of this machine alone, but the run goes over {needs.nodes} nodes",
            "put run.dir on a file system that all nodes see",
        )
    return ok("run.dir", where + (", of the network" if directory.kind in NETWORK else ""))


def _check_space(directory: Directory, needs: Needs) -> Record:
    """Room for checkpoints: those that are kept and one that is being written, and exports."""
    name, value = "run.dir space", f"{gib(directory.free)} are free"
    if needs.parameters is None:
        return ok(name, f"{value}; the size of a checkpoint is not known")
    one = needs.checkpoint_bytes
    exports = needs.export_bytes * needs.exports
    snapshot = needs.export_bytes * (needs.sglang and needs.transport == "disk")
    least = one + exports + snapshot
    # hf/ and best/; the older snapshot stays until the newer one is complete.
    most = (needs.checkpoints_kept + 1) * one + 2 * exports + 2 * snapshot
    value += f"; a checkpoint takes {gib(one)}" + (f", an export {gib(exports)}" if exports else "")
    remedy = f"make room, or lower checkpoint.keep={needs.checkpoints_kept}"
    if directory.free < least:
        return fail(name, value, f"{remedy}, or give another run.dir")
    if directory.free < most:
        return warn(name, f"{value}; the run may write {gib(most)}", remedy)
    return ok(name, value)


def _check_names(directory: Directory) -> Record:
    """Files and checkpoints appear under their names as a whole, by a rename."""
    problems = {"a file": directory.replace, "a directory": directory.rename}
    said = [f"{what}: {problem}" for what, problem in problems.items() if problem is not None]
    if said:
        return fail(
            "run.dir renames",
            f"it cannot replace or rename, written to the disk, {'; '.join(said)}",
            "put run.dir on another file system; checkpoints become complete by a rename",
        )
    return ok("run.dir renames", "files and directories are replaced as a whole and on the disk")


def _check_lock(directory: Directory, needs: Needs) -> Record:
    if directory.lock is None:
        return ok("run.dir locks", "flock works")
    return warn(
        "run.dir locks",
        f"flock does not work ({directory.lock})",
        "nothing need be done: a second training in run.dir is refused by a heartbeat, and a start "
        "after a crash may wait a minute",
    )


def _check_clock(directory: Directory) -> list[Record]:
    if directory.clock is None:
        return []
    ahead = directory.clock
    if abs(ahead) <= CLOCK_SECONDS:
        return [ok("run.dir clock", "that of its file system is this machine's")]
    direction = "ahead of" if ahead > 0 else "behind"
    return [
        warn(
            "run.dir clock",
            f"the file system's is {abs(ahead):.1f} s {direction} this machine's",
            "synchronise the clocks (chronyd, ntpd); make and logs compare their times",
        )
    ]
