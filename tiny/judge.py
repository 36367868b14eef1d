"""How good is the tiny model? Its sounds against held-out recordings, with numbers and controls.

    python -m tiny.judge                                  tiny/model, into runs/judge
    python -m tiny.judge --model runs/tiny/model --out runs/judge-mine

1. SETS. Scenes of held-out recordings (reference), scenes with the same labels from other held-out
   recordings, as far as a class has others (floor), and the model's sounds for the captions of the
   first (generated), compared by evaluate.py with all its controls. Also seams: the mean change of
   the mel spectrogram into every 21st frame, where a row of the latent picture begins, over that
   into the others (1: none); the median RMS in dB; the share with a peak above 1 before saving.
2. CLASSES. Clips of each class by its plain caption, and by unseen_prompts.csv, in words that no
   training caption has: how often is the class the tagger's first guess, or one of its first five?
   Beside it, clips of held-out recordings, and of training ones, which the tagger learned from.
3. PAIRS. Prompts with two sounds: does the tagger hear both, each more than in nine of ten clips
   whose prompts don't name it? Beside the same for scenes of recordings: what it hears at best.
4. NEAREST. For each generated clip the nearest training recording, by the cosine of the tagger's
   embeddings. Clips of held-out recordings can't hold one, those of training recordings do: between
   their medians and that of the generated clips of 2, memorising is seen for what it is.

All of it is in OUT/judge.json; OUT/sets holds evaluate.py's metrics.json. Sounds that are there
already are not made again, so a command that was stopped goes on.
"""

import argparse
import copy
import csv
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
from latents import (
    FRAMES,
    GRID,
    MelCodec,
    load_audio,
    natural,
    number,
    one_line_errors,
    positive,
    read_json,
    save_audio,
    to_clip,
    write_aside,
)
from sample import generate, load_model
from tiny.compose import HERE, Recordings, compose_scene, draw_layers, draw_scenes
from train import must_agree

SEED = 1  # of the scenes; those of tiny/data/test are seed 0's
KINDS = ("generated", "unseen", "real", "training")  # of clips; real: of held-out recordings


def recordings_of(scene: dict) -> set[str]:
    return {event["file"] for layer in scene["layers"] for event in layer["events"]}


def without(recordings: Recordings, files: set[str]) -> Recordings:
    """These recordings less the files and what shares a source with them; less the files alone
    where a class has no other source; a class that has nothing but them stays as it is."""
    rest = copy.copy(recordings)
    rest.classes = {}
    for label, sources in recordings.classes.items():
        left = {s: [x for x in takes if x["file"] not in files] for s, takes in sources.items()}
        others = {s: takes for s, takes in sources.items() if len(left[s]) == len(takes)}
        rest.classes[label] = others or {s: x for s, x in left.items() if x} or sources
    return rest


def other_scene(scene: dict, recordings: Recordings, number: int) -> dict:
    """A scene of the same labels in the same order, from other recordings where there are any."""
    rng = np.random.default_rng([SEED, 1000, number])
    labels = [layer["label"] for layer in scene["layers"]]
    others = without(recordings, recordings_of(scene))
    layers = draw_layers(rng, others, labels, scene["order"])
    for layer, old in zip(layers, scene["layers"], strict=True):
        layer["cutoff"] = old["cutoff"]
    return scene | {"layers": layers, "seed": int(rng.integers(2**31))}


def real_scene(labels: list[str], recordings: Recordings, number: int) -> dict:
    """A scene with these labels, near by."""
    rng = np.random.default_rng([SEED, 2000, *map(recordings.names.index, labels), number])
    scene = {"labels": labels, "order": "together", "place": "near", "noise_db": None}
    scene |= {"rt60": 0.3, "wet": 0.1, "level_db": -18.0}
    scene["layers"] = draw_layers(rng, recordings, labels, "together")
    return scene | {"seed": int(rng.integers(2**31))}


def write_scenes(folder: Path, scenes: dict[str, dict], recordings: Recordings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in tqdm(scenes.items(), desc=folder.name, unit="clip"):
        if not (folder / f"{name}.wav").exists():
            save_audio(folder / f"{name}.wav", compose_scene(scene, recordings))


def write_generated(folder: Path, prompts: dict[str, str], model, args) -> None:
    """Clip i comes of (seed, i), whatever is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [i for i, name in enumerate(prompts) if not (folder / f"{name}.wav").exists()]
    names, texts = list(prompts), list(prompts.values())
    options = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}
    starts = range(0, len(todo), args.batch_size)
    for start in tqdm(starts, desc=folder.name, unit="batch", disable=not todo):
        batch = todo[start : start + args.batch_size]
        waves = generate(model, [texts[i] for i in batch], seed=args.seed, indices=batch, **options)
        for i, wave in zip(batch, waves, strict=True):
            about = {"prompt": texts[i], "peak": wave.abs().max().item()}
            save_audio(folder / f"{names[i]}.wav", wave, json.dumps(about))


def seams(decibel: Tensor) -> float:
    """[clips, bands, 504] -> how much more changes into each frame with which a row of the latent
    picture begins than into the others."""
    change = decibel.diff().abs().mean((0, 1))  # [503]: into frames 1 … 503
    begins = torch.arange(1, FRAMES) % GRID[1] == 0
    return (change[begins].mean() / change[~begins].mean().clamp(min=1e-9)).item()


def seams_and_loudness(folder: Path) -> dict[str, float]:
    """Of the sounds in a folder; of generated ones, loudness before `save_audio` scaled them."""
    paths, codec, peaks = evaluate.sounds_of(folder).values(), MelCodec(), []
    for path in paths:
        with soundfile.SoundFile(path) as file:
            peaks.append(json.loads(file.comment or "{}").get("peak", 0.0))
    waves = torch.cat([to_clip(load_audio(path)) for path in paths])  # [clips, 161280]
    decibel = torch.cat([codec.decibel(codec.encode(batch)) for batch in waves.split(16)])
    peaks = torch.tensor(peaks)
    waves *= (peaks / 0.99).clamp(min=1)[:, None]
    rms = waves.square().mean(1).sqrt().median().item()
    above = (peaks > 1).float().mean().item()
    return {"seams": seams(decibel), "dB": 20 * math.log10(rms + 1e-9), "peak above 1": above}


def ranks(logits: Tensor, labels: list[str], asked: Sequence[str]) -> np.ndarray:
    """0 where the class asked for is the tagger's first guess, 1 where the second, …"""
    place = [labels.index(label) for label in asked]
    own = logits[torch.arange(len(logits)), place][:, None]
    return (logits > own).sum(1).numpy()


def hear(sounds: dict[str, Path], tagger: evaluate.Cnn14) -> tuple[list[str], Tensor, Tensor]:
    """Names, embeddings [N, D] and logits [N, classes] of files."""
    loaders = {name: partial(evaluate.load_sound, path) for name, path in sounds.items()}
    found = evaluate.hear(loaders, tagger)
    return found.names, *found.values.tensor_split([tagger.widths[-1]], 1)


def judge_sets(folder: Path, scenes: dict[str, dict], recordings: Recordings, classifier) -> dict:
    """1. evaluate.py's numbers of the sets, seams and loudness, and the share of the floor's scenes
    that have a recording of the reference's."""
    others = {n: other_scene(s, recordings, i) for i, (n, s) in enumerate(scenes.items())}
    write_scenes(folder / "reference", scenes, recordings)
    write_scenes(folder / "floor", others, recordings)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = ((name, scene["captions"][0]) for name, scene in scenes.items())
        csv.writer(file).writerows([("name", "caption"), *rows])
    arguments = [folder / "generated", folder / "reference", "--controls", folder / "floor"]
    arguments += ["--codec", "mel", "--classifier", classifier, "--out", folder]
    evaluate.main([*map(str, arguments)])
    shared = [bool(recordings_of(s) & recordings_of(others[n])) for n, s in scenes.items()]
    kinds = ("generated", "reference")
    result = {"seams and loudness": {kind: seams_and_loudness(folder / kind) for kind in kinds}}
    result |= {"floor shares a recording": float(np.mean(shared))}
    return result | {"sets": read_json(folder / "metrics.json")["sets"]}


def judge_classes(heard: dict, asked: dict[str, str], tagger: evaluate.Cnn14) -> dict[str, dict]:
    """2. class, or "all" -> {"generated top-1": share, …}. heard: kind -> what `hear` gives; asked:
    name -> class."""
    rows = {label: {} for label in ["all", *sorted(set(asked.values()))]}
    for kind, (names, _, logits) in heard.items():
        classes = np.array([asked[name] for name in names])
        rank = ranks(logits, tagger.labels, classes)
        for label, row in rows.items():
            chosen = rank[(classes == label) | (label == "all")]
            row |= {f"{kind} top-{k}": float((chosen < k).mean()) for k in (1, 5)}
    return rows


def judge_pairs(logits: Tensor, named: list[set[str]], pairs: int, labels: list[str]) -> list[bool]:
    """3. Of the first `pairs` clips, each of two classes: are both heard, each above the 90th
    percentile of the clips that don't name it? logits [N, classes]; named: the classes asked for,
    clip by clip."""

    def heard(clip: int, label: str) -> bool:
        scores = logits[:, labels.index(label)]
        others = torch.tensor([label not in names for names in named])
        return bool(scores[clip] > scores[others].quantile(0.9))

    return [all(heard(i, label) for label in named[i]) for i in range(pairs)]


def agree(args: argparse.Namespace, options: Sequence[str]) -> None:
    """ValueError if --out was begun with another model, other recordings or other values of these
    options: its sounds would be taken for ours."""
    files = [args.model / "unet" / "diffusion_pytorch_model.safetensors", args.model / "model.json"]
    files += [HERE / name for name in ("recordings.csv", "wording.csv", "unseen_prompts.csv")]
    settings = {path.name: evaluate.file_sha256(path) for path in files}
    values = ((name, getattr(args, name)) for name in options)
    settings |= {name: str(x) if isinstance(x, Path) else x for name, x in values}
    path = args.out / "settings.json"
    if path.exists():
        must_agree(f"{args.out} was begun with", read_json(path), settings, "choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_aside(path, (json.dumps(settings, indent=1) + "\n").encode())


def judge(args: argparse.Namespace) -> dict:
    splits = {"real": "test", "training": "train"}  # of which real clips are composed
    splits = {kind: Recordings(HERE / "recordings.csv", name) for kind, name in splits.items()}
    recordings, known, out = splits["real"], splits["training"], args.out
    wording, classes = recordings.wording, recordings.names
    tagger = evaluate.Cnn14.load(args.classifier)
    if not tagger.labels or set(classes) - set(tagger.labels):
        raise ValueError(f"{args.classifier}: doesn't know the tiny world's classes")
    model = load_model(args.model, args.device)
    args.steps = model.steps if args.steps is None else args.steps
    args.guidance = model.guidance if args.guidance is None else args.guidance
    agree(args, ("seed", "steps", "guidance", "sampler", "scenes", "clips"))

    scenes = {s["id"]: s for s in draw_scenes(recordings, "test", args.scenes, SEED)}
    asked = {f"{k:02d}-{i}": x for k, x in enumerate(classes) for i in range(args.clips)}
    with open(HERE / "unseen_prompts.csv", newline="", encoding="utf-8") as file:
        unseen = {f"unseen-{i:03d}": row for i, row in enumerate(csv.DictReader(file))}
    unseen = {name: row for name, row in unseen.items() if row["label"] in classes}
    # Each class with another, seven places on in the alphabet
    pairs = {f"pair-{k:02d}": (x, classes[(k + 7) % len(classes)]) for k, x in enumerate(classes)}
    full = {x: wording[x]["full"] for x in classes}
    prompts = {
        "sets/generated": {name: scene["captions"][0] for name, scene in scenes.items()},
        "classes/generated": {name: wording[x]["plain"] for name, x in asked.items()},
        "classes/unseen": {name: row["prompt"] for name, row in unseen.items()},
        "pairs/generated": {name: f"{full[a]} and {full[b]}" for name, (a, b) in pairs.items()},
    }
    for folder, texts in prompts.items():
        write_generated(out / folder, texts, model, args)
    for kind, split in splits.items():
        one = {n: real_scene([x], split, i % args.clips) for i, (n, x) in enumerate(asked.items())}
        write_scenes(out / "classes" / kind, one, split)
        two = {name: real_scene([*pair], split, 0) for name, pair in pairs.items()}
        write_scenes(out / "pairs" / kind, two, split)

    result = vars(args) | judge_sets(out / "sets", scenes, recordings, args.classifier)
    folders = [*prompts, *(f"{x}/{kind}" for x in ("classes", "pairs") for kind in splits)]
    heard = {folder: hear(evaluate.sounds_of(out / folder), tagger) for folder in folders}

    # 2. Classes
    by_kind = {kind: heard[f"classes/{kind}"] for kind in KINDS}
    classes_asked = asked | {name: row["label"] for name, row in unseen.items()}
    result["classes"] = judge_classes(by_kind, classes_asked, tagger)

    # 3. Pairs
    result["pairs heard"] = {}
    for kind in (*splits, "generated"):
        (names, _, logits), (others, _, other_logits) = heard[f"pairs/{kind}"], by_kind[kind]
        named = [set(pairs[name]) for name in names] + [{asked[name]} for name in others]
        both = judge_pairs(torch.cat([logits, other_logits]), named, len(pairs), tagger.labels)
        result["pairs heard"][kind] = float(np.mean(both))
    result["pairs"] = dict(zip(prompts["pairs/generated"].values(), both, strict=True))

    # 4. Nearest training recording
    sources = [takes for by_source in known.classes.values() for takes in by_source.values()]
    files = {take["file"]: HERE / take["file"] for takes in sources for take in takes}
    names, recorded, _ = hear(files, tagger)
    nearest, medians = {}, {}
    for folder, (clips, embeddings, _) in heard.items():
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(recorded, dim=1).T
        best, which = cosines.max(1)
        medians[folder] = best.median().item()
        for clip, cosine, i in zip(clips, best.tolist(), which) if folder in prompts else ():
            found = {"prompt": prompts[folder][clip], "recording": names[i]}
            nearest[clip] = found | {"cosine": round(cosine, 4)}
    return result | {"median cosine to the nearest training recording": medians, "nearest": nearest}


def show(result: dict) -> None:
    print(f"{'first guess right, in five':32}" + "".join(f"{kind:>14}" for kind in KINDS))
    rows = sorted(result["classes"].items(), key=lambda item: -item[1]["generated top-1"])
    for label, row in rows:
        cells = (f"{row[f'{kind} top-1']:8.2f}{row[f'{kind} top-5']:6.2f}" for kind in KINDS)
        print(f"{label:32}{''.join(cells)}")
    for title in ("pairs heard", "median cosine to the nearest training recording"):
        print(f"{title}:", ", ".join(f"{kind} {x:.2f}" for kind, x in result[title].items()))
    for kind, row in result["seams and loudness"].items():
        print(f"{kind}:", ", ".join(f"{name} {x:.2f}" for name, x in row.items()))
    print(f"floor shares a recording with the reference: {result['floor shares a recording']:.0%}")


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--model", type=Path, default=HERE / "model", help="model folder [tiny/model]")
    add(
        "--classifier", type=Path, default=evaluate.CLASSIFIER, help="[tiny/classifier.safetensors]"
    )
    add("--out", type=Path, default=Path("runs/judge"), help="folder [runs/judge]")
    add("--scenes", type=number(int, 2), default=256, help="clips of each of the sets [256]")
    add("--clips", type=positive, default=8, help="clips of each class [8]")
    add("--seed", type=natural, default=0, help="of the generated sounds [0]")
    add("--steps", type=positive, help="denoising steps [the model's own]")
    add("--guidance", type=number(float, 0), help="[the model's own]")
    add("--sampler", choices=("pndm", "ddim", "ddpm"), default="pndm", help="[pndm]")
    add("--batch-size", type=positive, default=32, help="sounds at a time [32]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    with one_line_errors():
        result = judge(args)
    show(result)
    write_aside(
        args.out / "judge.json", (json.dumps(result, indent=1, default=str) + "\n").encode()
    )
    print(args.out / "judge.json")


if __name__ == "__main__":
    main()
