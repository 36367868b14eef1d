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

    RUN/model/  the result    RUN/data/  the recordings, stored, and DreamBooth's own clips

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
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import latents
import sample
import train
from appendix import make_parser, read_tensors
from captions import TextEncoder
from evaluate import sounds_of
from latents import natural, number, one_line_errors, positive
from unet import WEIGHTS, UNet

WORDS, LORA = "words.safetensors", "pytorch_lora_weights.safetensors"
# P2's prompt for a class, and others, so that the word isn't bound to one sentence.
TEMPLATES = ("The sound of {}", "{}", "a recording of {}", "{} can be heard")
# Where to begin; what a method needs depends on model and recordings. A new word changes nothing
# where there is no caption.
METHODS = {
    "textual-inversion": "--steps 1000 --warmup-steps 50 --batch-size 4 --lr 5e-3 "
    "--weight-decay 0 --caption-dropout 0",
    "lora": "--steps 1000 --warmup-steps 50 --batch-size 4 --lr 5e-4",
    "dreambooth": "--steps 400 --warmup-steps 20 --batch-size 4 --lr 5e-5",
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


class LoRA(Beside):
    """A [rank, in] and B [out, rank] for each of the attentions' linear layers."""

    def make_part(self) -> nn.ModuleList:
        ends, rank = ("to_q", "to_k", "to_v", "to_out.0"), self.c.rank
        self.layers = {k: x for k, x in self.unet.named_modules() if k.endswith(ends)}
        sizes = [x.weight.shape for x in self.layers.values()]
        A = [nn.Linear(inputs, rank, bias=False) for _, inputs in sizes]
        B = [nn.Linear(rank, outputs, bias=False) for outputs, _ in sizes]
        for layer in B:
            nn.init.zeros_(layer.weight)  # so that training begins with the model itself
        return nn.ModuleList(map(nn.Sequential, A, B))

    def changes(self, network: nn.Module) -> list[Tensor]:
        return [B.weight @ A.weight for A, B in network]

    def write(self, network: nn.Module, folder: Path) -> None:
        """And the file that diffusers' `load_lora_weights` and peft read: scale 1, α = rank."""
        tensors, unet = {}, UNet.from_pretrained(self.c.init)
        for name, (A, B) in zip(self.layers, network, strict=True):
            tensors[f"unet.{name}.lora_A.weight"] = A.weight.detach().cpu()
            tensors[f"unet.{name}.lora_B.weight"] = B.weight.detach().cpu()
        save_file(tensors, folder / LORA, {"format": "pt"})
        add_lora(unet, folder / LORA)
        super().write(unet, folder)


class DreamBooth(Adapter):
    """λ is for own clips that have kept their caption; those that lost it (caption_dropout) count
    in full."""

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


def own_clips(args: argparse.Namespace, c: train.Config, caption: str) -> list[dict]:
    """A record for each of the model's own clips of the class, which are made as they are stored:
    with other settings they are another data set."""
    files = [args.model / name for name in ("model.json", f"unet/{WEIGHTS}.safetensors")]
    made = {"seed": c.seed, "steps": c.denoising_steps, "precision": c.precision}
    row = {"captions": [caption], "made": made | {"model": train.sha256(files)}}
    return [{"id": f"own-{i:04d}", "number": i} | row for i in range(args.prior_clips)]


def prepare(args: argparse.Namespace, rest: list[str]) -> tuple[Config, type[Adapter]]:
    """The run's settings, those of train.py's in `rest` among them, and what is trained. The
    recordings are stored, if need be."""
    codec, data = train.read_settings(args.model)["codec"], args.data or args.out / "data"
    options = ["--init", args.model, "--out", args.out, "--data", data]
    # Nothing is held out of a few recordings: the validation loss is on themselves.
    options += ["--val-data", data] if args.audio else []
    c = train.parse_args([*METHODS[args.method].split(), *rest, *map(str, options)])
    more = {"rank": args.rank}
    if args.data:
        return Config(**vars(c), **more), LoRA
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: only with --data; without, one process is enough")

    records, kind, model = read_recordings(args), LoRA, None
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
        # Recordings are repeated: half of all clips are theirs, half the model's own.
        records *= max(1, args.prior_clips // max(1, len(records)))
        records += own_clips(args, c, caption)
        more |= {"class_caption": caption, "prior_weight": args.prior_weight}
        if not (data / "latent_stats.safetensors").is_file():
            where = c.device or None, c.encodec_weights or None
            model = sample.load_model(args.model, *where, c.precision)

    def load(row: dict) -> Tensor:
        if "number" not in row:
            return latents.load_row(row, args.audio)
        options = {key: row["made"][key] for key in ("seed", "steps", "precision")}
        return sample.generate(model, row["captions"], indices=[row["number"]], **options)

    codec = latents.load_codec(codec, latents.pick_device(c.device), c.encodec_weights or None)
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


FOREIGN = ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora")  # that change the mathematics


@torch.no_grad()
def add_lora(unet: UNet, path: Path, scale: float = 1.0) -> None:
    """W ← W + scale·(α/r)·B·A, low-rank changes of some of the U-Net's weights; those of several
    files add up. ValueError, before anything is changed, for a file of another architecture."""
    tensors, about = read_tensors(path)
    about = json.loads(about.get("lora_adapter_metadata", "{}"))  # peft's settings, by diffusers
    about = {key.removeprefix("unet."): value for key, value in about.items()}
    strange = [key for key in FOREIGN if about.get(key)]
    strange += [key for key in tensors if ".lora_down." in key][:1]  # kohya's scripts
    if strange or about.get("init_lora_weights") in ("pissa", "olora", "corda", "loftq"):
        raise ValueError(f"{path}: another kind of LoRA ({strange or 'of other base weights'}); "
                         "diffusers' save_lora_weights writes what is read here")  # fmt: skip
    weights, changes = dict(unet.named_parameters()), {}
    for name in sorted({key.partition(".lora_")[0] for key in tensors}):
        A, B = (tensors.pop(f"{name}.lora_{x}.weight", torch.empty(0, 0)) for x in "AB")
        layer = name.removeprefix("unet.")
        W = weights.get(f"{layer}.weight", torch.empty(0))
        if W.dim() != 2 or (*B.shape[:1], *A.shape[1:]) != W.shape or B.shape[1:] != A.shape[:1]:
            raise ValueError(f"{path}: no LoRA for this U-Net: {name} doesn't fit")
        r = len(A)  # the layer's own: what a rank_pattern says is to be seen here
        root = r**0.5 if about.get("use_rslora") else r  # Kalajdzievski, 2023
        alpha = about.get("lora_alpha", r)
        for pattern, value in about.get("alpha_pattern", {}).items():
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", layer) else alpha
        changes[W] = scale * alpha / root * (B.to(W) @ A.to(W))
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
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="method", required=True)
    for method in (*METHODS, "merge"):
        out = Path("runs", method)
        more = f"and train.py's options: [{METHODS.get(method)}]" if method in METHODS else ""
        command = commands.add_parser(method, epilog=more, allow_abbrev=False)
        command.set_defaults(data=None, caption="", rank=0)
        add = command.add_argument
        add("--model", type=Path, default=sample.TINY, help="model folder [tiny/model]")
        add("--out", type=Path, default=out, help=f"folder [{out}]")
        if method in METHODS:
            source = command.add_mutually_exclusive_group(required=True)
            source.add_argument("--audio", type=Path, help="recordings; 10.08 s of each")
            add("--table", type=Path, help="their captions and labels, as for latents.py encode")
        if method == "textual-inversion":
            which = command.add_mutually_exclusive_group(required=True)
            which.add_argument("--token", help='the new word, such as "<kazoo>"')
            each = "or one for each label of the table: <dog> for Dog (P2, appendix E)"
            which.add_argument("--each-label", action="store_true", help=each)
            add("--word", default="sound", help="known words to begin from, as: trumpet [sound]")
        elif method == "lora":
            source.add_argument("--data", type=Path, help="or a stored data set, with captions")
            add("--caption", help="of all recordings, where there is no table")
            add("--rank", type=positive, default=8, help="of its matrices [8]")
        elif method == "dreambooth":
            add("--token", required=True, help="a rare word, such as: sks")
            add("--word", required=True, help="what class of sound it is, such as: dog")
            add("--prior-clips", type=natural, default=64, help="the model's own clips [64]")
            add("--prior-weight", type=number(float, 0), default=1.0, help="λ of their loss [1]")
            add("--rank", type=natural, default=0, help="of LoRA's matrices [0: all weights]")
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
    with one_line_errors("the same command goes on from the last checkpoint"):
        print(merge(args) if args.method == "merge" else train.train(*prepare(args, rest)))


if __name__ == "__main__":
    main()
