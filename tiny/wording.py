"""What people call a sound: the captions of the tiny world's scenes.

`wording.csv` has a row for each class: its AudioSet label, how the sound fills its time (see
`compose.draw_layer`), a noun and a verb ("a dog", "barking"), and dozens of other things that
people type ("a hound baying|woof|…"). `llm_captions.csv` has what a language model made of classes
and of pairs of them, by the papers' prompt (README.md here). A scene gets the plain caption ("dog
barking") and some others, each in words of its own.
"""

import csv
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CAPTIONS = 6  # a scene
# What surrounds the words for a scene's labels.
ALONE = ("{all}", "{all}", "{all}", "{all}", "the sound of {all}", "The sound of {labels}")
TOGETHER = ("{all}", "{all}", "{rest} with {last}", "{rest} with {last} in the background")
TOGETHER += ("The sound of {labels}",)
THEN = ("{rest}, then {last}", "{rest} followed by {last}", "first {rest}, then {last}")
PLACED = {
    "far": ("distant {all}", "{all} in the distance", "{all} far away", "{all} from afar"),
    "hall": ("{all} in a large hall", "{all} with a long echo", "{all} with reverberation"),
}


def read_wording() -> dict[str, dict]:
    """label -> {"plays", "full": "a dog barking", "plain": "dog barking", "also": [...], and
    "written": {labels of a scene, sorted: [captions by a language model]}}."""
    wording = {}
    with open(HERE / "wording.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            full = f"{row['noun']} {row['verb']}"
            wording[row["label"]] = {
                "plays": row["plays"],
                "full": full,
                "plain": full.removeprefix("a ").removeprefix("an "),
                "also": row["also"].split("|"),
                "written": {},
            }
    with open(HERE / "llm_captions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            labels = tuple(row["labels"].split(";"))
            wording[labels[0]]["written"].setdefault(labels, []).append(row["caption"])
    return wording


def draw_captions(rng: np.random.Generator, scene: dict, wording: dict) -> list[str]:
    """CAPTIONS different captions of a scene (`compose.draw_scene`), the plain one first."""
    labels = [layer["label"] for layer in scene["layers"]]
    plain = [wording[label]["plain"] for label in labels]
    key = tuple(sorted(labels))
    written = wording[key[0]]["written"].get(key, [])
    if scene["order"] == "then":
        forms, written = THEN, []
    elif scene["place"] != "near":
        forms, written = PLACED[scene["place"]], []
    else:
        forms = ALONE if len(labels) == 1 else TOGETHER
    captions = [f"{plain[0]}, then {plain[1]}" if scene["order"] == "then" else listing(plain)]
    while len(captions) < CAPTIONS:
        if written and rng.random() < 0.2:
            caption = str(rng.choice(written))
        else:
            words = [say(rng, wording[label]) for label in labels]
            parts = {"all": listing(words), "last": words[-1], "labels": ", ".join(labels)}
            parts["rest"] = listing(words[:-1])
            caption = str(rng.choice(forms)).format(**parts)
        if caption not in captions:
            captions.append(caption)
    return captions


def say(rng: np.random.Generator, words: dict) -> str:
    """One of the ways to say a class."""
    ways = [words["plain"], words["full"], *words["also"]]
    return ways[rng.integers(len(ways))]


def listing(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
