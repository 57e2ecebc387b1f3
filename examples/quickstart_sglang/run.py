"""The quickstart with a real SGLang server: the same model, questions and settings, another engine.

    python -m examples.quickstart_sglang.run [--out runs/quickstart_sglang] [--seed 0]
                                             [key=value ...]

`make quickstart-sglang` runs it, after `make sglang-cpu` has made the server's environment on a
machine without a GPU.
"""

from __future__ import annotations

from pathlib import Path

from examples.quickstart import run

CONFIG = Path(__file__).with_name("quickstart.yaml")

if __name__ == "__main__":
    run.main(__doc__.splitlines()[0], "runs/quickstart_sglang", CONFIG)
