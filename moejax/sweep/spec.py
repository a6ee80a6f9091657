"""What the specs of all schedulers share: options of --set=KEY=VALUE, names of jobs, folders as the nodes see them, YAML."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import yaml

from moejax.errors import ConfigError
from moejax.sweep.members import Member
from moejax.sweep.plan import Plan

T = TypeVar("T", bound="Options")
Files = dict[str, str]
"""Text by file name; the first file is what is handed to the scheduler."""
NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
"""RFC 1035, which Kubernetes demands of jobs and what the other schedulers take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of every scheduler."""

    name: str = ""
    """What the names of jobs begin with: small letters, digits and dashes; empty for the name of the sweep file."""
    nodes: int = 1
    """Hosts of one run, each with one process."""
    port: int = 8476
    """On which process 0 of several listens."""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables of the runs; the flag --env."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and ("\n" in value or value != value.strip()):
                raise ConfigError(f"--set={field.name}={value!r}: one line without space around it")
        at_least(self, "nodes", 1)
        if not 1024 <= self.port <= 64000:
            raise ConfigError(f"--set=port={self.port}: from 1024 to 64000")
        if wrong := [key for key in self.env if not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII)]:
            raise ConfigError(f"--env={wrong[0]}=…: letters, digits and _, and no digit first")
        if slots := [f"{key}={value}" for key, value in self.env.items() if "{slot}" in value]:
            raise ConfigError(f"--env={slots[0]}: only --engine=local has slots; leave out {{slot}}")

    @property
    def variables(self) -> dict[str, str]:
        """Of a run: `env`, and output as it comes."""
        return {"PYTHONUNBUFFERED": "1", **self.env}


def at_least(options: Options, key: str, least: int) -> None:
    """Raises ConfigError for a number below."""
    if (value := getattr(options, key)) < least:
        raise ConfigError(f"--set={key}={value}: at least {least}")


def read(kind: type[T], settings: Sequence[str], env: Mapping[str, str]) -> T:
    """Options from KEY=VALUE, as --set has them. Raises ConfigError for an unknown, repeated, missing or ill-typed one."""
    types = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "env"}
    given: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if key not in fields or not equals:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]}?" if near and near[0] != key else "write --set=KEY=VALUE with KEY of"
            raise ConfigError(f"--set={text} is no option of {kind.__name__}; {hint} ({', '.join(fields)})")
        if key in given:
            raise ConfigError(f"--set={key} is given twice: {given[key]} and {value}; give it once")
        given[key] = _parsed(key, value, types[key])
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in given:
            raise ConfigError(f"--set={key}=… is missing, which {kind.__name__} cannot do without; see docs/sweeps.md")
    return kind(**given, env=dict(env))


def _parsed(key: str, value: str, kind: Any) -> Any:
    if kind is str:
        return value
    try:
        return int(value) if kind is int else {"true": True, "false": False}[value]
    except (ValueError, KeyError):
        raise ConfigError(f"--set={key}={value}: {'a whole number' if kind is int else 'true or false'}") from None


# ---- names and folders --------------------------------------------------------------------------------------------


def name(plan: Plan, options: Options) -> str:
    """What the names of a sweep's jobs begin with."""
    found = options.name or plan.name.lower().replace("_", "-")
    if not NAME.fullmatch(found):
        raise ConfigError(
            f"{found!r} cannot be the name of a job: a small letter, then letters, digits and dashes; give another with --set=name=…"
        )
    return found


def job(plan: Plan, options: Options, member: Member) -> str:
    """Of one run, by its id: names of runs have characters that no scheduler takes."""
    return f"{name(plan, options)}-{member.id}"


def under(plan: Plan, mount: str) -> None:
    """Raises ConfigError unless the runs write to what is mounted at `mount`, and the sweep file is one that the nodes have."""
    if not PurePosixPath(mount).is_absolute():
        raise ConfigError(f"--set=mount={mount}: a path from /, such as /runs")
    if not PurePosixPath(plan.root).is_relative_to(mount):
        raise ConfigError(
            f"--workdir={plan.root} is not in {mount}, which alone outlives a run's machines: give a folder in it, such as "
            f"--workdir={mount.rstrip('/')}/{plan.name}, or another --set=mount=…"
        )
    file = PurePosixPath(plan.config)
    if file.is_absolute() or ".." in file.parts:
        raise ConfigError(f"--config={plan.config}: the nodes have moejax's folder alone; give a path in it")


# ---- YAML ---------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def document(comment: str, tree: dict[str, Any]) -> str:
    """One YAML document under a line of comment; keys in their order."""
    return f"# {comment}\n" + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=10_000)
