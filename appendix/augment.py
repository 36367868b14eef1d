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
from appendix import classify, generated
from appendix.classify import WIDTHS, LogMelCodec, mean_and_std, open_features, targets_of
from latents import LatentDataset, write_aside
from train import must_agree

SETS = {  # generated clips for each real one, α (None: --alpha), are the worst classes amplified?
    "only": (1, 1.0, False),
    "real": (0, 0.0, False),
    "+1": (1, None, False),
    "+2": (2, None, False),
    "real-worst": (0, 0.0, True),
    "+1-worst": (1, None, True),
}
RECIPES = {"mx+sp": {}, "none": {"mixup": 0.0, "time_mask": 0, "mel_mask": 0}}


@dataclass(frozen=True)
class Config(classify.Config):
    """What a tagger's training computes, and so must agree when it is taken up again."""

    kind: str = ""  # of the generated clips
    times: int = 0  # generated clips for each real one: M
    alpha: float = 0.0  # probability of a generated clip
    amplified: list[str] = field(default_factory=list)  # classes drawn `factor` times as often
    factor: float = 1.0
    tables: list[str] = field(default_factory=list)  # hashes of what is trained and tested on


# ---- equation (1) --------------------------------------------------------------------------------


def worst(scores: list[dict], n: int) -> list[str]:
    """The n classes with the lowest average precision, in the mean of several taggers' scores."""
    labels = [label for label, ap in scores[0]["AP"].items() if ap is not None]
    return sorted(labels, key=lambda label: statistics.mean(x["AP"][label] for x in scores))[:n]


def balanced(targets: Tensor, gains: Tensor) -> Tensor:
    """The probability of each clip, float64 [N], if first a label is drawn, with a probability
    ∝ its gain [classes], then one of its clips: p ∝ Σ gain / (clips of label). targets:
    [N, classes] of 0 and 1. Gains of 1: `LatentDataset.sampling_weights`."""
    p = targets.double() @ (gains.double() / targets.sum(0).clamp(min=1))
    return p / p.sum()


class Mixture:
    """Real clips and the first c.times versions of each, end to end, as the data set that
    `classify.train` draws from. To draw by equation (1) is one draw from all of them:

        p(X_i) = (1 − α)·p_i       p(X̃_ij) = α·p_i / M,  or α·q_g for clip g of a plain set

    p is balanced over the real clips' labels, q over the generated ones'."""

    def __init__(self, real: LatentDataset, generated: LatentDataset | None, c: Config):
        self.real, self.generated, self.labels = real, generated, real.labels
        gains = torch.tensor([c.factor if x in c.amplified else 1.0 for x in real.labels])
        p = balanced(targets_of(real, range(len(real)), real.labels), gains)
        self.made, q = np.zeros(0, int), p.new_zeros(0)
        if c.times:
            records = [generated.record(g) for g in range(len(generated))]
            self.made = np.array([g for g, x in enumerate(records) if x["version"] < c.times])
            if c.kind == "plain":
                q = balanced(targets_of(generated, self.made, real.labels), gains)
            else:
                of = torch.tensor([records[g]["of"] for g in self.made])
                if (of.bincount(minlength=len(real)) != c.times).any():
                    raise ValueError(f"{generated.folder}: not {c.times} versions of each clip of "
                                     f"{real.folder}")  # fmt: skip
                q = p[of] / c.times
        self.p = torch.cat([(1 - c.alpha) * p, c.alpha * q])

    def __len__(self) -> int:
        return len(self.p)

    def sampling_weights(self) -> Tensor:
        return self.p

    def stored(self, indices) -> Tensor:
        """uint8 [B, 64, 1009]."""
        indices = np.asarray(indices)
        from_real = indices < len(self.real)
        out = torch.empty(len(indices), *LogMelCodec.stored_shape, dtype=LogMelCodec.stored_dtype)
        if from_real.any():
            out[from_real] = self.real.stored(indices[from_real])
        if not from_real.all():
            out[~from_real] = self.generated.stored(self.made[indices[~from_real] - len(self.real)])
        return out

    def label_ids(self, i: int) -> list[int]:
        if i < len(self.real):
            return self.real.label_ids(i)
        ids = self.generated.label_ids(self.made[i - len(self.real)])
        return [self.labels.index(self.generated.labels[k]) for k in ids]


# ---- the table -----------------------------------------------------------------------------------


def plan(args: argparse.Namespace, sets: list[str], weak: dict[str, list[str]]) -> Iterator:
    """((tagger, recipe, kind or "", set), Config) of every tagger to train, seed by seed."""
    arms = itertools.product(args.seeds, args.taggers, args.recipes, args.kinds, sets)
    for seed, (model, width), recipe, kind, name in arms:
        times, alpha, amplify = SETS[name]
        kind = kind if times else ""
        values = {"model": model, "width": width, "seed": seed, "kind": kind, "times": times}
        values |= {"alpha": args.alpha if alpha is None else alpha, **RECIPES[recipe]}
        values |= {"amplified": weak[f"{model}-{width}"], "factor": args.factor} if amplify else {}
        values |= {key: getattr(args, key) for key in ("steps", "batch_size", "lr")}
        c = Config(**values, warmup_steps=args.steps // 10)
        yield (f"{model}-{width}", recipe, kind, name), c


def run(c: Config, real, made, held_out: LatentDataset, out: Path, device) -> dict:
    """The scores of a tagger, which is trained if OUT doesn't have them."""
    if (out / "scores.json").is_file():
        scores = latents.read_json(out / "scores.json", "mAP", "AP", "config")
        must_agree(f"{out} has", scores["config"], asdict(c), "give the same, or another --out")
        return scores
    scores = classify.train(c, Mixture(real, made, c), held_out, out, device)
    (out / "checkpoint.pt").unlink()  # of a finished run nobody needs it
    return scores


def show(title: str, results: dict, args: argparse.Namespace, value: Callable) -> None:
    print(f"\n{title}\n\n| tagger | aug | generated from | {' | '.join(args.sets)} |")
    print("| --- | --- | --- |" + " ---: |" * len(args.sets))
    for (model, width), recipe, kind in itertools.product(args.taggers, args.recipes, args.kinds):
        row = [f"{model}-{width}", recipe, kind]
        for name in args.sets:
            scores = results[row[0], recipe, kind if SETS[name][0] else "", name].values()
            row.append(mean_and_std([value(x) for x in scores]))
        print(f"| {' | '.join(row)} |")


def table(args: argparse.Namespace) -> None:
    device = latents.pick_device(args.device)
    real, audio = generated.make_real(args)
    held_out = open_features(args.test or classify.tiny_features("test"))
    if unknown := set(args.amplify or []) - (set(real.labels) & set(held_out.labels)):
        raise ValueError("classes to be amplified of which there is no real clip, or none to test "
                         f"on: {', '.join(sorted(unknown))}")  # fmt: skip
    kinds = args.kinds if any(SETS[name][0] for name in args.sets) else []
    made = {kind: generated.make(kind, real, audio, args) for kind in kinds}

    results: dict[tuple, dict[int, dict]] = {}  # (tagger, recipe, kind, set) -> seed -> scores
    weak = {f"{model}-{width}": args.amplify or [] for model, width in args.taggers}
    amplifying = [name for name in args.sets if SETS[name][2]]
    for names in ([name for name in args.sets if name not in amplifying], amplifying):
        for (tagger, *_, name), by_seed in results.items():
            if name == "real" and not args.amplify:
                n = max(1, round(len(real.labels) * 100 / 527))
                weak[tagger] = worst([*by_seed.values()], n)
        bar = tqdm([*plan(args, names, weak)], unit="tagger", disable=not names)
        for arm, c in bar:
            bar.set_description(" ".join(filter(None, arm)))
            sets = [real, made.get(c.kind), held_out]
            hashes = [
                latents.read_json(x.folder / "plan.json", "table")["table"] for x in sets if x
            ]
            out = args.out / "taggers" / "_".join(filter(None, arm)) / f"seed-{c.seed}"
            scores = run(replace(c, tables=hashes), *sets, out, device)
            results.setdefault(arm, {})[c.seed] = scores
            bar.write(f"{out}: mAP {scores['mAP']:.3f}")

    def mean(scores: dict) -> float:
        return scores["mAP"]

    def mean_of_weak(scores: dict) -> float | None:
        labels = weak["{model}-{width}".format(**scores["config"])]
        return statistics.mean(scores["AP"][x] for x in labels) if labels else None

    rows = [["tagger", "aug", "generated from", "set", "seed", "mAP", "mAP of the worst"]]
    for arm, by_seed in results.items():
        rows += [[*arm, seed, mean(x), mean_of_weak(x)] for seed, x in by_seed.items()]
    content = {"real clips": len(real), "tested on": len(held_out), "worst": weak, "rows": rows}
    write_aside(args.out / "table.json", (json.dumps(content, indent=1) + "\n").encode())
    about = f"{len(real)} real clips of {len(real.labels)} classes, {len(args.seeds)} seeds"
    show(f"mAP in per cent on {len(held_out)} clips; {about}", results, args, mean)
    if all(weak.values()):
        named = "; ".join(f"{tagger}: {', '.join(labels)}" for tagger, labels in weak.items())
        show(f"the same of the worst classes alone ({named})", results, args, mean_of_weak)
    print(f"\n{args.out / 'table.json'}")


# ---- the command ---------------------------------------------------------------------------------


def tagger_and_width(text: str) -> tuple[str, int]:
    """ "cnn14:8" -> ("cnn14", 8)."""
    model, _, width = text.partition(":")
    if model not in WIDTHS or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(WIDTHS)}, and :WIDTH")
    if amiss := classify.width_amiss(model, int(width)):
        raise argparse.ArgumentTypeError(f"{text}: {amiss}")
    return model, int(width)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    generated.add_options(parser)
    add = parser.add_argument
    add("--test", type=Path, help="features to test on [of tiny/'s held-out scenes]")
    add("--taggers", nargs="+", type=tagger_and_width, default=[("taltrans", 128), ("cnn14", 8)],
        metavar="NAME:WIDTH", help=f"of {', '.join(WIDTHS)} [taltrans:128 cnn14:8]")  # fmt: skip
    add("--recipes", nargs="+", choices=RECIPES, default=["mx+sp"], help="mixup and SpecAugment, "
        "or none [mx+sp]")  # fmt: skip
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="[all]")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the taggers [0 1 2]")
    add("--alpha", type=float, default=0.5, help="probability of a generated clip [0.5]")
    add("--amplify", nargs="+", metavar="CLASS", help="these instead of the worst fifth")
    add("--factor", type=float, default=2.0, help="how much more often they are drawn [2]")
    add("--steps", type=int, default=300, help="of a tagger [300]")
    add("--batch-size", type=int, default=16, help="[16]")
    add("--lr", type=float, default=1e-3, help="peak [0.001]")
    args = parser.parse_args(arguments)
    generated.check_options(parser, args)
    if min(args.steps, args.batch_size, args.factor) < 1 or min(args.seeds) < 0:
        parser.error("--steps, --batch-size and --factor are 1 or more, --seeds 0 or more")
    if not 0 <= args.alpha <= 1 or args.lr <= 0:
        parser.error("--alpha is 0 to 1, --lr above 0")
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
