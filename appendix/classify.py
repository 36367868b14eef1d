"""Audio taggers: which of the classes are heard in a clip (P2, appendix E and table A10).

The papers train taggers on real and generated clips to see what generated ones are worth; and
evaluate.py needs one where PANNs' weights can't be had. Three networks on the same log-mel frames:

    cnn14       PANNs' CNN, the one in evaluate.py, of any width (64: PANNs' own, 80 M parameters)
    taltrans    the papers' CNN + transformer, 12.1 M parameters
    ast         the Audio Spectrogram Transformer (DeiT-B, 86 M), transformers' classes

trained by the papers' recipe: binary cross-entropy, AdamW, warm-up and cosine decay, draws balanced
over labels, and unless told otherwise mixup and SpecAugment:

    mixup        half of the clips: x ← λ·x + (1 − λ)·x', y likewise, λ ~ Beta(10, 10)
    SpecAugment  up to 192 frames and 24 bands (the papers': 48 of twice as many) set to the mean

Results are mAP (mean over classes of the average precision), AUC and every class's AP.

    python -m appendix.classify train                                  on tiny/'s composed scenes
    python -m appendix.classify encode AUDIO TABLE --out FOLDER        features of one's own clips
    python -m appendix.classify train FOLDER --test FOLDER --model taltrans --out runs/taltrans
    python -m appendix.classify test runs/taltrans/tagger.safetensors FOLDER

The papers' AST starts from ImageNet's weights and 128 mel bands; this one from scratch, on 64.
"""

import argparse
import functools
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import latents
from evaluate import Cnn14, ConvBlock, log_mel, mel_matrix
from latents import LatentDataset, keep_freed_memory, write_aside
from train import clips_of_step, learning_rate

TINY = Path(__file__).resolve().parent.parent / "tiny"
FRAMES = 1009  # of a clip, one every 10 ms
CHECKPOINT_EVERY = 500  # steps


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
    if not (folder / "dataset.json").is_file():
        recordings = Recordings(TINY / "recordings.csv", split)
        scenes = draw_scenes(recordings, split, CLIPS[split], seed=0)
        print(f"{folder}: {len(scenes)} scenes")
        recordings.preload(scenes)
        load = functools.partial(load_clips, recordings)
        latents.encode_dataset(folder, LogMelCodec(), scenes, load, workers=2)
    return folder


def open_features(folder: Path) -> LatentDataset:
    """ValueError if the folder holds something else."""
    data = LatentDataset(folder)
    if data.codec != LogMelCodec().settings():
        raise ValueError(f"{folder}: holds {data.codec.get('name')}, not log-mel frames: make them "
                         "with `python -m appendix.classify encode`")  # fmt: skip
    return data


def targets_of(data: LatentDataset, indices, labels: list[str]) -> Tensor:
    """[B, classes] of 0 and 1. Labels that the tagger doesn't know are left out."""
    place = {label: i for i, label in enumerate(labels)}
    targets = torch.zeros(len(indices), len(labels))
    for row, i in enumerate(indices):
        for number in data.label_ids(i):
            if data.labels[number] in place:
                targets[row, place[data.labels[number]]] = 1
    return targets


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
        return self.transformer(x + positions(*x.shape[1:], x))

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


def positions(steps: int, width: int, like: Tensor) -> Tensor:
    """Sine and cosine of each step's number at width / 2 frequencies: [steps, width]."""
    angle = torch.arange(steps)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], 1).to(like)


WIDTHS = {"cnn14": 16, "taltrans": 512, "ast": 768}  # unless told otherwise


def width_amiss(model: str, width: int) -> str:
    """What is wrong with a tagger's width, if anything is."""
    if width < 1:
        return f"width {width}: 1 or more is expected"
    if model == "taltrans" and width % 16:  # of its first block; and it has 8 heads
        return f"width {width}: a multiple of 16 is expected of taltrans"
    return ""


def make_tagger(model: str, labels: list[str], width: int) -> nn.Module:
    if model == "cnn14":
        return Cnn14(len(labels), [width << i for i in range(6)], labels)
    return {"taltrans": TALTrans, "ast": AST}[model](len(labels), width)


def save_tagger(path: Path, tagger: nn.Module, model: str, labels: list[str], width: int) -> None:
    """Safetensors; one of a cnn14 is also a classifier for evaluate.py."""
    state = {name: (value.half() if value.is_floating_point() else value).contiguous()
             for name, value in tagger.state_dict().items()}  # fmt: skip
    about = {"model": model, "labels": json.dumps(labels), "width": str(width)}
    write_aside(path, safetensors.torch.save(state, about))


def load_tagger(path: Path) -> tuple[nn.Module, list[str]]:
    """What `save_tagger` wrote, and its labels. ValueError for any other file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        labels = json.loads(about["labels"])
        tagger = make_tagger(about["model"], labels, int(about["width"]))
        tagger.load_state_dict(state)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path}: damaged, or not a tagger ({e!r:.80})") from e
    return tagger.eval(), labels


# ---- scores --------------------------------------------------------------------------------------


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Area under precision over recall, of one class: Σ (R_n − R_(n−1))·P_n over thresholds n.
    scores and targets (0 or 1): [N]. NaN without a positive."""
    hits, total = _ranked(scores, targets)
    precision, recall = hits / total, hits / hits[-1]
    return (recall.diff(prepend=recall.new_zeros(1)) * precision).sum().item()


def roc_auc(scores: Tensor, targets: Tensor) -> float:
    """The probability that a positive scores above a negative (half for equal). NaN without any."""
    hits, total = _ranked(scores, targets)
    hits, misses = (F.pad(x, (1, 0)) for x in (hits, total - hits))
    area = (misses.diff() * (hits[1:] + hits[:-1]) / 2).sum()
    return (area / (hits[-1] * misses[-1])).item()


def _ranked(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """At each distinct score, highest first: positives, and all, that score as much or more."""
    scores, order = scores.double().sort(descending=True)
    last = torch.cat([scores.diff() != 0, torch.ones(1, dtype=torch.bool)])  # of equal scores
    total = torch.arange(1, len(scores) + 1).double()
    return targets[order].double().cumsum(0)[last], total[last]


def scores_of(logits: Tensor, targets: Tensor, labels: list[str], name: object = "") -> dict:
    """mAP, AUC and AP by class from [N, classes] each; classes without a clip don't count.
    ValueError, which begins with `name`, if there is no class that does."""
    there = [i for i in range(len(labels)) if 0 < targets[:, i].sum() < len(targets)]
    if not there:
        raise ValueError(f"{name}: none of the tagger's classes is in some of its clips")
    ap = {labels[i]: average_precision(logits[:, i], targets[:, i]) for i in there}
    auc = [roc_auc(logits[:, i], targets[:, i]) for i in there]
    return {
        "mAP": float(np.mean([*ap.values()])),
        "AUC": float(np.mean(auc)),
        "clips": len(targets),
        "AP": ap,
    }


def mean_and_std(values: list[float]) -> str:
    """In per cent; the std is that of a sample (n − 1), as ± in the papers' tables."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


@torch.no_grad()
def test(
    tagger: nn.Module, data: LatentDataset, labels: list[str], device, batch: int = 32
) -> dict:
    """A tagger's `scores_of` a stored data set."""
    logits, codec = [], LogMelCodec()
    indices = range(len(data))
    for start in tqdm(range(0, len(data), batch), unit="batch", leave=False, desc="test"):
        x = codec.dequantize(data.stored(indices[start : start + batch])).transpose(1, 2)
        logits.append(tagger.eval().classify(x.to(device))[1].float().cpu())
    return scores_of(torch.cat(logits), targets_of(data, indices, labels), labels, data.folder)


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    model: str = "cnn14"  # cnn14, taltrans or ast
    width: int = WIDTHS["cnn14"]  # channels of cnn14's first block; of the others, their states'
    steps: int = 4000
    batch_size: int = 32
    lr: float = 1e-3  # peak; AudioSet-20K's in table A10
    warmup_steps: int = 200
    weight_decay: float = 0.01
    mixup: float = 0.5  # share of clips mixed with another
    time_mask: int = 192  # frames at most
    mel_mask: int = 24  # bands at most
    seed: int = 0


def augment(x: Tensor, y: Tensor, rng: np.random.Generator, c: Config) -> tuple[Tensor, Tensor]:
    """Mixup and SpecAugment. x: dB [B, T, 64], y: [B, classes]."""
    share = np.where(rng.random(len(x)) < c.mixup, rng.beta(10, 10, len(x)), 1)
    share, other = torch.from_numpy(share).float().to(x.device), rng.permutation(len(x))
    x = share[:, None, None] * x + (1 - share)[:, None, None] * x[other]
    y = share[:, None] * y + (1 - share)[:, None] * y[other]
    mean = x.mean((1, 2), keepdim=True)
    for dim, most in ((1, c.time_mask), (2, c.mel_mask)):
        size = rng.integers(0, most + 1, len(x))
        first = rng.integers(0, x.shape[dim] - size + 1)
        place = np.arange(x.shape[dim])
        mask = (place >= first[:, None]) & (place < (first + size)[:, None])
        mask = torch.from_numpy(mask).to(x.device).unsqueeze(3 - dim)  # [B, T, 1] or [B, 1, 64]
        x = torch.where(mask, mean, x)
    return x, y


def train(c: Config, data: LatentDataset, held_out: LatentDataset, out: Path, device) -> dict:
    """Train a tagger, test it, write OUT/tagger.safetensors and OUT/scores.json. Returns scores.

    Goes on from OUT/checkpoint.pt, written every so often, if a run of the same settings left one.
    """
    keep_freed_memory()
    torch.manual_seed(c.seed)
    labels = data.labels
    tagger = make_tagger(c.model, labels, c.width).to(device)
    tagger = tagger.to(memory_format=torch.channels_last)  # its convolutions' own, on a CPU, too
    decay = [p for p in tagger.parameters() if p.dim() > 1]
    rest = [p for p in tagger.parameters() if p.dim() <= 1]
    groups = [
        {"params": decay, "weight_decay": c.weight_decay},
        {"params": rest, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr)
    weights = data.sampling_weights().numpy().cumsum()
    weights /= weights[-1]
    first, scores, checkpoint = 0, None, out / "checkpoint.pt"
    run = asdict(c) | {"labels": labels, "clips": len(data)}
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.is_file():
        try:
            saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
            before = saved["run"]
        except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
            raise ValueError(f"{checkpoint}: damaged ({e!r:.80}); delete it to start again") from e
        if before != run:
            differs = ", ".join(k for k in run if before.get(k) != run[k])
            raise ValueError(
                f"{out}: holds a run of other settings ({differs}); choose another --out"
            )
        tagger.load_state_dict(saved["tagger"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    print(f"{c.model}: {sum(p.numel() for p in tagger.parameters()):,} parameters, "
          f"{len(labels)} classes, {len(data):,} clips, from step {first}")  # fmt: skip

    codec = LogMelCodec()
    bar = tqdm(range(first, c.steps), initial=first, total=c.steps, unit="step")
    for step in bar:
        tagger.train()
        rng = np.random.default_rng((c.seed, 1, step))
        torch.manual_seed(c.seed * 1_000_003 + step)  # dropout
        indices = clips_of_step(step, c.batch_size, weights, len(data), c.seed)
        x = codec.dequantize(data.stored(indices).to(device)).transpose(1, 2)  # [B, 1009, 64]
        x, y = augment(x, targets_of(data, indices.tolist(), labels).to(device), rng, c)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, c)
        with torch.autocast(device.type, torch.bfloat16):
            logits = tagger.classify(x)[1]
        loss = F.binary_cross_entropy_with_logits(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == c.steps:
            scores = test(tagger, held_out, labels, device)
            bar.write(f"step {step + 1}: mAP {scores['mAP']:.4f}, AUC {scores['AUC']:.4f}")
            state = {"run": run, "step": step + 1, "tagger": tagger.state_dict()}
            aside = checkpoint.with_suffix(".tmp")
            torch.save(state | {"optimizer": optimizer.state_dict()}, aside)
            aside.rename(checkpoint)
    save_tagger(out / "tagger.safetensors", tagger, c.model, labels, c.width)
    scores = (scores or test(tagger, held_out, labels, device)) | {"config": asdict(c)}
    write_aside(out / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    return scores


# ---- the command ---------------------------------------------------------------------------------


def show(scores: dict) -> None:
    for label, ap in sorted(scores["AP"].items(), key=lambda item: -item[1]):
        print(f"  {label:36}{ap:7.3f}")
    print(f"mAP {scores['mAP']:.4f}, AUC {scores['AUC']:.4f} on {scores['clips']} clips")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="audio and a table -> log-mel features")
    encode.add_argument("audio_folder", type=Path)
    encode.add_argument("table", type=Path, help="as for `latents.py encode`")
    encode.add_argument("--out", type=Path, required=True)
    encode.add_argument("--class-labels", type=Path, help="AudioSet's class_labels_indices.csv")
    encode.add_argument("--workers", type=int, default=2)
    fit = commands.add_parser("train", help="features -> tagger, with its scores")
    fit.add_argument("data", type=Path, nargs="?", help="features [of tiny/'s training scenes]")
    fit.add_argument("--test", type=Path, help="features to test on [of tiny/'s held-out scenes]")
    fit.add_argument("--out", type=Path, default=Path("runs/tagger"), help="folder [runs/tagger]")
    for name, default in asdict(Config()).items():
        choices = sorted(WIDTHS) if name == "model" else None
        shown = ", ".join(f"{m}: {w}" for m, w in WIDTHS.items()) if name == "width" else default
        option = "--" + name.replace("_", "-")
        default = None if name == "width" else default
        kind = int if name == "width" else type(default)
        fit.add_argument(option, type=kind, default=default, choices=choices, help=f"[{shown}]")
    score = commands.add_parser("test", help="a tagger's scores on features")
    score.add_argument("tagger", type=Path)
    score.add_argument("data", type=Path, nargs="?", help="features [of tiny/'s held-out scenes]")
    for command in (fit, score):
        command.add_argument("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if args.command == "train":
        args.width = WIDTHS[args.model] if args.width is None else args.width
        if amiss := width_amiss(args.model, args.width):
            parser.error(f"--{amiss}")
        if min(args.batch_size, args.steps) < 1 or args.seed < 0:
            parser.error("--batch-size and --steps are 1 or more, --seed 0 or more")
        if not 0 <= args.mixup <= 1 or not 0 <= args.time_mask <= FRAMES:
            parser.error(f"--mixup is 0 to 1, --time-mask 0 to {FRAMES}")
        if not 0 <= args.mel_mask <= LogMelCodec.channels:
            parser.error(f"--mel-mask is 0 to {LogMelCodec.channels}")
    try:
        if args.command == "encode":
            rows = latents.read_table(args.table, args.audio_folder, args.class_labels)
            load = functools.partial(latents.load_row, audio_folder=args.audio_folder)
            latents.encode_dataset(args.out, LogMelCodec(), rows, load, workers=args.workers)
            print(f"{args.out}: {len(LatentDataset(args.out))} clips")
        elif args.command == "train":
            names = asdict(Config())
            c = Config(**{k: v for k, v in vars(args).items() if k in names})
            data = open_features(args.data or tiny_features("train"))
            held_out = open_features(args.test or tiny_features("test"))
            show(train(c, data, held_out, args.out, latents.pick_device(args.device)))
            print(args.out / "tagger.safetensors")
        else:
            tagger, labels = load_tagger(args.tagger)
            device = latents.pick_device(args.device)
            data = open_features(args.data or tiny_features("test"))
            show(test(tagger.to(device), data, labels, device))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
