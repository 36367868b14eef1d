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
    python -m appendix.ablations captions --captions zero/filter.jsonl few/filter.jsonl
    python -m appendix.ablations all --seeds 0 1          one after the other, what is missing
    python -m appendix.ablations table                    what is on disk so far, as Markdown

The arms of an ablation differ in one thing, but for the picture, whose network has other widths,
and one mean and std for all bands. Clips, t and noise of a step are the same, and captions where
these aren't compared. So is what arms start from: the U-Net of --model or, where another
architecture is compared, random weights. "scratch" is the arm that layout, text and codes have in
common. Compute is equal in steps: those of the picture, which has 128 times as many pixels, take 5
times as many multiplications. The warm start has been trained masked, and on the data's wording: it
favours these arms.

Arms are trained by train.py's loop, with its options, and scored by evaluate.py's FD, IS and KL, on
sounds for the captions of held-out scenes (tiny.judge's; the arms of `captions`, on a hundred
captions that were written in other words). Without a classifier there are only losses.

    OUT/ARM-seedN.json    the result; such an arm isn't run again    OUT/ARM-seedN/    its run
"""

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import evaluate
import latents
import sample
import train
from appendix import make_parser, markdown, write_json
from latents import (
    LatentDataset,
    LatentStats,
    MelCodec,
    natural,
    one_line_errors,
    positive,
    read_json,
    to_grid,
    to_sequence,
)
from tiny import judge
from tiny.compose import CLIPS, HERE, Recordings, draw_scenes
from train import Denoiser
from unet import WEIGHTS, TransformerBlock, UNet, UNetConfig, load_config, load_weights


@dataclass(frozen=True)
class Config(train.Config):
    model: str = ""  # a hash of the weights of --model


# ---- freezing: train.py does it ------------------------------------------------------------------


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
        self.stats = LatentStats(mean.repeat(len(each.std)), std.repeat(len(each.std)), each.count)
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
        channels = self.text_in(mean.to(self.text_in.weight.dtype))[:, :, None, None].expand(
            -1, -1, *x_t.shape[2:]
        )
        x = torch.cat([x_t, channels.to(x_t)], 1)
        return super().forward(x, t, text, None, *rest)  # [B, 2C, H, W] -> [B, C, H, W]


class Concatenated(Denoiser):
    def make_network(self) -> UNet:
        return ConcatenatedUNet(super().make_network().config, self.encoder.dim)


# ---- codes: discrete ones, as numbers ------------------------------------------------------------


class Codes(MelCodec):
    """The 256 stored levels, numbered at random: level 100 may be code 7, and level 101 code 250.
    Code 7 is not between 6 and 8 in any sense, and that is the point of it."""

    name = "mel-codes"
    code_of = torch.from_numpy(np.random.default_rng(0).permutation(256))  # of a level

    def dequantize(self, stored: Tensor) -> Tensor:
        """uint8 [B, 128, 504] -> codes as numbers, float32 of the same shape."""
        return self.code_of.to(stored.device)[stored.long()].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Numbers [B, 128, frames], rounded to codes -> 16 kHz wave [B, 320·frames]."""
        codes = latents.round().clamp(0, 255).long().to(self.device)
        levels = self.code_of.argsort().to(self.device)[codes]
        return super().decode(super().dequantize(levels.to(torch.uint8)))


class DiscreteCodes(Denoiser):
    """P2 began with the codes themselves and saw "nearly 0 decreases in train loss over time".
    Theirs were EnCodec's, 8 of 0 … 1023 a frame. These hold what the other arm's latents do."""

    def make_network(self) -> UNet:
        if self.codec.name != "mel":
            raise ValueError("codes: made of stored mel spectrograms, and this data set has none")
        self.codec = Codes(self.device)
        some = self.data.stored(range(min(self.clips, 512)))
        self.stats = LatentStats.of(self.codec.dequantize(some))
        return super().make_network()


# ---- captions: others for the same clips ---------------------------------------------------------


def captions_by_labels(path: str | None = None) -> Callable[[dict], list[str]]:
    """record -> captions: those that a file of captions.py's step `filter` has for the same labels;
    else "The sound of A, B" (P2, A.2)."""
    table = {}
    for record in latents.read_table(path) if path else ():
        if "captions" not in record.get("made", {}):
            raise ValueError(f"{path}: {record['id']} hasn't been through captions.py's filter")
        table.setdefault(frozenset(record["labels"]), []).extend(record["captions"])

    def choose(record: dict) -> list[str]:
        labels = record["labels"]
        return table.get(frozenset(labels)) or [latents.template(labels)]

    return choose


def in_other_words() -> dict[str, str]:
    """Clip of tiny/data/test -> a caption that was not made from the data's own wording."""
    table = latents.read_table(HERE / "reference_captions.csv")
    return {clip["id"]: clip["captions"][0] for clip in table}


def recaption(source: str | Path, target: Path, choose: Callable[[dict], list[str]]) -> str:
    """A stored data set with the captions that choose(record) gives. Its codes are the source's."""
    data = LatentDataset(source)
    records = [data.record(i) for i in range(len(data))]
    # Twice: of a single caption none is drawn, and t and noise would be other random numbers.
    records = [record | {"captions": choose(record) * 2} for record in records]
    different = {text for record in records for text in record["captions"]}
    print(f"{target}: {len(different):,} different captions of {len(records):,} clips")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("codes.npy", "latent_stats.safetensors", "codec.json"):
        (target / name).unlink(missing_ok=True)
        (target / name).symlink_to(Path(source, name).resolve())
    lines = ["\n"] * len(data.codes)  # of rows that were skipped
    for row, record in zip(data.rows, records):
        lines[row] = json.dumps(record) + "\n"
    latents.write_aside(target / "clips.jsonl", "".join(lines).encode())
    return str(target)


def caption_arms(args: argparse.Namespace) -> dict[str, "Arm"]:
    """An arm for each wording of the same clips' captions."""
    choices = {"labels": captions_by_labels(), "wording": itemgetter("captions")}
    for file in args.captions:
        name = latents.safe_name(file.removesuffix(".jsonl"))
        choices[f"captions-{name}"] = captions_by_labels(file)
    source, sets = args.loop.data, {"val_data": args.loop.val_data}
    if not source:
        train.compose_tiny()
        source, sets = HERE / "data" / "train", {"val_data": str(HERE / "data" / "test")}
    folder = args.out / "data"
    sets = {x: sets | {"data": recaption(source, folder / x, choices[x])} for x in choices}
    return {name: Arm(settings=settings) for name, settings in sets.items()}


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
    # The papers' schedules, not shifted as the tiny model's is. That one is nearer to
    # scaled-linear's (log SNR differs by 1.5 in the mean, from cosine's by 2.4), which favours it.
    "cosine": Arm(settings={"schedule": "cosine", "schedule_shift": 1.0}),
    "scaled-linear": Arm(settings={"schedule": "scaled-linear", "schedule_shift": 1.0}),
    "all-layers": Arm(NewEnds),
    "frozen-first": Arm(NewEnds, frozen=5_000 / 60_000),  # as many of the steps as the papers'
    "scratch": Arm(warm=False),
    "picture": Arm(Picture, warm=False),
    "concatenated": Arm(Concatenated, warm=False),
    "codes": Arm(DiscreteCodes, warm=False),
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
    "captions": (),  # caption_arms: "labels", "wording", and one for each file of --captions
    "samplers": tuple(SAMPLERS),
    "guidance": tuple(GUIDANCE),
}
UNTRAINED = ("samplers", "guidance")  # what is compared is the model as it is
# The arms' latents are normalised, made or noised in different ways; or they are validated on the
# data's own wording, which one of them knows.
OTHER_LOSS = ("schedule", "layout", "codes", "captions")
LOOP = "--steps 3000 --batch-size 8"


def configure(name: str, arm: Arm, seed: int, args: argparse.Namespace) -> Config:
    """The settings of an arm: those of --model and train.py's options, and what the arm changes."""
    steps, unet = args.loop.steps, load_config(args.model)
    names = ("block_out_channels", "attention", "layers_per_block", "num_heads")
    options = {key: getattr(unet, key) for key in (*names, "cross_attention_dim")}
    options["warmup_steps"] = steps // 60  # as the papers'
    options |= {"out": str(args.out / f"{name}-seed{seed}"), "seed": seed}
    options |= {"init": str(args.model / "unet") if arm.warm else ""}
    options |= {"model": evaluate.file_sha256(args.model / "unet" / f"{WEIGHTS}.safetensors")}
    options |= {"frozen_steps": round(arm.frozen * steps), **arm.settings}
    return Config(**vars(args.loop) | options)


def train_once(c: train.Config, kind: type) -> None:
    """train.train, whose checkpoints go once it is done: 0.6 GB a run, and nobody needs them. What
    is done isn't run again: ValueError if it was with other settings."""
    out = Path(c.out)
    if (out / "model").is_dir() and not (out / "checkpoints").is_dir():
        names = asdict(c).keys() - train.MAY_CHANGE - {"precision"} | {"batch_size"}
        mine, advice = {k: getattr(c, k) for k in names}, "give the same, or another --out"
        train.must_agree(f"{out} has", read_json(out / "config.json"), mine, advice)
    else:
        train.train(c, kind)
        shutil.rmtree(out / "checkpoints")


# ---- scores --------------------------------------------------------------------------------------


class Judge:
    """Scores a model by sounds for the captions of held-out scenes: tiny.judge's, or for the
    captions ablation those of tiny/data/test that have a caption in other words."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.recordings = args, Recordings(HERE / "recordings.csv", "test")
        self.sha256 = evaluate.Cnn14.load(args.classifier).sha256  # better an error now than later
        others = args.name == "captions"
        count, seed = (CLIPS["test"], 0) if others else (args.clips, judge.SEED)
        scenes = {x["id"]: x for x in draw_scenes(self.recordings, "test", count, seed)}
        texts = in_other_words() if others else {i: x["captions"][0] for i, x in scenes.items()}
        self.prompts = dict(list(texts.items())[: args.clips])
        self.scenes = {i: scenes[i] for i in self.prompts}
        self.reference = args.out / f"reference-{len(texts)}-{len(self.prompts)}"

    def sampling(self, arm: Arm) -> dict:
        """How sounds are made, and by what they are heard. Guidance None: the model's own."""
        about = {"classifier": self.args.classifier.name, "sha256": self.sha256}
        about |= {"N": len(self.prompts), "sampler": "pndm"}
        return about | {"steps": self.args.loop.denoising_steps, "guidance": None} | arm.sampling

    def __call__(self, model: sample.Model, folder: Path, about: dict) -> dict:
        """FD, IS and KL of a model's sounds, beside what they are `about`."""
        judge.write_scenes(self.reference, self.scenes, self.recordings)
        options = argparse.Namespace(**about, seed=0, batch_size=16)
        judge.write_generated(folder, self.prompts, model, options)
        given = [folder, self.reference, "--classifier", self.args.classifier]
        given += ["--device", model.device.type]
        evaluate.main([*map(str, given)])
        row = read_json(folder / "metrics.json", "sets")["sets"]["generated"]
        return {key: row[key] for key in row if key.split("_")[0] in ("FD", "IS", "KL")} | about


def trained(c: Config, kind: type[Denoiser]) -> sample.Model:
    """The model of a finished run, whatever its network and its codec."""
    task = kind(c, latents.pick_device(c.device))
    task.network.load_state_dict(load_weights(Path(c.out) / "model" / "unet"))
    unet, codec = task.network.eval(), task.codec
    unet = sample.ShiftedRows(unet, codec).to(task.device) if c.shifted_rows else unet
    parts = unet, task.encoder, codec, task.stats, task.alphas_cumprod
    rest = c.prediction, c.guidance, c.guidance_above, c.denoising_steps
    return sample.Model(*parts, *rest, task.device)


# ---- the command ---------------------------------------------------------------------------------


def run_arm(name: str, arm: Arm, seed: int, score: Judge | None, args: argparse.Namespace) -> None:
    """Train and score, what isn't done; the result is OUT/NAME-seedN.json."""
    c, path = configure(name, arm, seed, args), args.out / f"{name}-seed{seed}.json"
    result = read_json(path) if path.is_file() else {}
    result |= {"ablation": args.name, "arm": name, "seed": seed}
    if arm.kind:
        train_once(c, arm.kind)
        lines = Path(c.out, "log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        seconds = statistics.median(c.batch_size / x["samples_per_second"] for x in log)
        result |= {"steps": c.steps, "seconds": seconds, "val_loss": log[-1]["val_loss"]}
    about = score.sampling(arm) | {"model": c.model} if score else {}
    if not about.items() <= result.get("scores", {}).items():
        settings = {"device": c.device, "precision": c.precision}
        model = trained(c, arm.kind) if arm.kind else sample.load_model(args.model, **settings)
        shutil.rmtree(folder := Path(c.out, "sounds"), ignore_errors=True)  # of other settings
        result["scores"] = score(model, folder, about)
    write_json(path, result)


def table(out: Path) -> str:
    """A Markdown table of what is on disk, a line for each arm and seed."""
    results = [read_json(path, "arm") for path in sorted(out.glob("*-seed*.json"))]
    if not results:
        raise FileNotFoundError(f"{out}: no results yet; run an ablation first")
    columns = {"seed": "{}", "steps": "{}", "seconds": "{:.2f}", "val_loss": "{:.4f}"}
    columns |= dict.fromkeys(("N", "FD", "IS", "KL_softmax"), "{:.4g}")
    lines = []
    for ablation, arms in ABLATIONS.items():
        for result in results:
            if result["ablation"] == ablation or result["arm"] in arms:
                row = result.get("scores", {}) | {"steps": None} | result
                cells = [text.format(row[key]) if row.get(key) is not None else "–"
                         for key, text in columns.items()]  # fmt: skip
                lines.append([f"{ablation}: {result['arm']}", *cells])
    heads = ["arm", "seed", "steps", "s/step", "loss", "N", "FD", "IS", "KL"]
    scored = [result["scores"] for result in results if "scores" in result]
    judges = sorted({f"{s['classifier']} ({s['sha256'][:8]}), {s['N']} clips" for s in scored})
    return f"""{markdown(heads, lines)}

Loss: validation, of the averaged weights; not to be compared: {", ".join(OTHER_LOSS)}.
FD, IS, KL {f"by {'; '.join(judges)}" if judges else ": not scored yet"}."""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Our own options, and as `loop` those of train.py."""
    parser = make_parser(__doc__, epilog=f"and train.py's options: [{LOOP}]")
    add = parser.add_argument
    add("name", choices=(*ABLATIONS, "all", "table"), help="which; table: show what is on disk")
    add("--seeds", type=natural, nargs="+", default=[0], help="of what is trained [0]")
    add("--model", type=Path, default=HERE / "model", help="to start from [tiny/model]")
    add("--captions", nargs="+", default=[], metavar="FILE", help="of captions.py's filter")
    add("--classifier", type=Path, help="as for evaluate.py [tiny/classifier.safetensors, if any]")
    add("--clips", type=positive, default=256, help="sounds to score an arm by [256]")
    add("--out", type=Path, default=Path("runs/ablations"), help="folder [runs/ablations]")
    args, rest = parser.parse_known_args(arguments)
    args.loop = train.parse_args([f"--init={args.model}", *LOOP.split(), *rest])
    if args.classifier is None and evaluate.CLASSIFIER.is_file():
        args.classifier = evaluate.CLASSIFIER
    return args


def run(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: not for ablations, one process is enough")
    if args.name in UNTRAINED and not args.classifier:
        raise ValueError(f"{args.name}: nothing is trained, so there is no loss: --classifier FILE")
    args.out.mkdir(parents=True, exist_ok=True)
    score = Judge(args) if args.classifier else None
    arms = {name: ARMS[name] for name in ABLATIONS[args.name]}
    arms = caption_arms(args) if args.name == "captions" else arms
    for seed in args.seeds if args.name not in UNTRAINED else [0]:
        for name, arm in arms.items():
            print(f"{args.name}: {name}, seed {seed}")
            run_arm(name, arm, seed, score, args)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors("the same command goes on from the last checkpoint"):
        args = parse_args(arguments)
        names = {"all": ABLATIONS, "table": ()}.get(args.name, (args.name,))
        for args.name in names:
            run(args)
        print(table(args.out))


if __name__ == "__main__":
    main()
