"""Command lines from frozen dataclasses: each field is a flag with its default, its help text and the stages it affects."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from engine.runtime.errors import UserError

LARGEST = 10**12  # largest absolute value of any number
SHOWN = 60  # largest number of characters of a wrong value in an error message


class Range(typing.NamedTuple):
    """Range of a finite number: at least ``least`` or above ``above``, at most ``most`` or below ``below``."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def has(self, value: float) -> bool:
        """Whether a number is in the range; False for NaN."""
        return (
            -LARGEST <= value <= LARGEST
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range in words: "from 1 on", "above 0, at most 1"; "" if every finite number is legal."""
        low = f"from {self.least}" if self.least is not None else f"above {self.above}" if self.above is not None else ""
        high = f"at most {self.most}" if self.most is not None else f"below {self.below}" if self.below is not None else ""
        if high.startswith("at most") and low.startswith("from"):
            return f"{low} to {self.most}"
        return ", ".join(filter(None, [low, high])) + (" on" if low.startswith("from") and not high else "")


def flag(
    default: Any,
    help: str,
    *,
    affects: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    short: str | None = None,
    scales: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    distinct: bool = False,
) -> Any:
    """Returns a dataclass field that is a flag of the command line.

    Args:
        default: default value.
        help: help text.
        affects: stages whose results depend on the flag. Changing it after one of them has begun is an error.
        choices: legal values of a text.
        short: short name, for example "-b".
        scales: whether the flag is a length of the run that ``--scale`` changes (``engine.loops.settings``).
        least, above, most, below: range of a number, or of each number in a list; see ``Range``.
        distinct: whether the values of a list must be different.
    """
    metadata = {
        "help": help,
        "affects": tuple(affects),
        "choices": choices,
        "short": short,
        "scales": scales,
        "range": Range(least, above, most, below),
        "distinct": distinct,
    }
    return dataclasses.field(default=default, metadata=metadata)


def check_flags(config: Any) -> None:
    """Checks the values of all flags of a dataclass. Flags that are unset (None) are not checked.

    Raises:
        UserError: a number is out of its range, or a list has a value twice that must be distinct.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check_number(f"--{field.name}", value, field.metadata["range"])
        if field.metadata["distinct"] and value and len(set(value)) < len(value):
            raise UserError(f"--{field.name} {','.join(map(str, value))} has a value twice; give each value once")


def check_number(what: str, value: Any, legal: Range) -> None:
    """Raises a UserError if ``value`` is a number outside a range, or a tuple with such a number."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not legal.has(number):
            kind = "a whole number" if isinstance(number, int) else "a number" if str(legal) else "a finite number"
            bound = "" if str(legal) and abs(number) <= LARGEST else f" of at most {LARGEST:.0e}"
            raise UserError(f"{what} {str(number)[:SHOWN]} found, {kind}{bound} {legal}".rstrip() + " wanted")


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations. An error is a one-line UserError that suggests similar flags."""

    def __init__(self, **kwargs):
        self.ranges: dict[str, Range] = {}
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Like argparse's, with ``least``, ``above``, ``most`` and ``below`` as the range that ``parse_args`` checks."""
        legal = Range(**{name: options.pop(name) for name in Range._fields if name in options})
        if kind := options.get("type"):
            options["type"] = _reader(kind, False, None) if kind in (int, float) else kind
        if str(legal):
            text = options["help"]
            options["help"] = f"{text[:-1]}; {legal}]" if text.endswith("]") else f"{text} [{legal}]"
        action = super().add_argument(*names, **options)
        self.ranges[action.dest] = legal
        return action

    def parse_known_args(self, args=None, namespace=None):
        """Like argparse's; also expands the ``~`` of ``--flag=~/path``, which shells leave as it is, and checks ranges."""
        words = [home(word) for word in (sys.argv[1:] if args is None else args)]
        found, rest = super().parse_known_args(words, namespace)
        for name, legal in self.ranges.items():
            check_number(f"--{name}", getattr(found, name, None), legal)
        return found, rest

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.removeprefix("unrecognized arguments: ").split()[0]
            written = "--" + unknown.split("=")[0].lstrip("-").replace("-", "_")
            known = [name for name in self._option_string_actions if "-" not in name.lstrip("-")]
            near = difflib.get_close_matches(written, known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            message = f"unknown flag {unknown}; {hint}see --help"
        raise UserError(message)


def home(word: str) -> str:
    """Returns a word of a command line with a leading ``~/``, or one behind ``--flag=``, replaced by the home directory."""
    name, path = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups(default="")
    return name + os.path.expanduser(path) if path == "~" or path.startswith("~/") else word


def add_list(parser: argparse.ArgumentParser, **tables: Iterable[str]) -> None:
    """Adds ``--list KIND``, which prints the names of a table, one per line, and ends the program.

    Args:
        tables: {kind: names}; a kind is, for example, "models".
    """

    class List(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            if value is None:
                parser.error(f"--list needs a kind of names; give one of {', '.join(tables)}")
            print("\n".join(tables[value]))
            parser.exit()

    parser.add_argument(
        "--list", action=List, nargs="?", choices=tables, help="print all known names of one kind, one per line, and exit"
    )


class _Formatter(argparse.HelpFormatter):
    """Help formatter that shows only the ``_`` spelling of a flag."""

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


def add_flags(parser: Parser, config: type, title: str, defaults: dict[str, Any] | None = None) -> None:
    """Adds a flag for each field of a dataclass, as ``--name_of_field`` and ``--name-of-field``, under a heading.

    Args:
        parser: parser to add the flags to.
        config: the dataclass.
        title: heading of the flags in the help.
        defaults: {name of a field: default} that replace the defaults of the fields.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = (defaults or {}).get(field.name, field.default)
        kind, repeated = _value_type(hints[field.name])
        names = dict.fromkeys(["--" + field.name, "--" + field.name.replace("_", "-")])
        if field.metadata.get("short"):
            names[field.metadata["short"]] = None
        shown = ",".join(map(str, default)) if repeated and default is not None else default
        notes = ["" if default in (None, "") or default is False else str(shown), str(field.metadata["range"])]
        text = field.metadata["help"].replace("%", "%%") + (f" [{'; '.join(filter(None, notes))}]" if any(notes) else "")
        options: dict[str, Any] = {"dest": field.name, "default": default, "help": text}
        if kind is bool:
            group.add_argument(*names, action="store_true", **options)
            continue
        options["metavar"] = (
            "{" + ",".join(field.metadata["choices"]) + "}" if field.metadata.get("choices") else kind.__name__.upper()
        )
        group.add_argument(*names, type=_reader(kind, repeated, field.metadata.get("choices")), **options)
        parser.ranges[field.name] = field.metadata["range"]


def _value_type(hint: Any) -> tuple[type, bool]:
    """Returns (type of one value, whether the flag takes a comma-separated list)."""
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _reader(kind: type, repeated: bool, choices: Sequence[str] | None):
    def one(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, TypeError):
            wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise argparse.ArgumentTypeError(f"'{text[:SHOWN]}' found, {wanted} wanted") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"'{text}' found, one of {', '.join(choices)} wanted")
        return value

    def read(text: str) -> Any:
        values = tuple(one(t) for t in text.split(",") if t.strip()) if repeated else one(text)
        if values == ():
            raise argparse.ArgumentTypeError("an empty list found; give at least one value, or leave the flag out")
        return values

    read.__name__ = kind.__name__
    return read


numbers = _reader(float, True, None)  # ``type`` of an argument such as "0.5,0.5,0.5"


def from_args(config: type, args: argparse.Namespace) -> Any:
    """Returns the dataclass ``config`` with the parsed arguments as values.

    Raises:
        UserError: as for ``check_flags``.
    """
    filled = config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(config)})
    check_flags(filled)
    return filled


def given_flags(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """Returns the names of the flags that a command line gives, even with their default values."""
    unset = object()
    names = [action.dest for action in parser._actions]
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name, value in vars(parsed).items() if value is not unset}


def stage_flags(stage: str, *configs: Any) -> dict[str, Any]:
    """Returns {name: value} of the flags on which a stage's result depends."""
    return {
        f.name: list(v) if isinstance(v := getattr(config, f.name), tuple) else v
        for config in configs
        for f in dataclasses.fields(config)
        if stage in f.metadata["affects"]
    }
