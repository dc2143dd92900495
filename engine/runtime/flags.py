"""Frozen dataclasses as command lines: a field is a flag, written once with its default, its help and the stages it affects."""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from engine.runtime.errors import UserError


def flag(
    default: Any,
    help: str,
    *,
    affects: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    short: str | None = None,
    scales: bool = False,
) -> Any:
    """A dataclass field that is a flag.

    Args:
        affects: the stages whose results depend on it. Changing it after one of them has begun is an error.
        scales: it is a length of a run, which ``--scale`` changes (``engine.loops.lengths``).
    """
    metadata = {"help": help, "affects": tuple(affects), "choices": choices, "short": short, "scales": scales}
    return dataclasses.field(default=default, metadata=metadata)


def check_least(config: Any, **least: int) -> None:
    """Of flags that count things: ``check_least(config, epochs=1)``. One that is unset (None) passes.

    Raises:
        UserError: one is smaller than given here.
    """
    for name, wanted in least.items():
        value = getattr(config, name)
        if value is not None and value < wanted:
            raise UserError(f"--{name} {value} found, a whole number from {wanted} on wanted")


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations; a wrong flag is one line that names the nearest right one."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.removeprefix("unrecognized arguments: ").split()[0]
            written = "--" + unknown.split("=")[0].lstrip("-").replace("-", "_")
            known = [name for name in self._option_string_actions if "-" not in name.lstrip("-")]
            near = difflib.get_close_matches(written, known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            message = f"unknown flag {unknown}; {hint}see --help"
        raise UserError(message)


def add_list(parser: argparse.ArgumentParser, **tables: Iterable[str]) -> None:
    """Adds ``--list KIND``, which prints the names of a table, one a line, and ends the program.

    Args:
        tables: {kind: names}, kind as "models".
    """

    class List(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            print("\n".join(tables[value]))
            parser.exit()

    parser.add_argument("--list", action=List, choices=tables, help="print the known names, one a line, and stop")


class _Formatter(argparse.HelpFormatter):
    """Shows only the ``_`` spelling of a flag and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [s for s in action.option_strings if "-" not in s.lstrip("-") or s.startswith("--no-")]
        if len(shown) < len(action.option_strings):
            value = (
                "" if action.nargs == 0 else " " + self._format_args(action, self._get_default_metavar_for_optional(action))
            )
            return ", ".join(shown) + value
        return super()._format_action_invocation(action)


def add_flags(parser: argparse.ArgumentParser, config: type, title: str, defaults: dict[str, Any] | None = None) -> None:
    """Adds one flag a field, as ``--name_of_field`` and ``--name-of-field``, under a heading."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = (defaults or {}).get(field.name, field.default)
        kind, repeated = _value_type(hints[field.name])
        names = dict.fromkeys(["--" + field.name, "--" + field.name.replace("_", "-")])
        if field.metadata.get("short"):
            names[field.metadata["short"]] = None
        shown = ",".join(map(str, default)) if repeated and default is not None else default
        text = field.metadata["help"].replace("%", "%%") + ("" if default in (None, "", False) else f" [{shown}]")
        options: dict[str, Any] = {"dest": field.name, "default": default, "help": text}
        if kind is bool:
            group.add_argument(*names, action="store_true", **options)
            continue
        options["metavar"] = (
            "{" + ",".join(field.metadata["choices"]) + "}" if field.metadata.get("choices") else kind.__name__.upper()
        )
        group.add_argument(*names, type=_reader(kind, repeated, field.metadata.get("choices")), **options)


def _value_type(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether the flag takes a comma-separated list)."""
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _reader(kind: type, repeated: bool, choices: Sequence[str] | None):
    def one(text: str) -> Any:
        value = kind(text)
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(choices)}")
        return value

    def read(text: str) -> Any:
        return tuple(one(t) for t in text.split(",") if t.strip()) if repeated else one(text)

    read.__name__ = kind.__name__
    return read


def from_args(config: type, args: argparse.Namespace) -> Any:
    """The dataclass filled from parsed arguments."""
    return config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(config)})


def given_flags(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The names of the flags that a command line gives, whatever their values."""
    unset = object()
    names = [action.dest for action in parser._actions]
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name, value in vars(parsed).items() if value is not unset}


def stage_flags(stage: str, *configs: Any) -> dict[str, Any]:
    """{name: value} of the fields on which a stage's result depends."""
    return {
        f.name: list(v) if isinstance(v := getattr(config, f.name), tuple) else v
        for config in configs
        for f in dataclasses.fields(config)
        if stage in f.metadata["affects"]
    }
