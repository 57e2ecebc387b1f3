"""The Triton kernels of the LM head run by Triton's interpreter, on a CPU."""

import importlib
import os
import sys
from contextlib import contextmanager

PACKAGE = "megatron_policysplit.vocab_parallel"
OURS = tuple(f"{PACKAGE}.triton_{name}" for name in ("head", "kernels", "launch", "warm_up"))


def depends_on_triton(name):
    """Triton itself, except for its extension modules, and the modules of ours whose import decorates kernels."""
    return name in OURS or name.split(".")[0] == "triton" and not name.startswith("triton._C")


@contextmanager
def interpreted_kernels():
    """The module `triton_head`, interpreted; heads of kernels use it meanwhile.

    Triton decides when a function is decorated, its own library included. So it is imported afresh here, whether or
    not another test has imported it, and what was there before comes back afterwards.
    """
    package = importlib.import_module(PACKAGE)
    before = {name: module for name, module in sys.modules.items() if depends_on_triton(name)}
    for name in before:
        del sys.modules[name]
    variable = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield importlib.import_module(OURS[0])
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if variable is not None:
            os.environ["TRITON_INTERPRET"] = variable
        # Kept under another name: Python clears at exit what is in sys.modules, and nanobind complains of the rest.
        for name in [name for name in sys.modules if depends_on_triton(name)]:
            sys.modules[f"interpreted.{name}"] = sys.modules.pop(name)
        sys.modules.update(before)
        for name in OURS:
            attribute = name.rpartition(".")[2]
            if hasattr(package, attribute):
                delattr(package, attribute)
            if name in before:
                setattr(package, attribute, before[name])
