"""Audio taggers: which of the classes are heard in a clip (P2, appendix E and table A10).

The papers train taggers on real and generated clips to see what generated ones are worth; and
evaluate.py needs one where PANNs' weights can't be had. Three networks on the same log-mel frames:

    cnn14       PANNs' CNN, the one in evaluate.py, of any width (64: PANNs' own, 80 M parameters)
    taltrans    the papers' CNN + transformer, 12.1 M parameters
    ast         the Audio Spectrogram Transformer (DeiT-B, 86 M), transformers' classes

trained in train.py's loop by the papers' recipe: binary cross-entropy, AdamW, warm-up and cosine
decay, draws balanced over labels, and unless told otherwise mixup and SpecAugment:

    mixup        half of the clips: x ← λ·x + (1 − λ)·x', y likewise, λ ~ Beta(10, 10)
    SpecAugment  up to 192 frames and 24 bands (the papers': 48 of twice as many) set to the mean

Results are mAP (mean over classes of the average precision), AUC and every class's AP.

    python -m appendix.classify train                                  on tiny/'s composed scenes
    python -m appendix.classify encode AUDIO TABLE --out FOLDER        features of one's own clips
    python -m appendix.classify train FOLDER --test FOLDER --model taltrans --out runs/taltrans

The papers' AST starts from ImageNet's weights and 128 mel bands; this one from scratch, on 64.
"""

import argparse
import functools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import latents
import train
from appendix import make_parser, read_tensors
from evaluate import Cnn14, ConvBlock, log_mel, mel_matrix
from latents import LatentDataset, natural, number, one_line_errors, write_aside
from train import TINY

FRAMES = 1009  # of a clip, one every 10 ms


# ---- features: a stored data set (latents.py) of log-mel frames ----------------------------------


class LogMelCodec:
    """The log-mel frames of evaluate.py as uint8, −100 … 40 dB in steps of 0.55 dB. A codec in so
    far as `latents.encode_dataset` needs one: it can't be decoded."""

    name = "log-mel"
    channels = 64
    stored_shape, stored_dtype = (64, FRAMES), torch.uint8
    low, high = -100.0, 40.0  # dB

    def __init__(self):
        self.mel = mel_matrix()

    def settings(self) -> dict:
        return {"name": self.name, "low": self.low, "high": self.high}

    def encode(self, wave: Tensor) -> Tensor:
        """16 kHz [B, 161280] -> uint8 [B, 64, 1009]."""
        decibel = log_mel(wave - wave.mean(1, keepdim=True), self.mel).transpose(1, 2)
        steps = (decibel - self.low) * (255 / (self.high - self.low))
        return steps.round().clamp(0, 255).to(torch.uint8)

    def dequantize(self, stored: Tensor) -> Tensor:
        """uint8 [B, 64, 1009] -> dB, float32."""
        return stored.float() * ((self.high - self.low) / 255) + self.low


def tiny_features(split: str) -> Path:
    """The folder of the tiny world's features; composed and written the first time."""
    from tiny.compose import CLIPS, Recordings, draw_scenes, load_clips

    folder = TINY / "data" / f"log-mel-{split}"
    if not (folder / "latent_stats.safetensors").is_file():
        recordings = Recordings(TINY / "recordings.csv", split)
        scenes = draw_scenes(recordings, split, CLIPS[split], seed=0)
        print(f"{folder}: {len(scenes)} scenes")
        recordings.preload(scenes)
        load = functools.partial(load_clips, recordings)
        latents.encode_dataset(folder, LogMelCodec(), scenes, load, workers=2)
    return folder


def open_features(folder: str | Path) -> LatentDataset:
    """ValueError if the folder holds something else."""
    data = LatentDataset(folder)
    if data.codec != LogMelCodec().settings():
        raise ValueError(f"{folder}: not log-mel frames, which appendix.classify encode makes")
    return data


def labels_of(data: LatentDataset) -> list[str]:
    """All labels that its clips have, sorted."""
    return sorted({label for i in range(len(data)) for label in data.record(i)["labels"]})


def targets_of(data: LatentDataset, indices, labels: list[str]) -> Tensor:
    """Which clips have which labels, bool [B, classes]; labels that aren't among these don't
    count."""
    own = [set(data.record(int(i))["labels"]) for i in indices]
    return torch.tensor([[label in there for label in labels] for there in own])


def balanced(targets: Tensor, gains: Tensor | float = 1.0) -> Tensor:
    """The probability of each clip, float64 [N], if first a label is drawn, with a probability
    ∝ its gain [classes], then one of its clips: p ∝ Σ gain / (clips of label). targets:
    [N, classes] of 0 and 1."""
    gains = torch.as_tensor(gains).double().expand(targets.shape[1])
    p = targets.double() @ (gains / targets.sum(0).clamp(min=1))
    return p / p.sum()


# ---- networks: dB [B, frames, 64] -> embedding and logits ----------------------------------------


class TALTrans(nn.Module):
    """Five blocks of two convolutions, two transformer layers over time, attention pooling (Li et
    al., 2022). The papers give the family and 12.1 M parameters; the numbers inside are ours."""

    def __init__(self, classes: int, width: int = 512):
        super().__init__()
        widths = [width >> i for i in (4, 3, 2, 1, 0)]
        self.bn0 = nn.BatchNorm2d(64)
        self.blocks = nn.ModuleList(map(ConvBlock, [1, *widths], widths))
        self.project = nn.Linear(2 * width, width)  # of 64 bands, 2 are left
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score, self.weight = nn.Linear(width, classes), nn.Linear(width, classes)

    def states(self, x: Tensor) -> Tensor:
        """dB [B, frames, 64] -> what the transformer makes of it, [B, frames / 8, width]."""
        x = self.bn0(x.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)  # [B, 1, T, 64]
        for i, block in enumerate(self.blocks):
            x = F.avg_pool2d(block(x), 2 if i < 3 else (1, 2))  # in time by 8: 80 ms a step
            x = F.dropout(x, 0.2, self.training)
        x = self.project(x.transpose(1, 2).flatten(2))  # [B, T / 8, width]
        # Sine and cosine of each step's number at width / 2 frequencies
        steps, width = torch.arange(x.shape[1]), torch.arange(0, x.shape[2], 2) / x.shape[2]
        angle = steps[:, None] / 10_000**width
        return self.transformer(x + torch.cat([angle.sin(), angle.cos()], 1).to(x))

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.states(x)
        # Each class listens where it is heard: a weighted mean of its scores over time.
        weights = self.weight(x).softmax(1)
        return x.mean(1), (weights * self.score(x)).sum(1)


class AST(nn.Module):
    """transformers' Audio Spectrogram Transformer, on normalised frames."""

    def __init__(self, classes: int, width: int = 768):
        from transformers import ASTConfig, ASTForAudioClassification

        super().__init__()
        sizes = {"hidden_size": width, "intermediate_size": 4 * width}
        sizes |= {"num_attention_heads": width // 64 or 1, "num_mel_bins": 64, "max_length": FRAMES}
        config = ASTConfig(num_labels=classes, **sizes)
        self.bn0 = nn.BatchNorm2d(64)
        self.ast = ASTForAudioClassification(config)

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.pad(x, (0, 0, 0, FRAMES - x.shape[1]), value=-100)  # its positions are learned
        x = self.bn0(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2) / 2  # std 0.5, as theirs
        out = self.ast(x, output_hidden_states=True)
        return out.hidden_states[-1].mean(1), out.logits


WIDTHS = {"cnn14": 16, "taltrans": 512, "ast": 768}  # unless told otherwise


def name_and_width(model: str) -> tuple[str, int]:
    """ "cnn14:8" -> ("cnn14", 8). ValueError for what is no tagger."""
    name, _, width = model.partition(":")
    # taltrans' first block is a sixteenth as wide, and it has 8 heads.
    step = 16 if name == "taltrans" else 1
    if name not in WIDTHS or (width and (not width.isdigit() or int(width) % step)):
        names = ", ".join(WIDTHS)
        raise ValueError(f"{model}: expected {names} or NAME:WIDTH (taltrans: a multiple of 16)")
    return name, int(width or WIDTHS[name])


def make_tagger(model: str, labels: list[str]) -> nn.Module:
    name, width = name_and_width(model)
    if name == "cnn14":
        return Cnn14(len(labels), [width << i for i in range(6)], labels)
    return {"taltrans": TALTrans, "ast": AST}[name](len(labels), width)


def save_tagger(path: Path, tagger: nn.Module, model: str, labels: list[str]) -> None:
    """Safetensors; one of a cnn14 is also a classifier for evaluate.py."""
    state = tagger.state_dict().items()
    state = {k: x.half() if x.is_floating_point() else x for k, x in state}
    state = {k: x.contiguous() for k, x in state.items()}
    about = {"model": model, "labels": json.dumps(labels)}
    write_aside(path, safetensors.torch.save(state, about))


def load_tagger(path: Path) -> tuple[nn.Module, list[str]]:
    """What `save_tagger` wrote, and its labels. ValueError for any other file."""
    state, about = read_tensors(path)
    try:
        labels = json.loads(about["labels"])
        tagger = make_tagger(about["model"], labels)
        tagger.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path}: not a tagger ({e!r:.80})") from e
    return tagger.eval(), labels


# ---- scores --------------------------------------------------------------------------------------


def precision_and_auc(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """Of one class: average precision, the area under precision over recall; and the area under the
    ROC curve, the probability that a positive scores above a negative (half for equal scores).
    scores and targets (0 or 1): [N], with both kinds among them."""
    scores, order = scores.double().sort(descending=True)
    last = F.pad(scores.diff() != 0, (0, 1), value=True)  # of equal scores
    hits = targets[order].double().cumsum(0)[last]  # positives that score so much or more
    total = torch.arange(1, len(scores) + 1).double()[last]  # all that do
    recall = F.pad(hits / hits[-1], (1, 0))
    false = F.pad((total - hits) / (total - hits)[-1], (1, 0))  # the share of negatives that do
    # Σ (R_n − R_(n−1))·P_n over thresholds n
    precision = (recall.diff() * hits / total).sum()
    return precision.item(), torch.trapezoid(recall, false).item()


def scores_of(logits: Tensor, targets: Tensor, labels: list[str], name: object = "") -> dict:
    """mAP, AUC and AP by class from [N, classes] each; classes without a clip don't count.
    ValueError, which begins with `name`, if there is no class that does."""
    there = [i for i in range(len(labels)) if 0 < targets[:, i].sum() < len(targets)]
    if not there:
        raise ValueError(f"{name}: none of the tagger's classes is in some of its clips")
    ap, auc = zip(*(precision_and_auc(logits[:, i], targets[:, i]) for i in there))
    means = {"mAP": statistics.mean(ap), "AUC": statistics.mean(auc), "clips": len(targets)}
    return means | {"AP": {labels[i]: value for i, value in zip(there, ap)}}


def mean_and_std(values: list[float]) -> str:
    """In per cent; the std is that of a sample (n − 1), as ± in the papers' tables."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


@torch.no_grad()
def test(tagger: nn.Module, data: LatentDataset, labels: list[str], device) -> dict:
    """A tagger's `scores_of` a stored data set."""
    tagger.eval()
    logits, codec = [], LogMelCodec()
    for part in tqdm(torch.arange(len(data)).split(32), unit="batch", leave=False, desc="test"):
        x = codec.dequantize(data.stored(part)).transpose(1, 2)  # [B, 1009, 64]
        logits.append(tagger.classify(x.to(device))[1].float().cpu())
    targets = targets_of(data, range(len(data)), labels)
    return scores_of(torch.cat(logits), targets, labels, data.folder)


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(train.Config):
    """train.py's settings, and a tagger's own."""

    model: str = "cnn14"  # or NAME:WIDTH, the channels of cnn14's first block, others' states
    mixup: float = 0.5  # share of clips mixed with another
    time_mask: int = 192  # frames at most
    mel_mask: int = 24  # bands at most


# The papers' for AudioSet-20K (table A10). The weights aren't averaged.
RECIPE = "--out runs/tagger --steps 4000 --batch-size 32 --lr 1e-3 --warmup-steps 200 "
RECIPE += "--beta2 0.999 --ema-decay 0"


def augment(x: Tensor, y: Tensor, rng: np.random.Generator, c: Config) -> tuple[Tensor, Tensor]:
    """Mixup and SpecAugment. x: dB [B, T, 64], y: [B, classes]."""
    share = np.where(rng.random(len(x)) < c.mixup, rng.beta(10, 10, len(x)), 1)
    share, other = torch.from_numpy(share).float(), rng.permutation(len(x))
    x = share[:, None, None] * x + (1 - share)[:, None, None] * x[other]
    y = share[:, None] * y + (1 - share)[:, None] * y[other]
    mean = x.mean((1, 2), keepdim=True)
    for dim, most in ((1, c.time_mask), (2, c.mel_mask)):
        size = rng.integers(0, most + 1, len(x))
        first = rng.integers(0, x.shape[dim] - size + 1)
        place = np.arange(x.shape[dim])
        mask = (place >= first[:, None]) & (place < (first + size)[:, None])
        mask = torch.from_numpy(mask).unsqueeze(3 - dim)  # [B, T, 1] or [B, 1, 64]
        x = torch.where(mask, mean, x)
    return x, y


class Tagger:
    """What train.py's loop trains here, instead of its Denoiser. A single process: what batch norm
    has seen is of one rank."""

    def __init__(self, c: Config, device: torch.device):
        self.c, self.device, self.step = c, device, 0
        self.data, self.val = open_features(c.data), open_features(c.val_data)
        self.clips, self.labels = len(self.data), labels_of(self.data)
        self.targets = targets_of(self.data, range(self.clips), self.labels)
        self.p, self.codec, self.scores = balanced(self.targets), LogMelCodec(), None
        torch.manual_seed(c.seed)
        tagger = make_tagger(c.model, self.labels).to(device)
        self.network = tagger.to(memory_format=torch.channels_last)  # convolutions' own, on a CPU

    def choose(self, step: int, global_batch: int) -> np.ndarray:
        rng = np.random.default_rng((self.c.seed, 0, step))
        return rng.choice(self.clips, global_batch, p=self.p.numpy())

    def batch(self, step: int, places: range, clips: np.ndarray) -> tuple[Tensor, Tensor, int]:
        """dB [B, 1009, 64], targets [B, classes], and a seed for dropout."""
        rng = np.random.default_rng((self.c.seed, 1, step, places.start))
        x = self.codec.dequantize(self.data.stored(clips)).transpose(1, 2)
        return *augment(x, self.targets[clips].float(), rng, self.c), int(rng.integers(2**63))

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        bf16 = self.c.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = network.train().classify(x.to(self.device))[1].float()
        y = y.to(self.device)
        return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)

    def validate(self, ema: nn.Module, rank: int, ranks: int) -> dict:
        """The average has the same weights, but has seen no statistics for its batch norm."""
        self.scores = test(self.network, self.val, self.labels, self.device)
        means = {key: self.scores[key] for key in ("mAP", "AUC")}
        tqdm.write(f"step {self.step}: mAP {means['mAP']:.4f}, AUC {means['AUC']:.4f}")
        return means

    def write(self, ema: nn.Module, folder: Path) -> None:
        path, c = folder / "tagger.safetensors", self.c
        save_tagger(path, self.network, c.model, self.labels)
        (folder / "scores.json").write_text(json.dumps(self.scores, indent=1) + "\n")


# ---- the command ---------------------------------------------------------------------------------


def encode_command(args: argparse.Namespace, _) -> None:
    rows = latents.rows_to_encode(args.table, args.audio_folder, args.class_labels)
    load = functools.partial(latents.load_row, audio_folder=args.audio_folder)
    latents.encode_dataset(args.out, LogMelCodec(), rows, load, workers=args.workers)
    print(f"{args.out}: {len(LatentDataset(args.out))} clips")


def train_command(args: argparse.Namespace, rest: list[str]) -> None:
    own = {key: getattr(args, key) for key in ("model", "mixup", "time_mask", "mel_mask")}
    own |= {"data": str(args.data or tiny_features("train"))}
    own |= {"val_data": str(args.test or tiny_features("test"))}
    shared = train.parse_args([*RECIPE.split(), *rest])
    folder = train.train(Config(**vars(shared) | own), Tagger)
    show(latents.read_json(folder / "scores.json"))
    print(folder / "tagger.safetensors")


def show(scores: dict) -> None:
    for label, ap in sorted(scores["AP"].items(), key=lambda item: -item[1]):
        print(f"  {label:36}{ap:7.3f}")
    print(f"mAP {scores['mAP']:.4f}, AUC {scores['AUC']:.4f} on {scores['clips']} clips")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("encode", help="audio and a table -> log-mel features")
    command.set_defaults(run=encode_command)
    add = command.add_argument
    add("audio_folder", type=Path)
    add("table", type=Path, help="as for `latents.py encode`")
    add("--out", type=Path, required=True)
    add("--class-labels", type=Path, help="AudioSet's class_labels_indices.csv")
    add("--workers", type=natural, default=2)
    more = {"epilog": f"and train.py's options: [{RECIPE}]", "allow_abbrev": False}
    command = commands.add_parser("train", help="features -> tagger, scores", **more)
    command.set_defaults(run=train_command)
    add = command.add_argument
    add("data", type=Path, nargs="?", help="features [of tiny/'s training scenes]")
    add("--test", type=Path, help="features to test on [of tiny/'s held-out scenes]")
    sizes = " ".join(f"{name}:{width}" for name, width in WIDTHS.items())
    add("--model", default="cnn14", help=f"NAME[:WIDTH], one of {sizes} [cnn14]")
    add("--mixup", type=number(float, 0, 1), default=0.5, help="share of clips [0.5]")
    add("--time-mask", type=natural, default=192, help="[192]")
    add("--mel-mask", type=natural, default=24, help="[24]")
    args, rest = parser.parse_known_args(arguments)
    if rest and args.run != train_command:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with one_line_errors("the same command goes on from the last checkpoint"):
        args.run(args, rest)


if __name__ == "__main__":
    main()
