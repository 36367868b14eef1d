"""What the papers' choices are worth, at tiny scale: one command for each, one table of all.

    mask       text encoder masked and unmasked                     P1 table 2; P2 table 1
    schedule   cosine against scaled-linear                         P1 section 4
    layout     channels × 24 × 21 against a one-channel picture     P2 section 4, "U-Net Design"
    freezing   all layers trained against blocks frozen first       P2 appendix B.4
    text       cross-attention against concatenated text            P1, P2 section 4
    codes      discrete codes against continuous latents            P2, "Generation Latent Space"
    captions   plain labels, the data's wording, captions of an LLM P1 section 3
    samplers   samplers × steps, on the model as it is              P1 section 4
    guidance   its scale, on the model as it is                     P1 section 4

    python -m appendix.ablations mask --minutes 25        (or --steps N; all arms take as many)
    python -m appendix.ablations captions --captions captions/labels.jsonl captions/filter.jsonl
    python -m appendix.ablations table                    what is on disk so far, as Markdown

The arms of an ablation differ in one thing, but for the picture, whose network has other widths,
and one mean and std for all bands. Clips, t and
noise of a step are the same, and captions where these aren't compared: they come of the seed and
step (the noise of `codes` has other channels). So is what arms start from: the U-Net of --model or,
where another architecture is compared, random weights; there both do. "scratch" is the arm that
layout, text and codes have in common: trained once. Compute is equal in steps. A step is dearer for
the picture, which has 128 times as many pixels: its U-Net, though narrower, takes 5 times as many
multiplications.

The warm start has been trained masked, and on the data's wording: it favours these arms.

Arms are trained by train.py's loop and scored by evaluate.py's FD, IS and KL, on sounds for the
captions of held-out scenes (tiny.judge's; the arms of `captions`, on a hundred captions that were
written in other words). Without a classifier there are only losses.

    OUT/ARM-seedN.json    the result; such an arm isn't run again    OUT/ARM-seedN/    its run
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import latents
import sample
import train
from diffusion import cosine_alphas_cumprod
from latents import LatentDataset, LatentStats, MelCodec, read_json, to_grid, to_sequence
from tiny import judge
from tiny.compose import CLIPS, HERE, Recordings, draw_scenes
from train import Run
from unet import WEIGHTS, TransformerBlock, UNet, UNetConfig, load_config, load_weights


@dataclass(frozen=True)
class Config(train.Config):
    captions: str = ""  # of OtherCaptions: "labels", "wording" or a file of captions.py's


# ---- schedule and freezing: train.py does it; what is compared has to be made comparable ---------


def nearest_noise(t: Tensor, of: Tensor, among: Tensor) -> Tensor:
    """Timesteps [B] of the schedule `among` (its ᾱ, [1000]) whose signal-to-noise ratio is nearest
    to that of timesteps t [B] of the schedule `of`."""
    ratio, ratios = of[t].logit(), among.logit()  # log ᾱ/(1−ᾱ)
    return (ratio[:, None] - ratios).abs().argmin(1)


class SameNoise(Run):
    """Validates at the noise levels of the cosine schedule, whatever the run's own: at equal t one
    schedule has more noise than another, and so more loss. (Scaled-linear never has as much as
    cosine's last 5 % of timesteps: there it is measured at its own last one.)

    Both schedules are the papers', not shifted as the tiny model's is. That one is nearer to
    scaled-linear's (log SNR differs by 1.5 in the mean, from cosine's by 2.4), which favours it.
    """

    def loss(self, model, stored, captions, t, noise) -> Tensor:
        if model is self.ema:
            t = nearest_noise(t, cosine_alphas_cumprod(), self.alphas_cumprod.cpu())
        return super().loss(model, stored, captions, t, noise)


class NewEnds(Run):
    """Begins as the papers' run does, from blocks that were trained and a conv_in and a conv_out
    that weren't: theirs come from Stable Diffusion, which has four channels."""

    def make_unet(self) -> UNet:
        unet = super().make_unet()
        unet.conv_in.reset_parameters()
        unet.conv_out.reset_parameters()
        return unet


# ---- layout: the latent as a picture of one channel ----------------------------------------------

# A picture of 128 × 504 is dear, so its first levels are as narrow as 32 groups allow. No patches,
# though: they would make channels of pixels again.
PICTURE_WIDTHS = (32, 32, 64, 128, 256)


def to_picture(x: Tensor) -> Tensor:
    """[B, 128, 24, 21] -> [B, 1, 128, 504]: bands down, frames across."""
    return to_sequence(x)[:, None].contiguous()


def from_picture(picture: Tensor) -> Tensor:
    """[B, 1, 128, 504] -> [B, 128, 24, 21], the inverse of `to_picture`."""
    return to_grid(picture[:, 0])


class PictureUNet(UNet):
    """A U-Net that sees a latent [B, 128, 24, 21] as a picture [B, 1, 128, 504], as AudioLDM's does
    ("the typical one or three channels"). Only the network knows: noise and loss are the same."""

    def forward(self, x_t: Tensor, *rest) -> Tensor:
        return from_picture(super().forward(to_picture(x_t), *rest))


class Picture(Run):
    def make_unet(self) -> UNet:
        # One channel, so one mean and one std: those of all bands together.
        mean, std = self.stats.mean, self.stats.std
        pooled = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
        mean = mean.mean()
        self.stats = LatentStats(
            torch.full_like(std, mean), torch.full_like(std, pooled), self.stats.count
        )
        last = len(PICTURE_WIDTHS) - 1
        attention = tuple(i == last for i in range(last + 1))  # of 8 × 32 pixels
        config = super().make_unet().config
        config = replace(config, block_out_channels=PICTURE_WIDTHS, attention=attention)
        return PictureUNet(replace(config, in_channels=1, out_channels=1))


# ---- text: concatenated instead of cross-attention -----------------------------------------------


class Nothing(nn.Module):
    """In the place of cross-attention."""

    def forward(self, *_) -> float:
        return 0.0


class ConcatenatedUNet(UNet):
    """The text is part of the input and of nothing else: its mean state, projected to as many
    channels as the latent has, beside the latent at every position. No cross-attention.

    Our reading of "the text embedding is first concatenated to the image embedding, subjecting it
    to modifications at each layer" and "incorporated into the noised latent" (section 4). AudioLDM
    itself, whom the papers have in mind, joins its one text vector to the time embedding.
    """

    def __init__(self, config: UNetConfig, dim: int):
        channels = config.in_channels
        super().__init__(replace(config, in_channels=2 * channels, text_dim=None))
        self.text_in = nn.Linear(dim, channels)
        for block in [m for m in self.modules() if isinstance(m, TransformerBlock)]:
            block.norm2, block.attn2 = nn.Identity(), Nothing()

    def forward(self, x_t: Tensor, t, text: Tensor, text_mask: Tensor | None = None, *rest):
        """x_t [B, C, H, W], text [B, L, dim], text_mask [B, L] -> [B, C, H, W]."""
        mask = torch.ones_like(text[..., 0]) if text_mask is None else text_mask.to(text)
        mean = (mask[..., None] * text).sum(1) / mask.sum(1, keepdim=True)  # [B, dim]
        channels = self.text_in(mean)[:, :, None, None].expand(-1, -1, *x_t.shape[2:])
        x = torch.cat([x_t, channels.to(x_t)], 1)
        return super().forward(x, t, text, None, *rest)  # [B, 2C, H, W] -> [B, C, H, W]


class Concatenated(Run):
    def make_unet(self) -> UNet:
        return ConcatenatedUNet(super().make_unet().config, self.encoder.dim)


# ---- codes: discrete ones, as numbers ------------------------------------------------------------

BOOKS, ENTRIES = 8, 1024  # EnCodec's at 6 kbps


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """[N, D], [K, D] -> [N]: the number of each row's nearest centre."""
    # ‖x − c‖² = ‖x‖² − 2·x·c + ‖c‖², and ‖x‖² is the same for every c.
    return (centres.square().sum(1) - 2 * x @ centres.T).argmin(1)


def residual_kmeans(x: Tensor, books: int, entries: int, iterations: int = 10) -> Tensor:
    """Codebooks [books, entries, D] for frames x [N, D]: k-means, then k-means of what is left by
    the codebooks before. Starts from random rows (seed 0). ValueError for fewer rows than entries.
    """
    if len(x) < entries:
        raise ValueError(f"codes: {len(x)} frames are too few for {entries} codebook entries")
    generator, codebooks = torch.Generator().manual_seed(0), []
    for _ in tqdm(range(books), desc="k-means", unit="codebook"):
        centres = x[torch.randperm(len(x), generator=generator)[:entries].to(x.device)]
        for _ in range(iterations):
            own = nearest(x, centres)
            counts = own.bincount(minlength=entries)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, own, x)
            centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        x = x - centres[nearest(x, centres)]
        codebooks.append(centres)
    return torch.stack(codebooks)


def quantize(x: Tensor, codebooks: Tensor) -> Tensor:
    """[N, D] -> codes [N, books]: the nearest entry, then the nearest to what it leaves, …"""
    codes = []
    for centres in codebooks:
        codes.append(nearest(x, centres))
        x = x - centres[codes[-1]]
    return torch.stack(codes, 1)


def lookup(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes [..., books] -> [..., D]: Σ_k q_k[c_k]."""
    return sum(centres[codes[..., k]] for k, centres in enumerate(codebooks))


class Codes:
    """A codec whose latents are codes, as numbers: 8 × 504 of 0 … 1023, for the stored mels of a
    data set. Entry 511 is not between 510 and 512 in any sense, and that is the point of it."""

    name = "mel-codes"

    def __init__(self, mel: MelCodec, stats: LatentStats, codebooks: Tensor):
        self.mel, self.stats, self.codebooks = mel, stats, codebooks.to(mel.device)
        self.channels = len(codebooks)

    def settings(self) -> dict:
        digest = hashlib.sha256(self.codebooks.cpu().numpy().tobytes()).hexdigest()
        return {"name": self.name, "sha256": digest}

    def encode(self, wave: Tensor) -> Tensor:
        """[B, 161280] -> uint8 [B, 128, 504]: what is stored is the mel itself."""
        return self.mel.encode(wave)

    def frames(self, stored: Tensor) -> Tensor:
        """uint8 [B, 128, 504] -> normalised mel frames [B·504, 128]."""
        return self.stats.normalize(self.mel.dequantize(stored)).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def dequantize(self, stored: Tensor) -> Tensor:
        """uint8 [B, 128, 504] -> codes as numbers, float32 [B, 8, 504]."""
        codes = quantize(self.frames(stored), self.codebooks)  # [B·504, 8]
        return codes.unflatten(0, (len(stored), -1)).transpose(1, 2).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Numbers [B, 8, frames], rounded to codes -> 16 kHz wave [B, 320·frames]."""
        codes = latents.to(self.mel.device).round().clamp(0, self.codebooks.shape[1] - 1).long()
        frames = lookup(codes.transpose(1, 2), self.codebooks)  # [B, frames, 128]
        return self.mel.decode(self.stats.denormalize(frames.transpose(1, 2)))


class DiscreteCodes(Run):
    """P2 began with the codes themselves and saw "nearly 0 decreases in train loss over time". Both
    their latents were of one EnCodec. Here the codes are of the mel frames that the other arm
    learns, and have a little less in them: how much less is printed, and kept with them."""

    def make_unet(self) -> UNet:
        if self.codec.name != "mel":
            raise ValueError("codes: made of stored mel spectrograms, and this data set has none")
        path = self.out.parent / "codebooks.safetensors"
        if not path.is_file():
            self.make_codebooks(path)
        kept = safetensors.torch.load_file(path)
        self.codec = Codes(self.codec, self.stats, kept["codebooks"])
        self.stats = LatentStats(kept["mean"], kept["std"])
        return super().make_unet()

    @torch.no_grad()
    def make_codebooks(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        clips = np.sort(rng.choice(self.clips, min(self.clips, 512), replace=False))
        mels = Codes(self.codec, self.stats, torch.zeros(0))
        x = mels.frames(self.data.stored(clips).to(self.device))  # [N, 128]
        x = x[torch.from_numpy(rng.permutation(len(x))[: 40 * ENTRIES]).to(self.device)]
        codebooks = residual_kmeans(x, BOOKS, ENTRIES)
        codes = quantize(x, codebooks)
        left = (x - lookup(codes, codebooks)).square().mean() / x.square().mean()
        print(f"{path}: the codes leave {left:.1%} of the variance out")
        stats = LatentStats.of(codes.T[None].double())  # of the numbers, [1, 8, N]
        tensors = {"codebooks": codebooks.cpu(), "left_out": left.cpu()}
        tensors |= {"mean": stats.mean, "std": stats.std}
        path.parent.mkdir(parents=True, exist_ok=True)
        latents.write_aside(path, safetensors.torch.save(tensors))


# ---- captions: others for the same clips ---------------------------------------------------------


class Captioned(LatentDataset):
    """A stored data set whose clips have other captions: those that choose(record) gives."""

    def __init__(self, folder: str | Path, choose: Callable[[dict], list[str]]):
        super().__init__(folder)
        self.choose = choose

    def record(self, i: int) -> dict:
        record = super().record(i)
        # Twice: of a single caption none is drawn, and t and noise would be other random numbers.
        return record | {"captions": self.choose(record) * 2}


def captions_by_labels(path: str | Path | None) -> Callable[[dict], list[str]]:
    """record -> captions: what a JSONL file of captions.py's (after the step `filter` its
    `captions`, before it `audio_caption`) has for the same labels; else "The sound of A, B" (P2,
    A.2)."""
    table, lines = {}, Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            # Before the step `filter`, `captions` may be the data's own.
            captions = record["captions"] if "gate" in record else [record["audio_caption"]]
            table.setdefault(frozenset(record["labels"]), []).extend(captions)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}, line {number}: no record of captions.py ({e!r})") from e

    def choose(record: dict) -> list[str]:
        labels = record["labels"]
        return table.get(frozenset(labels)) or ["The sound of " + ", ".join(labels)]

    return choose


def in_other_words() -> dict[str, str]:
    """Clip of tiny/data/test -> a caption that was not made from the data's own wording."""
    with open(HERE / "reference_captions.csv", newline="", encoding="utf-8") as file:
        return {row["id"]: row["caption"] for row in csv.DictReader(file)}


class OtherCaptions(Run):
    """Trains on other captions for the same clips; validates all arms on the captions in other
    words, or where the held-out clips have none, on their own."""

    def __init__(self, c: Config):
        super().__init__(c)
        if c.captions == "wording":
            choose = itemgetter("captions")
        else:
            choose = captions_by_labels(c.captions if c.captions != "labels" else None)
        if c.captions not in ("wording", "labels"):
            records = [self.data.record(i) for i in range(self.clips)]
            plain = captions_by_labels(None)
            other = sum(choose(record) != plain(record) for record in records)
            print(f"{c.captions}: other captions than \"The sound of …\" for {other:,} of "
                  f"{len(records):,} clips")  # fmt: skip
        self.data = Captioned(self.data.folder, choose)
        words = in_other_words()
        found = [i for i in range(len(self.val)) if self.val.record(i)["id"] in words]
        if found:
            self.val = Captioned(self.val.folder, lambda record: [words[record["id"]]])
            self.val_indices = found


# ---- the arms ------------------------------------------------------------------------------------


class Arm(NamedTuple):
    kind: type[Run] = Run
    settings: dict = {}  # of train.Config, where they differ from the others'
    warm: bool = True  # starts from --model's U-Net; else from random weights
    frozen: float = 0.0  # share of the steps that blocks are frozen


ARMS = {
    # Pads inside the text encoder and in cross-attention, or in neither.
    "masked": Arm(settings={"mask": "both"}),
    "unmasked": Arm(settings={"mask": "none"}),
    "cosine": Arm(SameNoise, {"schedule": "cosine", "schedule_shift": 1.0}),
    "scaled-linear": Arm(SameNoise, {"schedule": "scaled-linear", "schedule_shift": 1.0}),
    "all-layers": Arm(NewEnds),
    "frozen-first": Arm(NewEnds, frozen=5_000 / 60_000),  # as many of the steps as the papers'
    "scratch": Arm(warm=False),
    "picture": Arm(Picture, warm=False),
    "concatenated": Arm(Concatenated, warm=False),
    "codes": Arm(DiscreteCodes, warm=False),
    "labels": Arm(OtherCaptions, {"captions": "labels"}),
    "wording": Arm(OtherCaptions, {"captions": "wording"}),
}
ABLATIONS = {
    "mask": ("masked", "unmasked"),
    "schedule": ("cosine", "scaled-linear"),
    "layout": ("scratch", "picture"),
    "freezing": ("all-layers", "frozen-first"),
    "text": ("scratch", "concatenated"),
    "codes": ("scratch", "codes"),
    "captions": ("labels", "wording"),  # and one for each file of --captions
    "samplers": tuple(
        f"{s}-{n}" for n in (5, 10, 25, 45, 100, 200) for s in ("pndm", "ddim", "ddpm")
    ),
    "guidance": tuple(f"guidance-{g}" for g in (1, 2, 3.5, 5, 6.5, 7.5)),
}
UNTRAINED = ("samplers", "guidance")  # what is compared is the model as it is
TWO_SEEDS = ("mask", "schedule", "freezing")
OTHER_LOSS = ("layout", "codes")  # the arms' latents are normalised, or made, in different ways


def configure(name: str, arm: Arm, seed: int, steps: int, args) -> Config:
    """The settings of an arm: those of --model, and what the arm changes."""
    options = train.read_settings(args.model)
    del options["codec"]
    unet = load_config(args.model)
    names = ("block_out_channels", "attention", "layers_per_block", "num_heads")
    options |= {key: getattr(unet, key) for key in (*names, "cross_attention_dim")}
    # The ends are trained alone at the full rate for a while: 1/60 are warm-up, as the papers'.
    warmup = steps // 60 if arm.kind is NewEnds else min(300, steps // 10)
    options |= {"steps": steps, "warmup_steps": warmup, "sample_every": 0}
    options |= {"validate_every": max(1, steps // 5), "checkpoint_every": max(1, steps // 5)}
    options |= {"data": args.data, "val_data": args.val_data, "batch_size": args.batch_size}
    options |= {"device": args.device, "precision": args.precision, "seed": seed}
    options |= {"init": str(args.model / "unet") if arm.warm else ""}
    options |= {"frozen_steps": round(arm.frozen * steps), **arm.settings}
    return Config(out=str(args.out / f"{name}-seed{seed}"), **options)


def weights_hash(model: Path) -> str:
    return evaluate.file_sha256(model / "unet" / f"{WEIGHTS}.safetensors")


def write_json(path: Path, value: dict) -> None:
    latents.write_aside(path, (json.dumps(value, indent=1) + "\n").encode())


def planned_steps(args: argparse.Namespace) -> int:
    """--steps; or as many as "scratch" does in --minutes on this machine, measured once."""
    if args.steps:
        return args.steps
    path = args.out / "plan.json"
    if not path.is_file():
        run = Run(configure("scratch", ARMS["scratch"], 0, 1000, args))
        for step in tqdm(range(13), desc="measuring a step", unit="step", leave=False):
            if step == 3:
                started = time.perf_counter()
            run.train_step([run.batch(step, 0)])
        seconds = (time.perf_counter() - started) / 10
        plan = {"minutes": args.minutes, "seconds_a_step": seconds}
        plan["steps"] = max(10, round(args.minutes * 60 / seconds))
        write_json(path, plan)
    plan = read_json(path, "minutes", "steps")
    if plan["minutes"] != args.minutes:
        raise ValueError(f"{path}: begun with --minutes {plan['minutes']:g}: give the same, "
                         "or another --out")  # fmt: skip
    return plan["steps"]


def losses(c: Config) -> dict:
    """What a finished run's log says, and how large its network is."""
    run = Path(c.out)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validations = {x["step"]: x["val_loss"] for x in log if "val_loss" in x}
    return {
        "steps": c.steps,
        "parameters": sum(x.numel() for x in load_weights(run / "model" / "unet").values()),
        "seconds": statistics.median(c.batch_size / x["samples_per_second"] for x in log),
        "val_loss": log[-1]["val_loss"],
        "val_loss_bins": log[-1]["val_loss_bins"],
        "val_losses": validations,
    }


# ---- scores --------------------------------------------------------------------------------------


class Judge:
    """Scores a model by sounds for the captions of held-out scenes: tiny.judge's, or for the
    captions ablation those of tiny/data/test that have a caption in other words."""

    def __init__(self, ablation: str, args: argparse.Namespace):
        self.args = args
        self.classifier = evaluate.Cnn14.load(args.classifier)
        self.recordings, self.reference = Recordings(HERE / "recordings.csv", "test"), None
        if ablation == "captions":
            self.folder = args.out / "reference-captions"
            scenes = draw_scenes(self.recordings, "test", CLIPS["test"], 0)
            self.prompts = dict(list(in_other_words().items())[: args.clips])
        else:
            self.folder = args.out / "reference"
            scenes = draw_scenes(self.recordings, "test", args.clips, judge.SEED)
            self.prompts = {scene["id"]: scene["captions"][0] for scene in scenes}
        self.scenes = {scene["id"]: scene for scene in scenes if scene["id"] in self.prompts}

    def settings(self, **others) -> dict:
        """What scores depend on, beside the model."""
        about = {"classifier": self.args.classifier.name, "sha256": self.classifier.sha256}
        about |= {"N": len(self.prompts), "denoising_steps": self.args.denoising_steps}
        return about | {"sampler": "pndm"} | others

    def hear(self, folder: Path) -> evaluate.Features:
        sounds = {n: partial(evaluate.load_sound, folder / f"{n}.wav") for n in self.prompts}
        cache = self.args.out / "features"
        return evaluate.hear(sounds, self.classifier, cache=cache, title=folder.parent.name)

    def __call__(self, model: sample.Model, folder: Path, about: dict) -> dict:
        """FD, IS and KL of a model's sounds, made by `about` (see `settings`); guidance, where it
        doesn't say, is the model's own."""
        if self.reference is None:
            judge.write_scenes(self.folder, self.scenes, self.recordings)
            self.reference = self.hear(self.folder)
        options = {"steps": about["denoising_steps"], "sampler": about["sampler"], "seed": 0}
        options = argparse.Namespace(**options, guidance=about.get("guidance"), batch_size=16)
        judge.write_generated(folder, self.prompts, model, options)
        width = self.classifier.widths[-1]
        row = evaluate.measure(self.hear(folder), self.reference, width, True)
        row = {key: row[key] for key in row if key.split("_")[0] in ("FD", "IS", "KL")}
        return row | about


def trained(c: Config, kind: type[Run]) -> sample.Model:
    """The model of a finished run, whatever its network and its codec."""
    run = kind(c)
    run.ema.load_state_dict(load_weights(Path(c.out) / "model" / "unet"))
    parts = run.ema.eval(), run.encoder, run.codec, run.stats, run.alphas_cumprod
    return sample.Model(*parts, c.prediction, c.guidance, run.device)


# ---- the command ---------------------------------------------------------------------------------


def run_arm(ablation: str, name: str, arm: Arm, seed: int, steps: int, score, args) -> None:
    """Train and score, unless it is done; what is done is in OUT/NAME-seedN.json."""
    c = configure(name, arm, seed, steps, args)
    path = Path(f"{c.out}.json")
    config = {k: v for k, v in asdict(c).items() if k not in train.MAY_CHANGE}
    config |= {"batch_size": c.batch_size, "model (its hash)": weights_hash(args.model)}
    if path.is_file():
        result = read_json(path, "config", "val_loss")
        advice = "give the old value, or another --out"
        train.must_agree(f"{path} has", result["config"], config, advice)
    else:
        train.train(c, arm.kind)
        result = {"ablation": ablation, "arm": name, "seed": seed, "config": config, **losses(c)}
        write_json(path, result)
    shutil.rmtree(Path(c.out, "checkpoints"), ignore_errors=True)  # 0.6 GB; the model stays
    if score and not score.settings().items() <= result.get("scores", {}).items():
        folder = Path(c.out, f"sounds-{args.denoising_steps}")
        result["scores"] = score(trained(c, arm.kind), folder, score.settings())
        write_json(path, result)
    print(f"{path}: validation loss {result['val_loss']:.4f}", say(result.get("scores")))


def run_untrained(ablation: str, name: str, score: Judge, args: argparse.Namespace) -> None:
    """Score --model with another sampler, or another scale of guidance."""
    path, (what, value) = args.out / f"{name}-seed0.json", name.split("-")
    model = {"model (its hash)": weights_hash(args.model)}
    if ablation == "guidance":
        about = score.settings(guidance=float(value), **model)
    else:
        about = score.settings(sampler=what, denoising_steps=int(value), **model)
    result = read_json(path, "scores") if path.is_file() else {"scores": model}
    train.must_agree(f"{path} has", result["scores"], model, "another --out")
    if not about.items() <= result["scores"].items():
        model = sample.load_model(args.model, args.device or None)
        folder = args.out / f"{name}-seed0" / f"sounds-{about['denoising_steps']}"
        scores = score(model, folder, about)
        result = {"ablation": ablation, "arm": name, "seed": 0, "scores": scores}
        write_json(path, result)
    print(f"{path}:", say(result["scores"]))


def say(scores: dict | None) -> str:
    keys = [key for key in ("FD", "IS", "KL_softmax") if key in (scores or {})]
    return ", ".join(f"{key.partition('_')[0]} {scores[key]:.4g}" for key in keys)


def table(out: Path) -> str:
    """A Markdown table of what is on disk; seeds side by side."""
    results = [read_json(path, "arm") for path in sorted(out.glob("*-seed*.json"))]
    if not results:
        raise FileNotFoundError(f"{out}: no results yet; run an ablation first")
    heads = "ablation arm seeds steps s/step parameters loss N FD IS KL".split()
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * 9]
    for ablation, arms in ABLATIONS.items():
        others = {r["arm"] for r in results if r["ablation"] == ablation} - set(arms)
        for arm in [*arms, *sorted(others)]:
            rows = sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"])
            if rows:
                loss = "({:.3f})" if ablation in OTHER_LOSS else "{:.4f}"
                cells = [ablation, arm, cell(rows, "{}", "seed"), cell(rows[:1], "{}", "steps")]
                cells += [cell(rows[:1], "{:.2f}", "seconds"), cell(rows[:1], "{:,}", "parameters")]
                cells += [cell(rows, loss, "val_loss")]
                scores = [row.get("scores", {}) for row in rows]
                cells += [cell(scores, "{:.4g}", key) for key in ("N", "FD", "IS", "KL_softmax")]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Loss: validation, of the averaged weights; in brackets: not to be compared."]
    scored = [r["scores"] for r in results if "scores" in r]
    judges = sorted({f"{s['classifier']} ({s['sha256'][:8]}), {s['N']} clips" for s in scored})
    lines += [f"FD, IS, KL by {'; '.join(judges)}." if judges else "FD, IS, KL: not scored yet."]
    return "\n".join(lines)


def cell(rows: list[dict], pattern: str, key: str) -> str:
    return ", ".join(pattern.format(row[key]) if key in row else "–" for row in rows)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=(*ABLATIONS, "table"), help="which one; table: show what is on disk")
    add("--minutes", type=float, default=25.0, help="training of the arm scratch; how many steps "
        "that is, is measured once for an --out, and all arms take as many [25]")  # fmt: skip
    add("--steps", type=int, help="training steps of an arm, instead of --minutes")
    add("--seeds", type=int, nargs="+", help=f"[{', '.join(TWO_SEEDS)}: 0 1; others: 0]")
    add("--model", type=Path, default=HERE / "model", help="model folder: the warm start, and what "
        "settings and sizes come from [tiny/model]")  # fmt: skip
    add("--captions", nargs="+", default=[], metavar="FILE", help="captions: JSONL files of "
        "captions.py's with captions by labels; an arm for each, called by the file")  # fmt: skip
    add("--classifier", type=Path, help="tagger for FD, IS and KL, as for evaluate.py; without one "
        "only losses are shown [tiny/classifier.safetensors, where there is one]")  # fmt: skip
    add("--clips", type=int, default=256, help="sounds to score an arm by [256]")
    add("--denoising-steps", type=int, default=45, help="for these sounds [45]")
    add("--out", type=Path, default=Path("runs/ablations"), help="folder [runs/ablations]")
    add("--data", default="", help="stored data set [the tiny one]")
    add("--val-data", default="", help="held-out data set [the tiny one]")
    add("--batch-size", type=int, default=8, help="clips a step [8]")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of autocast [bf16]")
    add("--device", default="", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    steps = 1 if args.steps is None else args.steps
    if args.minutes <= 0 or min(steps, args.batch_size, args.denoising_steps) < 1:
        parser.error("--minutes is above 0, --steps, --batch-size, --denoising-steps 1 or more")
    if args.clips < 2 or min(args.seeds or [0]) < 0:
        parser.error("--clips is 2 or more, --seeds 0 or more")
    if args.name in UNTRAINED and (args.steps or args.seeds):
        parser.error(f"{args.name}: nothing is trained, so there are no --steps and no --seeds")
    if args.captions and args.name != "captions":
        parser.error("--captions is for the ablation captions")
    if args.classifier is None and evaluate.CLASSIFIER.is_file():
        args.classifier = evaluate.CLASSIFIER
    return args


def run(args: argparse.Namespace) -> None:
    if args.name == "table":
        return print(table(args.out))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: not for ablations, one process is enough")
    args.out.mkdir(parents=True, exist_ok=True)
    score = Judge(args.name, args) if args.classifier else None
    if args.name in UNTRAINED:
        if score is None:
            raise ValueError(f"{args.name}: nothing is trained, so there is no loss: "
                             "--classifier FILE")  # fmt: skip
        for name in ABLATIONS[args.name]:
            run_untrained(args.name, name, score, args)
        return print(table(args.out))
    arms = {name: ARMS[name] for name in ABLATIONS[args.name]}
    for file in args.captions:
        captions_by_labels(file)  # better an error now than after an hour
        name = f"captions-{sample.safe_name(Path(file).stem, given=True)}"
        if name in arms:
            raise ValueError(f"--captions: two files called {Path(file).stem}: rename one")
        arms[name] = Arm(OtherCaptions, {"captions": str(file)})
    seeds = args.seeds or ([0, 1] if args.name in TWO_SEEDS else [0])
    steps = planned_steps(args)
    todo = [(name, arm, seed) for seed in seeds for name, arm in arms.items()]
    for number, (name, arm, seed) in enumerate(todo, 1):
        print(f"{args.name}: {name}, seed {seed} ({number} of {len(todo)}), {steps} steps")
        run_arm(args.name, name, arm, seed, steps, score, args)
    print(table(args.out))


def main(arguments: list[str] | None = None) -> None:
    try:
        run(parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from the last checkpoint")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: {str(e).splitlines()[0]} Take a smaller --batch-size")
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
