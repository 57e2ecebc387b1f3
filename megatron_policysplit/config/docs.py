"""docs/configuration.md from the dataclasses: `python -m megatron_policysplit.config.docs`."""

from __future__ import annotations

from dataclasses import fields

from megatron_policysplit.config.keys import MISSING, Key, show
from megatron_policysplit.config.load import KEYS
from megatron_policysplit.config.schema import Config

_HEAD = """\
# Configuration

<!-- Written by `python -m megatron_policysplit.config.docs`; a test compares it with the code. -->

A run is described by a YAML file and by `key=value` overrides, which win:

    policysplit train run.yaml train.steps=20 rollout.normal.temperature=0.9

Keys are grouped; in YAML a group is a mapping, on the command line its keys are joined by dots. \
Keys without a
default must be given. `${oc.env:NAME}` is replaced by an environment variable. An unknown key, a \
wrong type, or
values that do not fit each other end the command with exit code 2 before any process starts.
`policysplit config run.yaml` prints the resolved configuration and both rendered prompts.
"""


def render() -> str:
    """Render the whole page: a table of keys for every group."""
    parts = [_HEAD]
    for group in fields(Config):
        parts.append(f"\n## {group.name}\n\n{group.metadata['help']}\n")
        parts.append("\n| key | default | allowed | meaning |\n|---|---|---|---|\n")
        parts += [row(key) for key in KEYS.values() if key.name.startswith(group.name + ".")]
    return "".join(parts)


def row(key: Key) -> str:
    """A key's row of a Markdown table: name, default, allowed values, meaning."""
    default = "required" if key.default == MISSING else f"`{show(key.default)}`"
    allowed = key.type_name + (f", {key.allowed}" if key.allowed else "")
    if key.choices:  # the choices say the type, too
        allowed = key.allowed.removeprefix("one of ")
    elif key.optional and key.allowed:
        allowed = f"{key.type_name.removesuffix(' or null')}, {key.allowed}"
    cells = (f"`{key.name}`", default, allowed, key.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    print(render(), end="")
