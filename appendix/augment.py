"""What generated clips are worth when a tagger is trained (P2, appendix E, equation 1, table A11).

Of each of N real clips X_i (default: of the scenes of tiny/) there are M generated versions X̃_ij,
in one of two ways (KIND):

    plain       "The sound of [LIST]" of 1 to 3 classes by chance, from noise
    inversion   "The sound of [LIST]" of a real clip's own classes, for each of which a word was
                learned by textual inversion (adapt.py), by image-to-image from that clip's latent:
                    x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,   t at the share `strength` of the steps

P2 finds the first suboptimal: from pure noise it trades the accuracy of a class for diversity. How
far x_0 is noised the papers don't say; 0.5 here. A clip of a tagger's batch is

    i ~ U{1 … N},  j ~ U{1 … M}:     X_i with probability 1 − α, otherwise X̃_ij            (1)

A plain clip is a version of no real one: "otherwise" is then any of them. The columns (SET):

    only        generated clips alone, one for each real one: α = 1           P2: AS-20kG
    real        real clips alone: α = 0                                       AS-20k
    +1, +2      one, or two, generated ones for each real one                 +20kG, +40kG
    …-worst     the classes at which `real` is worst are drawn `factor` times as often

Draws are balanced over labels, as P2 says beside (1). Departures: α isn't in the papers; 0.5, as in
Trabucco et al. (2023), from whom (1) is. P2 amplifies the weights of "the lowest performing 100
classes" of 527 by a factor that it doesn't give: here as large a share, 7 of 36, by 2. Which ones
the taggers of `real` tell, each kind for itself, by the average precision on the clips that all are
tested on.

    python -m appendix.augment                                 the table, on scenes of tiny/
    python -m appendix.augment --clips-only                    OUT/real, OUT/plain, OUT/inversion
    python -m appendix.augment --kinds plain --sets +1 --taggers cnn14:8 --seeds 0     one tagger
    python -m appendix.augment --audio AUDIO --table segments.csv --class-labels labels.csv \\
        --test FEATURES --per-class 0 --model runs/paper/model --taggers taltrans:512 ast:768

Clips are stored data sets (latents.py) of log-mel frames: OUT/real, and OUT/KIND, which has these
and after them the generated ones. Words, clips and taggers that are in OUT aren't made again.
"""

import argparse
import functools
import itertools
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import latents
import sample
import train
from appendix import adapt, classify, make_parser, markdown, write_json
from appendix.ablations import train_once
from appendix.classify import LogMelCodec, balanced, labels_of, open_features
from evaluate import file_sha256
from latents import LatentDataset, natural, number, one_line_errors, positive, template
from train import TINY
from unet import WEIGHTS

KINDS = ("plain", "inversion")
GROUP = 8  # plain clips generated at a time
SETS = {  # generated clips for each real one, α (None: --alpha), are the worst classes amplified?
    "only": (1, 1.0, False),
    "real": (0, 0.0, False),
    "+1": (1, None, False),
    "+2": (2, None, False),
    "real-worst": (0, 0.0, True),
    "+1-worst": (1, None, True),
}
LOOP = "--steps 300 --batch-size 16"  # and a tenth of the steps are warm-up


@dataclass(frozen=True)
class Config(classify.Config):
    kind: str = ""  # of the generated clips, if there are any
    times: int = 0  # generated clips for each real one: M
    alpha: float = 0.0  # probability of a generated clip
    amplified: list[str] = field(default_factory=list)  # classes drawn `factor` times as often
    factor: float = 1.0
    tables: list[str] = field(default_factory=list)  # hashes of the data sets' clips


# ---- real clips ----------------------------------------------------------------------------------


def balanced_subset(rows: list[dict], per_class: int) -> list[dict]:
    """Each row, in order, that has a label of which there aren't `per_class` yet (0: all that have
    a label). As in AudioSet's balanced set, frequent classes come out with more."""
    counts, chosen = Counter(), []
    for row in rows:
        if any(counts[label] < (per_class or len(rows)) for label in row["labels"]):
            counts.update(row["labels"])
            chosen.append(row)
    return chosen


def tiny_clips(folder: Path, per_class: int) -> list[dict]:
    """A balanced subset of tiny/'s training scenes, written as WAVs where they are missing."""
    from tiny.compose import CLIPS, Recordings, draw_scenes
    from tiny.judge import write_scenes

    recordings = Recordings(TINY / "recordings.csv", "train")
    enough = min(CLIPS["train"], 400 * per_class) or CLIPS["train"]  # 16 times as many as needed
    scenes = balanced_subset(draw_scenes(recordings, "train", enough, seed=0), per_class)
    write_scenes(folder, {scene["id"]: scene for scene in scenes}, recordings)
    keys = ("id", "labels", "captions")
    return [{"file": f"{x['id']}.wav", **{key: x[key] for key in keys}} for x in scenes]


def make_real(args: argparse.Namespace) -> tuple[LatentDataset, Path]:
    """The real clips' features, OUT/real, and where their audio is."""
    audio, folder = args.audio or args.out / "audio", args.out / "real"
    if args.audio:
        rows = latents.rows_to_encode(args.table, args.audio, args.class_labels)
        rows = balanced_subset(rows, args.per_class)
    else:
        rows = tiny_clips(audio, args.per_class)
    load = functools.partial(latents.load_row, audio_folder=audio)
    latents.encode_dataset(folder, LogMelCodec(), rows, load, workers=args.workers)
    return open_features(folder), audio


# ---- generated clips -----------------------------------------------------------------------------


def generated_rows(kind: str, real: LatentDataset, times: int, seed: int) -> list[dict]:
    """`times` rows for each real clip. Row n of a plain set has labels from (seed, n); one of an
    inversion set those of real clip `of`, of which it is version number `version`."""
    rows, known = [], labels_of(real)
    for n in range(times * len(real)):
        if kind == "plain":
            rng = np.random.default_rng((seed, n))
            count = min(int(rng.integers(1, 4)), len(known))  # P2: N ∈ [1, 2, 3]
            labels = words = rng.choice(known, count, replace=False).tolist()
            of, version = -1, n // len(real)
        else:
            of, version = divmod(n, times)
            labels = real.record(of)["labels"]
            words = [adapt.word_of(label) for label in labels]
        row = {"id": f"{kind}-{n:06d}", "labels": labels, "captions": [template(words)]}
        rows.append(row | {"number": n, "of": of, "version": version})
    return rows


def model_with_words(real: LatentDataset, audio: Path, args: argparse.Namespace) -> Path:
    """--model, or if it doesn't have a word for each class of the real clips, one in OUT/words that
    has learned them by textual inversion."""
    words = {adapt.word_of(label) for label in labels_of(real)}
    if words <= adapt.words_of(args.model).keys():
        return args.model
    c, out = args.loop, args.out / "words"
    options = {"--model": args.model, "--audio": audio, "--table": real.folder / "clips.jsonl"}
    options |= {"--out": out, "--steps": args.inversion_steps, "--precision": c.precision}
    options |= {"--device": c.device, "--encodec-weights": c.encodec_weights}
    given = [str(x) for pair in options.items() if pair[1] for x in pair]
    adapt.main(["textual-inversion", "--each-label", *given])
    return out / "model"


def make(kind: str, real: LatentDataset, audio: Path, args: argparse.Namespace) -> LatentDataset:
    """Features of the real clips and after these the generated ones, OUT/KIND; a stopped command
    goes on after the last batch."""
    folder, source, size, c = args.out / kind, args.model, GROUP, args.loop
    settings = {"steps": c.denoising_steps, "guidance": args.guidance, "seed": c.seed}
    if kind == "inversion":
        source = model_with_words(real, audio, args)
        settings["strength"] = args.strength
        size = args.times  # image-to-image: versions of one clip
    files = [source / "unet" / f"{WEIGHTS}.safetensors", source / adapt.WORDS]
    made = settings | {path.name: file_sha256(path) for path in files if path.is_file()}
    rows = [x | {"made": made} for x in generated_rows(kind, real, args.times, c.seed)]
    print(f"{folder}: {len(rows)} clips")
    load_model = functools.cache(sample.load_model)

    @functools.lru_cache(1)
    def group(number: int) -> Tensor:
        model = load_model(source, c.device or None, c.encodec_weights or None, c.precision)
        part = rows[number * size : (number + 1) * size]
        options = {"batch_size": size, "precision": c.precision} | settings
        options["indices"] = [row["number"] for row in part]
        if kind == "inversion":
            start = real.record(part[0]["of"])
            options["init_audio"] = latents.load_row(start, audio)[0]
        return sample.generate(model, [row["captions"][0] for row in part], **options)

    def load(row: dict) -> Tensor:
        if "number" not in row:
            return latents.load_row(row, audio)
        return group(row["number"] // size)[row["number"] % size][None]

    reals = [real.record(i) for i in range(len(real))]
    latents.encode_dataset(folder, LogMelCodec(), reals + rows, load)
    data = open_features(folder)
    if len(data) < len(reals + rows):
        raise ValueError(f"{folder}: some clips weren't made, see skipped.csv")
    return data


# ---- equation (1) --------------------------------------------------------------------------------


def worst(scores: list[dict], n: int) -> list[str]:
    """The n classes with the lowest average precision, in the mean of several taggers' scores."""
    labels = scores[0]["AP"]
    return sorted(labels, key=lambda label: statistics.mean(x["AP"][label] for x in scores))[:n]


class Mixed(classify.Tagger):
    """A tagger of real clips and the first c.times versions of each. To draw by equation (1) is one
    draw from all of them:

        p(X_i) = (1 − α)·p_i       p(X̃_ij) = α·p_i / M,  or α·q_g for clip g of a plain set

    p is balanced over the real clips' labels, q over the generated ones'."""

    def __init__(self, c: Config, device: torch.device):
        super().__init__(c, device)
        gains = [c.factor if x in c.amplified else 1.0 for x in self.labels]
        records = [self.data.record(i) for i in range(self.clips)]
        version = torch.tensor([x.get("version", -1) for x in records])  # −1: a real clip
        real, made = version < 0, (version >= 0) & (version < c.times)
        p = balanced(self.targets[real], gains)
        self.p = torch.zeros(self.clips).double()
        self.p[real] = (1 - c.alpha) * p
        if c.times and c.kind == "plain":
            self.p[made] = c.alpha * balanced(self.targets[made], gains)
        elif c.times:
            of = torch.tensor([x.get("of", 0) for x in records])[made]
            self.p[made] = c.alpha * p[of] / c.times


# ---- the table -----------------------------------------------------------------------------------


def configure(arm: tuple, seed: int, weak: list[str], args: argparse.Namespace) -> Config:
    """The settings of the tagger that is an arm (tagger, kind, set) of the table."""
    model, kind, name = arm
    times, alpha, amplify = SETS[name]
    kind = kind if times else ""
    names = (model.replace(":", "-"), kind, name, f"seed-{seed}")
    values = {"model": model, "seed": seed, "kind": kind, "times": times}
    values |= {"alpha": args.alpha if alpha is None else alpha}
    values |= {"amplified": weak, "factor": args.factor} if amplify else {}
    values |= {"data": str(args.out / (kind or "real")), "val_data": str(args.test)}
    folders = values["data"], values["val_data"]
    values["tables"] = [file_sha256(Path(folder, "clips.jsonl")) for folder in folders]
    values |= {"out": str(args.out / "taggers" / "_".join(filter(None, names)))}
    return Config(**vars(args.loop) | values | {"warmup_steps": args.loop.steps // 10})


def table(args: argparse.Namespace) -> None:
    real, audio = make_real(args)
    for kind in args.kinds if args.clips_only or any(SETS[name][0] for name in args.sets) else ():
        make(kind, real, audio, args)
    if args.clips_only:
        return
    args.test = args.test or classify.tiny_features("test")
    held_out, labels = open_features(args.test), labels_of(real)
    amplified, lines, rows = max(1, round(len(labels) * 100 / 527)), [], []
    sets = sorted(args.sets, key=lambda name: SETS[name][2])  # what `real` finds worst comes last
    for tagger, kind in itertools.product(args.taggers, args.kinds):
        cells, weak = [], []
        for name in tqdm(sets, unit="set"):
            scores = []
            for seed in args.seeds:
                c = configure((tagger, kind, name), seed, weak, args)
                train_once(c, Mixed)
                scores.append(latents.read_json(Path(c.out, "model", "scores.json"), "mAP", "AP"))
                rows.append([c.out, scores[-1]["mAP"]])
            weak = worst(scores, amplified) if name == "real" else weak
            cells.append(classify.mean_and_std([x["mAP"] for x in scores]))
        lines.append([tagger, kind, *cells, ", ".join(weak)])
    head = ["tagger", "generated from", *sets, "worst"]
    path = args.out / "table.json"
    write_json(path, {"head": head, "lines": lines, "runs": rows})
    print(f"mAP in per cent on {len(held_out)} clips; {len(real)} real clips of {len(labels)} "
          f"classes, {len(args.seeds)} seeds\n\n{markdown(head, lines)}\n\n{path}")  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Our own options, and as `loop` those of train.py."""
    parser = make_parser(__doc__, epilog=f"and train.py's options for the taggers' loop [{LOOP}]")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/augment"), help="folder [runs/augment]")
    add("--audio", type=Path, help="folder of real clips [scenes of tiny/]")
    add("--table", type=Path, help="their labels, as for latents.py encode")
    add("--class-labels", type=Path, help="AudioSet's class_labels_indices.csv")
    add("--per-class", type=natural, default=8, help="real clips of a class at least; 0: all [8]")
    add("--workers", type=natural, default=2, help="processes that read real clips [2]")
    add("--clips-only", action="store_true", help="no taggers")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of generated clips [both]")
    add("--model", type=Path, default=TINY / "model", help="that generates [tiny/model]")
    add("--times", type=positive, default=2, help="generated clips for each real one [2]")
    add("--inversion-steps", type=positive, default=1000, help="to learn new words [1000]")
    add("--strength", type=number(float, 0, 1), default=0.5, help="of image-to-image [0.5]")
    add("--guidance", type=number(float, 0), help="[the model's own]")
    add("--test", type=Path, help="features to test on [of tiny/'s held-out scenes]")
    add("--taggers", nargs="+", default=["taltrans:128", "cnn14:8"], help="[taltrans:128 cnn14:8]")
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="[all]")
    add("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="of the taggers [0 1 2]")
    add("--alpha", type=number(float, 0, 1), default=0.5, help="of a generated clip [0.5]")
    add(
        "--factor",
        type=number(float, 1),
        default=2.0,
        help="by which the worst come more often [2]",
    )
    args, rest = parser.parse_known_args(arguments)
    args.loop = train.parse_args([*classify.RECIPE.split(), *LOOP.split(), *rest])
    if bool(args.audio) != bool(args.table) or bool(args.audio) > bool(args.test):
        parser.error("--audio, --table and --test (clips that aren't trained on) go together")
    if not 0 < args.strength <= 1:
        parser.error("--strength is above 0 and at most 1")
    if (most := max(SETS[name][0] for name in args.sets)) > args.times:
        parser.error(f"--times {args.times}: these --sets need {most}")
    if "real" not in args.sets and any(SETS[name][2] for name in args.sets):
        parser.error("--sets: `real` says which classes are worst")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with one_line_errors():
        [*map(classify.name_and_width, args.taggers)]  # better an error now than after hours
        table(args)


if __name__ == "__main__":
    main()
