"""How good is the tiny model? Its sounds against held-out recordings, with numbers and controls.

    python -m tiny.judge                                  tiny/model, into runs/judge
    python -m tiny.judge --model runs/tiny/model --out runs/judge-mine

1. SETS. Scenes of held-out recordings are composed (reference), and for each another one with the
   same labels from other held-out recordings (floor; where a scene uses all that its class has, it
   shares some: how many do is said); the model is asked for the reference's captions (generated).
   evaluate.py compares the three, with all its controls.
2. CLASSES. Clips of each class by its plain caption; how often the tagger's first guess, or one of
   its first five, is the class asked for, beside the same for real held-out clips of that class,
   and for clips of training recordings, which the tagger has learned from.
3. PAIRS. Prompts with two sounds: does the tagger hear both, each more than in nine of ten clips
   whose prompts don't name it? Beside the same for scenes of held-out recordings of the two, and
   of training recordings: what it can hear at best.
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
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
from latents import read_json, save_audio, write_aside
from sample import generate, load_model
from tiny.compose import HERE, Recordings, compose_scene, draw_layers, draw_scenes
from train import must_agree

SEED = 1  # of the scenes; those of tiny/data/test are seed 0's
KINDS = ("generated", "real", "training")  # of clips; real ones are of held-out recordings


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
        texts_of = [texts[i] for i in batch]
        waves = generate(model, texts_of, seed=args.seed, indices=batch, **options)
        for i, wave in zip(batch, waves, strict=True):
            save_audio(folder / f"{names[i]}.wav", wave, json.dumps({"prompt": texts[i]}))


def ranks(logits: Tensor, labels: list[str], asked: Sequence[str]) -> np.ndarray:
    """0 where the class asked for is the tagger's first guess, 1 where the second, …"""
    place = [labels.index(label) for label in asked]
    own = logits[torch.arange(len(logits)), place][:, None]
    return (logits > own).sum(1).numpy()


def hear(sounds: dict[str, Path], tagger: evaluate.Cnn14) -> tuple[list[str], Tensor, Tensor]:
    """Names, embeddings [N, D] and logits [N, classes] of files."""
    loaders = {name: partial(evaluate.load_sound, path) for name, path in sounds.items()}
    found, width = evaluate.hear(loaders, tagger), tagger.widths[-1]
    return found.names, found.values[:, :width], found.values[:, width:]


def judge_sets(recordings: Recordings, model, args: argparse.Namespace) -> tuple[dict, dict, float]:
    """1. evaluate.py's metrics, the captions, and the share of the floor's scenes that have a
    recording of the reference's."""
    folder = args.out / "sets"
    scenes = {s["id"]: s for s in draw_scenes(recordings, "test", args.scenes, SEED)}
    captions = {name: scene["captions"][0] for name, scene in scenes.items()}
    others = {n: other_scene(s, recordings, i) for i, (n, s) in enumerate(scenes.items())}
    write_scenes(folder / "reference", scenes, recordings)
    write_scenes(folder / "floor", others, recordings)
    write_generated(folder / "generated", captions, model, args)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "caption"), *captions.items()])
    arguments = [folder / "generated", folder / "reference", "--controls", folder / "floor"]
    arguments += ["--codec", "mel", "--variants", "--classifier", args.classifier, "--out", folder]
    evaluate.main([*map(str, arguments)])
    shared = [bool(recordings_of(s) & recordings_of(others[n])) for n, s in scenes.items()]
    metrics = json.loads((folder / "metrics.json").read_text())["sets"]
    return metrics, captions, float(np.mean(shared))


def judge_classes(heard: dict, asked: dict[str, str], tagger: evaluate.Cnn14) -> dict[str, dict]:
    """2. class -> {"generated top-1": share, …}. heard: kind -> what `hear` gives; asked: name ->
    class."""
    rows = {label: {} for label in sorted(set(asked.values()))}
    for kind, (names, _, logits) in heard.items():
        classes = np.array([asked[name] for name in names])
        rank = ranks(logits, tagger.labels, classes)
        for label, row in rows.items():
            for k in (1, 5):
                row[f"{kind} top-{k}"] = float((rank[classes == label] < k).mean())
    return rows


def judge_pairs(logits: Tensor, named: list[set[str]], pairs: int, labels: list[str]) -> list[bool]:
    """3. Of the first `pairs` clips, each of two classes: are both heard, each above the 90th
    percentile of the clips that don't name it? logits [N, classes]; named: the classes asked for,
    clip by clip."""
    both = []
    for i in range(pairs):
        above = []
        for label in named[i]:
            scores = logits[:, labels.index(label)]
            without = [j for j in range(len(named)) if label not in named[j]]
            above.append(bool(scores[i] > scores[without].quantile(0.9)))
        both.append(all(above))
    return both


def agree(args: argparse.Namespace, options: Sequence[str]) -> None:
    """ValueError if --out was begun with another model, other recordings or other values of these
    options: its sounds would be taken for ours."""
    names = ("unet/diffusion_pytorch_model.safetensors", "model.json")
    files = {name: args.model / name for name in names}
    files |= {name: HERE / name for name in ("recordings.csv", "wording.csv")}
    settings = {name: evaluate.file_sha256(path) for name, path in files.items()}
    values = {name: getattr(args, name) for name in options}
    settings |= {name: str(x) if isinstance(x, Path) else x for name, x in values.items()}
    path = args.out / "settings.json"
    if path.exists():
        must_agree(f"{args.out} was begun with", read_json(path), settings, "choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_aside(path, (json.dumps(settings, indent=1) + "\n").encode())


def judge(args: argparse.Namespace) -> dict:
    recordings = Recordings(HERE / "recordings.csv", "test")
    wording, classes, out = recordings.wording, recordings.names, args.out
    tagger = evaluate.Cnn14.load(args.classifier)
    if not tagger.labels or set(classes) - set(tagger.labels):
        raise ValueError(f"{args.classifier}: doesn't know the tiny world's classes")
    model = load_model(args.model, args.device)
    agree(args, ("seed", "steps", "guidance", "sampler", "scenes", "clips"))
    sets, captions, shared = judge_sets(recordings, model, args)

    known = Recordings(HERE / "recordings.csv", "train")
    splits = {"real": recordings, "training": known}  # of which real clips are composed
    asked = {f"{k:02d}-{i}": x for k, x in enumerate(classes) for i in range(args.clips)}
    prompts = {name: wording[label]["plain"] for name, label in asked.items()}
    for kind, split in splits.items():
        numbered = enumerate(asked.items())
        scenes = {name: real_scene([x], split, i % args.clips) for i, (name, x) in numbered}
        write_scenes(out / "classes" / kind, scenes, split)
    write_generated(out / "classes" / "generated", prompts, model, args)
    folders = {kind: out / "classes" / kind for kind in KINDS}
    heard = {kind: hear(evaluate.sounds_of(path), tagger) for kind, path in folders.items()}
    rows = judge_classes(heard, asked, tagger)
    totals = {key: float(np.mean([row[key] for row in rows.values()])) for key in rows[classes[0]]}

    # Each class with another, seven places on in the alphabet.
    pairs = {
        f"pair-{k:02d}": (classes[k], classes[k - len(classes) + 7]) for k in range(len(classes))
    }
    texts = {n: " and ".join(wording[label]["full"] for label in pair) for n, pair in pairs.items()}
    for kind, split in splits.items():
        scenes = {name: real_scene([*pair], split, 0) for name, pair in pairs.items()}
        write_scenes(out / "pairs" / kind, scenes, split)
    write_generated(out / "pairs" / "generated", texts, model, args)
    in_pairs = {kind: hear(evaluate.sounds_of(out / "pairs" / kind), tagger) for kind in KINDS}
    both = {}
    for kind, (others, _, other_logits) in heard.items():
        names, _, logits = in_pairs[kind]
        named = [set(pairs[n]) for n in names] + [{asked[n]} for n in others]
        logits = torch.cat([logits, other_logits])
        both[kind] = judge_pairs(logits, named, len(names), tagger.labels)

    # 4. Nearest training recording
    sources = [takes for by_source in known.classes.values() for takes in by_source.values()]
    files = [take["file"] for takes in sources for take in takes]
    names, embeddings, _ = hear({file: HERE / file for file in files}, tagger)
    embeddings = F.normalize(embeddings, dim=1)
    cosines = {kind: F.normalize(e, dim=1) @ embeddings.T for kind, (_, e, _) in heard.items()}
    in_sets = hear(evaluate.sounds_of(out / "sets" / "generated"), tagger)
    nearest, asked_for = {}, captions | prompts | texts
    for clips, e, _ in (in_sets, heard["generated"], in_pairs["generated"]):
        for clip, cosine in zip(clips, F.normalize(e, dim=1) @ embeddings.T, strict=True):
            best, i = cosine.max(0)
            found = {"prompt": asked_for[clip], "recording": names[i]}
            nearest[clip] = found | {"cosine": round(best.item(), 4)}
    return {
        "model": str(args.model), "classifier": str(args.classifier), "seed": args.seed,
        "sets": sets, "floor shares a recording": shared, "totals": totals, "classes": rows,
        "pairs heard": {kind: float(np.mean(found)) for kind, found in both.items()},
        "pairs": dict(zip(texts.values(), both["generated"], strict=True)),
        "median cosine to the nearest training recording":
            {kind: x.max(1).values.median().item() for kind, x in cosines.items()},
        "nearest": nearest,
    }  # fmt: skip


def show(result: dict) -> None:
    print(f"{'class':34}{'generated':>16}{'held-out real':>18}{'training':>18}   (top-1, top-5)")
    rows = sorted(result["classes"].items(), key=lambda item: -item[1]["generated top-1"])
    for label, row in [*rows, ("all", result["totals"])]:
        cells = [f"{row[f'{kind} top-1']:10.2f}{row[f'{kind} top-5']:8.2f}" for kind in KINDS]
        print(f"{label:32}{''.join(cells)}")
    pairs = result["pairs heard"]
    print(f"two sounds asked for, both heard: generated {pairs['generated']:.0%}, held-out real "
          f"{pairs['real']:.0%}, training recordings {pairs['training']:.0%}")  # fmt: skip
    similarity = result["median cosine to the nearest training recording"]
    print("nearest training recording, median cosine: generated {generated:.3f}, held-out real "
          "{real:.3f}, training {training:.3f}".format(**similarity))  # fmt: skip
    print(f"scenes of the floor that share a recording with the reference: "
          f"{result['floor shares a recording']:.0%}")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=HERE / "model", help="model folder [tiny/model]")
    add(
        "--classifier", type=Path, default=evaluate.CLASSIFIER, help="[tiny/classifier.safetensors]"
    )
    add("--out", type=Path, default=Path("runs/judge"), help="folder [runs/judge]")
    add("--scenes", type=int, default=256, help="clips of each of the sets [256]")
    add("--clips", type=int, default=8, help="clips of each class [8]")
    add("--seed", type=int, default=0, help="of the generated sounds [0]")
    add("--steps", type=int, default=45, help="[45]")
    add("--guidance", type=float, help="[the model's own]")
    add("--sampler", choices=("pndm", "ddim", "ddpm"), default="pndm", help="[pndm]")
    add("--batch-size", type=int, default=32, help="sounds at a time [32]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    if args.scenes < 20 or args.clips < 1:
        parser.error("--scenes is 20 or more, --clips 1 or more")
    try:
        result = judge(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    show(result)
    write_aside(args.out / "judge.json", (json.dumps(result, indent=1) + "\n").encode())
    print(args.out / "judge.json")


if __name__ == "__main__":
    main()
