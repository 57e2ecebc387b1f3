"""`policysplit doctor`: checks of this machine, each a line with OK, WARN or FAIL (docs/doctor.md).

A probe looks at the machine and returns facts, in dataclasses; a check is a pure function of facts
that returns records. So every verdict can be tested with facts that were made up.
"""
