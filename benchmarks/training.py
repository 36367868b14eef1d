"""How long a training step takes and what memory it needs, here and with diffusers.

The peer is the loop of diffusers' own example (train_text_to_image.py, with --use_ema and mixed
precision): UNet2DConditionModel, DDPMScheduler.add_noise, torch's AdamW as it comes, EMAModel. Both
get the same data set, text states, weights, captions, t and noise, and autocast to bf16; losses and
gradient norms of their first steps must agree. Each runs in a process of its own, so that peak
memory is its own. Ours keeps freed memory on a CPU (`latents.keep_freed_memory`); theirs is timed
without that, as its users run it, and with it.

    python -m benchmarks.training                       the tiny preset's network, batch 8
    python -m benchmarks.training --preset paper --batch-size 2 --steps 3 --rounds 2
    python -m benchmarks.training --gradient-checkpointing      both with it

At full width (861,022,528 parameters with gradients, AdamW's two moments and EMA) it takes 20 GB.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from encodec import EncodecModel
from transformers import BertConfig, BertModel, BertTokenizer

import train
from benchmarks.data import RandomCodes
from benchmarks.sampling import betas_of
from latents import (
    CLIP_SAMPLES,
    EncodecCodec,
    MelCodec,
    encode_dataset,
    keep_freed_memory,
    pick_device,
)
from unet import to_diffusers_config


class Ours:
    """train.py's step, as its loop calls it."""

    def __init__(self, c: train.Config):
        self.task = train.Denoiser(c, pick_device(c.device))
        network = self.task.network
        self.model = torch.compile(network) if c.compile else network
        self.ema = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = train.make_optimizer(network, c)

    def step(self, batch: tuple) -> dict:
        return train.train_step(self.task, self.model, self.ema, self.optimizer, [batch])


class Example:
    """diffusers' training example, on the batches of our loop."""

    def __init__(self, c: train.Config):
        self.task = task = train.Denoiser(c, torch.device("cpu"))
        with torch.device("meta"):
            config = to_diffusers_config(task.network.config)
            self.unet = UNet2DConditionModel.from_config(config)
        self.unet.load_state_dict(task.network.state_dict(), assign=True)
        task.network = None
        if c.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), c.lr, (0.9, c.beta2), weight_decay=c.weight_decay
        )
        self.ema = EMAModel(self.unet.parameters(), decay=c.ema_decay)
        self.scheduler = DDPMScheduler(trained_betas=betas_of(task.alphas_cumprod))

    def step(self, batch: tuple) -> dict:
        captions, stored, t, noise = batch
        task = self.task
        latents = task.stats.normalize(task.codec.dequantize(stored))
        latents = latents.unflatten(2, (24, 21))
        noisy = self.scheduler.add_noise(latents, noise, t)
        states, _ = task.encoder(captions)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.unet(noisy, t, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), task.c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return {"loss": loss.item(), "gradient_norm": norm.item()}


def prepare(folder: Path, preset: str, clips: int) -> train.Config:
    """Random recordings, codec and text encoder of the preset's kind, and the run on them."""
    paper = preset == "paper"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    weights = folder / Path(EncodecCodec.url).name
    encodec = EncodecModel.encodec_model_24khz(pretrained=False)
    for layer in encodec.quantizer.vq.layers:
        torch.nn.init.normal_(layer.codebook)  # zeros, until it is trained
    torch.save(encodec.state_dict(), weights)
    codec = MelCodec()
    if paper:
        codec = RandomCodes()
        codec.settings = EncodecCodec(weights).settings
    rows = [
        {"id": f"{i}", "file": f"{i}", "captions": [f"a dog {i}"], "labels": ["sound"]}
        for i in range(clips)
    ]
    encode_dataset(
        folder / "data", codec, rows, lambda row: 0.1 * torch.randn(1, CLIP_SAMPLES), batch_size=4
    )
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", *map(str, range(clips))]
    sizes = {"hidden_size": 1024 if paper else 384, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": len(pieces)}
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "text")
    BertTokenizer(vocab={p: i for i, p in enumerate(pieces)}).save_pretrained(folder / "text")
    return replace(
        train.PRESETS[preset],
        data=str(folder / "data"),
        encodec_weights=str(weights),
        text_encoder=str(folder / "text"),
        mask="none",
        prediction="eps",
        schedule_shift=1.0,
        precision="bf16",
        val_clips=1,
        device="cpu",
        gradient_checkpointing=False,
    )


def peak_memory() -> float:
    """GiB of this process (its ru_maxrss would begin at its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def measure(kind: type, keep: bool, c: train.Config, steps: int) -> dict:
    if keep:
        keep_freed_memory()
    run, times, entries = kind(c), [], []
    for step in range(steps + 1):
        places = range(c.batch_size)
        batch = run.task.batch(step, places, run.task.choose(step, c.batch_size))  # in a thread,
        started = time.perf_counter()  # beside the step, in a real run
        entries.append(run.step(batch))
        times.append(time.perf_counter() - started)
    first = {key: float(entries[0][key]) for key in ("loss", "gradient_norm")}
    return {"seconds": statistics.median(times[1:]), "GiB": peak_memory(), **first}


def copied_bytes() -> float:
    """A second, read and written, in the best of ten copies of 1 GiB."""
    source = torch.ones(2**28)
    target, times = torch.ones_like(source), []
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(times)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--preset", choices=train.PRESETS, default="tiny", help="[tiny]")
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step [8]")
    parser.add_argument("--steps", type=int, default=20, help="after the first, a round [20]")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run [3]")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    kinds = {
        "diffusers": (Example, False),
        "diffusers, freed memory kept": (Example, True),
        "here": (Ours, True),
    }
    print(f"memory: {copied_bytes() / 1e9:.0f} GB/s read and written in a copy")
    results = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HUB_OFFLINE"] = "1"
        c = prepare(Path(folder), args.preset, clips=2 * args.batch_size + 1)
        c = replace(
            c,
            batch_size=args.batch_size,
            gradient_checkpointing=args.gradient_checkpointing,
            out=folder,
        )
        for number in range(args.rounds):
            for name, kind in kinds.items():
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    results[name].append(pool.submit(measure, *kind, c, args.steps).result())
                r = results[name][-1]
                print(f"round {number + 1}: {name:28} {r['seconds']:.3f} s a step, {r['GiB']:.2f} "
                      f"GiB; first step: loss {r['loss']:.6f}, gradient norm "
                      f"{r['gradient_norm']:.4f}", flush=True)  # fmt: skip
    ours = results.pop("here")
    for name, theirs in results.items():
        pairs = list(zip(theirs, ours, strict=True))
        for key, tolerance in (("loss", 1e-3), ("gradient_norm", 2e-2)):
            if any(abs(a[key] / b[key] - 1) > tolerance for a, b in pairs):
                sys.exit(f"error: the first {key} differs: it isn't the same step that was timed")
        memory = max(x["GiB"] for x in ours) / max(x["GiB"] for x in theirs)
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        print(f"{args.preset}, batch {args.batch_size}, {torch.get_num_threads()} threads: "
              f"{statistics.median(ratios):.2f}x as fast as {name} ({min(ratios):.2f} to "
              f"{max(ratios):.2f}), {memory:.2f} of its memory")  # fmt: skip


if __name__ == "__main__":
    main()
