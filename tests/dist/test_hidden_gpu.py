"""A machine whose GPU is hidden, with Transformer Engine installed for it: ranks train on the CPU all the same."""

import os
import sys

from tests.support.dist import ROOT, run_distributed


def parts_of_megatron(rank):
    """Where Megatron-Core takes its Adam from, and whether it has seen Transformer Engine."""
    from megatron_policysplit.actor.megatron_on_cpu import install

    install()
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.optimizer import Adam

    return Adam.__module__.split(".")[0], extension.HAVE_TE, sys.modules["transformer_engine"]


def test_megatron_core_does_not_see_transformer_engine(tmp_path):
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported without a GPU')\n")
    environ = dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert run_distributed(parts_of_megatron, 1, start="spawn", environ=environ) == [("torch", False, None)]
