"""How the commands here begin and fail, and what they read, write and print alike."""

import argparse
import json
from pathlib import Path

import safetensors
from torch import Tensor

from latents import write_aside


def make_parser(description: str, **options) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it stands, and takes no abbreviations: some of
    the arguments may be train.py's."""
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, formatter_class=style, allow_abbrev=False, **options
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file and its metadata; ValueError for any other."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: damaged, or no safetensors file ({e})") from e


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def markdown(head: list[str], rows: list[list]) -> str:
    """A table in Markdown; all columns but the first have numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
