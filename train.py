"""Train ε_θ on stored latents and their captions: papers, sections 4 and 5, P2 tables 2 and A10.

    loss = E ‖ε_θ(x_t, t, τ(y)) − ε‖²   with  x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,  t uniform in 0 … 999

    x_0   normalised latent [B, 128, 24, 21]       y   its caption, "" for one clip in ten
    τ     the frozen text encoder                  ε   Gaussian noise (or v, x_0: diffusion.py)

    python train.py                                          the tiny model, on tiny/'s recordings
    torchrun --nproc_per_node 8 train.py --preset paper --data FOLDER \\
        --init CompVis/stable-diffusion-v1-4                 the papers' run

Everything random (which clips, which caption, t, ε, dropped captions) is a function of (seed, step,
place in the global batch) and of nothing else. So a run is the same on any number of ranks, and one
that was killed goes on, from its newest checkpoint, as if nothing had happened.

Not in the papers: caption dropout (guidance needs an unconditional branch), the moving average of
the weights (EMA, which is what the model folder holds), bf16 autocast, balanced sampling; and for
the tiny model x_0-prediction with v's loss, a shifted noise schedule and AdamW's shorter memory.

    RUN/model/          the result: what sample.py --model takes
    RUN/checkpoints/    the last two; start the same command again to go on
    RUN/log.jsonl       a line a step       RUN/samples/    a sound every now and then
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
from captions import MASKS, TextEncoder
from latents import (
    GRID,
    SAMPLE_RATE,
    LatentDataset,
    LatentStats,
    keep_freed_memory,
    load_codec,
    pick_device,
    read_json,
    save_audio,
    to_grid,
    to_sequence,
    write_aside,
)
from unet import UNet, UNetConfig, load_config

TINY = Path(__file__).resolve().parent / "tiny"

# Types for numbers with a condition, in words and as a test.
Count = Annotated[int, "1 or more", lambda x: x >= 1]
NotNegative = Annotated[float, "0 or more", lambda x: x >= 0]
Positive = Annotated[float, "above 0", lambda x: x > 0]
Share = Annotated[float, "0 to 1", lambda x: 0 <= x <= 1]


@dataclass(frozen=True)
class Config:
    out: str = "runs/tiny"  # the run's folder
    data: str = ""  # stored data set (latents.py encode); empty: the one that tiny.compose makes
    val_data: str = ""  # held-out data set; empty: the last val_clips of data are held out
    encodec_weights: str = ""  # EnCodec's file, for data of its codes; empty: torch hub's cache
    init: str = ""  # start from a model folder, or a U-Net folder or hub id of Stable Diffusion
    # The model. With --init its architecture is that of what is loaded.
    text_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"  # hub id or folder
    max_length: Count = 32  # tokens of a caption, padded or cut
    mask: Literal[MASKS] = "both"  # where pads are masked out
    block_out_channels: tuple[int, ...] = (128, 192, 256)  # width of each level
    attention: tuple[bool, ...] = (True, True, True)  # a spatial transformer at this level (0, 1)
    layers_per_block: Count = 1  # residual blocks a level
    num_heads: Count = 4  # attention heads
    cross_attention_dim: Count = 384  # text width inside the U-Net
    prediction: Literal[diffusion.PREDICTIONS] = "x0"  # what the U-Net predicts; the papers: eps
    schedule: Literal[*diffusion.SCHEDULES] = "cosine"  # of the noise; the papers: cosine
    schedule_shift: Positive = 0.3  # its signal-to-noise ratio times shift²; the papers: 1
    # The optimisation
    steps: Count = 20_000  # length of the run; the learning rate follows it: it can't change later
    batch_size: Count = 8  # clips a rank and forward pass
    accumulate: Count = 1  # forward passes a step
    lr: Positive = 7e-4  # peak learning rate of AdamW
    beta2: Share = 0.95  # AdamW's memory of squared gradients; the papers: 0.999
    warmup_steps: NotNegative = 300  # linear from 0, then cosine decay to 0
    weight_decay: NotNegative = 0.01  # AdamW's
    clip: Positive = 1.0  # largest norm of the gradient
    ema_decay: Share = 0.9999  # of the averaged weights; less at the start of a run
    caption_dropout: Share = 0.1  # share of clips trained without a caption
    balanced: bool = True  # draw clips so that labels come up equally often
    frozen_steps: NotNegative = 0  # until then only conv_in, conv_out, text projection train (B.4)
    precision: Literal["bf16", "fp32"] = "bf16"  # of autocast
    gradient_checkpointing: bool = False  # less memory, a third more time
    compile: bool = False  # torch.compile the U-Net
    device: str = ""  # cpu, cuda; empty: cuda where there is one
    seed: NotNegative = 0  # of everything random
    # Upkeep
    checkpoint_every: Count = 500  # steps
    validate_every: Count = 500  # steps
    val_clips: Count = 128  # clips of the validation loss
    sample_every: NotNegative = 1000  # steps; 0: never
    sample_prompt: str = "dog barking"  # what the samples are of
    guidance: float = 3.0  # of these samples, and what sample.py takes unless told otherwise
    resume: bool = True  # go on from the run's newest checkpoint; no: set the old run aside


PRESETS = {
    "tiny": Config(),
    # P2 tables 2 and A10; the batch of 192 a GPU is inferred from the time a step takes.
    "paper": Config(
        out="runs/paper",
        text_encoder="t5-large",
        max_length=50,
        mask="none",
        block_out_channels=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        layers_per_block=2,
        num_heads=8,
        cross_attention_dim=768,
        prediction="eps",
        schedule_shift=1.0,
        steps=60_000,
        batch_size=192,
        lr=2.56e-4,
        beta2=0.999,
        warmup_steps=1000,
        balanced=False,
        gradient_checkpointing=True,
        checkpoint_every=1000,
        validate_every=1000,
        val_clips=512,
        sample_every=5000,
        guidance=6.5,
    ),
}
# What may differ when a run goes on; everything else is part of what is being computed. (So is
# the global batch, but it may be divided otherwise.)
MAY_CHANGE = set(
    "out device resume compile gradient_checkpointing batch_size accumulate encodec_weights "
    "checkpoint_every validate_every sample_every sample_prompt guidance".split()
)
PATHS = {"data", "val_data", "init", "text_encoder"}  # compared as such: ./x is x


# ---- pure functions of the step ------------------------------------------------------------------


def learning_rate(step: int, c: Config) -> float:
    """Linear warm-up to c.lr, then half a cosine down to 0 at c.steps."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    progress = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
    return c.lr * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, c: Config) -> float:
    """Rises to c.ema_decay: with a fixed 0.9999 a short run would ship its initial noise."""
    return min(c.ema_decay, (1 + step) / (10 + step))


def clips_of_step(step: int, global_batch: int, weights: np.ndarray | None, n: int, seed: int):
    """Indices [global_batch] into the data set's n training clips: balanced draws with replacement
    (`weights`, cumulative, ending at 1), or every clip once an epoch in a random order."""
    if weights is not None:
        u = np.random.default_rng((seed, 0, step)).random(global_batch)
        return np.searchsorted(weights, u, side="right").clip(max=n - 1)
    places = np.arange(step * global_batch, (step + 1) * global_batch)
    orders = {e: np.random.default_rng((seed, 1, e)).permutation(n) for e in set(places // n)}
    return np.array([orders[p // n][p % n] for p in places])


def draw(step: int, place: int, captions: list[str], shape: tuple, c: Config):
    """What is random about one sample of a step: caption, t and noise."""
    rng = np.random.default_rng((c.seed, 2, step, place))
    caption = captions[rng.integers(len(captions))]
    if rng.random() < c.caption_dropout:
        caption = ""
    t = int(rng.integers(1000))
    return caption, t, rng.standard_normal(shape, dtype=np.float32)


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """Everything a run is made of. What changes from step to step (and is checkpointed) is the
    U-Net, its average `ema`, the optimizer and the step."""

    def __init__(self, c: Config):
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(c.device)
        keep_freed_memory()
        if self.ranks > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=1))  # composing takes a while
        self.c, self.out = c, Path(c.out)
        self.global_batch = c.batch_size * c.accumulate * self.ranks

        # Data: stored integers, their statistics and their captions.
        data, val_data = c.data, c.val_data
        if not data:
            data, val_data = str(TINY / "data" / "train"), val_data or str(TINY / "data" / "test")
            self.on_rank_0(compose_tiny)
        self.data = LatentDataset(data)
        self.val = LatentDataset(val_data) if val_data else self.data
        names = ("plan.json", "dataset.json", "latent_stats.safetensors")
        sets = [data.folder / name for data in (self.data, self.val) for name in names]
        sources = sorted(Path(__file__).parent.glob("*.py"))
        self.hashes = {"data (its hash)": sha256(sets)}
        self.source = sha256(sources)
        self.ranks_agree(asdict(c) | self.hashes | {"source files (their hash)": self.source})
        n = len(self.val)
        self.val_indices = list(range(max(0, n - c.val_clips), n))
        self.clips = len(self.data) - (0 if val_data else len(self.val_indices))
        if self.clips < self.global_batch:
            raise ValueError(
                f"{data}: {self.clips} clips to train on ({len(self.data) - self.clips} are held "
                f"out), fewer than the {self.global_batch} of one step ({self.ranks} ranks × "
                f"{c.accumulate} × {c.batch_size}): use fewer ranks, or a smaller --batch-size or "
                "--val-clips"
            )
        self.weights = None
        if c.balanced:
            self.weights = np.cumsum(np.asarray(self.data.sampling_weights())[: self.clips])
            self.weights /= self.weights[-1]
        self.stats = self.data.stats
        self.codec = load_codec(self.data.codec, self.device, c.encodec_weights or None)
        if self.val.codec != self.data.codec:
            raise ValueError(f"{val_data}: made with another codec than {data}")
        self.init = choose_init(c, self.data.codec) if c.init else ""
        if self.init and (Path(self.init) / "model.json").is_file():
            # A model goes on with the normalisation that it was trained with.
            self.stats = LatentStats.load(Path(self.init) / "latent_stats.safetensors")

        # Model
        self.encoder = TextEncoder(
            c.text_encoder, c.max_length, c.mask, device=self.device, cache_bytes=2**29
        )
        alphas_cumprod = diffusion.SCHEDULES[c.schedule]()
        self.alphas_cumprod = diffusion.shifted(alphas_cumprod, c.schedule_shift).to(self.device)
        torch.manual_seed(c.seed)  # of the layers that --init doesn't bring
        self.unet = self.make_unet().to(self.device, memory_format=layout(self.device))
        self.ema = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), c.lr, (0.9, c.beta2), weight_decay=c.weight_decay, fused=True
        )
        self.step = 0
        self.frozen = [
            p
            for name, p in self.unet.named_parameters()
            if not name.startswith(("conv_in.", "conv_out.", "encoder_hid_proj."))
        ]

        self.model = torch.compile(self.unet) if c.compile else self.unet
        if self.ranks > 1:
            self.model = DistributedDataParallel(self.model)
            # DDP regroups the gradients after its first backward pass, and the last bits of a sum
            # over three or more ranks depend on the grouping. With that pass behind it, a resumed
            # run goes on as the interrupted one would have.
            _, captions, stored, t, noise = self.batch(0, 0)
            self.loss(self.model, stored, captions, t, noise).mean().backward()
            self.unet.zero_grad(set_to_none=True)

    def make_unet(self) -> UNet:
        """The preset's architecture from scratch, or what --init names; channels and text width
        follow from codec and text encoder."""
        c, channels = self.c, self.codec.channels
        width = load_config(self.init).cross_attention_dim if self.init else c.cross_attention_dim
        text_dim = None if self.encoder.dim == width else self.encoder.dim
        if self.init:
            return UNet.from_pretrained(
                self.init, in_channels=channels, out_channels=channels, text_dim=text_dim
            )
        if c.prediction != "x0" and c.block_out_channels[0] < 2 * channels and self.rank == 0:
            # ε has as many independent dimensions as the latent has channels.
            print(f"warning: a first level {c.block_out_channels[0]} wide can't predict well what "
                  f"has {channels} channels: use {2 * channels} or more")  # fmt: skip
        shared = {f.name: getattr(c, f.name) for f in fields(UNetConfig) if hasattr(c, f.name)}
        return UNet(UNetConfig(channels, channels, text_dim=text_dim, **shared))

    def ranks_agree(self, mine: dict) -> None:
        """ValueError, on every rank, that names the first one that has something else than rank 0.
        Left alone, ranks of two minds would train on nonsense, or wait for each other."""
        if self.ranks > 1:
            every = [None] * self.ranks
            dist.all_gather_object(every, mine)
            for rank, theirs in enumerate(every):
                must_agree(f"rank {rank} has", theirs, every[0], "make them the same", "rank 0")

    def on_rank_0(self, function) -> None:
        if self.rank == 0:
            function()
        if self.ranks > 1:
            dist.barrier()

    # -- one step

    def batch(self, step: int, part: int) -> tuple[list[int], list[str], Tensor, Tensor, Tensor]:
        """This rank's share of one forward pass: clip indices, captions, stored integers, t, noise.

        Runs in a thread, one step ahead; touches no state.
        """
        c = self.c
        clips = clips_of_step(step, self.global_batch, self.weights, self.clips, c.seed)
        first = (part * self.ranks + self.rank) * c.batch_size
        places = range(first, first + c.batch_size)
        indices = [int(clips[p]) for p in places]
        shape = (self.codec.channels, *GRID)
        drawn = [
            draw(step, p, self.data.record(i)["captions"], shape, c)
            for p, i in zip(places, indices, strict=True)
        ]
        captions, t, noise = zip(*drawn, strict=True)
        stored = self.data.stored(indices)
        return indices, list(captions), stored, torch.tensor(t), torch.from_numpy(np.stack(noise))

    def noise(self, rngs: list[np.random.Generator]) -> Tensor:
        """Gaussian noise, a sample from each generator: float32 [B, 128, 24, 21]."""
        shape = (self.codec.channels, *GRID)
        noise = [rng.standard_normal(shape, dtype=np.float32) for rng in rngs]
        return torch.from_numpy(np.stack(noise))

    def loss(self, model, stored, captions, t, noise) -> Tensor:
        """Squared error of what the network predicts (x_0's weighted), a sample: float32 [B]."""
        c, device = self.c, self.device
        x_0 = to_grid(self.stats.normalize(self.codec.dequantize(stored.to(device))))
        t, noise = t.to(device), noise.to(device)
        x_t = diffusion.add_noise(x_0, noise, t, self.alphas_cumprod)
        target = {"eps": noise, "x0": x_0}.get(c.prediction)
        if c.prediction == "v":
            target = diffusion.velocity(x_0, noise, t, self.alphas_cumprod)
        text, text_mask = self.encoder(captions)
        text = text.float()  # on CUDA the encoder gives bf16
        predicted = self.network(model, x_t, t, text, text_mask, c.gradient_checkpointing)
        losses = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        if c.prediction == "x0":
            # v's error is x_0's over √(1−ᾱ_t): the loss of v, whose weight is 1 + SNR, but no more
            # than 5, or clips with hardly any noise outweigh the rest (Hang et al. 2023).
            losses = losses / (1 - self.alphas_cumprod[t]).clamp(min=0.2).to(losses)
        return losses

    def network(self, model, x_t: Tensor, *rest) -> Tensor:
        """What `model` predicts for x_t [B, 128, 24, 21], float32 of the same shape."""
        bf16 = self.c.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return model(x_t, *rest).float()

    def train_step(self, batches: list) -> dict:
        """One step of AdamW on this step's batches (one for each --accumulate)."""
        c, total = self.c, 0.0
        for i, (_, captions, stored, t, noise) in enumerate(batches):
            ddp_waits = self.ranks > 1 and i < len(batches) - 1  # sum gradients over ranks once
            with self.model.no_sync() if ddp_waits else nullcontext():
                loss = self.loss(self.model, stored, captions, t, noise).mean() / len(batches)
                loss.backward()
            total += loss.detach()
        if self.ranks > 1:
            dist.all_reduce(total)
            total = total / self.ranks
        if self.step < c.frozen_steps:
            for p in self.frozen:
                p.grad = None  # AdamW passes over these; DDP needn't know
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), c.clip)
        loss, norm = float(total), float(norm)
        if not math.isfinite(loss + norm):
            clips = clips_of_step(self.step, self.global_batch, self.weights, self.clips, c.seed)
            ids = ", ".join(str(self.data.record(int(i))["id"]) for i in clips)
            raise ValueError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; stopped before it "
                f"spoiled the weights. The clips of this step, on all ranks: {ids}"
            )
        lr = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = ema_decay(self.step, c)
        with torch.no_grad():
            # ema ← decay·ema + (1 − decay)·weights
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.unet.parameters()), 1 - decay
            )
        self.step += 1
        return {"step": self.step, "loss": loss, "lr": lr, "gradient_norm": norm}

    # -- looking at it

    @torch.no_grad()
    def validate(self) -> dict:
        """Loss of the EMA weights on held-out clips, the same noise each time, in four bins of t.

        The mean hides what matters: an error at high t is multiplied by √((1−ᾱ)/ᾱ) on its way to
        x_0 when the network predicts ε.
        """
        sums = torch.zeros(4, 2, dtype=torch.float64)
        for start in range(0, len(self.val_indices), self.c.batch_size):
            if start // self.c.batch_size % self.ranks != self.rank:
                continue
            indices = self.val_indices[start : start + self.c.batch_size]
            captions = [self.val.record(i)["captions"][0] for i in indices]
            stored = self.val.stored(indices)
            for q in range(4):
                rngs = [np.random.default_rng((self.c.seed, 3, q, i)) for i in indices]
                t = torch.tensor([rng.integers(250 * q, 250 * (q + 1)) for rng in rngs])
                losses = self.loss(self.ema, stored, captions, t, self.noise(rngs))
                sums[q] += torch.tensor([losses.double().sum().item(), len(indices)])
        if self.ranks > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        bins = [s / n for s, n in sums.tolist()]
        return {"val_loss": sum(bins) / 4, "val_loss_bins": bins}

    @torch.no_grad()
    def write_sample(self) -> None:
        """What the EMA weights make of the sample prompt: always the same noise, PNDM, 45 steps."""
        text, mask = self.encoder(["", self.c.sample_prompt])
        text = text.float()
        x_T = self.noise([np.random.default_rng((self.c.seed, 4))]).to(self.device)

        def network(x_t: Tensor, t: int) -> Tensor:
            return self.network(self.ema, x_t, t, text, mask)

        eps = diffusion.predicts_eps(network, self.c.prediction, self.alphas_cumprod)
        eps = diffusion.guided(eps, self.c.guidance)
        x_0 = diffusion.pndm(eps, x_T, self.alphas_cumprod, 45)
        wave = self.codec.decode(self.stats.denormalize(to_sequence(x_0)))[0]
        (self.out / "samples").mkdir(exist_ok=True)
        try:
            save_audio(self.out / "samples" / f"step-{self.step:07d}.wav", wave)
        except ValueError as e:  # NaN: a bad sample is worth a word, not the run
            print(f"warning: {e}", file=sys.stderr)

    # -- what stays on disk

    def save(self) -> None:
        """The model folder and a checkpoint, each written aside and then renamed. In this order, so
        that a run that has its last checkpoint is complete."""
        self.save_model()
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.step:07d}.pt"
        aside = path.with_suffix(".tmp")
        state = {
            "step": self.step,
            "config": asdict(self.c),
            "global_batch": self.global_batch,
            "source": self.source,
            **self.hashes,
            "unet": self.unet.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            with open(aside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as e:  # a full disk; PyTorch has its own words for some
            aside.unlink(missing_ok=True)
            raise OSError(f"{path}: not written ({str(e).splitlines()[0]})") from e
        aside.rename(path)
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def save_model(self) -> None:
        folder, aside, old = (self.out / name for name in ("model", "model.tmp", "model.old"))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        self.write_model(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def write_model(self, folder: Path) -> None:
        c = self.c
        self.ema.save_pretrained(folder / "unet")
        self.stats.save(folder / "latent_stats.safetensors")
        about = {
            "text_encoder": c.text_encoder,
            "max_length": c.max_length,
            "mask": c.mask,
            "codec": self.codec.settings(),
            "sample_rate": SAMPLE_RATE,
            "schedule": c.schedule,
            "schedule_shift": c.schedule_shift,
            "prediction": c.prediction,
            "guidance": c.guidance,
            "trained_on": {
                "data": Path(c.data).name if c.data else "tiny",
                "clips": self.clips,
                "steps": self.step,
                "global_batch": self.global_batch,
                "init": c.init or None,
            },
        }
        (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")

    def load(self, path: Path) -> None:
        """Take up a checkpoint; ValueError if it belongs to another run than this command's."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
            raise OSError(f"{e!r:.100}") from e
        mine = {k: v for k, v in asdict(self.c).items() if k not in MAY_CHANGE}
        mine |= {"global_batch": self.global_batch, **self.hashes}
        advice = "give the old value to go on, another --out for a new run, or "
        advice += f"--init {self.out}/model to train further"
        must_agree(f"{self.out}: its run has", saved["config"] | saved, mine, advice)
        self.unet.load_state_dict(saved["unet"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for p, state in self.optimizer.state.items():  # laid out as the weights are: AdamW's fused
            for name, value in state.items():  # kernels take memory as it comes
                if value.shape == p.shape:
                    state[name] = torch.empty_like(p, requires_grad=False).copy_(value)
        if self.rank == 0 and saved["source"] != self.source:
            print(f"{path}: its source files were others; this may not be what it would have been")
        self.step = int(saved["step"])


def load_newest(run: Run) -> None:
    """Resume from the newest checkpoint that can be read; clear away what a kill left behind."""
    folder = run.out / "checkpoints"

    def tidy() -> None:
        if not run.c.resume and folder.exists():
            n = 1
            while (aside := run.out.with_name(f"{run.out.name}.{n}")).exists():
                n += 1
            run.out.rename(aside)
            print(f"the old run is now {aside}")
        run.out.mkdir(parents=True, exist_ok=True)
        model, old = run.out / "model", run.out / "model.old"
        if old.exists() and not model.exists():  # killed between two renames of save_model
            old.rename(model)
        torn_files = [".log.jsonl.*.tmp", "samples/.step-*.tmp", "checkpoints/step-*.tmp"]
        torn_files = [path for pattern in torn_files for path in run.out.glob(pattern)]
        for torn in [*torn_files, run.out / "model.tmp", old]:
            shutil.rmtree(torn) if torn.is_dir() else torn.unlink(missing_ok=True)

    run.on_rank_0(tidy)
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in paths:
        try:
            return run.load(path)
        except (RuntimeError, LookupError, AttributeError, TypeError, OSError) as e:
            print(f"{path} can't be read ({e!r:.120}); trying the one before")
    if paths:
        raise ValueError(f"{folder}: no checkpoint can be read; --no-resume sets the run aside "
                         "and starts another")  # fmt: skip


def must_agree(subject: str, old: dict, new: dict, advice: str, who: str = "this command") -> None:
    """ValueError names the first value of `new`, this command's, that is another in `old`."""
    for name, value in new.items():
        pair = json.loads(json.dumps([old.get(name), value]))  # a tuple equals a list
        paths = name in PATHS and all(isinstance(x, str) and x for x in pair)
        a, b = map(os.path.realpath, pair) if paths else pair
        if a != b:
            raise ValueError(f"{subject} {name} = {pair[0]!r}, {who} {pair[1]!r}: {advice}")


def read_settings(folder: Path) -> dict:
    """What a model folder says of itself, by the names of Config, and its codec."""
    names = ("text_encoder", "max_length", "mask", "prediction", "schedule", "codec")
    older = {"schedule_shift": 1.0, "guidance": 6.5}  # of folders that don't say
    if not (folder / "model.json").is_file():
        raise FileNotFoundError(f"{folder}: not a model folder (no model.json)")
    about = older | read_json(folder / "model.json", *names)
    return {name: about[name] for name in (*names, *older)}


def choose_init(c: Config, codec: dict) -> str:
    """What a run starts from: c.init, or its own model once it has a checkpoint (c.init may be gone
    by then). ValueError if c.init is a model folder trained on something else than this run."""
    init, own = Path(c.init), Path(c.out) / "model"
    begun = c.resume and any(own.parent.glob("checkpoints/step-*.pt"))
    if begun and (own / "model.json").is_file():
        return str(own)
    if (init / "log.jsonl").is_file():
        raise ValueError(f"{init} is a run, not a model: give --init {init / 'model'}")
    if (init / "model.json").is_file():
        model = read_settings(init)
        names = model.keys() - {"codec", "guidance"}
        mine = {name: getattr(c, name) for name in sorted(names)} | {"codec": codec}
        advice = f"give the same, or --init {init / 'unet'} for its U-Net alone"
        must_agree(f"{init / 'model.json'} has", model, mine, advice)
    return c.init


def compose_tiny() -> None:
    """Make the tiny data sets, once (the command goes on where it was interrupted)."""
    if not all((TINY / "data" / split / "dataset.json").is_file() for split in ("train", "test")):
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, "-m", "tiny.compose"]
        subprocess.run(command, cwd=TINY.parent, env=environment, check=True)


def sha256(paths: list[Path]) -> str:
    """Of what is in these files; its beginning."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def layout(device: torch.device) -> torch.memory_format:
    """Of the weights, and so of what convolutions give: as a GPU's matrix units read it; on a CPU,
    where group norms and gradients would be slow in that, as it is."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def peak_memory(device: torch.device) -> float:
    """GiB, on the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train(c: Config, kind: type[Run] = Run) -> Path:
    """The loop. Returns the model folder."""
    parent = os.getppid()
    run = kind(c)
    load_newest(run)
    run.ranks_agree({"checkpoint of step": run.step})  # not if they see different folders
    if run.step >= c.steps:
        if run.rank == 0:
            print(f"{run.out}: finished at step {run.step}; its model is {run.out / 'model'}")
        return run.out / "model"

    log_path = run.out / "log.jsonl"
    if run.rank == 0:
        (run.out / "config.json").write_text(json.dumps(asdict(c), indent=2) + "\n")
        lines = log_path.read_bytes().splitlines(keepends=True) if log_path.exists() else []
        write_aside(log_path, b"".join(lines[: run.step]))  # a line a step; the last may be torn
        print(f"{run.out}: {sum(p.numel() for p in run.unet.parameters()):,} parameters, "
              f"{run.clips:,} clips, {run.global_batch} a step, from step {run.step}")  # fmt: skip

    def fetch(step: int) -> list:
        return [run.batch(step, part) for part in range(c.accumulate)]

    bar = tqdm(total=c.steps, initial=run.step, unit="step", disable=run.rank != 0)
    with ThreadPoolExecutor(1) as pool, open(log_path, "a") as log:  # only rank 0 writes
        upcoming = pool.submit(fetch, run.step)
        while run.step < c.steps:
            if run.ranks > 1 and os.getppid() != parent:
                # Else ranks outlive a torchrun that was killed, and write beside its successor's.
                raise OSError(f"torchrun is gone: stopped before step {run.step + 1}")
            started = time.perf_counter()
            batches = upcoming.result()
            upcoming = pool.submit(fetch, run.step + 1)  # while this step is computed
            entry = run.train_step(batches)
            entry["samples_per_second"] = run.global_batch / (time.perf_counter() - started)
            entry["memory_gib"] = peak_memory(run.device)
            last = run.step == c.steps
            if last or run.step % c.validate_every == 0:
                entry |= run.validate()
            if run.rank == 0:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                bar.update()
                bar.set_postfix(loss=f"{entry['loss']:.3f}", lr=f"{entry['lr']:.1e}", refresh=False)
                if "val_loss" in entry:
                    bins = " ".join(f"{b:.3f}" for b in entry["val_loss_bins"])
                    bar.write(f"step {run.step}: val loss {entry['val_loss']:.4f} (by t: {bins})")
                if last or run.step % c.checkpoint_every == 0:
                    run.save()
                if c.sample_every and (last or run.step % c.sample_every == 0):
                    run.write_sample()
    bar.close()
    return run.out / "model"


# ---- the command line, generated from Config -----------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> Config:
    """A field is an option, its comment the option's help, its preset's value the default."""
    help_of = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="tiny", help="where defaults come from")
    preset = PRESETS[first.parse_known_args(arguments)[0].preset]
    parser = argparse.ArgumentParser(
        parents=[first],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in fields(Config):
        default = getattr(preset, field.name)
        shown = ",".join(str(int(x)) for x in default) if isinstance(default, tuple) else default
        options = {"default": default, "help": f"{help_of[field.name]} [{shown}]"}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        elif isinstance(default, tuple):

            def numbers(text: str, kind: type = type(default[0])) -> tuple:
                return tuple(kind(int(x)) for x in text.split(","))

            options["type"] = numbers
        else:
            options["type"] = type(default)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    values = vars(parser.parse_args(arguments))
    values.pop("preset")
    for field in fields(Config):
        if get_origin(field.type) is Annotated:
            words, holds = field.type.__metadata__
            if not holds(values[field.name]):
                parser.error(f"--{field.name.replace('_', '-')} must be {words}")
    return Config(**values)


def main(arguments: list[str] | None = None) -> None:
    c = parse_args(arguments)
    try:
        train(c)
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: the same command goes on from {c.out}'s newest checkpoint")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: {str(e).splitlines()[0]} Take a smaller --batch-size, with --accumulate")
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        rank = int(os.environ.get("RANK", 0))  # it may be the only one that has this problem
        sys.exit(f"error on rank {rank}: {e}" if rank else f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
