"""What `python sample.py "dog barking"` costs, where the time goes, and how it grows.

The embedded model, on this machine:

    cold      the command itself, from a process that isn't there yet: seconds, peak memory
    parts     imports, loading, one clip: text encoder, U-Net, phase reconstruction
    steps     a clip's time and memory against denoising steps: linear, and constant
    batch     time a clip and memory against prompts in a batch: should fall
    ranks     training steps a second at one global batch, on 1 and 2 ranks of torchrun (on tiny/'s
              scenes, which are composed first if they aren't there: five minutes)

    python -m benchmarks.tiny                   all of them, five minutes on 2 CPU cores
    python -m benchmarks.tiny cold parts
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak memory in GiB of `python …`."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            errors.seek(0)
            sys.exit(f"error: python {' '.join(arguments)}:\n{errors.read().decode()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def cold() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [command("sample.py", "dog barking", "--out", folder) for _ in range(6)][1:]
    seconds, cpu, memory = (sorted(column) for column in zip(*runs, strict=True))
    spread = f"{seconds[0]:.1f} to {seconds[-1]:.1f} in 5"
    print(f"cold start: {statistics.median(seconds):.1f} s ({spread}), "
          f"{statistics.median(cpu):.1f} s of CPU, {memory[-1]:.2f} GiB")  # fmt: skip


def parts() -> None:
    code = """
import time; start = time.perf_counter()
def lap(name):
    global start
    print(f"  {name:22}{time.perf_counter() - start:6.2f} s"); start = time.perf_counter()
import torch; lap("import torch")
import sample; lap("import sample")
from transformers import AutoModel, AutoTokenizer; lap("import transformers")
model = sample.load_model(); lap("load the model folder")
states = model.encoder(["", "dog barking"]); lap("encode the text")
decode = model.codec.decode
model.codec.decode = lambda z: (lap(f"U-Net, {model.steps + 1} calls"), decode(z))[1]
sample.generate(model, ["dog barking"]); lap("phases (Griffin-Lim)")
"""
    print("parts:", flush=True)
    command("-c", code)


def generating(n: int, steps: int) -> None:
    code = """
import sys, time, sample
n, steps, model = int(sys.argv[1]), int(sys.argv[2]), sample.load_model()
decode = model.codec.decode
model.codec.decode = lambda z: (denoised.append(time.perf_counter()), decode(z))[1]
denoised = []
sample.generate(model, ["dog"] * n, steps=2, batch_size=n)
start = time.perf_counter()
sample.generate(model, ["dog"] * n, steps=steps, batch_size=n)
total, unet = (end - start for end in (time.perf_counter(), denoised[-1]))
memory = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
print(f"batch {n:3}, {steps:3} steps: {total / n:6.2f} s a clip, {unet / n:6.2f} s of it until the "
      f"latent is there, {memory:.2f} GiB")
"""
    command("-c", code, str(n), str(steps))


def steps() -> None:
    for number in (10, 20, 45, 90, 180):
        generating(1, number)


def batch() -> None:
    for n in (1, 2, 4, 8, 16, 32):
        generating(n, 45)


def ranks() -> None:
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            *_, memory = command(
                *f"-m torch.distributed.run --nproc_per_node {n} train.py --out {folder}/run "
                f"--steps 40 --batch-size {8 // n} --val-clips 8".split()
            )
            lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
        rate = statistics.median(json.loads(line)["samples_per_second"] for line in lines[5:-1])
        print(f"ranks {n}: {rate:.1f} clips a second at a global batch of 8, {memory:.2f} GiB each")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    choices = {f.__name__: f for f in (cold, parts, steps, batch, ranks)}
    parser.add_argument("what", nargs="*", help=f"of {', '.join(choices)} [all]")
    args = parser.parse_args()
    for name in args.what or choices:
        if name not in choices:
            parser.error(f"{name!r}: expected some of {', '.join(choices)}")
        choices[name]()


if __name__ == "__main__":
    main()
