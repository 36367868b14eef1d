"""The tiny world: scenes are reproducible, balanced, rightly labelled, and store like any data."""

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from latents import LatentDataset
from tiny import compose, wording
from tiny.wording import read_wording

REPO = Path(__file__).parent.parent
TABLE = REPO / "tiny" / "recordings.csv"


@pytest.fixture(scope="module")
def train():
    return compose.Recordings(TABLE, "train")


@pytest.fixture(scope="module")
def scenes(train):
    return compose.draw_scenes(train, "train", 2000, seed=0)


def rows(name="recordings"):
    with open(REPO / "tiny" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scene_depends_on_seed_split_and_index_only(train, scenes):
    few = compose.draw_scenes(train, "train", 30, seed=0)
    assert few == scenes[:30]
    other = compose.draw_scenes(train, "train", 30, seed=1)
    assert [x["layers"] for x in other] != [x["layers"] for x in few]
    # A record that went through JSON, as on disk, gives the same sound, bit for bit.
    again = json.loads(json.dumps(few[7]))
    assert torch.equal(compose.compose_scene(few[7], train), compose.compose_scene(again, train))


def test_scenes_that_measure_stay_as_they_are():
    """Numbers of different models compare only on the same test scenes, draw for draw."""
    recordings = compose.Recordings(TABLE, "test")
    scenes = compose.draw_scenes(recordings, "test", 20, seed=0)
    drawn = [{key: scene[key] for key in scene if key != "captions"} for scene in scenes]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == "f680e6edba6dcc30"


def test_scenes_to_train_on_vary_more(scenes):
    events = [e for scene in scenes for layer in scene["layers"] for e in layer["events"]]
    assert {(2, 3), (3, 2)} <= {tuple(e["pitch"]) for e in events}
    assert max(scene["wet"] for scene in scenes if scene["place"] == "near") > 0.8


def test_draws_are_balanced_over_classes(train, scenes):
    counts = Counter(layer["label"] for scene in scenes for layer in scene["layers"])
    share = sum(counts.values()) / len(train.names)
    assert set(counts) == set(train.names)
    assert all(0.6 * share < n < 1.4 * share for n in counts.values())
    labels_a_scene = Counter(len(scene["layers"]) for scene in scenes)
    for count, probability in enumerate(compose.LABELS_A_SCENE["train"], 1):
        assert labels_a_scene[count] / len(scenes) == pytest.approx(probability, abs=0.04)


def test_draws_are_balanced_over_sources(train):
    """Within a class a source counts as much as any other, however many recordings it has."""
    label = max(train.names, key=lambda x: len(train.classes[x]))
    sources = train.classes[label]
    source_of = {take["file"]: name for name, takes in sources.items() for take in takes}
    rng = np.random.default_rng(0)
    layers = [compose.draw_layer(rng, train, label, 0.0, 10.0) for _ in range(1000)]
    counts = Counter(source_of[layer["events"][0]["file"]] for layer in layers)
    share = 1000 / len(sources)
    assert len(counts) == len(sources)
    assert all(abs(n - share) < 5 * share**0.5 for n in counts.values())


def test_labels_are_those_of_the_events(scenes):
    label_of = {row["file"]: row["labels"].split(";")[0] for row in rows()}
    group_of = {row["file"]: row["source_group"] for row in rows()}
    for scene in scenes[:500]:
        for layer in scene["layers"]:
            assert {label_of[event["file"]] for event in layer["events"]} == {layer["label"]}
            assert len({group_of[event["file"]] for event in layer["events"]}) == 1
        assert scene["labels"] == sorted(layer["label"] for layer in scene["layers"])
        assert len(set(scene["labels"])) == len(scene["labels"])


def test_splits_share_no_recording(scenes):
    split_of = {row["file"]: row["split"] for row in rows()}
    test = compose.draw_scenes(compose.Recordings(TABLE, "test"), "test", 100, seed=0)
    for split, drawn in (("train", scenes), ("test", test)):
        layers = [layer for scene in drawn for layer in scene["layers"]]
        assert {split_of[e["file"]] for layer in layers for e in layer["events"]} == {split}


def test_captions_name_every_label(train, scenes):
    """A caption that no language model wrote has one of its class's phrases for each label."""
    written = [
        captions for words in train.wording.values() for captions in words["written"].values()
    ]
    written = {caption for captions in written for caption in captions}
    for scene in scenes:
        assert len(scene["captions"]) == len(set(scene["captions"])) == wording.CAPTIONS
        for caption in set(scene["captions"]) - written:
            for layer in scene["layers"]:
                words = train.wording[layer["label"]]
                names = [words["plain"], layer["label"], *words["also"]]
                assert any(name in caption for name in names), (caption, layer["label"])
        if len(scene["layers"]) == 1:
            assert scene["captions"][0] == train.wording[scene["labels"][0]]["plain"]


def test_language_model_captions_are_of_known_labels_and_reach_scenes(train, scenes):
    table = {row["caption"]: sorted(row["labels"].split(";")) for row in rows("llm_captions")}
    assert all(set(labels) <= set(train.names) for labels in table.values())
    found = [(x, scene["labels"]) for scene in scenes for x in scene["captions"] if x in table]
    assert len(found) > 100 and all(table[caption] == labels for caption, labels in found)


def test_unseen_prompts_are_in_words_of_their_own():
    """At least three a class, none of them said in training, by people or by the language model."""
    classes = read_wording()
    said = {x.lower() for w in classes.values() for x in (w["plain"], w["full"], *w["also"])}
    said |= {row["caption"].lower() for row in rows("llm_captions")}
    prompts = rows("unseen_prompts")
    counts = Counter(row["label"] for row in prompts)
    assert set(counts) == set(classes) and min(counts.values()) >= 3
    assert len(prompts) == len({row["prompt"] for row in prompts})
    assert not said & {row["prompt"].lower() for row in prompts}


def test_every_class_has_words():
    classes = read_wording()
    for row in rows():
        words = classes[row["labels"].split(";")[0]]
        assert words["plain"] and words["full"].endswith(words["plain"]) and all(words["also"])
        phrases = [words["plain"], words["full"], *words["also"]]
        assert len(phrases) == len(set(phrases)) or words["plain"] == words["full"]
        assert len(set(phrases)) >= 40


def test_reference_captions_are_of_the_first_scene_of_each_label_set():
    """36 sets of one label (all), 44 of two, 20 of three, in the order of the test scenes."""
    drawn = compose.draw_scenes(compose.Recordings(TABLE, "test"), "test", 512, seed=0)
    left, chosen = {1: 36, 2: 44, 3: 20}, {}
    for scene in drawn:
        labels = tuple(scene["labels"])
        if labels not in chosen and left[len(labels)]:
            left[len(labels)] -= 1
            chosen[labels] = scene
    table = rows("reference_captions")
    assert len(table) == len({row["caption"] for row in table}) == 100
    for row, scene in zip(table, chosen.values(), strict=True):
        assert (row["id"], row["labels"].split(";")) == (scene["id"], scene["labels"])
        assert re.fullmatch("[A-Z][^.!?;]*[.]", row["caption"]), row  # one sentence
        assert 6 <= len(row["caption"].split()) <= 20, row
        assert row["caption"].rstrip(".").lower() not in [x.lower() for x in scene["captions"]]


def test_waves_are_finite_audible_and_long_enough(train, scenes):
    sounding = []
    for scene in scenes[:10]:
        wave = compose.compose_scene(scene, train)
        assert wave.shape == (161_280,) and wave.dtype == torch.float32
        assert wave.isfinite().all() and wave.abs().max() <= 1
        rms = compose.frame_rms(wave)
        assert rms.max() > 0.005
        sounding.append((rms > rms.max() / 30).float().mean())
    assert min(sounding) > 0.03 and sum(sounding) / 10 > 0.5  # mostly sound, not silence


def test_pitch_goes_up_with_p_over_q():
    """A sine of 1000 Hz at pitch 6/5 is one of 1200 Hz, and as much shorter."""
    sine = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    take = {"file": "sine", "seconds": 1.0}
    stem = torch.zeros(compose.FFT_SAMPLES)
    item = compose.event(take, 0.0, 1 / 1.2, (6, 5), 0.0, 0.01)
    compose.place_event(stem, item, sine)
    assert stem.nonzero().max() == pytest.approx(16_000 / 1.2, abs=3)
    pitch = torch.fft.rfft(stem[:13_000]).abs().argmax() * 16_000 / 13_000
    assert pitch == pytest.approx(1200, abs=5)


def test_texture_has_no_holes():
    """Crossfades at equal power keep the level of a noise that is looped."""
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    takes, rng = [{"file": "noise", "seconds": 1.0}], np.random.default_rng(0)
    stem = torch.zeros(compose.FFT_SAMPLES)
    for item in compose.texture_events(rng, takes, 0.0, compose.SECONDS):
        compose.place_event(stem, item, noise)
    rms = compose.frame_rms(stem[:160_000])
    assert 0.6 < rms.min() and rms.max() < 1.6


def test_command_line(tmp_path):
    """Two builds with different workers are the same bytes, and a data set like any other."""
    for name, workers in (("a", "0"), ("b", "2")):
        command = [
            "-m",
            "tiny.compose",
            "--out",
            tmp_path / name,
            "--clips",
            8,
            "--workers",
            workers,
        ]
        subprocess.run([sys.executable, *map(str, command)], cwd=REPO, check=True)
    a, b = ({x.name: x.read_bytes() for x in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b
    data = LatentDataset(tmp_path / "a")
    assert [data.record(i)["id"] for i in range(8)] == [f"train-0-{i:06d}" for i in range(8)]


@pytest.mark.parametrize(
    "args, status, words",
    [
        (["--recordings", "/nowhere/recordings.csv"], 1, "/nowhere/recordings.csv"),
        (["--recordings", "tiny/wording.csv"], 1, "columns"),
        (["--clips", "0"], 2, "--clips"),
        (["--split", "validation"], 2, "--split"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path, args, status, words, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", ["compose", "--out", str(tmp_path / "out"), *args])
    with pytest.raises(SystemExit) as stop:
        compose.main()
    said = str(stop.value) if status == 1 else capsys.readouterr().err
    assert words in said
    assert stop.value.code == status if status == 2 else said.startswith("error: ")
