"""What people call a sound: the captions of the tiny world's scenes.

`wording.csv` has a row for each class: its AudioSet label, how the sound fills its time (see
`compose.draw_layer`), a noun and a verb ("a dog", "barking"), and other things that people type
("a dog barks|barking dog|…"). A scene gets the plain caption ("dog barking") and two others, or one
other if it has several labels: these are named by noun and verb only. So there are some thousands
of distinct captions in all, and the states of a text encoder fit a cache.
"""

import csv
from pathlib import Path

import numpy as np


def read_wording() -> dict[str, dict]:
    """label -> {"plays", "full": "a dog barking", "plain": "dog barking", "also": [...]}."""
    wording = {}
    with open(Path(__file__).with_name("wording.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            full = f"{row['noun']} {row['verb']}"
            wording[row["label"]] = {
                "plays": row["plays"],
                "full": full,
                "plain": full.removeprefix("a ").removeprefix("an "),
                "also": row["also"].split("|"),
            }
    return wording


def draw_captions(rng: np.random.Generator, scene: dict, wording: dict) -> list[str]:
    """Two or three different captions of a scene (`compose.draw_scene`), the plain one first."""
    labels = [layer["label"] for layer in scene["layers"]]
    plain = [wording[label]["plain"] for label in labels]
    full = [wording[label]["full"] for label in labels]
    if len(labels) == 1:
        first, label = plain[0], labels[0]
        if scene["place"] == "far":
            others = [f"distant {first}", f"{full[0]} in the distance", f"{full[0]} far away"]
        elif scene["place"] == "hall":
            others = [f"{first} in a large hall", f"{full[0]} in a large hall"]
            others += [f"{first} with a long echo", f"{full[0]} with reverberation"]
        else:
            others = [full[0], f"the sound of {full[0]}", f"The sound of {label}"]
            others += wording[label]["also"]
    elif scene["order"] == "then":
        first = f"{plain[0]}, then {plain[1]}"
        others = [f"{full[0]}, then {full[1]}", f"{full[0]} followed by {full[1]}"]
        others += [f"first {plain[0]}, then {plain[1]}"]
    else:
        first = listing(plain)
        others = [listing(full), f"The sound of {listing(labels)}"]
        others += [f"{listing(full[:-1])} with {plain[-1]} in the background"]
    others = [x for x in dict.fromkeys(others) if x != first]  # "rain falling" has no article
    count = 2 if len(labels) == 1 else 1
    return [first, *(str(x) for x in rng.choice(others, count, replace=False))]


def listing(words: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
