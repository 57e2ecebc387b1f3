"""The one pickle that Megatron reads from a checkpoint is looked at before it is loaded."""

import pickle

import pytest

from checkpoints_conv.metadata import check_metadata
from megatron_policysplit.errors import CheckpointError


class Call:
    """Unpickles by calling something."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_of_something_else_is_refused(tmp_path, protocol):
    file, marker = tmp_path / ".metadata", tmp_path / "marker"
    file.write_bytes(pickle.dumps(Call(open, str(marker), "w"), protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata is not torch_dist metadata \(it names \w+\.open\)"):
        check_metadata(file)
    assert not marker.exists()


def test_a_dotted_name_does_not_reach_through_an_allowed_module(tmp_path):
    file, marker = tmp_path / ".metadata", tmp_path / "m"
    command = f"touch {marker}".encode()
    payload = (
        b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c" + bytes([len(command)]) + command + b"\x85R."
    )
    file.write_bytes(payload)
    with pytest.raises(CheckpointError, match="it names torch.serialization.os.system"):
        check_metadata(file)
    assert not marker.exists()
    pickle.loads(payload)  # the payload is real: nothing but the check stands between it and the shell
    assert marker.exists()


def test_what_torch_writes_is_accepted(tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp

    dcp.save({"weight": torch.ones(3), "half": torch.ones(2, dtype=torch.bfloat16)}, checkpoint_id=tmp_path)
    check_metadata(tmp_path / ".metadata")


def test_a_harmless_pickle_of_something_else_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(CheckpointError, match="it is a pickled dict"):
        check_metadata(tmp_path / ".metadata")
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not torch_dist metadata"):
        check_metadata(tmp_path / ".metadata")
