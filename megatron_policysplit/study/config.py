"""STUDY.yaml: which runs a study has, and what is compared. docs/study.md describes the file."""

from __future__ import annotations

import difflib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_policysplit.config import yaml_values
from megatron_policysplit.config.keys import Key, expand_user, show
from megatron_policysplit.config.settings import KEYS, read_yaml_text, yaml_error
from megatron_policysplit.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PLACEHOLDER = re.compile(r"\{(python|dir|run|seed|slot)\}")
SET_BY_STUDY = ("run.dir", "run.seed")


@dataclass(frozen=True)
class Study:
    """A study as its file describes it: the fields are the file's keys. Made by `load_study`."""

    config: str  # the configuration file of every run
    dir: str  # where everything goes
    seeds: list[int]
    methods: dict[str, list[str]]  # name -> overrides of its runs
    baseline: str  # the method that the others are compared with
    overrides: list[str] = field(default_factory=list)  # of all runs, before the method's
    at_once: int = 1  # runs that train at the same time
    # A command; it is run once for every text that its placeholders give.
    prepare: str | None = None
    environment: dict[str, str] = field(default_factory=dict)  # variables of every process
    # Names in metrics.jsonl to compare; empty takes those that the report knows.
    measures: list[str] = field(default_factory=list)
    # Title -> the methods whose curves the figure shows; empty shows all in one figure.
    figures: dict[str, list[str]] = field(default_factory=dict)
    stop_on_failure: bool = False  # whether to start nothing more after a run failed

    @property
    def runs(self) -> list[StudyRun]:
        """Every run, all methods of a seed before the next seed.

        In this order an unfinished study has compared as many seeds as it could.
        """
        return [
            StudyRun(method, seed, Path(self.dir)) for seed in self.seeds for method in self.methods
        ]

    def settings(self, run: StudyRun) -> list[str]:
        """The overrides of `policysplit train` for a run."""
        texts = [*self.overrides, *self.methods[run.method]]
        overrides = [fill(text, self.dir, run) for text in texts]
        return [*overrides, f"run.seed={run.seed}", f"run.dir={run.directory}"]

    def preparation(self, run: StudyRun) -> list[str] | None:
        """The command that must have succeeded before this run; None if there is none."""
        if self.prepare is None:
            return None
        words = shlex.split(self.prepare)
        return [expand_user(fill(word, self.dir, run), "prepare") for word in words]


@dataclass(frozen=True)
class StudyRun:
    """One method with one seed."""

    method: str
    seed: int
    study: Path

    @property
    def name(self) -> str:
        return f"{self.method}/seed_{self.seed}"

    @property
    def directory(self) -> Path:
        return self.study / self.method / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """The file of what its processes write to the terminal, one start after the other."""
        return self.study / self.method / f"seed_{self.seed}.log"


def fill(text: str, directory: str, run: StudyRun, slot: int = 0) -> str:
    """`text` with its placeholders filled in.

    They are {python} (this interpreter), {dir} (of the study), {run} (the method's name), {seed}
    and {slot} (which of the `at_once` places the run has, from 0).
    """
    values = {
        "python": sys.executable,
        "dir": directory,
        "run": run.method,
        "seed": run.seed,
        "slot": slot,
    }
    return PLACEHOLDER.sub(lambda match: str(values[match[1]]), text)


def load_study(path: str | Path) -> Study:
    """The study of a YAML file, its runs' configurations checked too. Raises ConfigError."""
    study = parse_study(_read(path), path)
    _check_runs(study, path)
    return study


def parse_study(content: Mapping[str, Any], path: str | Path) -> Study:
    """The study of a file's content. path is for messages. Raises ConfigError."""
    known = [key.name for key in fields(Study)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{path}: unknown key {key}; {hint}")
    for key in ("config", "dir", "seeds", "methods", "baseline"):
        if content.get(key) is None:
            raise ConfigError(f"{path}: {key} is missing; {_MEANING[key]}")
    values = {key: value for key, value in content.items() if value is not None}
    for key, value in values.items():
        is_valid, description = _KINDS[key]
        if not is_valid(value):
            raise ConfigError(f"{path}: {key}={show(value)} is not {description}")
    _check_values(values, path)
    values["methods"] = {name: overrides or [] for name, overrides in values["methods"].items()}
    values["environment"] = {
        name: show(value) for name, value in values.get("environment", {}).items()
    }
    for key in ("config", "dir"):
        values[key] = expand_user(values[key], f"{path}: {key}")
    return Study(**values)


def _check_values(values: dict[str, Any], path: str | Path) -> None:
    """Raise ConfigError unless the values, each of the right kind, fit each other."""
    seeds, methods, baseline = values["seeds"], values["methods"], values["baseline"]
    duplicates = [seed for seed in seeds if seeds.count(seed) > 1]
    if duplicates:
        raise ConfigError(
            f"{path}: seeds={show(seeds)} names {duplicates[0]} twice; remove one of them"
        )
    for seed in seeds:
        if (requirement := KEYS["run.seed"].requirement(seed)) is not None:
            raise ConfigError(
                f"{path}: seeds={show(seeds)} has {seed}, which is no run.seed; it must be "
                f"{requirement}"
            )
    for name in methods:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: methods.{name} cannot name a directory; use letters, digits, '_', '-' "
                "and '.', a letter or digit first"
            )
    if baseline not in methods:
        raise ConfigError(
            f"{path}: baseline={baseline} is none of the methods; use one of {', '.join(methods)}"
        )
    for title, names in values.get("figures", {}).items():
        if unknown := [name for name in names if name not in methods]:
            raise ConfigError(
                f"{path}: figures.{title} shows {unknown[0]}, which is none of the methods; use "
                f"some of {', '.join(methods)}"
            )
    _check_overrides("overrides", values.get("overrides", []), path)
    for name, overrides in methods.items():
        _check_overrides(f"methods.{name}", overrides or [], path)
    _check_prepare(values.get("prepare"), path)


def _check_overrides(key: str, overrides: list[str], path: str | Path) -> None:
    """Raise ConfigError for an override of what the study sets, or with a slot in it."""
    for override in overrides:
        name = override.partition("=")[0]
        if name in SET_BY_STUDY:
            raise ConfigError(
                f"{path}: {key} sets {name}, which the study sets for every run; remove {override}"
            )
        if "{slot}" in override:
            raise ConfigError(
                f"{path}: {key} holds {override}, but {{slot}} stands in environment only; "
                "remove it"
            )


def _check_prepare(command: str | None, path: str | Path) -> None:
    """Raise ConfigError for a preparation whose command does not exist."""
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(
            f"{path}: prepare={command} is no command line ({error}); fix it"
        ) from error
    if not words:
        raise ConfigError(f"{path}: prepare is empty; write a command or remove the key")
    if words[0] != "{python}" and shutil.which(expand_user(words[0], "prepare")) is None:
        raise ConfigError(
            f"{path}: prepare={command} starts with {words[0]}, which is no command; correct it"
        )


def _check_runs(study: Study, path: str | Path) -> None:
    """Check every method's configuration with the first seed. Raises ConfigError.

    Its files are not looked at: `prepare` may have to make them first.
    """
    from megatron_policysplit.algorithms.checks import check_method
    from megatron_policysplit.config.checks import check_config
    from megatron_policysplit.config.load import load_config

    for method in study.methods:
        run = StudyRun(method, study.seeds[0], Path(study.dir))
        try:
            config = load_config(study.config, study.settings(run))
            check_config(config)
            check_method(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: methods.{method}: {error}") from error


def _read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, the variables of `environment` as written. Raises ConfigError."""
    text = read_yaml_text(path, "study")
    try:
        root = yaml_values.compose(text)
    except yaml.YAMLError as error:
        raise ConfigError(yaml_error(f"study {path}", error)) from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"study {path} is not a mapping of keys to values; docs/study.md shows one"
        )
    source = yaml_values.Source(text, str(path))
    return {key: _value(key, node, source) for key, node in yaml_values.pairs(root)}


def _value(key: str, node: yaml.Node, source: yaml_values.Source) -> Any:
    """The value of a key of the file. Raises ConfigError where its spelling is of another type."""
    if key in _PLAIN_TYPES and not yaml_values.is_null(node):
        kind = _PLAIN_TYPES[key]
        item = int if kind is list else None
        return yaml_values.read_value(Key(key, kind, False, None, "", item=item), node, source)
    mapping = Key(key, dict, False, None, "", verbatim=key == "environment")
    return yaml_values.read_entry(mapping, (), node, source)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_whole(value: Any, least: int) -> bool:
    # True and False are integers to Python.
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_methods(value: Any) -> bool:
    named = isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value)
    return named and all(overrides is None or _is_texts(overrides) for overrides in value.values())


def _are_figures(value: Any) -> bool:
    named = isinstance(value, dict) and all(isinstance(title, str) for title in value)
    return named and all(_is_texts(methods) and bool(methods) for methods in value.values())


def _are_variables(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(text, (str, int, float))
        for name, text in value.items()
    )


_TEXT = (lambda value: isinstance(value, str) and bool(value.strip()), "a text; write one")
_TEXTS = (
    _is_texts,
    "a list of key=value texts; write [key=value, ...], quoted where they hold ': '",
)
# Key -> (whether a value is of the right kind, the end of the sentence if it is not).
_KINDS = {
    "config": _TEXT,
    "dir": _TEXT,
    "seeds": (
        lambda value: (
            isinstance(value, list) and bool(value) and all(_is_whole(seed, 0) for seed in value)
        ),
        "a list of whole numbers from 0; write one such as [0, 1, 2]",
    ),
    "methods": (
        _are_methods,
        "a mapping of names to lists of key=value; write grpo: [algorithm.name=grpo]",
    ),
    "baseline": _TEXT,
    "overrides": _TEXTS,
    "at_once": (
        lambda value: _is_whole(value, 1),
        "a whole number from 1; use 1 to run one after the other",
    ),
    "prepare": (lambda value: isinstance(value, str), "a command line; write it as one text"),
    "environment": (_are_variables, "a mapping of variables to values; write OMP_NUM_THREADS: 1"),
    "measures": (_is_texts, "a list of names of metrics.jsonl; write [eval/normal/accuracy, ...]"),
    "figures": (
        _are_figures,
        "a mapping of titles to lists of methods; write {Targets: [grpo, aepo]}",
    ),
    "stop_on_failure": (lambda value: isinstance(value, bool), "true or false"),
}
# Keys whose values YAML must not take for something else.
_PLAIN_TYPES = {
    "config": str,
    "dir": str,
    "seeds": list,
    "baseline": str,
    "at_once": int,
    "prepare": str,
    "stop_on_failure": bool,
}
# Key that must be given -> the remedy where it is not.
_MEANING = {
    "config": "give the configuration file of the runs",
    "dir": "give the directory of everything the study writes",
    "seeds": "give a list of seeds such as [0, 1, 2]",
    "methods": "give names with their overrides, such as grpo: [algorithm.name=grpo]",
    "baseline": "name the method that the others are compared with",
}
