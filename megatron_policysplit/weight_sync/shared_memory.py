"""Memory that engines on this machine can read, and that is gone when the run ends.

torch keeps a small process, `torch_shm_manager`, that removes shared files when all who used them
are gone. Started by torch it inherits the trainer's standard error and its gloo sockets: peers of a
killed trainer would go on waiting, and so would a pipe, for as long as an engine runs. Here it is
started with neither, and ended with the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
import weakref
from pathlib import Path

import torch

from megatron_policysplit.distributed.device import collect_shared_memory
from megatron_policysplit.errors import ConfigError, TrainingError

SHARED = Path("/dev/shm")
HEADER_BYTES = 4096  # more than what torch keeps in front of a shared file's data


class SharedMemory:
    """Makes the buffers of one process, and keeps torch's manager, which outlives it if killed."""

    def __init__(self):
        binary = Path(torch.__file__).parent / "bin" / "torch_shm_manager"
        self._manager = subprocess.Popen(
            [str(binary)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._socket = self._manager.stdout.readline().strip()
        if not self._socket:
            raise TrainingError(
                f"{binary} does not start; weight_sync.transport=distributed or disk does without "
                "it"
            )
        # A finalizer also runs at the end of the process, without a `close`.
        self._end = weakref.finalize(
            self, _end_manager, self._manager, Path(os.fsdecode(self._socket)).parent
        )
        # torch shares through the first manager it has met, so it must meet this one; it does when
        # it opens a file.
        name = f"/policysplit_{uuid.uuid4().hex}"
        with open(_file(name), "xb") as file:
            file.truncate(HEADER_BYTES + 1)
        torch.UntypedStorage._new_shared_filename_cpu(self._socket, name.encode(), 1)

    def buffer(self, nbytes: int, device: torch.device) -> Buffer:
        """Allocate memory on `device` that other processes can read."""
        return Buffer(nbytes, device)

    def close(self) -> None:
        """End the manager; done at the end of the process too."""
        self._end()


class Buffer:
    """Memory that an engine can read: `flat`, uint8[nbytes], on the host or on a GPU.

    Raises ConfigError if host memory of that size is not free.
    """

    def __init__(self, nbytes: int, device: torch.device):
        host = device == torch.device("cpu")
        free = shutil.disk_usage(SHARED).free if host else nbytes
        if nbytes > free:  # writing to it would end in a bus error
            raise ConfigError(
                f"a bucket of {nbytes >> 20} MiB does not fit in {SHARED}, of which {free >> 20} "
                "MiB are free; lower weight_sync.bucket_mib or give the machine more shared memory"
            )
        if not host:
            # What engines have let go of of earlier buffers is used again, not held beside this.
            collect_shared_memory()
        self.flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.name: str | None = None  # of its file in host memory; None for memory of a GPU
        if host:
            storage = self.flat.untyped_storage()
            self.name = storage._share_filename_cpu_()[1].decode()
            # Counts one reader more than there are. A reader that takes itself for the last one
            # removes the file, and its process ends if the file is gone already. So none may take
            # itself for the last; `release` removes the file.
            storage._shared_incref()
            self._remove = weakref.finalize(self, _file(self.name).unlink, missing_ok=True)

    @property
    def reusable(self) -> bool:
        """Whether it may be filled again once its readers have answered.

        Not memory of a GPU: SGLang answers before it is done with it. Such a buffer is used once,
        and torch keeps the memory until the reader lets go of it.
        """
        return self.name is not None

    def release(self) -> None:
        """Give the memory back, also after a reader died; done at the end of the process too."""
        self.flat = torch.empty(0, dtype=torch.uint8)
        if self.name is not None:
            self._remove()
        else:
            collect_shared_memory()


# Not a method: a finalizer that refers to its object would keep it alive.
def _end_manager(manager: subprocess.Popen, directory: Path) -> None:
    manager.terminate()
    manager.wait()
    manager.stdout.close()
    shutil.rmtree(directory, ignore_errors=True)


def _file(name: str) -> Path:
    return SHARED / name.removeprefix("/")
