"""The servers' interpreter is asked for SGLang before a run starts."""

import sys
from pathlib import Path

import pytest

from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.interpreter import check_interpreter

FAKE = str(Path(__file__).parents[1] / "support" / "fake_sglang")


def refusal(*arguments) -> str:
    with pytest.raises(ConfigError) as error:
        check_interpreter(*arguments)
    return str(error.value)


def test_what_an_interpreter_lacks_is_named(monkeypatch, tmp_path):
    check_interpreter(sys.executable, ["json"], {})
    assert refusal(None, ["json", "no_such_module"], {}).startswith(
        "rollout.server.python=null, which is the trainer's interpreter, has no no_such_module; install SGLang there"
    )
    both = refusal(sys.executable, ["no_such_module", "nor_this"], {})
    assert both.startswith(f"rollout.server.python={sys.executable} has no no_such_module and no nor_this; ")


def test_modules_are_looked_for_where_the_servers_look(monkeypatch, tmp_path):
    check_interpreter(None, ["sglang", "sglang_router"], {"PYTHONPATH": FAKE})
    monkeypatch.setenv("PYTHONPATH", FAKE)
    check_interpreter(None, ["sglang"], {})
    # Another interpreter does not inherit our PYTHONPATH.
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    assert "has no sglang" in refusal(str(other), ["sglang"], {})


def test_what_is_no_python(tmp_path):
    assert refusal("/bin/false", ["sglang"], {}) == "rollout.server.python=/bin/false cannot be run (no message)"
    assert "rollout.server.python=/no/such/python cannot be run (" in refusal("/no/such/python", ["sglang"], {})
