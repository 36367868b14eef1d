"""How encoding a folder of audio scales with ranks: `latents.py encode`, by 1, 2, … processes.

A folder of 10.08 s WAVs (noise) is encoded by EnCodec with random weights, the real one's size,
each rank on one thread. Seconds are those of the whole command: Python's and EnCodec's start,
reading, encoding, writing, and what rank 0 does at the end. The data sets must be equal, to the
byte.

    python -m benchmarks.encoding                  96 files, 1 and 2 ranks, three rounds in turn
    python -m benchmarks.encoding --files 2000 --ranks 1 2 4 8
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from encodec import EncodecModel

import latents
from benchmarks.kills import contents

ROOT = Path(latents.__file__).parent


def encode(folder: Path, ranks: int, out: Path) -> float:
    """Seconds of the command."""
    options = [folder, folder / "table.csv", "--encodec-weights", folder / "encodec.th"]
    options += ["--out", out, "--workers", "1", "--batch-size", "8", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [sys.executable, *(torchrun if ranks > 1 else []), ROOT / "latents.py", "encode"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    run = subprocess.run([*map(str, command + options)], env=environment, capture_output=True)
    if run.returncode:
        sys.exit(run.stderr.decode())
    return time.perf_counter() - started


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--files", type=int, default=96, help="[96]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="[1 2]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, lines = Path(folder), ["file,caption"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = EncodecModel.encodec_model_24khz(pretrained=False)
        torch.save(model.state_dict(), folder / "encodec.th")
        for i in range(args.files):
            wave = 0.1 * torch.randn(
                latents.CLIP_SAMPLES, generator=torch.Generator().manual_seed(i)
            )
            latents.save_audio(folder / f"{i}.wav", wave)
            lines.append(f"{i}.wav,noise")
        (folder / "table.csv").write_text("\n".join(lines) + "\n")
        seconds = {ranks: [] for ranks in args.ranks}
        for number in range(args.rounds):
            for ranks in args.ranks:
                out = folder / f"{ranks}-{number}"
                seconds[ranks].append(encode(folder, ranks, out))
                assert contents(out) == contents(folder / f"{args.ranks[0]}-0"), "differs"
        print(f"{args.files} files\n{'ranks':>5}{'seconds':>10}{'clips a second':>16}{'times':>8}")
        first = statistics.median(seconds[args.ranks[0]])
        for ranks, found in seconds.items():
            middle = statistics.median(found)
            print(f"{ranks:>5}{middle:>10.1f}{args.files / middle:>16.2f}{first / middle:>8.2f}   "
                  f"{', '.join(f'{x:.1f}' for x in found)}")  # fmt: skip


if __name__ == "__main__":
    main()
