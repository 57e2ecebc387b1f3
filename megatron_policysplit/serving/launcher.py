"""Runs a module of SGLang in the interpreter that has it: `launcher.py MODULE ARGUMENTS`.

`processes.py` starts it by its path. It sees to two things: the process dies with the one that
started it, however that ends; and the API key comes through the environment, so that no command
line shows it and no log record repeats it. SGLang's own subprocesses run this file too, as
`__mp_main__`, for the same log records. Standard library only: SGLang's interpreter need not have
anything of ours.
"""

import ctypes
import logging
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
KEY = os.environ.get("POLICYSPLIT_API_KEY", "")


def redact(text: str) -> str:
    """Return the text without the key, neither as it is nor as `repr` would write it."""
    return text.replace(KEY, "***").replace(repr(KEY)[1:-1], "***")


def hide_key(make_record):
    """Return a factory of log records that never hold the key."""

    def make_redacted_record(*args, **kwargs):
        record = make_record(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit: the handler says so
            return record
        if redact(text) != text:
            record.msg, record.args = redact(text), ()
        return record

    return make_redacted_record


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have ended before the call above; then no signal comes any more.
    if os.getppid() != parent:
        os._exit(1)


if KEY:
    logging.setLogRecordFactory(hide_key(logging.getLogRecordFactory()))

if __name__ == "__main__":
    die_with(int(os.environ.pop("POLICYSPLIT_PARENT")))
    # The first entry is this file's directory, whose modules are not meant to be found as SGLang's.
    sys.path.pop(0)
    module = sys.argv[1]
    sys.argv = [module, *sys.argv[2:], *([f"--api-key={KEY}"] if KEY else [])]
    runpy.run_module(module, run_name="__main__")
