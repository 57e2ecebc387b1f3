"""docs/configuration.md from the dataclasses: `python -m megatron_policysplit.config.docs`."""

from __future__ import annotations

from dataclasses import fields

from megatron_policysplit.config.keys import MISSING, Key, show
from megatron_policysplit.config.load import KEYS
from megatron_policysplit.config.schema import Config

_HEAD = """\
# Configuration

<!-- Written by `python -m megatron_policysplit.config.docs`; a test compares it with the code. \
-->

A run is described by a YAML file and by `key=value` overrides, which win:

    policysplit train run.yaml train.steps=20 rollout.normal.temperature=0.9

Keys are grouped; in YAML a group is a mapping, on the command line its keys are joined by dots. \
Keys without a
default must be given. An unknown key, a wrong type, or values that do not fit each other end the \
command with exit
code 2 before any process starts. `policysplit config run.yaml` checks all that `train` checks \
before it starts a
process, and prints the resolved configuration, every mode's prompt of the first question, and \
what `train` prints at
its start. It writes nothing, so a run may be training in `run.dir` meanwhile.

## How values are read

The key decides what a value means, not its spelling.

| kind of key | `key=value` | in a file |
|---|---|---|
| a string | The text as it stands, without the blanks around it: `run.dir=1.10`, \
`modes.high_entropy_prompt=Say why: # first`. A text wholly in YAML quotes is taken out of them, \
so `'"null"'` is the text null. `null` or nothing is null, where null is allowed. | YAML text. \
What YAML takes for a number, true, false, a list or a mapping (`1.10`, `010`, `12:30`, `yes`) is \
refused; put it in quotes. Behind a blank, `#` begins a comment. |
| a number | YAML; `1e-6` and `1_000` are numbers. An integer has neither point nor exponent. \
What YAML 1.1 reads in another base, `010` and `12:30`, is refused. | the same |
| true or false | `true` or `false`; YAML 1.1's `yes`, `no`, `on` and `off` count, too; 0, 1 and \
2 do not. | the same |
| a list, a mapping | YAML, such as `rollout.server.devices=[0, 1]`. `mapping.NAME=value` sets \
one entry. | YAML |

- In `rollout.server.environment` and `rollout.server.arguments`, numbers and words are text as \
they are written; `true`,
  `false` and `null` are what they say. Texts in `modes.others` and `eval.prompts` are read as \
those of a string key.
  In other mappings YAML decides, but for `yes`, `no`, `on`, `off`, `010` and `12:30`, which are \
refused without quotes.
- `${oc.env:NAME}` is replaced by an environment variable, `${run.seed}` by another key's value; \
`\\${` is the text `${`.
  Two mappings may hold secrets, `rollout.server.environment` and `rollout.server.arguments`: \
their `${...}` is kept as
  it is written wherever the configuration is shown, logged or written, `config.yaml` in \
`run.dir` included, which its
  owner alone may read. Everywhere else it is resolved, because a resumed run is compared with \
its `config.yaml`.
- A leading `~` or `~user` of a path is the home directory, in a file as well as in \
`model.path=~/m`, and so it is with
  the paths of commands' options. `./~` is a directory of that name. Relative paths are relative \
to where the command is
  started. A resumed run may spell its paths in another way, if they lead to the same place.
- Whatever a key allows, a number must be one of single precision (its size 0 or from 1.2e-38 to \
3.4e38), and an integer
  at most 2147483647.
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
