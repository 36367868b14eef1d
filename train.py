"""Train ε_θ on stored latents and their captions: papers, sections 4 and 5, P2 tables 2 and A10.

    loss = E ‖ε_θ(x_t, t, τ(y)) − ε‖²   with  x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,  t uniform in 0 … 999

    x_0   normalised latent [B, 128, 24, 21]       y   its caption, "" for one clip in ten
    τ     the frozen text encoder                  ε   Gaussian noise (or v, x_0: diffusion.py)

    python train.py                                          the tiny model, on tiny/'s recordings
    torchrun --nproc_per_node 8 train.py --preset paper --data FOLDER \\
        --init CompVis/stable-diffusion-v1-4                 the papers' run

Everything random (which clips, which caption, t, ε, dropped captions) is a function of (seed, step,
place in the global batch) and of nothing else. So a run is the same on any number of ranks, and one
that was killed goes on, from its newest checkpoint, as if nothing had happened. On a GPU, which
draws another ε, it goes on to the bit with --deterministic.

Not in the papers: caption dropout (guidance needs an unconditional branch), the moving average of
the weights (EMA, which is what the model folder holds), bf16 autocast; and for the tiny model
x_0-prediction with v's loss, a shifted noise schedule and AdamW's shorter memory.

    RUN/model/          the result so far: what sample.py --model takes
    RUN/checkpoints/    the last two; start the same command again to go on
    RUN/log.jsonl       a line per step
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import diffusion
import latents
from captions import MASKS, TextEncoder
from latents import GRID, LatentDataset, LatentStats, load_codec, write_aside
from sample import GRAPHS, MODEL_SETTINGS, read_settings
from unet import UNet, UNetConfig, load_config

TINY = Path(__file__).resolve().parent / "tiny"


# ---- the settings --------------------------------------------------------------------------------


def option(default, help: str, low: float = -math.inf, high: float = math.inf, choices=None):
    """A field of Config, and with it an option of the command line."""
    about = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Config:
    out: str = option("runs/tiny", "the run's folder")
    data: str = option("", "stored data set (latents.py encode); none: what tiny.compose makes")
    val_data: str = option("", "held-out data set; none: the last val_clips of data are held out")
    encodec_weights: str = option("", "EnCodec's file, for its codes; none: torch hub's cache")
    init: str = option("", "start from a model folder, or a U-Net folder or hub id")
    # The model. With --init its sizes are those of what is loaded.
    text_encoder: str = option("sentence-transformers/all-MiniLM-L6-v2", "hub id or folder")
    max_length: int = option(32, "tokens of a caption, padded or cut", 3)
    mask: str = option("both", "where pads are masked out", choices=MASKS)
    block_out_channels: tuple[int, ...] = option(
        (128, 192, 256), "width of each level, as in 128,192,256"
    )
    attention: tuple[int, ...] = option((1, 1, 1), "a spatial transformer at each level? 0 or 1")
    layers_per_block: int = option(1, "residual blocks a level", 1)
    num_heads: int = option(4, "attention heads", 1)
    cross_attention_dim: int = option(384, "text width inside the U-Net", 1)
    prediction: str = option("x0", "of the U-Net; the papers: eps", choices=diffusion.PREDICTIONS)
    schedule: str = option("cosine", "of the noise", choices=tuple(diffusion.SCHEDULES))
    schedule_shift: float = option(0.3, "its signal-to-noise ratio times shift²; papers: 1", 1e-3)
    # The optimisation
    steps: int = option(20_000, "length of the run, which the learning rate follows", 1)
    batch_size: int = option(8, "clips per rank and forward pass", 1)
    accumulate: int = option(1, "forward passes per step", 1)
    lr: float = option(7e-4, "peak learning rate of AdamW", 0)
    beta2: float = option(0.95, "AdamW's memory of squared gradients; papers: 0.999", 0, 0.99999)
    warmup_steps: int = option(300, "linear from 0, then cosine decay to 0", 0)
    weight_decay: float = option(0.01, "AdamW's", 0)
    clip: float = option(1.0, "largest norm of the gradient", 1e-9)
    ema_decay: float = option(0.9999, "of the averaged weights; less at the start of a run", 0, 1)
    caption_dropout: float = option(0.1, "share of clips trained without a caption", 0, 1)
    frozen_steps: int = option(0, "train only the ends and text projection till then (B.4)", 0)
    precision: str = option("auto", "bf16 where fast; never TF32", choices=("auto", "bf16", "fp32"))
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    compile: bool = option(False, "torch.compile the U-Net")
    deterministic: bool = option(False, "the same bits each time on a GPU, too; slower")
    device: str = option("", "cpu or cuda; none: cuda where there is one")
    seed: int = option(0, "of everything random", 0)
    # Upkeep
    checkpoint_every: int = option(500, "steps", 1)
    validate_every: int = option(500, "steps", 1)
    val_clips: int = option(128, "clips of the validation loss", 1)
    guidance: float = option(4.0, "what sample.py takes unless told otherwise", 0)
    guidance_above: int = option(500, "the t down to which it is used", 0, 999)
    denoising_steps: int = option(20, "what sample.py takes unless told otherwise", 1, 1000)
    shifted_rows: bool = option(True, "sample.py moves the rows at each step, against seams")
    resume: bool = option(True, "go on from the newest checkpoint; no: set the old run aside")


# P2 tables 2 and A10; guidance 6.5 is their code's, and the batch of 192 per GPU is inferred from
# the time that a step takes.
PAPER = {"out": "runs/paper", "text_encoder": "t5-large", "max_length": 50, "mask": "none"}
PAPER |= {"block_out_channels": (320, 640, 1280, 1280), "attention": (1, 1, 1, 0)}
PAPER |= {"layers_per_block": 2, "num_heads": 8, "cross_attention_dim": 768, "prediction": "eps"}
PAPER |= {"schedule_shift": 1.0, "steps": 60_000, "batch_size": 192, "lr": 2.56e-4, "beta2": 0.999}
PAPER |= {"warmup_steps": 1000, "gradient_checkpointing": True, "checkpoint_every": 1000}
PAPER |= {"validate_every": 1000, "val_clips": 512, "guidance": 6.5, "denoising_steps": 45}
PAPER |= {"guidance_above": 0, "shifted_rows": False}
PRESETS = {"tiny": Config(), "paper": Config(**PAPER)}
WARM_STEPS = 3  # before one is captured: AdamW's moments and the libraries' memory come with them
FETCH_EVERY = {"cuda": 10}  # steps: to look at a step's loss is to wait for it; elsewhere 1
PATIENT, HUNG = timedelta(hours=1), timedelta(minutes=2)  # for others: to compose, save; in a step
STORED = ("latent_stats.safetensors", "codec.json", "clips.jsonl")  # what tells data sets apart
# What may differ when a run goes on; everything else is part of what is being computed. (So are the
# global batch and the data, compared as such.)
MAY_CHANGE = set(
    "out data val_data device resume compile deterministic gradient_checkpointing batch_size "
    "accumulate encodec_weights checkpoint_every validate_every guidance guidance_above "
    "denoising_steps shifted_rows".split()
)


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


def clips_of_step(step: int, global_batch: int, n: int, seed: int) -> np.ndarray:
    """Indices [global_batch] into n clips: every clip once an epoch, in a random order."""
    places = np.arange(step * global_batch, (step + 1) * global_batch)
    orders = {e: np.random.default_rng((seed, 1, e)).permutation(n) for e in set(places // n)}
    return np.array([orders[p // n][p % n] for p in places])


def draw(step: int, place: int, captions: list[str], shape: tuple, c: Config, generator=None):
    """What is random about one sample of a step: caption, t and noise. The noise comes from a
    GPU's `generator`, if there is one: as fast as the rest there, and other noise than a CPU's."""
    rng = np.random.default_rng((c.seed, 2, step, place))
    caption = captions[rng.integers(len(captions))]
    if rng.random() < c.caption_dropout:
        caption = ""
    t = int(rng.integers(1000))
    if generator is None:
        return caption, t, torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    generator.manual_seed(int(rng.integers(2**63)))
    return caption, t, torch.randn(shape, generator=generator, device=generator.device)


# ---- data and model ------------------------------------------------------------------------------


class Denoiser:
    """What is trained, on what, and by which loss. The loop knows no more of it than its methods:
    a subclass can train something else (appendix/)."""

    group = None  # of ranks, for what they exchange in a step
    update, warm_steps = None, 0  # a step as a CUDA graph, and how many were taken without

    def __init__(self, c: Config, device: torch.device):
        self.c, self.device, self.step = c, device, 0
        data, val_data = c.data, c.val_data
        if not data:
            data, val_data = TINY / "data" / "train", val_data or TINY / "data" / "test"
            compose_tiny()
        self.data = LatentDataset(data)
        self.val = LatentDataset(val_data) if val_data else self.data
        held_out = min(c.val_clips, len(self.val))
        self.val_indices = range(len(self.val) - held_out, len(self.val))
        self.clips = len(self.data) - (0 if val_data else held_out)
        if self.clips < 1:
            raise ValueError(f"{data}: all clips are held out: a smaller --val-clips or --val-data")
        if self.val.codec != self.data.codec:
            raise ValueError(f"{val_data}: made with another codec than {data}")
        self.codec = load_codec(self.data.codec, device, c.encodec_weights or None)
        self.shape = (self.codec.channels, *GRID)
        self.stats = self.data.stats
        if is_model(c.init):
            if read_settings(c.init)["codec"] != self.data.codec:
                raise ValueError(f"{c.init} knows latents of another codec than {data} has")
            self.stats = LatentStats.load(Path(c.init, "latent_stats.safetensors"))
        mean_and_std = self.stats.mean.to(device), self.stats.std.to(device)
        self.stats = LatentStats(*mean_and_std, self.stats.count)
        size, cache = (c.max_length, c.mask), 2**31 if device.type == "cuda" else 2**29  # bytes
        self.encoder = TextEncoder(c.text_encoder, *size, device=device, cache_bytes=cache)
        self.words = Path(c.init or "-", "words.safetensors")  # that the model has learned
        if self.words.is_file():
            self.encoder.add_words(load_file(self.words))
        alphas_cumprod = diffusion.SCHEDULES[c.schedule]()
        self.alphas_cumprod = diffusion.shifted(alphas_cumprod, c.schedule_shift).to(device)
        torch.manual_seed(c.seed)  # of the layers that --init doesn't bring
        # As a GPU's matrix units read it; on CPUs, group norms and gradients would be slow in that.
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network = self.make_network().to(device, memory_format=layout)

    def make_network(self) -> nn.Module:
        """What is trained, averaged and checkpointed: a U-Net of these sizes, or that of --init.
        Channels and text width follow from codec and text encoder."""
        c, ends = self.c, dict.fromkeys(("in_channels", "out_channels"), self.codec.channels)
        width = load_config(c.init).cross_attention_dim if c.init else c.cross_attention_dim
        ends["text_dim"] = None if self.encoder.dim == width else self.encoder.dim
        if c.init:
            return UNet.from_pretrained(c.init, **ends)
        sizes = {f.name: getattr(c, f.name) for f in fields(UNetConfig) if hasattr(c, f.name)}
        return UNet(UNetConfig(**sizes, **ends))

    def choose(self, step: int, global_batch: int) -> np.ndarray:
        """The clips of a step, by number: [global_batch]."""
        return clips_of_step(step, global_batch, self.clips, self.c.seed)

    def captions_of(self, record: dict) -> list:
        """Those of a clip, one of which is drawn for a step."""
        return record["captions"]

    def batch(self, step: int, places: range, clips, data=None) -> tuple:
        """The clips at these places of a step's global batch: captions, stored integers, t, noise.
        Runs in a thread, a step ahead; touches no state."""
        data, drawn, cuda = data or self.data, [], self.device.type == "cuda"
        generator = torch.Generator(self.device) if cuda else None
        for place, clip in zip(places, clips, strict=True):
            captions = self.captions_of(data.record(int(clip)))
            drawn.append(draw(step, place, captions, self.shape, self.c, generator))
        captions, t, noise = zip(*drawn, strict=True)
        stored, t = data.stored(clips), torch.tensor(t)
        if cuda:  # from pinned memory, which nobody waits for
            stored, t = (x.pin_memory().to(self.device, non_blocking=True) for x in (stored, t))
        return list(captions), stored, t, torch.stack(noise)

    def loss(self, network: nn.Module, *batch) -> Tensor:
        """`error` of what the network predicts of x_t: float32 [B]."""
        return self.loss_of(network, *self.inputs(*batch))

    def inputs(self, captions: list[str], stored: Tensor, t: Tensor, noise: Tensor) -> list[Tensor]:
        """A batch as tensors on the device; captions as their states and, if there is one, mask."""
        text = [x for x in self.encoder(captions) if x is not None]
        return [*(x.to(self.device) for x in (stored, t, noise)), *text]

    def loss_of(self, network: nn.Module, stored, t, noise, text, text_mask=None) -> Tensor:
        """The same of what `inputs` gives: on a GPU it is captured, without tokenizer and cache."""
        x_0 = self.latent(stored)
        x_t = diffusion.add_noise(x_0, noise, t, self.alphas_cumprod)
        target = {"eps": noise, "x0": x_0}.get(self.c.prediction)
        if self.c.prediction == "v":
            target = diffusion.velocity(x_0, noise, t, self.alphas_cumprod)
        return self.error(self.predict(network, x_t, t, text, text_mask), target, t)

    def latent(self, stored: Tensor) -> Tensor:
        """Stored integers -> x_0 [B, 128, 24, 21], on the device."""
        z = self.codec.dequantize(stored.to(self.device))  # [B, 128, 504]
        return self.codec.to_grid(self.stats.normalize(z))

    def error(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared error of a prediction (of x_0: weighted), per sample: float32 [B]."""
        losses = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        if self.c.prediction == "x0":
            # v's error is x_0's over √(1−ᾱ_t): the loss of v, whose weight is 1 + SNR, but no more
            # than 5, or clips with hardly any noise outweigh the rest (Hang et al. 2023).
            losses = losses / (1 - self.alphas_cumprod[t]).clamp(min=0.2).to(losses)
        return losses

    def predict(self, network: nn.Module, x_t: Tensor, t, text: Tensor, text_mask) -> Tensor:
        """What the network predicts for x_t [B, 128, 24, 21], float32 of the same shape."""
        bf16 = self.c.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            checkpointing = self.c.gradient_checkpointing
            return network(x_t, t, text.float(), text_mask, checkpointing).float()

    @torch.no_grad()
    def validate(self, network: nn.Module, rank: int, ranks: int) -> dict:
        """Loss on held-out clips, always with the same draws, dropped captions among them, in four
        bins of t. (The mean hides what matters: at high t, an error in ε grows by √((1−ᾱ)/ᾱ) on
        its way to x_0.)"""
        n, size = len(self.val_indices), self.c.batch_size
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for start in range(rank * size, n, ranks * size):
            places = range(start, min(start + size, n))
            clips = [self.val_indices[place] for place in places]
            # Drawn as for step 10⁹, which no training has
            captions, stored, t, noise = self.batch(10**9, places, clips, self.val)
            for q in range(4):
                losses = self.loss(network, captions, stored, 250 * q + t // 4, noise)
                sums[q] += losses.double().sum()
        if ranks > 1:
            dist.all_reduce(sums)  # one rank may have a batch more: this has an hour
        bins = (sums / n).tolist()
        return {"val_loss": sum(bins) / 4, "val_loss_bins": bins}

    def write(self, network: nn.Module, folder: Path) -> None:
        """A model folder, all that sample.py needs; `network` is its U-Net."""
        c, about = self.c, {key: getattr(self.c, key) for key in MODEL_SETTINGS}
        network.save_pretrained(folder / "unet")
        self.stats.save(folder / "latent_stats.safetensors")
        if Path(c.text_encoder).is_dir():  # no hub's: then it goes with the model
            shutil.copytree(c.text_encoder, folder / "text_encoder")
            about["text_encoder"] = "text_encoder"
        if self.words.is_file():
            shutil.copy(self.words, folder)
        about |= {"codec": self.codec.settings(), "sample_rate": latents.SAMPLE_RATE}
        data, init = Path(c.data).name or "tiny", c.init or None
        about["trained_on"] = {"data": data, "clips": self.clips, "steps": self.step, "init": init}
        (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")


def compose_tiny() -> None:
    """Make the tiny data sets, once; other ranks wait."""
    done = all((TINY / "data" / split / STORED[0]).is_file() for split in ("train", "test"))
    if not done and os.environ.get("LOCAL_RANK", "0") == "0":
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, "-m", "tiny.compose"]
        subprocess.run(command, cwd=TINY.parent, env=environment, check=True)
    if dist.is_initialized():
        dist.barrier()


def is_model(folder: str | None) -> bool:
    return bool(folder) and Path(folder, "model.json").is_file()


# ---- the loop ------------------------------------------------------------------------------------


def train_step(task: Denoiser, model: nn.Module, ema: nn.Module, optimizer, batches: list) -> dict:
    """One step of AdamW on a batch for each of --accumulate; `model` is task.network, perhaps
    compiled, perhaps distributed. Returns loss and norm of the gradient, of all ranks, as tensors:
    nothing here waits for a GPU, for which the whole is one CUDA graph after the first steps."""
    c, step = task.c, task.step
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    capture = GRAPHS.get(task.device.type) if type(task).loss is Denoiser.loss else None
    loss_of, inputs = task.loss, [x for batch in batches for x in batch]
    if capture:  # what tokenizes stays outside
        loss_of, inputs = task.loss_of, [x for batch in batches for x in task.inputs(*batch)]
    size = len(inputs) // len(batches)

    def update(lr: Tensor, weight: Tensor, *inputs) -> tuple[Tensor, Tensor]:
        total = 0.0
        optimizer.zero_grad(set_to_none=True)  # first: a capture that failed leaves some
        for i in range(0, len(inputs), size):
            waits = ranks > 1 and i + size < len(inputs)  # sum gradients over ranks once
            with model.no_sync() if waits else nullcontext():
                loss = loss_of(model, *inputs[i : i + size]).mean() / len(batches)
                loss.backward()
            total += loss.detach()
        if step < c.frozen_steps:
            for name, p in task.network.named_parameters():
                if not name.startswith(("conv_in.", "conv_out.", "encoder_hid_proj.")):
                    p.grad = None  # AdamW passes over these; DDP needn't know
        norm = torch.nn.utils.clip_grad_norm_(task.network.parameters(), c.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        averaged = list(ema.parameters())
        with torch.no_grad():  # ema ← decay·ema + (1 − decay)·weights
            weights = list(task.network.parameters())
            torch._foreach_lerp_(averaged, weights, [weight] * len(averaged))
        return total, norm

    lr = learning_rate(step, c)
    inputs = [torch.full((), x, device=task.device) for x in (lr, 1 - ema_decay(step, c))] + inputs
    if capture and ranks == 1 and step >= c.frozen_steps:
        if task.warm_steps == WARM_STEPS:
            task.update = capture(update, inputs)
        task.warm_steps += 1
        update = task.update or update
    total, norm = (x.clone() for x in update(*inputs))  # or the next replay would overwrite them
    if ranks > 1:
        dist.all_reduce(total, group=task.group)
        total = total / ranks
    task.step += 1
    return {"step": task.step, "loss": total, "lr": lr, "gradient_norm": norm}


def make_optimizer(network: nn.Module, c: Config) -> torch.optim.AdamW:
    rest = {"weight_decay": c.weight_decay, "fused": True}
    rest["capturable"] = next(network.parameters()).is_cuda  # with its count of steps there, too
    return torch.optim.AdamW(network.parameters(), c.lr, (0.9, c.beta2), **rest)


def fetch_losses(task: Denoiser, entries: list[dict], global_batch: int) -> None:
    """What steps returned, as numbers. ValueError for the first step where one isn't finite."""
    keys = ("loss", "gradient_norm")
    numbers = torch.stack([entry[key] for entry in entries for key in keys]).tolist()
    for entry, loss, norm in zip(entries, numbers[::2], numbers[1::2], strict=True):
        entry |= {"loss": loss, "gradient_norm": norm}
        if not math.isfinite(loss + norm):
            step = entry["step"]
            clips = task.choose(step - 1, global_batch)
            ids = ", ".join(str(task.data.record(int(i))["id"]) for i in clips)
            raise ValueError(f"step {step}: loss {loss:g}, gradient norm {norm:g}; stopped, "
                             f"none of it is kept. The clips of this step: {ids}")  # fmt: skip


def train(c: Config, kind: type[Denoiser] = Denoiser) -> Path:
    """Train what `kind` is, from the run's newest checkpoint on. Returns the model folder."""
    parent, out = os.getppid(), Path(c.out)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = latents.pick_device(c.device)
    latents.keep_freed_memory()
    if ranks > 1 and not dist.is_initialized():  # composing, downloads and saving may take long
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENT)
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # or an error names the kernel that can't
    c = replace(c, precision=latents.pick_precision(c.precision, device))
    task = kind(c, device)
    network, ema = task.network, copy.deepcopy(task.network).requires_grad_(False)
    optimizer = make_optimizer(network, c)
    parts = {"network": network, "ema": ema, "optimizer": optimizer}

    # What is being computed, in full: a resumed run must agree on it, and so must all ranks.
    global_batch = c.batch_size * c.accumulate * ranks
    stored = [data.folder / name for data in (task.data, task.val) for name in STORED]
    same = {k: v for k, v in asdict(c).items() if k not in MAY_CHANGE}
    same |= {"global_batch": global_batch, "data (its hash)": sha256(stored)}
    state = load_newest(out / "checkpoints") if c.resume else None
    if state:
        advice = f"give that to go on, or another --out (to train further, --init {out}/model)"
        must_agree(f"{out}: its run has", state["config"], same, advice)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        optimizer.param_groups[0]["capturable"] = device.type == "cuda"  # whatever it came from
        for p, moments in optimizer.state.items():  # laid out as the weights are: AdamW's fused
            for name, value in moments.items():  # kernels take memory as it comes
                if value.shape == p.shape:
                    moments[name] = torch.empty_like(p, requires_grad=False).copy_(value)
        task.step = state["step"]
    if ranks > 1:
        mine, every = json.dumps([same, task.step]), [None] * ranks
        dist.all_gather_object(every, mine)
        if set(every) != {mine}:
            raise ValueError("ranks differ in settings, data or checkpoints: make them the same")
    if rank == 0:
        old = not c.resume and out.exists()
        file = open_log(out)
        if old:
            print(f"the old run is now {out.rename(f'{out}-{datetime.now():%Y%m%d-%H%M%S}')}")
            file = open_log(out)
        for torn in (*out.glob(".*.tmp"), *out.glob("checkpoints/.*.tmp")):  # by a kill
            torn.unlink()
        (out / "config.json").write_text(json.dumps(asdict(c), indent=2) + "\n")
        lines = file.readlines()
        file.truncate(sum(map(len, lines[: task.step])))  # one per step; the last may be torn
        size = sum(p.numel() for p in network.parameters())
        print(f"{out}: {size:,} parameters, {task.clips:,} clips, {global_batch} per step; "
              f"{task.step} of {c.steps} steps are done")  # fmt: skip

    def fetch(step: int) -> list[tuple]:
        """This rank's share of a step: a batch for each forward pass."""
        clips, batches = task.choose(step, global_batch), []
        for i in range(c.accumulate):
            first = (i * ranks + rank) * c.batch_size
            places = range(first, first + c.batch_size)
            batches.append(task.batch(step, places, clips[first : first + c.batch_size]))
        return batches

    model = torch.compile(network) if c.compile else network
    if ranks > 1:
        task.group = dist.new_group(timeout=HUNG)
        model = DistributedDataParallel(model, process_group=task.group)
        # DDP regroups the gradients after its first backward pass, and the last bits of a sum over
        # three or more ranks depend on the grouping. With that pass behind it, a resumed run goes
        # on as the interrupted one would have.
        task.loss(model, *fetch(0)[0]).mean().backward()
        optimizer.zero_grad(set_to_none=True)

    bar = tqdm(total=c.steps, initial=task.step, unit="step", disable=rank > 0)
    entries, started = [], time.perf_counter()
    with ThreadPoolExecutor(1, initializer=latents.pick_device, initargs=(c.device,)) as pool:
        upcoming = pool.submit(fetch, task.step)
        while task.step < c.steps:
            if ranks > 1 and os.getppid() != parent:
                # Else ranks outlive a torchrun that was killed, and write beside its successor's.
                raise OSError(f"torchrun is gone: stopped before step {task.step + 1}")
            batches = upcoming.result()
            upcoming = pool.submit(fetch, task.step + 1)  # while this step is computed
            entries.append(train_step(task, model, ema, optimizer, batches))
            last = task.step == c.steps
            validates = last or task.step % c.validate_every == 0
            saves = last or task.step % c.checkpoint_every == 0
            if not (validates or saves or len(entries) == FETCH_EVERY.get(device.type, 1)):
                continue
            fetch_losses(task, entries, global_batch)
            rate = global_batch * len(entries) / (time.perf_counter() - started)
            entries = [entry | {"samples_per_second": rate} for entry in entries]
            entry = entries[-1]
            if validates:
                entry |= task.validate(ema, rank, ranks)
            if rank == 0:
                file.write("".join(json.dumps(x) + "\n" for x in entries).encode())
                file.flush()
                bar.update(len(entries))
                bar.set_postfix(loss=f"{entry['loss']:.3f}", lr=f"{entry['lr']:.1e}", refresh=False)
                if "val_loss" in entry:
                    bar.write(f"step {task.step}: val loss {entry['val_loss']:.4f}")
                if saves:
                    save(task, out, {"config": same}, parts)
            if ranks > 1 and saves:
                dist.barrier()  # the others wait, as long as it takes
            entries, started = [], time.perf_counter()
    bar.close()
    return out / "model"


# ---- what stays on disk --------------------------------------------------------------------------


def open_log(out: Path) -> IO:
    """RUN/log.jsonl, at its beginning; OSError if another command is writing it."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "log.jsonl", "a+b")
    latents.lock(file)
    file.seek(0)
    return file


def save(task: Denoiser, out: Path, about: dict, parts: dict) -> None:
    """The model folder, then a checkpoint, each written aside and then renamed: a run that has its
    last checkpoint is complete. The last two checkpoints stay."""
    aside = out / "model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    task.write(parts["ema"], aside)
    shutil.rmtree(out / "model", ignore_errors=True)
    aside.rename(out / "model")

    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    state = about | {"step": task.step} | {name: part.state_dict() for name, part in parts.items()}
    write_aside(folder / f"step-{task.step:07d}.pt", partial(torch.save, state))
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()


def load_newest(folder: Path) -> dict | None:
    """The newest checkpoint that can be read. ValueError if there are some, and none can be."""
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in paths:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
            print(f"{path} can't be read ({e!r:.120}); trying the one before")
    if paths:
        raise ValueError(f"{folder}: no checkpoint can be read; --no-resume sets the run aside "
                         "and starts another")  # fmt: skip
    return None


def must_agree(subject: str, old: dict, new: dict, advice: str) -> None:
    """ValueError names the first value of `new`, this command's, that is another in `old`."""
    old, new = (json.loads(json.dumps(x)) for x in (old, new))  # a tuple equals a list
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"{subject} {name} = {old.get(name)!r}, this command {new[name]!r}: {advice}"
            )


def sha256(paths: list[Path]) -> str:
    """Of what is in these files; its beginning."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:  # a piece at a time: a large set's clips.jsonl has gigabytes
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


# ---- the command line, generated from Config -----------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> Config:
    """A field of Config is an option. What isn't given is what the model folder that --init names
    says of itself, or the preset's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="[tiny | paper]")
    for f in fields(Config):
        kind = type(f.default)
        how = {"type": kind, "choices": f.metadata["choices"]}
        if kind in (int, float):
            how["type"] = latents.number(kind, f.metadata["low"], f.metadata["high"])
        elif kind is tuple:
            how["type"] = numbers
        elif kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        defaults = dict.fromkeys(str(getattr(preset, f.name)) for preset in PRESETS.values())
        text = f"{f.metadata['help']} [{' | '.join(defaults)}]"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **how)
    given = vars(parser.parse_args(arguments))
    values = asdict(PRESETS[given.pop("preset")])
    if is_model(given.get("init")):
        values |= {k: v for k, v in read_settings(given["init"]).items() if k in values}
    values |= given
    for name in ("data", "val_data", "init", "text_encoder"):
        if values[name] and Path(values[name]).exists():  # else a hub id
            values[name] = str(Path(values[name]).resolve())  # from anywhere, and ./x is x
    return Config(**values)


def numbers(text: str) -> tuple[int, ...]:
    """ "128,192" -> (128, 192)"""
    return tuple(map(int, text.split(",")))


def main(arguments: list[str] | None = None) -> None:
    with latents.one_line_errors("start the same command again"):
        c = parse_args(arguments)
    smaller = f"--batch-size {max(1, c.batch_size // 2)} --accumulate {2 * c.accumulate}, or "
    smaller += "--gradient-checkpointing"
    with latents.one_line_errors("the same command goes on from the newest checkpoint", smaller):
        train(c)


if __name__ == "__main__":
    main()
