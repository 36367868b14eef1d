"""How the commands here begin and fail, and what they read, write and print alike."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor

from latents import write_aside


def make_parser(description: str, **options) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it stands, and takes no abbreviations: some of
    the arguments may be train.py's."""
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, formatter_class=style, allow_abbrev=False, **options
    )


@contextmanager
def one_line_errors(after_interrupt: str = "the same command goes on") -> Iterator[None]:
    """A bad input or Ctrl-C within ends the process with one line and status 1."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: {after_interrupt}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: {str(e).splitlines()[0]} Take a smaller --batch-size")
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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
