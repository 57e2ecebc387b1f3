"""New weights for the engines after every batch: one file a transport, `sync.py` for their common
order.
"""

from megatron_policysplit.weight_sync.in_process import load_in_process
from megatron_policysplit.weight_sync.sync import WeightSync
from megatron_policysplit.weight_sync.transport import sync_settings

__all__ = ["WeightSync", "load_in_process", "sync_settings"]
