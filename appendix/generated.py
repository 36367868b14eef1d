"""Clips that a model generates for training a tagger, as features (P2, appendix E).

Real clips are those of a table, or a balanced subset of them; default: of the scenes of tiny/. For
each of N real clips M are generated, in one of two ways (KIND):

    plain       "The sound of [LIST]" of 1 to 3 classes by chance, from noise
    inversion   "The sound of [LIST]" of a real clip's own classes, for each of which a word was
                learned by textual inversion (adapt.py), by image-to-image from that clip's latent:
                    x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,   t at the share `strength` of the steps

P2 finds the first suboptimal: from pure noise it trades the accuracy of a class for diversity. How
far x_0 is noised the papers don't say; 0.5 here.

    python -m appendix.generated                               OUT/real, OUT/plain, OUT/inversion
    python -m appendix.generated --kinds plain --times 1 --per-class 20
    python -m appendix.generated --audio AUDIO --table segments.csv --class-labels labels.csv \\
        --per-class 0 --model runs/paper/model --out runs/augment-20k
    python -m appendix.classify train runs/augment/plain       a tagger of generated clips only

What comes are stored data sets (latents.py) of log-mel frames. A stopped command goes on where it
was. appendix/augment.py trains taggers on real and generated clips together.
"""

import argparse
import functools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

import latents
import sample
from appendix import adapt
from appendix.classify import TINY, LogMelCodec, labels_of, open_features
from evaluate import file_sha256
from latents import LatentDataset, template, write_aside
from unet import WEIGHTS

KINDS = ("plain", "inversion")
GROUP = 8  # plain clips generated at a time


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
    """The real clips' features, OUT/real, and where their audio is; OUT/real.jsonl lists them."""
    audio = args.audio or args.out / "audio"
    if args.audio:
        rows = latents.rows_to_encode(args.table, args.audio, args.class_labels)
        rows = balanced_subset(rows, args.per_class)
    else:
        rows = tiny_clips(audio, args.per_class)
    load = functools.partial(latents.load_row, audio_folder=audio)
    latents.encode_dataset(args.out / "real", LogMelCodec(), rows, load, workers=args.workers)
    real = open_features(args.out / "real")
    lines = [json.dumps(real.record(i)) + "\n" for i in range(len(real))]
    write_aside(args.out / "real.jsonl", "".join(lines).encode())
    return real, audio


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
            of, version = None, n // len(real)
        else:
            of, version = divmod(n, times)
            labels = real.record(of)["labels"]
            words = [adapt.word_of(label) for label in labels]
        row = {"id": f"{kind}-{n:06d}", "labels": labels, "captions": [template(words)]}
        rows.append(row | {"number": n, "of": of, "version": version})
    return rows


def learn_words(audio: Path, args: argparse.Namespace) -> Path:
    """A model with a word for each class of the real clips, by textual inversion in OUT/words."""
    options = {"--model": args.model, "--audio": audio, "--table": args.out / "real.jsonl"}
    options |= {"--out": args.out / "words", "--steps": args.inversion_steps}
    options |= {"--precision": args.precision, "--device": args.device}
    options |= {"--encodec-weights": args.encodec_weights}
    given = [str(x) for pair in options.items() if pair[1] for x in pair]
    adapt.main(["textual-inversion", "--each-label", *given])
    return args.out / "words" / "model"


def make(kind: str, real: LatentDataset, audio: Path, args: argparse.Namespace) -> LatentDataset:
    """The generated clips' features, OUT/KIND; a stopped command goes on after the last batch."""
    folder, model, source = args.out / kind, None, args.model
    done = (folder / "codec.json").is_file()
    made = {"steps": args.denoising_steps, "guidance": args.guidance, "seed": args.seed}
    about = {}
    if kind == "inversion":
        source = args.words_model or args.out / "words" / "model"
        if not args.words_model and not done:
            source = learn_words(audio, args)
        about["words"] = file_sha256(source / adapt.WORDS)
        made["strength"] = args.strength
    about["model"] = file_sha256(source / "unet" / f"{WEIGHTS}.safetensors")
    rows = generated_rows(kind, real, args.times, args.seed)
    rows = [row | {"made": about | made} for row in rows]
    if not done:
        model = sample.load_model(source, args.device, args.encodec_weights)
        words = {adapt.word_of(label) for label in labels_of(real)} if "words" in about else set()
        if missing := sorted(words - adapt.words_of(source).keys()):
            raise ValueError(f"{source}: has no word for {', '.join(missing)}")
        print(f"{folder}: {len(rows)} clips to generate")
    size = args.times if kind == "inversion" else GROUP  # image-to-image: versions of one clip

    @functools.lru_cache(1)
    def group(number: int) -> Tensor:
        part = rows[number * size : (number + 1) * size]
        options = {"batch_size": size, "precision": args.precision} | made
        options["indices"] = [row["number"] for row in part]
        if kind == "inversion":
            start = real.record(part[0]["of"])
            options["init_audio"] = latents.load_row(start, audio)[0]
        return sample.generate(model, [row["captions"][0] for row in part], **options)

    def load(row: dict) -> Tensor:
        return group(row["number"] // size)[row["number"] % size][None]

    latents.encode_dataset(folder, LogMelCodec(), rows, load)
    data = open_features(folder)
    if len(data) < len(rows):
        raise ValueError(f"{folder}: {len(rows) - len(data)} clips weren't made, see skipped.csv")
    return data


# ---- the command ---------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/augment"), help="folder [runs/augment]")
    add("--audio", type=Path, help="folder of real clips [scenes of tiny/]")
    add("--table", type=Path, help="their labels, as for latents.py encode")
    add("--class-labels", type=Path, help="AudioSet's class_labels_indices.csv")
    add("--per-class", type=int, default=8, help="real clips of a class, or more where they "
        "have others, too; 0: all there are [8]")  # fmt: skip
    add("--workers", type=int, default=2, help="processes that read real clips [2]")
    add("--model", type=Path, default=TINY / "model", help="that generates [tiny/model]")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="[both]")
    add("--times", type=int, default=2, help="generated clips for each real one [2]")
    add("--words-model", type=Path, help="model folder with words for all classes [learned]")
    add("--inversion-steps", type=int, default=1000, help="to learn them [1000]")
    add("--strength", type=float, default=0.5, help="of image-to-image [0.5]")
    add("--denoising-steps", type=int, default=45, help="[45]")
    add("--guidance", type=float, help="[the model's own]")
    add("--seed", type=int, default=0, help="of the generated clips [0]")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="[auto]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    add("--encodec-weights", help="EnCodec's weights, for models that decode with it")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if bool(args.audio) != bool(args.table):
        parser.error("--audio and --table go together")
    if not 0 < args.strength <= 1 or (args.guidance or 1) <= 0:
        parser.error("--strength is above 0 and at most 1, --guidance above 0")


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add_options(parser)
    args = parser.parse_args(arguments)
    check_options(parser, args)
    try:
        real, audio = make_real(args)
        for kind in args.kinds:
            made = make(kind, real, audio, args)
            print(f"{made.folder}: {len(made)} clips, for {len(real)} real ones in {real.folder}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on")


if __name__ == "__main__":
    main()
