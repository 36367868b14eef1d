"""Teach a trained model a sound from a few recordings (P2, appendices D and E).

The papers say that a model like theirs can be adapted in the ways that were found for pictures,
and use the first to make training clips of AudioSet's classes. Three of them, by train.py's loop,
with its options and its checkpoints (the same command goes on):

    textual-inversion  a new word: only its input embedding v is learned (Gal et al., 2022)
        v* = argmin_v E‖ε − ε_θ(x_t, t, τ(y; v))‖²
    lora               low-rank changes of the attention's weights (Hu et al., 2021)
        W' = W + B·A,   A: rank × in,   B: out × rank, 0 at first
    dreambooth         a rare word for these recordings of a class (Ruiz et al., 2023), and sounds
        of the model's own, so that it doesn't forget the class: all weights, or LoRA's
        L = E_recordings[L(x, "The sound of sks dog")] + λ·E_own[L(x, "The sound of dog")]

    python -m appendix.adapt textual-inversion --audio FOLDER --token "<kazoo>" --word trumpet
    python sample.py "the sound of <kazoo>" --model runs/textual-inversion/model

    python -m appendix.adapt lora --audio FOLDER --caption "a kazoo" --rank 8
    python -m appendix.adapt dreambooth --audio FOLDER --token sks --word dog [--rank 8]

    RUN/model/  the result    RUN/data/  the recordings, stored    RUN/prior/  the model's own clips

A result is a model folder like any other: a copy of the one that was adapted, with other weights or
with more words (words.safetensors). LoRA's changes are merged into the weights, and are beside them
as a file in diffusers' and peft's format. Such files and words make further model folders:

    python -m appendix.adapt merge --lora runs/lora/model/pytorch_lora_weights.safetensors:0.8 \\
        --words runs/textual-inversion/model/words.safetensors --out runs/both

Departures: DreamBooth leaves the text encoder as it is, and a tenth of its batch has no caption.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import latents
import sample
import train
from captions import TextEncoder
from evaluate import sounds_of
from unet import WEIGHTS, UNet

WORDS, LORA = "words.safetensors", "pytorch_lora_weights.safetensors"
# P2's prompt for a class, and others, so that the word isn't bound to one sentence.
TEMPLATES = ("The sound of {}", "{}", "a recording of {}", "{} can be heard")
# Where to begin; what a method needs depends on model and recordings. A new word changes nothing
# where there is no caption.
METHODS = {
    "textual-inversion": "--steps 1000 --lr 5e-3 --batch-size 4 --weight-decay 0 "
    "--caption-dropout 0",
    "lora": "--steps 1000 --lr 5e-4 --batch-size 4",
    "dreambooth": "--steps 400 --lr 5e-5 --batch-size 4",
}


@dataclass(frozen=True)
class Config(train.Config):
    """What a run computes, and so must agree when it goes on."""

    words: dict[str, str] = field(default_factory=dict)  # new word -> words to begin from
    rank: int = 0  # of LoRA
    class_caption: str = ""  # DreamBooth's, of the model's own clips
    prior_weight: float = 1.0  # DreamBooth's λ


# ---- what is trained -----------------------------------------------------------------------------


class Adapter(train.Denoiser):
    """Goes on from a model folder, and writes a copy of it with what has changed."""

    def write(self, network: nn.Module, folder: Path) -> None:
        write_model(folder, self.c.init, network)


class Beside(Adapter):
    """Trains a small network beside a model that stays as it is, for the `changes` of the weights W
    of some `layers`. The small network is what is averaged and checkpointed."""

    def make_network(self) -> nn.Module:
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.unet = super().make_network().requires_grad_(False)
        self.unet.to(self.device, memory_format=layout)
        network = self.make_part()
        self.originals = [layer.weight.detach() for layer in self.layers.values()]
        for layer, W in zip(self.layers.values(), self.originals, strict=True):
            del layer.weight  # where a parameter is, nothing else can be put
            layer.weight = W
        return network

    def loss(self, network: nn.Module, *batch) -> Tensor:
        changes = zip(self.layers.values(), self.originals, self.changes(network), strict=True)
        for layer, W, change in changes:
            layer.weight = W + change.to(W)
        return super().loss(self.unet, *batch)


def start_of(encoder: TextEncoder, words: str) -> Tensor:
    """The mean embedding [dim] of the tokens of these words. ValueError if one isn't known."""
    ids = encoder.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids or encoder.tokenizer.unk_token_id in ids:
        raise ValueError(f"{words!r}: not words that the text encoder {encoder.name} knows")
    return encoder.model.get_input_embeddings().weight[ids].detach().float().mean(0).cpu()


def word_of(label: str) -> str:
    """The new word for a class: <dog> for Dog."""
    return f"<{latents.safe_name(label)}>"


class TextualInversion(Beside):
    def make_part(self) -> nn.Embedding:
        starts = {word: start_of(self.encoder, old) for word, old in self.c.words.items()}
        self.encoder.add_words({word: torch.zeros_like(row) for word, row in starts.items()})
        self.encoder.rows = self.c.batch_size  # no more captions at once than there are
        self.layers = {"embeddings": self.encoder.model.get_input_embeddings()}
        return nn.Embedding.from_pretrained(torch.stack([*starts.values()]), freeze=False)

    def changes(self, network: nn.Module) -> list[Tensor]:
        self.encoder.cache.clear()  # its states are those of the step before
        rows = network(torch.arange(len(self.c.words), device=self.device))
        return [F.pad(rows, (0, 0, len(self.originals[0]) - len(rows), 0))]  # the table's last

    def write(self, network: nn.Embedding, folder: Path) -> None:
        rows = network.weight.detach().cpu()
        words = {word: row.clone() for word, row in zip(self.c.words, rows, strict=True)}
        words = words_of(self.c.init) | words
        write_model(folder, self.c.init, words=words, encoder=self.encoder)


class LowRank(nn.Module):
    """A [rank, in] and B [out, rank] for each of some linear layers; gives every B·A."""

    def __init__(self, layers: list[nn.Linear], rank: int):
        super().__init__()
        # Random as the weights of a linear layer are; with B = 0, the product begins as 0.
        self.A = nn.ParameterList(nn.Linear(x.in_features, rank).weight for x in layers)
        self.B = nn.ParameterList(torch.zeros(x.out_features, rank) for x in layers)

    def forward(self) -> list[Tensor]:
        return [B @ A for A, B in zip(self.A, self.B, strict=True)]


class LoRA(Beside):
    def make_part(self) -> LowRank:
        ends = ("to_q", "to_k", "to_v", "to_out.0")
        self.layers = {k: x for k, x in self.unet.named_modules() if k.endswith(ends)}
        return LowRank([*self.layers.values()], self.c.rank)

    def changes(self, network: nn.Module) -> list[Tensor]:
        return network()

    def write(self, network: LowRank, folder: Path) -> None:
        """And the file that diffusers' `load_lora_weights` and peft read: scale 1, α = rank."""
        tensors, unet = {}, UNet.from_pretrained(self.c.init)
        for name, A, B in zip(self.layers, network.A, network.B, strict=True):
            tensors[f"unet.{name}.lora_A.weight"] = A.detach().cpu()
            tensors[f"unet.{name}.lora_B.weight"] = B.detach().cpu()
        save_file(tensors, folder / LORA, {"format": "pt"})
        add_lora(unet, folder / LORA)
        super().write(unet, folder)


class DreamBooth(Adapter):
    """Half of each batch are recordings, half the model's own clips. λ is for own clips that have
    kept their caption; those that lost it (caption_dropout) count in full."""

    @cached_property
    def shares(self) -> np.ndarray:
        """The probability of each clip."""
        own = [self.data.record(i)["captions"] == [self.c.class_caption] for i in range(self.clips)]
        if all(own):
            raise ValueError(f"{self.data.folder}: no recording could be read, see skipped.csv")
        shares = np.where(own, 1 / max(1, sum(own)), 1 / (len(own) - sum(own)))
        return shares / shares.sum()

    def choose(self, step: int, global_batch: int) -> np.ndarray:
        rng = np.random.default_rng((self.c.seed, 0, step))
        return rng.choice(self.clips, global_batch, p=self.shares)

    def loss(self, network: nn.Module, captions: list[str], *rest) -> Tensor:
        losses, own = super().loss(network, captions, *rest), self.c.class_caption
        weights = [self.c.prior_weight if caption == own else 1.0 for caption in captions]
        return losses * losses.new_tensor(weights)


class DreamBoothLoRA(DreamBooth, LoRA):
    """DreamBooth's loss, LoRA's weights."""


# ---- what it is trained on -----------------------------------------------------------------------


def read_recordings(args: argparse.Namespace) -> list[dict]:
    """A record for each recording, as latents.py encode makes them."""
    if args.table:
        return latents.rows_to_encode(args.table, args.audio)
    sounds = sounds_of(args.audio).items()
    return [{"id": x, "file": path.name, "captions": [args.caption]} for x, path in sounds]


def make_own_clips(args: argparse.Namespace, c: train.Config, caption: str) -> list[dict]:
    """The model's own clips of the class, in RUN/prior; made where they are missing."""
    files = [args.model / name for name in ("model.json", f"unet/{WEIGHTS}.safetensors")]
    options = {"seed": c.seed, "steps": args.prior_steps, "precision": c.precision}
    about = json.dumps([train.sha256(files), caption, options])  # other settings, other files
    name = hashlib.sha256(about.encode()).hexdigest()[:8]
    paths = [args.out / "prior" / f"{name}-{i:04d}.wav" for i in range(args.prior_clips)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if missing:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        print(f"{args.out}/prior: {len(missing)} clips of {caption!r}, made by the model")
        model = sample.load_model(args.model, c.device or None, c.encodec_weights or None)
    for i in missing:  # one by one: then a clip doesn't depend on which others were missing
        wave = sample.generate(model, [caption], indices=[i], progress=True, **options)
        latents.save_audio(paths[i], wave[0])
    own = {"captions": [caption]}
    return [{"id": path.stem, "file": str(path.resolve())} | own for path in paths]


def prepare(args: argparse.Namespace, rest: list[str]) -> tuple[Config, type[Adapter]]:
    """The run's settings, those of train.py's in `rest` among them, and what is trained. The
    recordings are stored, if need be."""
    codec, data = train.read_settings(args.model)["codec"], args.data or args.out / "data"
    options = ["--init", args.model, "--out", args.out, "--data", data]
    # Nothing is held out of a few recordings: the validation loss is on themselves.
    options += ["--val-data", data] if args.audio else []
    c = train.parse_args([*METHODS[args.method].split(), *rest, *map(str, options)])
    more = {"rank": args.rank}
    if not any(option.startswith("--warmup-steps") for option in rest):
        c = replace(c, warmup_steps=c.steps // 20)
    if args.data:
        return Config(**vars(c), **more), LoRA
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: only with --data; without, one process is enough")

    records, kind = read_recordings(args), LoRA
    if args.method == "textual-inversion":
        kind, more["words"] = TextualInversion, {}
        for record in records:
            words = {word_of(label): label for label in record.get("labels", [])}
            words = {args.token: args.word} if args.token else words
            if not words:
                raise ValueError(f"--each-label: {record['file']} has no labels")
            more["words"] |= words
            record["captions"] = [template.format(", ".join(words)) for template in TEMPLATES]
    elif args.method == "dreambooth":
        kind, caption = DreamBoothLoRA if args.rank else DreamBooth, f"The sound of {args.word}"
        for record in records:
            record["captions"] = [f"The sound of {args.token} {args.word}"]
        records += make_own_clips(args, c, caption)
        more |= {"class_caption": caption, "prior_weight": args.prior_weight}
    codec = latents.load_codec(codec, latents.pick_device(c.device), c.encodec_weights or None)
    load = partial(latents.load_row, audio_folder=args.audio)
    latents.encode_dataset(data, codec, records, load)
    if skipped := len(records) - len(latents.LatentDataset(data)):
        print(f"{data}: {skipped} of {len(records)} recordings were skipped, see skipped.csv")
    return Config(**vars(c), **more), kind


# ---- model folders -------------------------------------------------------------------------------


def write_model(folder: Path, source: str | Path, unet=None, words=None, encoder=None) -> None:
    """A copy of the model folder `source`, with another U-Net, or with these words, which are for
    this text encoder."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LORA))
    if unet is not None:
        unet.save_pretrained(folder / "unet")
    if words:
        save_file(words, folder / WORDS, {"text_encoder": table_hash(encoder)})


def words_of(folder: str | Path) -> dict[str, Tensor]:
    """The learned words of a model folder, with their embeddings [dim]."""
    path = Path(folder, WORDS)
    return load_file(path) if path.is_file() else {}


def table_hash(encoder: TextEncoder) -> str:
    """A hash of the input embeddings of a text encoder's own tokens: learned words mean something
    beside these only. In bf16, since on CUDA there is no more of them."""
    table = encoder.model.get_input_embeddings().weight[: encoder.tokenizer.vocab_size]
    table = table.detach().bfloat16().view(torch.int16).cpu().numpy()
    return hashlib.sha256(table.tobytes()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file and its metadata; ValueError for any other."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: damaged, or no safetensors file ({e})") from e


@torch.no_grad()
def add_lora(unet: UNet, path: Path, scale: float = 1.0) -> None:
    """W ← W + scale·(α/r)·B·A, low-rank changes of some of the U-Net's weights; those of several
    files add up. ValueError, before anything is changed, for a file of another architecture."""
    tensors, about = read_tensors(path)
    about = json.loads(about.get("lora_adapter_metadata", "{}"))  # peft's settings, by diffusers
    about = {key.removeprefix("unet."): value for key, value in about.items()}
    weights, changes = dict(unet.named_parameters()), {}
    for name in sorted({key.partition(".lora_")[0] for key in tensors}):
        A, B = (tensors.pop(f"{name}.lora_{x}.weight", torch.empty(0, 0)) for x in "AB")
        layer = name.removeprefix("unet.")
        W = weights.get(f"{layer}.weight", torch.empty(0))
        if W.dim() != 2 or (*B.shape[:1], *A.shape[1:]) != W.shape or B.shape[1:] != A.shape[:1]:
            raise ValueError(f"{path}: no LoRA for this U-Net: {name} doesn't fit")
        r = len(A)  # the layer's own: what a rank_pattern says is to be seen here
        alpha = about.get("lora_alpha", r)
        for pattern, value in about.get("alpha_pattern", {}).items():
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", layer) else alpha
        changes[W] = scale * alpha / r * (B.to(W) @ A.to(W))
    if tensors or not changes:
        raise ValueError(f"{path}: expected NAME.lora_A.weight and NAME.lora_B.weight, and no more")
    for W, change in changes.items():
        W += change


def merge(args: argparse.Namespace) -> Path:
    """The command: a model, and files of LoRA and of words, make another model folder."""
    settings, unet = train.read_settings(args.model), UNet.from_pretrained(args.model)
    encoder = TextEncoder(*(settings[key] for key in ("text_encoder", "max_length", "mask")))
    words = words_of(args.model)
    for path, scale in args.lora:
        add_lora(unet, path, scale)
    for path in args.words:
        new, about = read_tensors(path)
        if about.get("text_encoder") != table_hash(encoder) or new.keys() & words.keys():
            raise ValueError(f"{path}: no new words for the model's text encoder, {encoder.name}")
        words |= new
    args.out.mkdir(parents=True)
    write_model(args.out, args.model, unet, words, encoder)
    return args.out


def file_and_scale(text: str) -> tuple[Path, float]:
    """ "FILE:0.5" -> (FILE, 0.5); without a scale 1."""
    file, _, scale = text.partition(":")
    return Path(file), float(scale or 1)


# ---- the command ---------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those left for train.py's `parse_args`."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    commands = parser.add_subparsers(dest="method", required=True)
    for method in (*METHODS, "merge"):
        learns, out = method in METHODS, Path("runs", method)
        more = f"and train.py's options: [{METHODS[method]}]" if learns else ""
        command = commands.add_parser(method, epilog=more, **style)
        command.set_defaults(data=None, caption="", rank=0)
        add = command.add_argument
        add("--model", type=Path, default=sample.TINY, help="model folder [tiny/model]")
        add("--out", type=Path, default=out, help=f"folder [{out}]")
        if learns:
            source = command.add_mutually_exclusive_group(required=True)
            source.add_argument("--audio", type=Path, help="recordings; 10.08 s of each")
            add("--table", type=Path, help="their captions and labels, as for latents.py encode")
        if method == "textual-inversion":
            which = command.add_mutually_exclusive_group(required=True)
            which.add_argument("--token", help='the new word, such as "<kazoo>"')
            which.add_argument("--each-label", action="store_true", help="or one for each label of "
                "the table: <dog> for Dog (P2, appendix E)")  # fmt: skip
            add("--word", default="sound", help="known words to begin from, as: trumpet [sound]")
        elif method == "lora":
            source.add_argument("--data", type=Path, help="or a stored data set, with captions")
            add("--caption", help="of all recordings, where there is no table")
            add("--rank", type=int, default=8, help="of its matrices [8]")
        elif method == "dreambooth":
            add("--token", required=True, help="a rare word, such as: sks")
            add("--word", required=True, help="what class of sound it is, such as: dog")
            add("--prior-clips", type=int, default=64, help="the model's own, of the class [64]")
            add("--prior-weight", type=float, default=1.0, help="the λ of their loss [1]")
            add("--prior-steps", type=int, help="denoising steps for them [the model's]")
            add("--rank", type=int, default=0, help="of LoRA's matrices [0: all weights]")
        else:
            add("--lora", type=file_and_scale, nargs="+", default=[], metavar="FILE[:SCALE]")
            add("--words", type=Path, nargs="+", default=[], metavar="FILE")
    args, rest = parser.parse_known_args(arguments)
    if args.method == "merge" and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.method == "lora" and args.audio and bool(args.caption) == bool(args.table):
        parser.error("say what is to be heard in the recordings: --caption TEXT, or --table FILE")
    if args.method == "lora" and args.rank < 1:
        parser.error(f"--rank {args.rank}: expected 1 or more")
    return args, rest


def main(arguments: list[str] | None = None) -> None:
    args, rest = parse_args(arguments)
    try:
        print(merge(args) if args.method == "merge" else train.train(*prepare(args, rest)))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from the last checkpoint")
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
