"""Flags are the fields of a dataclass; wrong ones are refused."""

import dataclasses

import pytest

from engine.runtime.errors import UserError
from engine.runtime.flags import Parser, add_flags, flag, from_args, stage_flags


@dataclasses.dataclass(frozen=True)
class Example:
    number: int = flag(3, "a number", affects=("a",))
    rate: float | None = flag(None, "a rate", affects=("a", "b"))
    names: tuple[str, ...] | None = flag(None, "names")
    long_name: str = flag("x", "a name", choices=("x", "y"), short="-l")
    on: bool = flag(False, "a switch")


def parse(text):
    parser = Parser(prog="p")
    add_flags(parser, Example, "example", {"number": 5})
    return from_args(Example, parser.parse_args(text.split()))


def test_flags_are_the_dataclass():
    assert parse("") == Example(number=5)
    assert parse("--number 7 --rate 1e-3 --names a,b --long-name y --on") == Example(7, 1e-3, ("a", "b"), "y", True)
    assert parse("--long_name y") == parse("-l y")
    assert stage_flags("b", Example(rate=0.5)) == {"rate": 0.5}


@pytest.mark.parametrize("text", ["--numbr 3", "--num 3", "--number x", "--long_name z", "--rate"])
def test_wrong_flags_are_refused(text):
    with pytest.raises(UserError):
        parse(text)
