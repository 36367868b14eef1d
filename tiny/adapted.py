"""What does adapting teach the tiny model? The three methods of appendix/adapt.py, and the
ControlNet of appendix/control.py, before and after.

    python -m tiny.adapted                                       into runs/adapted
    python -m tiny.adapted --methods lora --label Moo --word cow --out runs/adapted-moo

For adapt.py's a few held-out recordings of a class are the sound to be learned (default:
streams, which the model misses): eight scenes of these recordings are what adapt.py gets, other
scenes of the same recordings are what the model's sounds are compared with. The tagger says how
often its first guess (or one of five) is the class, evaluate.py how far the sounds are from the
recordings' (FD, KL; with a floor and a ceiling), and the cosine of embeddings how near each is to
the nearest of the scenes that were learned from. DreamBooth's model is asked for the class without
the rare word as well.

For controlnet the prompts are captions of held-out scenes, the control is the scene's loudness, and
what counts is the correlation of the loudness of what comes with it, frame by frame.

Seeds and settings are the same before and after, and prompts but for the new word. Results:
OUT/adapted.json, adapted.png and control.png; what is there already is neither trained nor made
again.
"""

import argparse
import itertools
import json
import statistics
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import evaluate
import latents
import sample
from appendix import adapt, control
from latents import natural, number, one_line_errors, positive
from tiny import judge
from tiny.compose import HERE, Recordings, draw_scenes

METHODS = (*adapt.METHODS, "controlnet")
CONTROL_STEPS = 2000  # of 8 clips: 23 minutes on a core; control.py takes 5000 unless told
LEARN = 8  # scenes to learn from; a few recordings, in several places and levels


def learn(method: str, arguments: list, args: argparse.Namespace) -> Path:
    """The result of a run of adapt.py's or control.py's, which goes on where it was."""
    run = args.out / method
    options = ["--model", args.model, "--out", run, "--checkpoint-every", 250, *arguments]
    options += ["--device", args.device] if args.device else []
    options += ["--steps", args.train_steps] if args.train_steps else []
    if method == "controlnet":
        control.main([*map(str, options)])
    else:
        adapt.main([method, *map(str, options)])
    return run / "model"


# ---- the three that learn a sound ----------------------------------------------------------------


def experiments(args: argparse.Namespace) -> dict[str, tuple[str, str, list]]:
    """Set of sounds -> its prompt, and the method, with options, that its model is made by."""
    the_sound = f"The sound of {args.word}"
    word = "textual-inversion", ["--token", "<new>", "--word", args.word]
    lora = "lora", ["--caption", the_sound]
    booth = "dreambooth", ["--token", "sks", "--word", args.word]
    booth[1].extend(["--denoising-steps", args.steps] if args.steps else [])
    sets = {"before": (the_sound, "", []), "textual-inversion": ("The sound of <new>", *word)}
    sets |= {"lora": (the_sound, *lora), "dreambooth": (f"The sound of sks {args.word}", *booth)}
    sets["dreambooth-class"] = (the_sound, *booth)  # what it makes of the class itself
    return {name: x for name, x in sets.items() if x[1] in ("", *args.methods)}


def judge_sound(recordings: Recordings, tagger: evaluate.Cnn14, args: argparse.Namespace) -> dict:
    """Set -> its numbers. Two are no model's: floor, further scenes of the same recordings, and
    ceiling, what the codec leaves of these."""
    numbers, hear, real = itertools.count(), partial(hear_folder, tagger=tagger), {}
    for name, clips in (("learned-from", LEARN), ("reference", args.clips), ("floor", args.clips)):
        scenes = [judge.real_scene([args.label], recordings, next(numbers)) for _ in range(clips)]
        named = {f"{i:02d}": scene for i, scene in enumerate(scenes)}
        judge.write_scenes(args.out / name, named, recordings)
        real[name] = hear(args.out / name)
    learned, reference, width = real["learned-from"], real["reference"], tagger.widths[-1]
    codec = sample.load_model(args.model, args.device).codec
    files = evaluate.sounds_of(args.out / "floor")
    ceiling = {name: partial(evaluate.reconstruct, codec, path) for name, path in files.items()}
    rows = {"floor": (None, real["floor"]), "ceiling": (None, evaluate.hear(ceiling, tagger))}
    for name, (prompt, method, options) in experiments(args).items():
        folder = args.out / name / "sounds"
        prompts = {f"{i:02d}": prompt for i in range(args.clips)}
        if any(not (folder / f"{x}.wav").exists() for x in prompts):
            options = ["--audio", args.out / "learned-from", *options]
            model = learn(method, options, args) if method else args.model
            model = sample.load_model(model, args.device)
            judge.write_generated(folder, prompts, model, args)
        rows[name] = (prompt, hear(folder))
    result = {}
    for name, (prompt, heard) in rows.items():
        logits, embeddings = heard.values[:, width:], F.normalize(heard.values[:, :width], dim=1)
        rank = judge.ranks(logits, tagger.labels, [args.label] * len(logits))
        nearest = (embeddings @ F.normalize(learned.values[:, :width], dim=1).T).max(1).values
        row = {"prompt": prompt, "top-1": float((rank < 1).mean())}
        row |= {"top-5": float((rank < 5).mean()), "cosine": nearest.median().item()}
        scores = evaluate.measure(heard, reference, width, True)
        result[name] = row | {key: scores[key] for key in ("FD", "KL_softmax")}
    return result


def hear_folder(folder: Path, tagger: evaluate.Cnn14) -> evaluate.Features:
    paths = evaluate.sounds_of(folder)
    return evaluate.hear({n: partial(evaluate.load_sound, p) for n, p in paths.items()}, tagger)


# ---- the one that follows a signal ---------------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two series [n], Pearson's; 0 where one of them doesn't vary."""
    a, b = a - a.mean(), b - b.mean()
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-9)).item()


def loudness_of(codec, wave: Tensor) -> Tensor:
    """[504] of a wave [samples]: what a ControlNet is shown."""
    stored = codec.encode(latents.to_clip(wave).to(codec.device))
    return codec.to_sequence(control.loudness(codec, stored))[0, 0].cpu()


def judge_control(recordings: Recordings, tagger: evaluate.Cnn14, args: argparse.Namespace) -> dict:
    """Before and after: correlation and distance of loudness, KL to the scenes."""
    scenes = {s["id"]: s for s in draw_scenes(recordings, "test", args.clips, judge.SEED)}
    folder = args.out / "controlnet"
    judge.write_scenes(folder / "reference", scenes, recordings)
    if any(not (folder / "after" / f"{name}.wav").exists() for name in scenes):
        options = ["--data", args.data, "--val-clips", 16] if args.data else []
        net = learn("controlnet", [*options, "--steps", CONTROL_STEPS], args)
    base = sample.load_model(args.model, args.device)
    reference = hear_folder(folder / "reference", tagger)
    result, width = {}, tagger.widths[-1]
    for name in ("before", "after"):
        (folder / name).mkdir(exist_ok=True)
        found, off = [], []
        for i, (scene, about) in enumerate(scenes.items()):
            path, real = folder / name / f"{scene}.wav", folder / "reference" / f"{scene}.wav"
            wave = latents.load_audio(real)
            if not path.exists():
                model = base if name == "before" else control.add_control(base, net, wave)
                options = {"seed": args.seed, "indices": [i], "steps": args.steps}
                options |= {"guidance": args.guidance, "sampler": args.sampler}
                made = sample.generate(model, [about["captions"][0]], **options)
                latents.save_audio(path, made[0])
            wanted, got = (loudness_of(base.codec, latents.load_audio(x)) for x in (real, path))
            found.append(correlation(wanted, got))
            off.append(20 * (wanted - got).abs().mean().item())  # 1 is 20 dB
        scores = evaluate.measure(hear_folder(folder / name, tagger), reference, width, True)
        result[name] = {"correlation": statistics.mean(found), "off by, dB": statistics.mean(off)}
        result[name] |= {key: scores[key] for key in ("FD", "KL_softmax")}
    return result


# ---- what is shown -------------------------------------------------------------------------------


def picture(path: Path, folders: dict[str, Path]) -> None:
    """A PNG: mel spectrograms, three sounds of each folder in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    codec, rows = latents.MelCodec(), len(folders)
    figure, axes = plt.subplots(rows, 3, figsize=(9, 1.3 * rows), layout="constrained")
    for line, (name, folder) in zip(axes.reshape(rows, 3), folders.items(), strict=True):
        for axis, file in zip(line, sorted(folder.glob("*.wav")), strict=False):
            stored = codec.encode(latents.to_clip(latents.load_audio(file)))
            level = codec.decibel(stored)[0].numpy()
            axis.imshow(level, origin="lower", aspect="auto", vmin=-75, vmax=-15)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=7)
    figure.savefig(path, dpi=100)


def show(rows: dict[str, dict]) -> None:
    """A Markdown table."""
    heads = list(dict.fromkeys(key for row in rows.values() for key in row if key != "prompt"))
    print(f"\n| | {' | '.join(heads)} |\n| --- |" + " ---: |" * len(heads))
    for name, row in rows.items():
        cells = [f"{row[key]:.3g}" if key in row else "" for key in heads]
        name += f' ("{row["prompt"]}")' if row.get("prompt") else ""
        print(f"| {name} | {' | '.join(cells)} |")


def run(args: argparse.Namespace) -> None:
    recordings = Recordings(HERE / "recordings.csv", "test")
    if args.label not in recordings.names:
        raise ValueError(f"--label {args.label}: expected one of {', '.join(recordings.names)}")
    tagger = evaluate.Cnn14.load(args.classifier)
    if args.label not in (tagger.labels or []):
        raise ValueError(f"{args.classifier}: doesn't know {args.label}")
    names = ("label", "word", "train_steps", "clips", "seed", "steps", "guidance", "sampler")
    judge.agree(args, (*names, "data", "classifier"))
    path = args.out / "adapted.json"
    result = latents.read_json(path) if path.exists() else {}  # of other --methods
    result |= {"label": args.label, "model": str(args.model), "classifier": str(args.classifier)}
    result |= {"clips": args.clips, "steps": args.steps}
    if set(args.methods) - {"controlnet"}:
        result["sound"] = result.get("sound", {}) | judge_sound(recordings, tagger, args)
        show(result["sound"])
        made = [name for name, row in result["sound"].items() if row["prompt"]]
        folders = {"recordings": args.out / "learned-from"}
        folders |= {name: args.out / name / "sounds" for name in made}
        picture(args.out / "adapted.png", folders)
    if "controlnet" in args.methods:
        result["control"] = judge_control(recordings, tagger, args)
        show(result["control"])
        folder = args.out / "controlnet"
        names = {"control from": "reference", "without": "before", "with": "after"}
        picture(args.out / "control.png", {title: folder / x for title, x in names.items()})
    latents.write_aside(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"\n{path}")


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="[all four]")
    add("--label", default="Stream", help="class of the recordings to learn [Stream]")
    add("--word", default="stream", help="it in a prompt [stream]")
    add("--model", type=Path, default=HERE / "model", help="model folder [tiny/model]")
    add("--classifier", type=Path, default=evaluate.CLASSIFIER,
        help="[tiny/classifier.safetensors]")  # fmt: skip
    add("--out", type=Path, default=Path("runs/adapted"), help="folder [runs/adapted]")
    add("--data", type=Path, help="what a ControlNet learns from [the tiny data set]")
    add("--train-steps", type=positive, help="[adapt.py's own; controlnet: 2000]")
    add("--clips", type=positive, default=32, help="sounds of each set [32]")
    add("--seed", type=natural, default=0, help="of the sounds [0]")
    add("--steps", type=positive, help="denoising steps [the model's own]")
    add("--guidance", type=number(float, 0), help="[the model's own]")
    add("--sampler", choices=("pndm", "ddim", "ddpm"), default="pndm", help="[pndm]")
    add("--batch-size", type=positive, default=16, help="sounds at a time [16]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if args.clips < 3 or (args.train_steps or 1) < 1:
        parser.error("--clips is 3 or more, --train-steps 1 or more")
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
