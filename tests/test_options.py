"""Every command: its numbers have bounds, and what is out of them is refused before any work."""

import argparse
import importlib
import math
import pathlib

import pytest

from latents import number

ROOT = pathlib.Path(__file__).parent.parent
CORE = ("latents", "captions", "train", "sample", "evaluate")
APPENDIX = [f"appendix.{p.stem}" for p in sorted(ROOT.glob("appendix/*.py")) if p.stem[0] != "_"]
TINY = ("tiny.adapted", "tiny.compose", "tiny.judge")


class Stopped(Exception):
    """Where a command would start to work."""


def parsers(script: str, monkeypatch) -> list[argparse.ArgumentParser]:
    """The parser of a script and those of its subcommands."""
    found = []

    def stop(self, *_):
        found.append(self)
        raise Stopped

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Stopped):
        importlib.import_module(script).main()
    for parser in found:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
    return found


@pytest.mark.parametrize("script", (*CORE, *APPENDIX, *TINY))
def test_numbers_have_bounds(script, monkeypatch):
    for parser in parsers(script, monkeypatch):
        for action in parser._actions:
            name = f"{script} {'/'.join(action.option_strings)}"
            assert action.type not in (int, float), f"{name} takes any number"
            if getattr(action.type, "__name__", "") == "float":
                with pytest.raises(argparse.ArgumentTypeError, match="nan: expected"):
                    action.type("nan")


def test_a_number():
    share = number(float, 0, 1)
    assert share("0.5") == 0.5 and share.__name__ == "float" and number(int, 3)("7") == 7
    for kind, text in ((share, "-0.1"), (share, "1.5"), (share, "nan"), (number(int, 1), "0")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: expected"):
            kind(text)
    with pytest.raises(ValueError):
        share("half")
    assert number(float, -math.inf)("-2") == -2
