"""How fast a training process gets at its data, and how that grows with the data set.

A data set of random EnCodec codes is written through latents.py, and one twenty times as large, a
sparse file that takes no room. Then, on one thread, each in a process of its own:

    read        random batches gathered from the memory map                      clips a second
    read + z    the same, and the latents of the codes (EnCodec's arithmetic, random codebooks)
    records     random clips' records                                            clips a second
    open        opening the data set                                             seconds
    memory      what reading adds to the process beside the map's pages, which the system may drop

    python -m benchmarks.data                     100,000 and 2,000,000 clips; 1.1 GB, a minute
    python -m benchmarks.data --clips 10000
"""

import argparse
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from latents import (
    CLIP_SAMPLES,
    FRAMES,
    EncodecCodec,
    LatentDataset,
    encode_dataset,
    keep_freed_memory,
)


class RandomCodes:
    """A codec that hears nothing and gives random codes."""

    name, channels, stored_shape, stored_dtype = "encodec", 128, (8, FRAMES), torch.uint16

    def settings(self) -> dict:
        return {"name": "random codes"}

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        return torch.randint(1024, (len(wave), *self.stored_shape)).to(torch.uint16)

    def dequantize(self, stored: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, self.channels, 1)  # statistics are of no interest here


def write(folder: Path, clips: int) -> None:
    silence = torch.zeros(1, CLIP_SAMPLES)
    rows = [
        {"id": f"{i:011d}", "file": f"{i:011d}", "captions": ["a sound"], "labels": [f"{i % 527}"]}
        for i in range(clips)
    ]
    encode_dataset(folder, RandomCodes(), rows, lambda row: silence, batch_size=64)


def repeat(folder: Path, out: Path, times: int) -> None:
    """A data set `times` as large: its records again and again, and an array full of zeros."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("codes.npy", "clips.jsonl"))
    codes = np.load(folder / "codes.npy", mmap_mode="r")
    shape = (times * len(codes), *codes.shape[1:])
    np.lib.format.open_memmap(out / "codes.npy", "w+", codes.dtype, shape)
    (out / "clips.jsonl").write_text(times * (folder / "clips.jsonl").read_text())


def own_memory() -> int:
    """Bytes of this process that are no file's pages."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(folder: Path, batch_size: int, seconds: float = 5.0) -> dict:
    torch.set_num_threads(1)
    keep_freed_memory()  # as in train.py
    started = time.perf_counter()
    data = LatentDataset(folder)
    opened = time.perf_counter() - started
    before, memory = own_memory(), 0
    rng, rates = np.random.default_rng(0), {}
    codec = EncodecCodec.__new__(EncodecCodec)  # its arithmetic, without its weights
    codec.codebooks = torch.randn(8 * 1024, 128)
    for name, use in (("read", lambda codes: codes), ("read + z", codec.dequantize)):
        use(data.stored(rng.integers(len(data), size=batch_size)))
        clips, begun = 0, time.process_time()  # of this process: waiting for the disk is not in it
        while time.process_time() - begun < seconds:
            use(data.stored(rng.integers(len(data), size=batch_size)))
            clips += batch_size
        rates[name] = clips / (time.process_time() - begun)
        memory = memory if name != "read" else own_memory() - before - codec.codebooks.nbytes
    begun = time.process_time()
    for i in rng.integers(len(data), size=10_000):
        data.record(i)
    rates["records"] = 10_000 / (time.process_time() - begun)
    return {"clips": len(data), **rates, "open": opened, "memory": memory}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--clips", type=int, default=100_000, help="of the data set [100000]")
    parser.add_argument("--batch-size", type=int, default=192, help="clips at a time [192]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        started = time.perf_counter()
        write(small, args.clips)
        print(f"{args.clips:,} clips written in {time.perf_counter() - started:.0f} s")
        repeat(small, large, 20)
        print(f"{'clips':>10}{'read/s':>10}{'read + z/s':>12}{'records/s':>11}{'open s':>9}"
              f"{'memory MB':>11}")  # fmt: skip
        for data in (small, large):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(measure, data, args.batch_size).result()
            rates = f"{row['clips']:>10,}{row['read']:>10,.0f}{row['read + z']:>12,.0f}"
            times = f"{row['records']:>11,.0f}{row['open']:>9.3f}"
            print(f"{rates}{times}{row['memory'] / 1e6:>11.1f}")


if __name__ == "__main__":
    main()
