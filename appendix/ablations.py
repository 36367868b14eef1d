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

    python -m appendix.ablations mask --steps 3000        all arms take as many
    python -m appendix.ablations captions --captions captions/labels.jsonl captions/filter.jsonl
    python -m appendix.ablations table                    what is on disk so far, as Markdown

The arms of an ablation differ in one thing, but for the picture, whose network has other widths,
and one mean and std for all bands. Clips, t and noise of a step are the same, and captions where
these aren't compared: they come of the seed and step (the noise of `codes` has other channels). So
is what arms start from: the U-Net of --model or, where another architecture is compared, random
weights; there both do. "scratch" is the arm that layout, text and codes have in common: trained
once. Compute is equal in steps. A step is dearer for the picture, which has 128 times as many
pixels: its U-Net, though narrower, takes 5 times as many multiplications.

The warm start has been trained masked, and on the data's wording: it favours these arms.

Arms are trained by train.py's loop and scored by evaluate.py's FD, IS and KL, on sounds for the
captions of held-out scenes (tiny.judge's; the arms of `captions`, on a hundred captions that were
written in other words). Without a classifier there are only losses.

    OUT/ARM-seedN.json    the result; such an arm isn't run again    OUT/ARM-seedN/    its run
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from appendix.classify import markdown
from diffusion import cosine_alphas_cumprod
from latents import LatentDataset, LatentStats, MelCodec, read_json, to_grid, to_sequence
from tiny import judge
from tiny.compose import CLIPS, HERE, Recordings, draw_scenes
from train import Denoiser
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


class SameNoise(Denoiser):
    """Validates at the noise levels of the cosine schedule, whatever the run's own: at equal t one
    schedule has more noise than another, and so more loss. (Scaled-linear never has as much as
    cosine's last 5 % of timesteps: there it is measured at its own last one.)

    Both schedules are the papers', not shifted as the tiny model's is. That one is nearer to
    scaled-linear's (log SNR differs by 1.5 in the mean, from cosine's by 2.4), which favours it.
    """

    def loss(self, network: nn.Module, captions, stored, t, noise) -> Tensor:
        if not torch.is_grad_enabled():  # it is validation
            t = nearest_noise(t, cosine_alphas_cumprod(), self.alphas_cumprod.cpu())
        return super().loss(network, captions, stored, t, noise)


class NewEnds(Denoiser):
    """Begins as the papers' run does, from blocks that were trained and a conv_in and a conv_out
    that weren't: theirs come from Stable Diffusion, which has four channels."""

    def make_network(self) -> UNet:
        unet = super().make_network()
        unet.conv_in.reset_parameters()
        unet.conv_out.reset_parameters()
        return unet


# ---- layout: the latent as a picture of one channel ----------------------------------------------

# A picture of 128 × 504 is dear, so its first levels are as narrow as 32 groups allow. No patches,
# though: they would make channels of pixels again.
PICTURE_WIDTHS = (32, 32, 64, 128, 256)


class PictureUNet(UNet):
    """A U-Net that sees a latent [B, 128, 24, 21] as a picture, bands down, frames across, as
    AudioLDM's does ("the typical one or three channels"). Only the network knows."""

    def forward(self, x_t: Tensor, *rest) -> Tensor:
        picture = to_sequence(x_t)[:, None].contiguous()  # [B, 1, 128, 504]
        return to_grid(super().forward(picture, *rest)[:, 0])  # [B, 128, 24, 21]


class Picture(Denoiser):
    def make_network(self) -> UNet:
        # One channel, so one mean and one std: those of all bands together.
        each = self.stats
        mean = each.mean.mean()
        std = (each.std.square() + (each.mean - mean).square()).mean().sqrt()
        mean, std = (torch.full_like(each.std, x) for x in (mean, std))
        self.stats = LatentStats(mean, std, each.count)
        attention = [False] * (len(PICTURE_WIDTHS) - 1) + [True]  # of 8 × 32 pixels
        config = super().make_network().config
        config = replace(config, block_out_channels=PICTURE_WIDTHS, attention=tuple(attention))
        return PictureUNet(replace(config, in_channels=1, out_channels=1))


# ---- text: concatenated instead of cross-attention -----------------------------------------------


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
            del block.norm2, block.attn2
            block.norm2 = block.attn2 = lambda *_: 0.0

    def forward(self, x_t: Tensor, t, text: Tensor, text_mask: Tensor | None = None, *rest):
        """x_t [B, C, H, W], text [B, L, dim], text_mask [B, L] -> [B, C, H, W]."""
        mask = torch.ones_like(text[..., 0]) if text_mask is None else text_mask.to(text)
        mean = (mask[..., None] * text).sum(1) / mask.sum(1, keepdim=True)  # [B, dim]
        channels = self.text_in(mean)[:, :, None, None].expand(-1, -1, *x_t.shape[2:])
        x = torch.cat([x_t, channels.to(x_t)], 1)
        return super().forward(x, t, text, None, *rest)  # [B, 2C, H, W] -> [B, C, H, W]


class Concatenated(Denoiser):
    def make_network(self) -> UNet:
        return ConcatenatedUNet(super().make_network().config, self.encoder.dim)


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


class Codes(MelCodec):
    """A codec whose latents are codes, as numbers: 8 × 504 of 0 … 1023, for the stored mels of a
    data set. Entry 511 is not between 510 and 512 in any sense, and that is the point of it."""

    name = "mel-codes"

    def __init__(self, stats: LatentStats, codebooks: Tensor, device: torch.device):
        super().__init__(device)
        self.stats, self.codebooks = stats, codebooks.to(device)
        self.channels = len(codebooks)

    def frames(self, stored: Tensor) -> Tensor:
        """uint8 [B, 128, 504] -> normalised mel frames [B·504, 128]."""
        return self.stats.normalize(super().dequantize(stored)).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def dequantize(self, stored: Tensor) -> Tensor:
        """uint8 [B, 128, 504] -> codes as numbers, float32 [B, 8, 504]."""
        codes = quantize(self.frames(stored), self.codebooks)  # [B·504, 8]
        return codes.unflatten(0, (len(stored), -1)).transpose(1, 2).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Numbers [B, 8, frames], rounded to codes -> 16 kHz wave [B, 320·frames]."""
        codes = latents.to(self.device).round().clamp(0, self.codebooks.shape[1] - 1).long()
        frames = lookup(codes.transpose(1, 2), self.codebooks)  # [B, frames, 128]
        return super().decode(self.stats.denormalize(frames.transpose(1, 2)))


class DiscreteCodes(Denoiser):
    """P2 began with the codes themselves and saw "nearly 0 decreases in train loss over time". Both
    their latents were of one EnCodec. Here the codes are of the mel frames that the other arm
    learns, and have a little less in them: how much less is printed, and kept with them."""

    def make_network(self) -> UNet:
        if self.codec.name != "mel":
            raise ValueError("codes: made of stored mel spectrograms, and this data set has none")
        path = Path(self.c.out).parent / "codebooks.safetensors"
        if not path.is_file():
            self.make_codebooks(path)
        kept = safetensors.torch.load_file(path)
        self.codec = Codes(self.stats, kept["codebooks"], self.device)
        self.stats = LatentStats(kept["mean"], kept["std"])
        self.shape = (self.codec.channels, *latents.GRID)
        return super().make_network()

    @torch.no_grad()
    def make_codebooks(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        clips = np.sort(rng.choice(self.clips, min(self.clips, 512), replace=False))
        mels = Codes(self.stats, torch.zeros(0), self.device)
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
    """record -> captions: what a file of captions.py's has for the same labels (after the step
    `filter` its `captions`, which before it may be the data's own, then its `audio_caption`); else
    "The sound of A, B" (P2, A.2)."""
    table = {}
    for record in latents.read_table(path) if path else ():
        filtered = "captions" in record.get("made", {})
        if not filtered and "audio_caption" not in record:
            raise ValueError(f"{path}: {record['id']} is no record of captions.py's")
        captions = record["captions"] if filtered else [record["audio_caption"]]
        table.setdefault(frozenset(record["labels"]), []).extend(captions)

    def choose(record: dict) -> list[str]:
        labels = record["labels"]
        return table.get(frozenset(labels)) or [latents.template(labels)]

    return choose


def in_other_words() -> dict[str, str]:
    """Clip of tiny/data/test -> a caption that was not made from the data's own wording."""
    table = latents.read_table(HERE / "reference_captions.csv")
    return {clip["id"]: clip["captions"][0] for clip in table}


class OtherCaptions(Denoiser):
    """Trains on other captions for the same clips; validates all arms on the captions in other
    words, or where the held-out clips have none, on their own."""

    def __init__(self, c: Config, device: torch.device):
        super().__init__(c, device)
        choose = captions_by_labels(c.captions if c.captions not in ("wording", "labels") else None)
        choose = itemgetter("captions") if c.captions == "wording" else choose
        records = [self.data.record(i) for i in range(self.clips)]
        other = sum(choose(x) != [latents.template(x["labels"])] for x in records)
        print(f'{c.captions}: other captions than "The sound of …" for {other:,} of {self.clips:,}')
        self.data = Captioned(self.data.folder, choose)
        words = in_other_words()
        found = [i for i in range(len(self.val)) if self.val.record(i)["id"] in words]
        if found:
            self.val = Captioned(self.val.folder, lambda record: [words[record["id"]]])
            self.val_indices = found


# ---- the arms ------------------------------------------------------------------------------------


class Arm(NamedTuple):
    kind: type[Denoiser] | None = Denoiser  # what is trained; None: nothing
    settings: dict = {}  # of train.Config, where they differ from the others'
    warm: bool = True  # starts from --model's U-Net; else from random weights
    frozen: float = 0.0  # share of the steps that blocks are frozen
    sampling: dict = {}  # of `generate`, for the sounds by which it is scored


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
SAMPLERS = {
    f"{sampler}-{steps}": Arm(None, sampling={"sampler": sampler, "steps": steps})
    for steps in (5, 10, 25, 45, 100, 200)
    for sampler in ("pndm", "ddim", "ddpm")
}
SCALES = (1.0, 2.0, 3.5, 5.0, 6.5, 7.5)
GUIDANCE = {f"guidance-{x:g}": Arm(None, sampling={"guidance": x}) for x in SCALES}
ARMS |= SAMPLERS | GUIDANCE
ABLATIONS = {
    "mask": ("masked", "unmasked"),
    "schedule": ("cosine", "scaled-linear"),
    "layout": ("scratch", "picture"),
    "freezing": ("all-layers", "frozen-first"),
    "text": ("scratch", "concatenated"),
    "codes": ("scratch", "codes"),
    "captions": ("labels", "wording"),  # and one for each file of --captions
    "samplers": tuple(SAMPLERS),
    "guidance": tuple(GUIDANCE),
}
UNTRAINED = ("samplers", "guidance")  # what is compared is the model as it is
TWO_SEEDS = ("mask", "schedule", "freezing")
OTHER_LOSS = ("layout", "codes")  # the arms' latents are normalised, or made, in different ways


def configure(name: str, arm: Arm, seed: int, args) -> Config:
    """The settings of an arm: those of --model, and what the arm changes."""
    options, steps = train.read_settings(args.model), args.steps
    del options["codec"]
    unet = load_config(args.model)
    names = ("block_out_channels", "attention", "layers_per_block", "num_heads")
    options |= {key: getattr(unet, key) for key in (*names, "cross_attention_dim")}
    # The ends are trained alone at the full rate for a while: 1/60 are warm-up, as the papers'.
    warmup = steps // 60 if arm.kind is NewEnds else min(300, steps // 10)
    options |= {"steps": steps, "warmup_steps": warmup}
    options |= {"validate_every": max(1, steps // 5), "checkpoint_every": max(1, steps // 5)}
    options |= {"data": args.data, "val_data": args.val_data, "batch_size": args.batch_size}
    options |= {"device": args.device, "precision": args.precision, "seed": seed}
    options |= {"init": str(args.model / "unet") if arm.warm else ""}
    options |= {"frozen_steps": round(arm.frozen * steps), **arm.settings}
    return Config(out=str(args.out / f"{name}-seed{seed}"), **options)


def write_json(path: Path, value: dict) -> None:
    latents.write_aside(path, (json.dumps(value, indent=1) + "\n").encode())


def losses(c: Config) -> dict:
    """What a finished run's log says, and how large its network is."""
    run = Path(c.out)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "steps": c.steps,
        "parameters": sum(x.numel() for x in load_weights(run / "model" / "unet").values()),
        "seconds": statistics.median(c.batch_size / x["samples_per_second"] for x in log),
        "val_loss": log[-1]["val_loss"],
        "val_loss_bins": log[-1]["val_loss_bins"],
        "val_losses": {x["step"]: x["val_loss"] for x in log if "val_loss" in x},
    }


# ---- scores --------------------------------------------------------------------------------------


class Judge:
    """Scores a model by sounds for the captions of held-out scenes: tiny.judge's, or for the
    captions ablation those of tiny/data/test that have a caption in other words."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.recordings = args, Recordings(HERE / "recordings.csv", "test")
        self.sha256 = evaluate.Cnn14.load(args.classifier).sha256  # better an error now than later
        if args.name == "captions":
            scenes = draw_scenes(self.recordings, "test", CLIPS["test"], 0)
            self.prompts = dict(list(in_other_words().items())[: args.clips])
        else:
            scenes = draw_scenes(self.recordings, "test", args.clips, judge.SEED)
            self.prompts = {scene["id"]: scene["captions"][0] for scene in scenes}
        self.scenes = {scene["id"]: scene for scene in scenes if scene["id"] in self.prompts}
        kind = "-captions" if args.name == "captions" else ""
        self.reference = args.out / f"reference{kind}-{len(self.prompts)}"

    def sampling(self, arm: Arm) -> dict:
        """How sounds are made, and by what they are heard. Guidance None: the model's own."""
        about = {"classifier": self.args.classifier.name, "sha256": self.sha256}
        about |= {"N": len(self.prompts), "sampler": "pndm", "steps": self.args.denoising_steps}
        return about | {"guidance": None} | arm.sampling

    def __call__(self, model: sample.Model, folder: Path, about: dict) -> dict:
        """FD, IS and KL of a model's sounds, beside what they are `about`."""
        judge.write_scenes(self.reference, self.scenes, self.recordings)
        options = argparse.Namespace(**about, seed=0, batch_size=16)
        judge.write_generated(folder, self.prompts, model, options)
        given = [folder, self.reference, "--classifier", self.args.classifier]
        given += ["--device", self.args.device] if self.args.device else []
        evaluate.main([*map(str, given), "--cache", str(self.args.out / "features")])
        row = read_json(folder / "metrics.json", "sets")["sets"]["generated"]
        return {key: row[key] for key in row if key.split("_")[0] in ("FD", "IS", "KL")} | about


def trained(c: Config, kind: type[Denoiser]) -> sample.Model:
    """The model of a finished run, whatever its network and its codec."""
    task = kind(c, latents.pick_device(c.device))
    task.network.load_state_dict(load_weights(Path(c.out) / "model" / "unet"))
    parts = task.network.eval(), task.encoder, task.codec, task.stats, task.alphas_cumprod
    return sample.Model(*parts, c.prediction, c.guidance, c.denoising_steps, task.device)


# ---- the command ---------------------------------------------------------------------------------


def run_arm(name: str, arm: Arm, seed: int, score: Judge | None, args) -> None:
    """Train and score, unless it is done; what is done is in OUT/NAME-seedN.json."""
    c, path = configure(name, arm, seed, args), args.out / f"{name}-seed{seed}.json"
    config = {k: v for k, v in asdict(c).items() if k not in train.MAY_CHANGE and arm.kind}
    config |= {"batch_size": c.batch_size} if arm.kind else {}
    config["model"] = evaluate.file_sha256(args.model / "unet" / f"{WEIGHTS}.safetensors")
    result = {"ablation": args.name, "arm": name, "seed": seed, "config": config}
    if path.is_file():
        result = read_json(path, "config")
        advice = "give the old value, or another --out"
        train.must_agree(f"{path} has", result["config"], config, advice)
    elif arm.kind:
        train.train(c, arm.kind)
        result |= losses(c)
        write_json(path, result)
    shutil.rmtree(Path(c.out, "checkpoints"), ignore_errors=True)  # 0.6 GB; the model stays
    about = score.sampling(arm) if score else {}
    if not about.items() <= result.get("scores", {}).items():
        model = trained(c, arm.kind) if arm.kind else sample.load_model(args.model, args.device)
        result["scores"] = score(model, Path(c.out, f"sounds-{about['steps']}"), about)
        write_json(path, result)


SCORES = ("FD", "IS", "KL_softmax")


def table(out: Path) -> str:
    """A Markdown table of what is on disk; seeds side by side."""
    results = [read_json(path, "arm") for path in sorted(out.glob("*-seed*.json"))]
    if not results:
        raise FileNotFoundError(f"{out}: no results yet; run an ablation first")

    def cell(rows: list[dict], pattern: str, key: str) -> str:
        return ", ".join(pattern.format(row[key]) if key in row else "–" for row in rows)

    lines = []
    for ablation, arms in ABLATIONS.items():
        others = {r["arm"] for r in results if r["ablation"] == ablation} - set(arms)
        for arm in [*arms, *sorted(others)]:
            rows = sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"])
            scores = [row.get("scores", {}) for row in rows]
            loss = "({:.3f})" if ablation in OTHER_LOSS else "{:.4f}"
            cells = [cell(rows, "{}", "seed"), cell(rows[:1], "{}", "steps")]
            cells += [cell(rows[:1], "{:.2f}", "seconds"), cell(rows[:1], "{:,}", "parameters")]
            cells += [cell(rows, loss, "val_loss")]
            cells += [cell(scores, "{:.4g}", key) for key in ("N", *SCORES)]
            lines += [[f"{ablation}: {arm}", *cells]] if rows else []
    heads = ["arm", "seeds", "steps", "s/step", "parameters", "loss", "N", "FD", "IS", "KL"]
    scored = [r["scores"] for r in results if "scores" in r]
    judges = sorted({f"{s['classifier']} ({s['sha256'][:8]}), {s['N']} clips" for s in scored})
    return f"""{markdown(heads, lines)}

Loss: validation, of the averaged weights; in brackets: not to be compared.
FD, IS, KL {f"by {'; '.join(judges)}" if judges else ": not scored yet"}."""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("name", choices=(*ABLATIONS, "table"), help="which one; table: show what is on disk")
    add("--steps", type=int, help="training steps of each arm [3000]")
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
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="[auto]")
    add("--device", default="", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if args.name in UNTRAINED and (args.steps or args.seeds):
        parser.error(f"{args.name}: nothing is trained, so there are no --steps and no --seeds")
    if args.captions and args.name != "captions":
        parser.error("--captions is for the ablation captions")
    args.steps = 3000 if args.steps is None else args.steps
    args.seeds = args.seeds or ([0, 1] if args.name in TWO_SEEDS else [0])
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch-size are 1 or more")
    if args.classifier is None and evaluate.CLASSIFIER.is_file():
        args.classifier = evaluate.CLASSIFIER
    return args


def run(args: argparse.Namespace) -> None:
    if args.name == "table":
        return print(table(args.out))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: not for ablations, one process is enough")
    if args.name in UNTRAINED and not args.classifier:
        raise ValueError(f"{args.name}: nothing is trained, so there is no loss: --classifier FILE")
    args.out.mkdir(parents=True, exist_ok=True)
    score = Judge(args) if args.classifier else None
    arms = {name: ARMS[name] for name in ABLATIONS[args.name]}
    for file in args.captions:
        captions_by_labels(file)  # better an error now than after an hour
        name = f"captions-{latents.safe_name(Path(file).stem, given=True)}"
        if name in arms:
            raise ValueError(f"--captions: two files called {Path(file).stem}: rename one")
        arms[name] = Arm(OtherCaptions, {"captions": str(file)})
    for seed in args.seeds:
        for name, arm in arms.items():
            print(f"{args.name}: {name}, seed {seed}")
            run_arm(name, arm, seed, score, args)
    print(table(args.out))


def main(arguments: list[str] | None = None) -> None:
    try:
        run(parse_args(arguments))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from the last checkpoint")
    except (ValueError, OSError, subprocess.CalledProcessError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
