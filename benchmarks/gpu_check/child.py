"""The process of one check: python -m benchmarks.gpu_check.child CHECK OPTIONS ANSWER.json"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.runner import FAIL, PASS, SKIP, Check, Options, Skip


def answer_of(check: Check, options: Options) -> dict[str, Any]:
    """Call a check's function; its status, reason and values."""
    try:
        if check.needs_gpu:
            from megatron_policysplit.distributed.device import gpu_count

            if not gpu_count():
                raise Skip("there is no GPU")
        module, _, function = check.function.partition(":")
        values = getattr(importlib.import_module(module), function)(options)
    except Skip as skip:
        return {"status": SKIP, "reason": str(skip), "values": {}}
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:300]
        return {"status": FAIL, "reason": f"{type(error).__name__}: {said}", "values": {}}
    return {"status": PASS, "reason": "", "values": values}


def main(check: str, options: str, answer: str) -> None:
    said = answer_of(Check(**json.loads(check)), Options(**json.loads(options)))
    partial = Path(answer).with_suffix(".partial")
    partial.write_text(json.dumps(said))
    partial.rename(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
