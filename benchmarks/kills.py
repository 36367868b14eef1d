"""Runs that are killed with SIGKILL, again and again, and must end as if nothing had happened.

Small real runs of train.py (alone, and with two ranks under torchrun), `latents.py encode` and
`captions.py run`, on made-up sounds and random networks, each once without interruption and once
with kills at random moments: while it starts, after some more of its output, while it writes a file
(checkpoints, models, data sets). The same command goes on each time. Then what both have left
must be equal: weights, their average, the optimizer's state and the log; all files of the stored
data set; all records with their captions; and nothing else may lie about.

    python -m benchmarks.kills                            30 kills of each of the four
    python -m benchmarks.kills --kills 3 --only train encode captions --ranks 1

The scripts are imported once and forked for each start, which saves the seconds that imports take;
torchrun starts from the command line. The networks are those of the tests: pip install -r
requirements-dev.txt.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of a sum depend on who adds up what

import numpy as np
import soundfile
import torch

import latents
import train
from appendix import visual_captions
from tests.conftest import save_bert
from tests.test_captions_pipeline import build

ROOT = Path(train.__file__).parent


@dataclass
class Job:
    """A command, where one can see that it gets on, and how to compare what two of it have left."""

    name: str
    main: Callable[[], None] | None  # of the script; None: train.py under torchrun
    arguments: list[str]  # but for --out
    watched: str  # files in --out that change, or become more
    writing: tuple[str, ...]  # files that exist while something is being written
    compare: Callable[[Path, Path], None]  # AssertionError where they differ
    ranks: int = 1


# ---- what is left behind -------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def equal(a, b) -> bool:
    """To the bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def compare_runs(one: Path, other: Path) -> None:
    newest = [sorted((run / "checkpoints").iterdir()) for run in (one, other)]
    assert [path.name for path in newest[0]] == [path.name for path in newest[1]], newest
    a, b = (torch.load(paths[-1], weights_only=True) for paths in newest)
    for name in ("network", "ema", "optimizer", "step"):
        assert equal(a[name], b[name]), f"{name} differs"
    assert contents(one / "model") == contents(other / "model"), "the model folders differ"
    a, b = (
        [
            json.loads(line) | {"samples_per_second": None}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (one, other)
    )
    assert a == b, "the logs differ"
    assert contents(one).keys() == contents(other).keys(), "other files"


def compare_data_sets(one: Path, other: Path) -> None:
    a, b = map(contents, (one, other))
    assert a == b, f"the data sets differ: {[k for k in {*a, *b} if a.get(k) != b.get(k)]}"
    data = latents.LatentDataset(one)
    ids = [data.record(i)["id"] for i in range(len(data))]
    assert len(set(ids)) == len(ids) > 0, "records are repeated"


def compare_captions(one: Path, other: Path) -> None:
    a, b = ((folder / "run.jsonl").read_bytes() for folder in (one, other))
    assert a == b, "the records differ"
    assert contents(one).keys() == contents(other).keys(), "files differ"
    ids = [json.loads(line)["id"] for line in a.splitlines()]
    assert len(set(ids)) == len(ids) > 0, "records are repeated"


# ---- starting, waiting, killing ------------------------------------------------------------------


def start(job: Job, out: Path) -> int:
    """The process id of the job, which leads a process group; what it prints goes to OUT.txt."""
    if pid := os.fork():
        return pid
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    arguments, code = [*job.arguments, "--out", str(out)], 1
    try:
        if job.main is None:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc_per_node", str(job.ranks), str(ROOT / "train.py"), *arguments]
            os.execv(sys.executable, launch)
        sys.argv = [job.name, *arguments]
        job.main()
        code = 0
    except SystemExit as e:
        print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, until: Callable[[], bool]) -> int | None:
    """The exit status of a process that ends by itself, or None as soon as `until()`."""
    try:
        while not until():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
    except BaseException:  # Ctrl-C, say: nothing is left running
        kill(pid)
        raise
    return None


def moment(job: Job, out: Path, rng: random.Random) -> Callable[[], bool]:
    """A function that says when a random moment to kill has come."""

    def size() -> list:
        stats = [(path.name, path.stat()) for path in sorted(out.glob(job.watched))]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    kind = rng.choice(["start", *["output"] * 2, *["writing"] * 3])
    kind = kind if job.writing or kind == "start" else "output"
    last, moves, kill_at = size(), rng.randint(1, 4), math.inf
    if kind == "start":  # or with its first output, if that comes before
        moves, kill_at = 1, time.monotonic() + rng.uniform(0.02, 1 if job.main else 10)

    def come() -> bool:
        nonlocal last, moves, kill_at
        if kind == "writing" and kill_at == math.inf:
            if any(any(out.glob(pattern)) for pattern in job.writing):
                kill_at = time.monotonic() + rng.choice((0, rng.uniform(0, 0.03)))
        elif kind != "writing" and moves > 0 and (now := size()) != last:
            last, moves = now, moves - 1
            if moves == 0:
                kill_at = time.monotonic() + rng.uniform(0, 0.1)
        return time.monotonic() >= kill_at

    return come


def family(pid: int) -> list[int]:
    """The process, and all that it and they have started."""
    children = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, path.read_text().split())
    return [pid, *(x for child in children for x in family(child))]


def alive(pid: int) -> bool:
    try:  # a zombie waits for whoever adopted it, and does nothing
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    """The process group, and those of torchrun's ranks, each of which leads one of its own."""
    pids = family(pid)
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each, signal.SIGKILL)
    os.waitpid(pid, 0)
    while any(map(alive, pids)):
        time.sleep(0.001)


def finish(job: Job, out: Path) -> None:
    if wait(start(job, out), lambda: False) != 0:
        raise RuntimeError(f"{job.name}: {Path(f'{out}.txt').read_text()[-2000:]}")


def torn(job: Job, out: Path) -> bool:
    """Did the kill leave something half done?"""
    lines = [path.read_bytes() for path in out.glob("*.jsonl")]
    return any(text and not text.endswith(b"\n") for text in lines) or any(
        any(out.glob(pattern)) for pattern in job.writing
    )


def run(job: Job, folder: Path, kills: int, seed: int) -> dict:
    """The job without kills, and with; AssertionError if it makes a difference."""
    rng, started = random.Random(f"{seed} {job.name}"), time.monotonic()
    whole, out = folder / f"{job.name} whole", folder / f"{job.name} killed"
    if not whole.exists():
        finish(job, whole)
    done, halves = 0, 0
    while done < kills:
        pid = start(job, out)
        status = wait(pid, moment(job, out, rng))
        if status is None:
            kill(pid)
            done, halves = done + 1, halves + torn(job, out)
        elif status:
            raise RuntimeError(f"{job.name}: {Path(f'{out}.txt').read_text()[-2000:]}")
        else:  # it was faster than the kills: once more, from the beginning
            job.compare(out, whole)
            shutil.rmtree(out)
    finish(job, out)
    job.compare(out, whole)
    return {"kills": done, "torn": halves, "seconds": time.monotonic() - started}


# ---- the jobs ------------------------------------------------------------------------------------


def make_jobs(folder: Path, kills: int, ranks: list[int]) -> list[Job]:
    """Sounds, tables and networks; as much work as so many kills need."""
    rng, n = np.random.default_rng(0), 6 * kills + 6
    (folder / "sounds").mkdir()
    for i in range(n):
        soundfile.write(folder / f"sounds/{i}.wav", rng.uniform(-0.5, 0.5, 4000), 16_000)
    rows = [
        {"file": f"{i}.wav", "id": f"{i}", "labels": [f"Sound {i % 5}", "Noise"][: 1 + (i % 9 > 0)]}
        for i in range(n)
    ]
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def models() -> None:
        save_bert(folder / "bert")
        for part in build("llama"):
            part.save_pretrained(folder / "llama")

    encode = ["encode", str(folder / "sounds"), str(table), "--codec", "mel", "--workers", "1"]
    encode += ["--batch-size", "2", "--device", "cpu"]
    encode = Job("encode", latents.main, encode, "done", (".*.tmp",), compare_data_sets)
    finish(encode, folder / "encode whole")  # the training data, too
    make_models = replace(encode, name="models", main=models)
    finish(make_models, folder / "models")

    text = ["run", str(table), "--llm", str(folder / "llama"), "--t5", "", "--bert", ""]
    text += "--score llm --shots 1 --batch-size 2 --device cpu".split()
    text = Job("captions", visual_captions.main, text, "run.jsonl", (), compare_captions)

    options = f"--steps {6 * kills + 6} --frozen-steps {3 * kills} --checkpoint-every 3 "
    options += f"--validate-every 20 --text-encoder {folder}/bert --max-length 16 "
    options += "--block-out-channels 32,32 --attention 0,1 --num-heads 2 --cross-attention-dim 24 "
    options += "--val-clips 2 --warmup-steps 2 --precision fp32 --device cpu --batch-size 2"
    options = [*options.split(), "--data", str(folder / "encode whole")]
    writing = ("checkpoints/.*.tmp", "model.tmp")
    jobs = [encode, text]
    for count in ranks:
        name, main = ("train", train.main) if count == 1 else (f"train, {count} ranks", None)
        jobs.append(Job(name, main, options, "log.jsonl", writing, compare_runs, count))
    return jobs


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    names = ("train", "encode", "captions")
    parser.add_argument("--kills", type=int, default=30, help="of each job [30]")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="[all of them]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of train.py [1 2]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # as tidily as by Ctrl-C
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        jobs = make_jobs(Path(folder), args.kills, args.ranks)
        print(f"{'command':18}{'kills':>7}{'half-written files left':>26}{'minutes':>9}  result")
        for job in jobs:
            if job.name.split(",")[0] in args.only:
                row = run(job, Path(folder), args.kills, args.seed)
                counts = f"{row['kills']:>7}{row['torn']:>26}{row['seconds'] / 60:>9.1f}"
                print(f"{job.name:18}{counts}  as without kills", flush=True)


if __name__ == "__main__":
    main()
