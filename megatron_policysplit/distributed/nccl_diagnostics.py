"""What torch writes down when an NCCL collective runs past its time limit.

The watch of the other ranks (`rank_watch`) ends a run when a rank fails or is gone. What is left
for the time limit is a collective that some ranks never came to: then the record of the last
collectives says which. Imports nothing: the variables are set before torch is imported.
"""

from __future__ import annotations

import os

# Names of torch 2.13; a torch that does not know one passes over it. TORCH_FR_DUMP_TEMP_FILE says
# where the files go.
DIAGNOSTICS = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}


def record_collectives() -> None:
    """Have torch record NCCL collectives, unless the environment says otherwise."""
    for name, value in DIAGNOSTICS.items():
        os.environ.setdefault(name, value)
