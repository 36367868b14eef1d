"""The tiny world: scenes are reproducible, balanced, rightly labelled, and store like any data."""

import csv
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from latents import LatentDataset
from tiny import compose, wording
from tiny.wording import read_wording

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def train():
    return compose.Recordings(compose.HERE / "recordings.csv", "train")


@pytest.fixture(scope="module")
def held_out():
    test = compose.Recordings(compose.HERE / "recordings.csv", "test")
    return compose.draw_scenes(test, "test", 512, seed=0)


@pytest.fixture(scope="module")
def scenes(train):
    return compose.draw_scenes(train, "train", 1000, seed=0)


def rows(name="recordings"):
    with open(compose.HERE / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scene_depends_on_seed_split_and_index_only(train, scenes):
    few = compose.draw_scenes(train, "train", 30, seed=0)
    assert few == scenes[:30]
    other = compose.draw_scenes(train, "train", 30, seed=1)
    assert [x["layers"] for x in other] != [x["layers"] for x in few]
    # A record that went through JSON, as on disk, gives the same sound, bit for bit.
    again = json.loads(json.dumps(few[7]))
    assert torch.equal(compose.compose_scene(few[7], train), compose.compose_scene(again, train))


def test_scenes_that_measure_stay_as_they_are(held_out):
    """Numbers of different models compare only on the same test scenes, draw for draw."""
    drawn = [{key: x[key] for key in x if key != "captions"} for x in held_out[:20]]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == "f680e6edba6dcc30"


def test_draws_are_balanced_over_classes(train, scenes):
    counts = Counter(layer["label"] for scene in scenes for layer in scene["layers"])
    share = sum(counts.values()) / len(train.names)
    assert set(counts) == set(train.names)
    assert all(0.6 * share < n < 1.4 * share for n in counts.values())
    labels_a_scene = Counter(len(scene["layers"]) for scene in scenes)
    for count, probability in enumerate(compose.LABELS_A_SCENE["train"], 1):
        assert labels_a_scene[count] / len(scenes) == pytest.approx(probability, abs=0.05)


def test_labels_and_split_are_those_of_the_recordings(scenes, held_out):
    table = {row["file"]: row for row in rows()}
    for split, scene in [("train", x) for x in scenes] + [("test", x) for x in held_out]:
        for layer in scene["layers"]:
            takes = [table[event["file"]] for event in layer["events"]]
            assert {take["labels"].split(";")[0] for take in takes} == {layer["label"]}
            assert {take["split"] for take in takes} == {split}
            assert len({take["source_group"] for take in takes}) == 1
        assert scene["labels"] == sorted({layer["label"] for layer in scene["layers"]})


def test_captions_name_every_label(train, scenes):
    """A caption that no language model wrote has one of its class's phrases for each label."""
    written = {x for words in train.wording.values() for y in words["written"].values() for x in y}
    for scene in scenes:
        assert len(scene["captions"]) == len(set(scene["captions"])) == wording.CAPTIONS
        for caption in set(scene["captions"]) - written:
            for label in scene["labels"]:
                words = train.wording[label]
                names = [words["plain"], label, *words["also"]]
                assert any(name in caption for name in names), (caption, label)
        if len(scene["layers"]) == 1:
            assert scene["captions"][0] == train.wording[scene["labels"][0]]["plain"]


def test_unseen_prompts_are_in_words_of_their_own():
    """At least three a class, none of them said in training, by people or by the language model."""
    classes, prompts = read_wording(), rows("unseen_prompts")
    said = {x.lower() for w in classes.values() for x in (w["plain"], w["full"], *w["also"])}
    said |= {row["caption"].lower() for row in rows("llm_captions")}
    counts = Counter(row["label"] for row in prompts)
    assert set(counts) == set(classes) and min(counts.values()) >= 3
    assert len(prompts) == len({row["prompt"] for row in prompts})
    assert not said & {row["prompt"].lower() for row in prompts}


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


def test_the_command_is_reproducible_on_any_number_of_workers(tmp_path, monkeypatch):
    """Two builds are the same bytes, and a data set like any other."""
    command = ["-m", "tiny.compose", "--out", f"{tmp_path}/a", "--clips", "4", "--workers", "2"]
    subprocess.run([sys.executable, *command], cwd=REPO, check=True)
    again = ["--out", f"{tmp_path}/b", "--clips", "4", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["compose", *again])
    compose.main()
    a, b = ({x.name: x.read_bytes() for x in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b
    data = LatentDataset(tmp_path / "a")
    assert [data.record(i)["id"] for i in range(4)] == [f"train-0-{i:06d}" for i in range(4)]


def test_mistakes_get_one_clear_line(tmp_path, monkeypatch):
    for table, words in (("/nowhere/table.csv", "/nowhere/table.csv"), (__file__, "columns")):
        monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--recordings", table])
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
            compose.main()
