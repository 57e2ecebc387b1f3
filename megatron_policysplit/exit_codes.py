"""Exit codes of `policysplit` and of every rank that it starts."""

DONE = 0  # All that was asked for is done.
FAILED = 1  # Training cannot go on: bad steps in a row, a peer that is gone, or a defect of the program.
BAD_INPUT = 2  # Something that was given is wrong; one sentence on stderr says what.
STOPPED = 75  # A signal stopped it, its state is saved, and the same command goes on (EX_TEMPFAIL).
