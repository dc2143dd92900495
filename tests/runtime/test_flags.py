"""Flags are the fields of a dataclass; wrong flags are refused."""

import argparse
import dataclasses
import importlib

import pytest

import datafree_kd
from engine.runtime.errors import UserError
from engine.runtime.flags import LARGEST, Parser, add_flags, flag, from_args, stage_flags
from registry import METHODS


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


def test_a_home_directory_that_the_shell_leaves_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--names=~/a,b --names ~/c").names == ("/home/me/c",)
    assert parse("--names=~/a").names == ("/home/me/a",) and parse("--names=b~/c").names == ("b~/c",)
    monkeypatch.setattr("sys.argv", ["program", "--save_dir=~/x"])
    parser = Parser(prog="p")
    parser.add_argument("--save_dir")
    assert parser.parse_args().save_dir == "/home/me/x"


def main_of(name):
    """A function that calls ``main`` of a module with a command line."""

    def call(words, monkeypatch):
        monkeypatch.setattr("sys.argv", ["program", *words])
        importlib.import_module(name).main()

    return call


COMMANDS = {method: (lambda words, _: datafree_kd.parse(words), f"--method {method}") for method in METHODS} | {
    "train_scratch": (main_of("train_scratch"), ""),
    "train_prior": (main_of("datafree.diffusion.train_prior"), ""),
    "glyphs": (main_of("datafree.diffusion.glyphs"), ""),
    "export": (main_of("datafree.bank"), "export bank folder"),
    "import": (main_of("datafree.bank"), "import folder bank --dataset digits"),
    "int8": (main_of("datafree.int8"), "--dataset digits --teacher resnet8 --bank b --lines l"),
    "loops": (main_of("datafree.benchmark.__main__"), ""),
    "evaluate": (main_of("engine.evaluate"), "m --dataset digits"),
    "report": (main_of("engine.report.command"), "r"),
}
NOT_A_NUMBER = ("nan", "inf", "-inf", "1e400", "9" * 5000, "x", "")


class Stop(Exception):
    """Raised after a command line was accepted."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(call, words): the innermost parser that a command line reaches; an error of that parser is raised."""

    def reach(call, words):
        reached, parse = [], Parser.parse_known_args

        def spy(self, args=None, namespace=None):
            reached.append(self)
            return parse(self, args, namespace)

        def stop(*_):
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(Parser, "parse_known_args", spy)
            patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *a: (self.parse_known_args(*a), stop()))
            with pytest.raises(Stop):
                call(words, patch)
        return reached[-1]

    return reach


def outside(kind, legal):
    """Numbers just outside a range, as strings."""
    step = 1 if kind == "int" else 1e-6
    return [
        str(number)
        for number in (
            None if legal.least is None else legal.least - step,
            legal.above,
            None if legal.most is None else legal.most + step,
            legal.below,
            LARGEST * 10,
        )
        if number is not None
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range_and_is_held_to_it(command, parser_of, capsys):
    """Values outside are refused in one line, values at the edge accepted; ``--help`` has the range; defaults are inside."""
    call, words = COMMANDS[command][0], COMMANDS[command][1].split()
    parser = parser_of(call, words)
    shown = " ".join(parser.format_help().split())
    for name, legal in parser.ranges.items():
        action = next(action for action in parser._actions if action.dest == name)
        kind, written = getattr(action.type, "__name__", ""), f"--{name}"
        if kind not in ("int", "float"):
            continue
        assert str(legal) or name.endswith("mean"), f"{written} of {command} has no range"
        assert str(legal) in shown
        for value in (*NOT_A_NUMBER, *outside(kind, legal)):
            with pytest.raises(UserError) as caught:
                parser_of(call, [*words, f"{written}={value}"])
            assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
        for edge in filter(lambda edge: edge is not None, (legal.least, legal.most)):
            parser_of(call, [*words, f"{written}={edge}"])
        assert action.default is None or not isinstance(action.default, int | float) or legal.has(action.default)


def test_a_seed_that_comes_twice(command):
    with pytest.raises(UserError, match="--seeds 0,1,0 has a value twice"):
        command("datafree_kd", "--method dafl --seeds 0,1,0")
