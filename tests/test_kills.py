"""A short version of `python -m benchmarks.kills`, without torchrun (test_train.py has that)."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_killed_runs_end_as_if_nothing_had_happened():
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "1", "--ranks", "1"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["encode", "1"], ["captions", "1"], ["train", "1"]]
