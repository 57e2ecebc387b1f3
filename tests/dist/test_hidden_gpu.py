"""A machine whose GPU is hidden, with Transformer Engine installed for it: ranks train on the CPU all the same."""

import os
import sys

from tests.support.dist import ROOT, run_distributed


CONFIG = "model: {path: none}\ndata: {path: none}\nrun: {dir: none}\nparallel: {tensor: 2}\n"


def parts_of_megatron(rank, config):
    """Where a rank's Megatron-Core takes its Adam and its norms from, and what is left of Transformer Engine."""
    from megatron_policysplit.training import worker

    assert worker.main([config]) == 2  # one rank is too few, which it finds after all that a rank imports
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.optimizer import Adam
    from megatron.core.transformer.transformer_block import LayerNormImpl

    origins = [thing.__module__.partition(".")[0] for thing in (Adam, LayerNormImpl)]
    # wandb, which this run does not log to, is neither imported nor hidden for good.
    return origins, extension.HAVE_TE, sys.modules["transformer_engine"], "wandb" in sys.modules


def test_megatron_core_does_not_see_transformer_engine(tmp_path):
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported without a GPU')\n")
    environ = dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (tmp_path / "run.yaml").write_text(CONFIG)
    (found,) = run_distributed(parts_of_megatron, 1, str(tmp_path / "run.yaml"), start="spawn", environ=environ)
    assert found == (["torch", "megatron"], False, None, False)
