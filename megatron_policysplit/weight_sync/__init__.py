"""New weights for the engines after every batch: one file a transport, `sync.py` for their common
order.
"""

from megatron_policysplit.weight_sync.in_process import load_in_process
from megatron_policysplit.weight_sync.sync import WeightSync

__all__ = ["WeightSync", "load_in_process"]
