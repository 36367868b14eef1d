"""A short version of `python -m benchmarks.kills`, without torchrun (test_train.py has that)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_killed_again_and_again():
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "2", "--ranks", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["encode", "captions", "train"]
    assert all(int(row[1]) >= 1 for row in rows), done.stdout  # a run may be over before
