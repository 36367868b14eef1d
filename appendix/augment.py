"""What generated clips are worth when a tagger is trained (P2, appendix E, equation 1, table A11).

Of each of N real clips X_i there are M generated versions X̃_ij; a clip of a batch is

    i ~ U{1 … N},  j ~ U{1 … M}:     X_i with probability 1 − α, otherwise X̃_ij            (1)

An image-to-image clip of appendix/generated.py (KIND inversion) is a version of the real clip that
it began from. A plain one is a version of none: "otherwise" is then any of them. The columns (SET):

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
    python -m appendix.augment --kinds plain --sets +1 --taggers cnn14:8 --seeds 0     one tagger
    python -m appendix.augment --audio AUDIO --table segments.csv --class-labels labels.csv \\
        --test FEATURES --per-class 0 --model runs/paper/model --taggers taltrans:512 ast:768

Words, clips and taggers that are in OUT already are not made again. OUT/table.json is of the last
command; each tagger's own scores.json stays.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import latents
import train
from appendix import classify, generated
from appendix.classify import balanced, labels_of, markdown, mean_and_std, open_features, targets_of
from evaluate import file_sha256
from latents import LatentDataset

SETS = {  # generated clips for each real one, α (None: --alpha), are the worst classes amplified?
    "only": (1, 1.0, False),
    "real": (0, 0.0, False),
    "+1": (1, None, False),
    "+2": (2, None, False),
    "real-worst": (0, 0.0, True),
    "+1-worst": (1, None, True),
}
RECIPES = {"mx+sp": {}, "none": {"mixup": 0.0, "time_mask": 0, "mel_mask": 0}}
LOOP = "--steps 300 --batch-size 16"  # and a tenth of the steps are warm-up


@dataclass(frozen=True)
class Config(classify.Config):
    kind: str = ""  # of the generated clips
    times: int = 0  # generated clips for each real one: M
    alpha: float = 0.0  # probability of a generated clip
    amplified: list[str] = field(default_factory=list)  # classes drawn `factor` times as often
    factor: float = 1.0
    tables: dict[str, str] = field(default_factory=dict)  # data set -> hash of its clips


# ---- equation (1) --------------------------------------------------------------------------------


def worst(scores: list[dict], n: int) -> list[str]:
    """The n classes with the lowest average precision, in the mean of several taggers' scores."""
    labels = scores[0]["AP"]
    return sorted(labels, key=lambda label: statistics.mean(x["AP"][label] for x in scores))[:n]


class Both:
    """Two data sets, end to end: real clips, and those with these numbers of the generated ones."""

    def __init__(self, real: LatentDataset, made: LatentDataset, numbers: np.ndarray):
        self.real, self.made, self.numbers, self.folder = real, made, numbers, real.folder

    def find(self, i: int) -> tuple[LatentDataset, int]:
        n = len(self.real)
        return (self.real, i) if i < n else (self.made, int(self.numbers[i - n]))

    def stored(self, indices) -> Tensor:
        """uint8 [B, 64, 1009]."""
        return torch.cat([data.stored([i]) for data, i in map(self.find, indices)])

    def record(self, i: int) -> dict:
        data, i = self.find(i)
        return data.record(i)


class Mixed(classify.Tagger):
    """A tagger of real clips and the first c.times versions of each. To draw by equation (1) is one
    draw from all of them:

        p(X_i) = (1 − α)·p_i       p(X̃_ij) = α·p_i / M,  or α·q_g for clip g of a plain set

    p is balanced over the real clips' labels, q over the generated ones'."""

    def __init__(self, c: Config, device: torch.device):
        super().__init__(c, device)
        real, gains = self.data, [c.factor if x in c.amplified else 1.0 for x in self.labels]
        self.p = p = balanced(self.targets, gains)
        if not c.times:
            return
        made = open_features(Path(c.data).parent / c.kind)
        records = [made.record(g) for g in range(len(made))]
        numbers = np.array([g for g, x in enumerate(records) if x["version"] < c.times])
        targets = targets_of(made, numbers, self.labels)
        if c.kind == "plain":
            q = balanced(targets, gains)
        else:
            of = torch.tensor([records[g]["of"] for g in numbers])
            if (of.bincount(minlength=len(real)) != c.times).any():
                raise ValueError(f"{made.folder}: not {c.times} versions of each clip of "
                                 f"{real.folder}")  # fmt: skip
            q = p[of] / c.times
        self.p = torch.cat([(1 - c.alpha) * p, c.alpha * q])
        self.data, self.clips = Both(real, made, numbers), len(self.p)
        self.targets = torch.cat([self.targets, targets])


# ---- the table -----------------------------------------------------------------------------------


def plan(args: argparse.Namespace, sets: list[str], weak: dict[str, list[str]]) -> Iterator:
    """((tagger, recipe, kind or "", set), Config) of every tagger to train, seed by seed."""
    arms = itertools.product(args.seeds, args.taggers, args.recipes, args.kinds, sets)
    for seed, (model, width), recipe, kind, name in arms:
        times, alpha, amplify = SETS[name]
        kind = kind if times else ""
        arm = (f"{model}-{width}", recipe, kind, name)
        out = args.out / "taggers" / "_".join(filter(None, arm)) / f"seed-{seed}"
        values = {"model": model, "width": width, "seed": seed, "kind": kind, "times": times}
        values |= {"alpha": args.alpha if alpha is None else alpha, **RECIPES[recipe]}
        values |= {"amplified": weak[arm[0]], "factor": args.factor} if amplify else {}
        values |= {"data": str(args.out / "real"), "val_data": str(args.test), "out": str(out)}
        values |= {"device": args.device or "", "warmup_steps": args.loop.steps // 10}
        yield arm, Config(**vars(args.loop) | values)


def run(c: Config) -> dict:
    """The scores of a tagger, which is trained if OUT doesn't have them."""
    folders, out = {"real": c.data, "test": c.val_data}, Path(c.out)
    folders |= {"generated": Path(c.data).parent / c.kind} if c.times else {}
    c = replace(c, tables={k: file_sha256(Path(x, "clips.jsonl")) for k, x in folders.items()})
    if (out / "model").exists() and not (out / "checkpoints").exists():
        may_change, advice = train.MAY_CHANGE - {"batch_size"}, "give the same, or another --out"
        mine = {k: v for k, v in asdict(c).items() if k not in may_change and k != "precision"}
        train.must_agree(f"{out} has", latents.read_json(out / "config.json"), mine, advice)
    else:
        train.train(c, Mixed)
        shutil.rmtree(out / "checkpoints")  # of a finished run nobody needs them
    return latents.read_json(out / "model" / "scores.json", "mAP", "AP")


def show(title: str, results: dict, args: argparse.Namespace, value: Callable) -> None:
    rows = []
    for (model, width), recipe, kind in itertools.product(args.taggers, args.recipes, args.kinds):
        rows.append([f"{model}-{width}", recipe, kind])
        for name in args.sets:
            arm = (f"{model}-{width}", recipe, kind if SETS[name][0] else "", name)
            rows[-1].append(mean_and_std([value(arm, x) for x in results[arm].values()]))
    print(f"\n{title}\n\n{markdown(['tagger', 'aug', 'generated from', *args.sets], rows)}")


def table(args: argparse.Namespace) -> None:
    real, audio = generated.make_real(args)
    args.test = args.test or classify.tiny_features("test")
    held_out, labels = open_features(args.test), labels_of(real)
    if unknown := set(args.amplify or []) - (set(labels) & set(labels_of(held_out))):
        raise ValueError("classes to be amplified of which there is no real clip, or none to test "
                         f"on: {', '.join(sorted(unknown))}")  # fmt: skip
    for kind in args.kinds if any(SETS[name][0] for name in args.sets) else ():
        generated.make(kind, real, audio, args)

    results: dict[tuple, dict[int, dict]] = {}  # (tagger, recipe, kind, set) -> seed -> scores
    weak = {f"{model}-{width}": args.amplify or [] for model, width in args.taggers}
    amplifying = [name for name in args.sets if SETS[name][2]]
    for names in ([name for name in args.sets if name not in amplifying], amplifying):
        for (tagger, *_, name), by_seed in results.items():
            if name == "real" and not args.amplify:
                n = max(1, round(len(labels) * 100 / 527))
                weak[tagger] = worst([*by_seed.values()], n)
        for arm, c in tqdm([*plan(args, names, weak)], unit="tagger", disable=not names):
            results.setdefault(arm, {})[c.seed] = scores = run(c)
            tqdm.write(f"{c.out}: mAP {scores['mAP']:.3f}")

    def mean(arm: tuple, scores: dict) -> float:
        return scores["mAP"]

    def mean_of_weak(arm: tuple, scores: dict) -> float | None:
        return statistics.mean(scores["AP"][x] for x in weak[arm[0]]) if weak[arm[0]] else None

    rows = [["tagger", "aug", "generated from", "set", "seed", "mAP", "mAP of the worst"]]
    for arm, by_seed in results.items():
        rows += [[*arm, seed, mean(arm, x), mean_of_weak(arm, x)] for seed, x in by_seed.items()]
    content = {"real clips": len(real), "tested on": len(held_out), "worst": weak, "rows": rows}
    latents.write_aside(args.out / "table.json", (json.dumps(content, indent=1) + "\n").encode())
    about = f"{len(real)} real clips of {len(labels)} classes, {len(args.seeds)} seeds"
    show(f"mAP in per cent on {len(held_out)} clips; {about}", results, args, mean)
    if all(weak.values()):
        named = "; ".join(f"{tagger}: {', '.join(labels)}" for tagger, labels in weak.items())
        show(f"the same of the worst classes alone ({named})", results, args, mean_of_weak)
    print(f"\n{args.out / 'table.json'}")


# ---- the command ---------------------------------------------------------------------------------


def tagger_and_width(text: str) -> tuple[str, int]:
    """ "cnn14:8" -> ("cnn14", 8)."""
    model, _, width = text.partition(":")
    try:
        classify.check_width(model, int(width))
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text}: {e}") from e
    return model, int(width)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Our own options, and as `loop` those of train.py."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    more = f"and train.py's options for the taggers' loop [{LOOP}]"
    parser = argparse.ArgumentParser(description=__doc__, epilog=more, **style)
    generated.add_options(parser)
    add = parser.add_argument
    add("--test", type=Path, help="features to test on [of tiny/'s held-out scenes]")
    add("--taggers", nargs="+", type=tagger_and_width, default=[("taltrans", 128), ("cnn14", 8)],
        metavar="NAME:WIDTH", help="[taltrans:128 cnn14:8]")  # fmt: skip
    add("--recipes", nargs="+", choices=RECIPES, default=["mx+sp"], help="mixup and SpecAugment, "
        "or none [mx+sp]")  # fmt: skip
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="[all]")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the taggers [0 1 2]")
    add("--alpha", type=float, default=0.5, help="probability of a generated clip [0.5]")
    add("--amplify", nargs="+", metavar="CLASS", help="these instead of the worst fifth")
    add("--factor", type=float, default=2.0, help="how much more often they are drawn [2]")
    args, rest = parser.parse_known_args(arguments)
    args.loop = train.parse_args([*classify.RECIPE.split(), *LOOP.split(), *rest])
    generated.check_options(parser, args)
    if not 0 <= args.alpha <= 1 or args.factor < 0:
        parser.error("--alpha is 0 to 1, --factor above 0")
    if (most := max(SETS[name][0] for name in args.sets)) > args.times:
        parser.error(f"--times {args.times}: these --sets need {most}")
    if not args.amplify and "real" not in args.sets and any(SETS[name][2] for name in args.sets):
        parser.error("--sets: without `real`, --amplify has to say which classes are worst")
    if args.audio and not args.test:
        parser.error("--audio needs --test: features of clips that weren't trained on")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        table(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on")


if __name__ == "__main__":
    main()
