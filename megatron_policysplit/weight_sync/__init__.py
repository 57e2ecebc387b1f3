"""New weights for the engines after every batch.

`sync.py` has the order of a weight sync, `session.py` the calls to one engine, `transport.py` what
a transport must do; one file a transport. `in_process.py` is for engines without a server.
"""

from megatron_policysplit.weight_sync.in_process import load_in_process
from megatron_policysplit.weight_sync.sync import WeightSync
from megatron_policysplit.weight_sync.transport import sync_settings

__all__ = ["WeightSync", "load_in_process", "sync_settings"]
