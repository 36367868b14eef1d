"""Teach a trained model a sound from a few recordings, or to follow a signal (P2, appendices D, E).

The papers say that a model like theirs can be adapted in the ways that were found for pictures,
and use the first to make training clips of AudioSet's classes. Four of them, all through train.py's
loop with its checkpoints (the same command goes on):

    textual-inversion  a new word: only its input embedding v is learned (Gal et al., 2022)
        v* = argmin_v E‖ε − ε_θ(x_t, t, τ(y; v))‖²
    lora               low-rank changes of the attention's weights (Hu et al., 2021)
        W' = W + B·A,   A: rank × in,   B: out × rank, 0 at first
    dreambooth         a rare word for these recordings of a class (Ruiz et al., 2023), and sounds
        of the model's own, so that it doesn't forget the class: all weights, or LoRA's
        L = E_recordings[L(x, "The sound of sks dog")] + λ·E_own[L(x, "The sound of dog")]
    controlnet         a copy of the U-Net's way down that sees the loudness ℓ of each frame, and
        adds to the U-Net's skips by convolutions Z, 0 at first (Zhang et al., 2023)
        skip_i ← skip_i + Z_i(copy_i(x_t, t, y, ℓ))

    python -m appendix.adapt textual-inversion --audio FOLDER --token "<kazoo>" --word trumpet
    python sample.py "the sound of <kazoo>" \\
        --embedding runs/textual-inversion/model/embedding.safetensors

    python -m appendix.adapt lora --audio FOLDER --caption "a kazoo" --rank 8
    python sample.py "a kazoo" --lora runs/lora/model/pytorch_lora_weights.safetensors:0.8

    python -m appendix.adapt dreambooth --audio FOLDER --token sks --word dog [--rank 8]
    python sample.py "The sound of sks dog" --model runs/dreambooth/model   (--rank: --lora FILE)

    python -m appendix.adapt controlnet --data tiny/data/train
    python sample.py "rain" --controlnet runs/controlnet/model --control RECORDING.wav

    RUN/model/  the result    RUN/data/  the recordings, stored    RUN/prior/  the model's own clips

Departures: DreamBooth leaves the text encoder as it is, and a tenth of its batch has no caption.
A ControlNet for any sound wants as much data as the model had; from a few recordings it learns
these.
"""

import argparse
import functools
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

import latents
import sample
import train
from captions import TextEncoder
from evaluate import sounds_of
from train import Run, layout
from unet import WEIGHTS, ControlNet, UNet

TINY = Path(__file__).resolve().parent.parent / "tiny" / "model"
# P2's prompt for a class, and others, so that the word isn't bound to one sentence.
TEMPLATES = ("The sound of {}", "{}", "a recording of {}", "{} can be heard")
# Starting points: what a method needs depends on model and recordings.
METHODS = {
    "textual-inversion": {"steps": 1000, "lr": 5e-3, "batch_size": 4},
    "lora": {"steps": 1000, "lr": 5e-4, "batch_size": 4},
    "dreambooth": {"steps": 400, "lr": 5e-5, "batch_size": 4},
    "controlnet": {"steps": 5000, "lr": 1e-4, "batch_size": 8},
}


@dataclass(frozen=True)
class Config(train.Config):
    """What a run computes, and so must agree when it goes on."""

    method: str = ""
    words: dict[str, str] = field(default_factory=dict)  # new word -> words to begin from
    rank: int = 0  # of LoRA
    class_caption: str = ""  # DreamBooth's, of the model's own clips
    prior_weight: float = 1.0  # DreamBooth's λ


# ---- what is trained -----------------------------------------------------------------------------


class Beside(Run):
    """A run that trains a small network beside a model that stays as it is. In train.py's terms the
    small one is the `unet`: it is what is averaged, checkpointed and written."""

    def make_unet(self) -> nn.Module:
        base = super().make_unet().requires_grad_(False)
        self.base: UNet = base.to(self.device, memory_format=layout(self.device))
        return self.make_part()


class Vectors(nn.Module):
    """Input embeddings of new words, [n, dim]."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.rows = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.rows.view_as(self.rows)  # no Parameter: a module would take it for its own


def start_of(encoder: TextEncoder, words: str) -> Tensor:
    """The mean embedding [dim] of the tokens of these words. ValueError if one isn't known."""
    ids = encoder.tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids or encoder.tokenizer.unk_token_id in ids:
        raise ValueError(f"{words!r}: not words that the text encoder {encoder.name} knows")
    return encoder.table.weight[ids].float().mean(0)


def word_of(label: str) -> str:
    """The new word for a class: <dog> for Dog."""
    return f"<{sample.safe_name(label)}>"


class TextualInversion(Beside):
    def make_part(self) -> Vectors:
        starts = {word: start_of(self.encoder, old) for word, old in self.c.words.items()}
        self.encoder.add_words(starts)
        # States change with every step: no cache. And no more captions at once than there are.
        self.encoder.cache_rows, self.encoder.rows = 0, self.c.batch_size
        return Vectors(torch.stack([*starts.values()]))

    def loss(self, model, stored, captions, t, noise) -> Tensor:
        # The text encoder looks the words up in what is given: those being learned, or their mean.
        self.encoder.model.get_input_embeddings().rows = model()
        return super().loss(self.base, stored, captions, t, noise)

    def write_model(self, folder: Path) -> None:
        rows = dict(zip(self.c.words, self.ema.rows.detach().cpu(), strict=True))
        rows = {word: row.clone() for word, row in rows.items()}  # safetensors takes no views
        about = {"text_encoder": self.encoder.identity()}
        safetensors.torch.save_file(rows, folder / "embedding.safetensors", about)


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
        self.layers = {k: x for k, x in self.base.named_modules() if k.endswith(ends)}
        self.originals = [layer.weight.detach() for layer in self.layers.values()]
        for layer in self.layers.values():
            del layer.weight  # where a parameter is, nothing else can be put
        return LowRank([*self.layers.values()], self.c.rank)

    def loss(self, model, stored, captions, t, noise) -> Tensor:
        for layer, W, change in zip(self.layers.values(), self.originals, model(), strict=True):
            layer.weight = W + change
        return super().loss(self.base, stored, captions, t, noise)

    def write_model(self, folder: Path) -> None:
        """The file that diffusers' `load_lora_weights` and peft read: scale 1, α = rank."""
        tensors = {}
        for name, A, B in zip(self.layers, self.ema.A, self.ema.B, strict=True):
            tensors[f"unet.{name}.lora_A.weight"] = A.detach().cpu()
            tensors[f"unet.{name}.lora_B.weight"] = B.detach().cpu()
        path = folder / "pytorch_lora_weights.safetensors"
        safetensors.torch.save_file(tensors, path, {"format": "pt"})


class DreamBooth(Run):
    """Half of each batch are recordings, half the model's own clips: draws are balanced over labels
    (see `prepare`), and these have one label each. λ is for own clips that have kept their caption;
    those that lost it (caption_dropout) count in full."""

    def loss(self, model, stored, captions, t, noise) -> Tensor:
        losses = super().loss(model, stored, captions, t, noise)
        own = self.c.class_caption
        weights = [self.c.prior_weight if caption == own else 1.0 for caption in captions]
        return losses * losses.new_tensor(weights)


class DreamBoothLoRA(DreamBooth, LoRA):
    """DreamBooth's loss, LoRA's weights."""


class Control(Beside):
    def make_part(self) -> ControlNet:
        return ControlNet.copy_of(self.base)

    def loss(self, model, stored, captions, t, noise) -> Tensor:
        picture = latents.loudness(self.codec, stored.to(self.device))  # [B, 1, 24, 21]

        def controlled(*batch) -> Tensor:
            return self.base(*batch, control=model(picture, *batch))

        return super().loss(controlled, stored, captions, t, noise)

    def write_model(self, folder: Path) -> None:
        self.ema.save_pretrained(folder)


# ---- what it is trained on -----------------------------------------------------------------------


def read_rows(args: argparse.Namespace) -> list[dict]:
    """The recordings as rows for `latents.encode_dataset`, with the table's captions and labels."""
    if args.table:
        if not args.audio.is_dir():
            raise FileNotFoundError(f"{args.audio}: no such folder")
        return latents.read_table(args.table, args.audio)
    captions = [args.caption] if getattr(args, "caption", None) else []
    return [
        {"id": name, "file": path.name, "captions": captions, "labels": []}
        for name, path in sounds_of(args.audio).items()
    ]


def make_own_clips(args: argparse.Namespace, caption: str) -> list[dict]:
    """The model's own clips of the class, in RUN/prior, as rows; made where they are missing."""
    folder = args.out / "prior"
    folder.mkdir(parents=True, exist_ok=True)
    files = [args.model / name for name in ("model.json", f"unet/{WEIGHTS}.safetensors")]
    about = {"caption": caption, "seed": args.seed, "steps": args.prior_steps}
    about |= {"model (its hash)": train.sha256(files)}
    if (folder / "made.json").is_file():
        old = latents.read_json(folder / "made.json")
        train.must_agree(f"{folder} was begun with", old, about, "give the same, or another --out")
    latents.write_aside(folder / "made.json", (json.dumps(about) + "\n").encode())
    paths = [folder / f"{i:04d}.wav" for i in range(args.prior_clips)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"{folder}: {len(missing)} clips of {caption!r}, made by the model")
        model = sample.load_model(args.model, args.device, args.encodec_weights)
    for i in missing:  # one by one: then a clip doesn't depend on which others were missing
        options = {"seed": args.seed, "indices": [i], "precision": args.precision}
        wave = sample.generate(model, [caption], steps=args.prior_steps, progress=True, **options)
        latents.save_audio(paths[i], wave[0])
    row = {"captions": [caption], "labels": ["own"], "own": True}
    return [{"id": f"prior-{p.stem}", "file": p.name, **row} for p in paths]


def load_clips(row: dict, audio: Path, out: Path) -> Tensor:
    return latents.load_row(row, out / "prior" if row.get("own") else audio)


def prepare(args: argparse.Namespace) -> tuple[Config, type[Run]]:
    """The run's settings, with the model's own among them; its data set is made if need be."""
    options = train.read_settings(args.model)
    codec = options.pop("codec")
    names = ("method", "steps", "batch_size", "lr", "seed", "precision", "checkpoint_every")
    options |= {name: getattr(args, name) for name in names}
    options |= {"warmup_steps": args.steps // 20, "validate_every": args.checkpoint_every}
    # Without captions, too, or guidance would lose its other half; half of a ControlNet's, so that
    # it learns to go by the signal (Zhang et al., section 3.3). A new word changes nothing without.
    dropout = {"textual-inversion": 0.0, "controlnet": 0.5}.get(args.method, 0.1)
    options |= {"caption_dropout": dropout, "sample_every": 0, "device": args.device or ""}
    options |= {"encodec_weights": args.encodec_weights or ""}
    if getattr(args, "data", None):  # the last tenth is held out
        clips = len(latents.LatentDataset(args.data))
        options |= {"data": str(args.data), "val_clips": max(1, min(64, clips // 10))}
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun: only with --data; without, one process is enough")
    else:
        rows = read_rows(args)

    if args.method == "textual-inversion":
        kind, words = TextualInversion, {}
        for row in rows:
            mine = {args.token: args.word}
            if args.each_label:
                mine = {word_of(label): label for label in row["labels"]}
            if not mine:
                raise ValueError(f"--each-label: {row['file']} has no labels")
            words |= mine
            row["captions"] = [template.format(", ".join(mine)) for template in TEMPLATES]
        options |= {"words": words, "weight_decay": 0.0}
    elif args.method == "dreambooth":
        kind = DreamBoothLoRA if args.rank else DreamBooth
        for row in rows:
            row |= {"captions": [f"The sound of {args.token} {args.word}"], "labels": ["given"]}
        caption = f"The sound of {args.word}"
        rows += make_own_clips(args, caption) if args.prior_clips else []
        options |= {"rank": args.rank, "class_caption": caption, "prior_weight": args.prior_weight}
    else:
        kind = LoRA if args.method == "lora" else Control
        options["rank"] = getattr(args, "rank", 0)

    if "data" not in options:
        rows *= -(-args.batch_size // len(rows))  # of one recording, too, a batch of many t
        data, device = args.out / "data", latents.pick_device(args.device)
        codec = latents.load_codec(codec, device, args.encodec_weights)
        load = functools.partial(load_clips, audio=args.audio, out=args.out)
        latents.encode_dataset(data, codec, rows, load)
        if skipped := latents.read_json(data / "dataset.json", "skipped")["skipped"]:
            print(f"{data}: {skipped} of {len(rows)} rows were skipped, see skipped.csv")
        # Nothing is held out of a few recordings: the validation loss is on themselves.
        options |= {"data": str(data), "val_data": str(data), "val_clips": 64}
    return Config(out=str(args.out), init=str(args.model), **options), kind


# ---- the command ---------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = parser.add_subparsers(dest="method", required=True)
    for method, defaults in METHODS.items():
        add = methods.add_parser(method).add_argument
        add("--model", type=Path, default=TINY, help="model folder [tiny/model]")
        add("--audio", type=Path, help="folder of recordings; the first 10.08 s of each")
        add("--table", type=Path, help="their captions and labels, as for latents.py encode")
        if method in ("lora", "controlnet"):
            add("--caption", help="of all recordings, where there is no table")
            add("--data", type=Path, help="stored data set, instead of --audio")
        if method == "textual-inversion":
            add("--token", help='the new word, such as "<kazoo>"')
            add("--word", help="known words to begin from, such as: trumpet")
            add("--each-label", action="store_true", help="a word for each label of the table, "
                "instead: <dog> for Dog (P2, appendix E)")  # fmt: skip
        if method == "dreambooth":
            add("--token", required=True, help="a rare word, such as: sks")
            add("--word", required=True, help="what class of sound it is, such as: dog")
            add("--prior-clips", type=int, default=64, help="the model's own, of the class [64]")
            add("--prior-weight", type=float, default=1.0, help="the λ of their loss [1]")
            add("--prior-steps", type=int, default=45, help="denoising steps for them [45]")
        if method in ("lora", "dreambooth"):
            rank, shown = (8, "8") if method == "lora" else (0, "0: all weights")
            add("--rank", type=int, default=rank, help=f"of LoRA's matrices [{shown}]")
        add("--out", type=Path, default=Path("runs", method), help=f"folder [runs/{method}]")
        for name, value in defaults.items():
            option = "--" + name.replace("_", "-")
            add(option, type=type(value), default=value, help=f"as in train.py [{value}]")
        add("--checkpoint-every", type=int, default=500, help="steps [500]")
        add("--seed", type=int, default=0, help="of everything random [0]")
        add("--precision", choices=("bf16", "fp32"), default="bf16", help="of autocast [bf16]")
        add("--device", help="cpu or cuda [cuda where there is one]")
        add("--encodec-weights", help="EnCodec's weights, for models that decode with it")
    args = parser.parse_args(arguments)
    if min(args.steps, args.batch_size, args.checkpoint_every) < 1 or args.lr <= 0:
        parser.error("--steps, --batch-size and --checkpoint-every are 1 or more, --lr above 0")
    if getattr(args, "rank", 1) < (args.method == "lora"):
        parser.error(f"--rank {args.rank}: expected 1 or more")
    takes_captions, data = hasattr(args, "caption"), getattr(args, "data", None)
    if bool(args.audio) == bool(data):
        parser.error("say what to learn from: --audio FOLDER" + ", or --data" * takes_captions)
    if takes_captions and not data and bool(args.caption) == bool(args.table):
        parser.error("say what is to be heard in the recordings: --caption TEXT, or --table FILE")
    if args.method == "textual-inversion":
        if bool(args.token and args.word) == args.each_label:
            parser.error("say what is to be learned: --token and --word, or --each-label")
        if args.each_label and not args.table:
            parser.error("--each-label: the labels are in a --table")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        print(train.train(*prepare(args)))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from the last checkpoint")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: {str(e).splitlines()[0]} Take a smaller --batch-size")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
