"""appendix/generated.py and appendix/augment.py: what is generated, what is drawn, the table."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import save_model
from safetensors.torch import load_file, save_file

from appendix import augment, classify, generated
from appendix.augment import Config, Mixture, balanced, worst
from appendix.classify import LogMelCodec, targets_of
from appendix.generated import balanced_subset, generated_rows
from latents import LatentDataset, encode_dataset
from sample import read_tensors
from train import clips_of_step

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("quick_sounds")


class Codec(LogMelCodec):
    """Writes what the clip's first sample says into all of its frames: quick to encode."""

    def encode(self, wave):
        return (wave[:, :1] * 255).round().to(torch.uint8)[..., None].expand(-1, 64, 1009)


def store(folder, labels, **more):
    """A data set of clips with these labels; clip i is full of the integer i + 1."""
    rows = [{"id": str(i), "file": "x", "captions": ["x"], "labels": x, "number": i}
            for i, x in enumerate(labels)]  # fmt: skip
    rows = [row | {key: values[i] for key, values in more.items()} for i, row in enumerate(rows)]
    load = lambda row: torch.full((1, 161_280), (row["number"] + 1) / 255)  # noqa: E731
    encode_dataset(folder, Codec(), rows, load)
    return LatentDataset(folder)


LABELS = [["a"], ["a"], ["a"], ["a", "b"], ["b"], ["c"]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Six real clips; two versions of each; twelve plain ones, of other labels."""
    root = tmp_path_factory.mktemp("sets")
    real = store(root / "real", LABELS)
    of, version = [i // 2 for i in range(12)], [i % 2 for i in range(12)]
    versions = store(root / "inversion", [LABELS[i] for i in of], of=of, version=version)
    labels = [["c"], ["b", "c"], ["b"]] * 4
    plain = store(root / "plain", labels, of=[None] * 12, version=[i // 6 for i in range(12)])
    return SimpleNamespace(real=real, inversion=versions, plain=plain)


def mixture(sets, kind="inversion", times=2, alpha=0.5, **more):
    return Mixture(
        sets.real, getattr(sets, kind), Config(kind=kind, times=times, alpha=alpha, **more)
    )


def drawn(data, steps=500, batch=32, seed=0):
    """How often each clip is drawn, as classify.train draws."""
    weights = data.sampling_weights().numpy().cumsum()
    weights /= weights[-1]
    draws = [clips_of_step(step, batch, weights, len(data), seed) for step in range(steps)]
    return np.bincount(np.concatenate(draws), minlength=len(data)) / (steps * batch)


# ---- equation (1) --------------------------------------------------------------------------------


def test_without_gains_draws_are_the_data_sets_own(sets):
    targets = targets_of(sets.real, range(6), sets.real.labels)
    p = balanced(targets, torch.ones(3))
    torch.testing.assert_close(p, sets.real.sampling_weights())
    torch.testing.assert_close(Mixture(sets.real, None, Config()).sampling_weights(), p)


@pytest.mark.parametrize("kind", ["inversion", "plain"])
def test_limits_of_alpha(sets, kind):
    real, made = mixture(sets, kind, alpha=0.0), mixture(sets, kind, alpha=1.0)
    assert len(real) == len(made) == 18
    assert drawn(real)[6:].sum() == 0 and (drawn(real)[:6] > 0).all()
    assert drawn(made)[:6].sum() == 0 and (drawn(made)[6:] > 0).all()
    torch.testing.assert_close(real.sampling_weights()[:6], sets.real.sampling_weights())
    if kind == "plain":  # balanced over their own labels
        torch.testing.assert_close(made.sampling_weights()[6:], sets.plain.sampling_weights())


@pytest.mark.parametrize("alpha, times", [(0.5, 1), (0.5, 2), (0.3, 2)])
def test_mixing_is_equation_1(sets, alpha, times):
    data, p = mixture(sets, alpha=alpha, times=times), sets.real.sampling_weights().numpy()
    assert len(data) == 6 + 6 * times
    # Written out as it stands: i, then j, then a coin.
    rng, n = np.random.default_rng(1), 40_000
    i, j = rng.choice(6, n, p=p), rng.integers(times, size=n)
    clip = np.where(rng.random(n) < 1 - alpha, i, 6 + times * i + j)
    expected = np.bincount(clip, minlength=len(data)) / n
    error = np.sqrt(expected / n + expected / 16_000)
    assert (np.abs(drawn(data) - expected) < 4 * error).all()
    assert abs(drawn(data)[6:].sum() - alpha) < 0.015


def test_draws_depend_on_the_seed_alone(sets):
    data = mixture(sets)
    assert (drawn(data, 5) == drawn(mixture(sets), 5)).all()
    assert (drawn(data, 5) != drawn(data, 5, seed=1)).any()


def test_clips_come_from_where_they_are(sets):
    data = mixture(sets, times=1)  # the versions with even numbers
    stored = data.stored(np.array([7, 0, 11, 5]))
    assert stored[:, 0, 0].tolist() == [3, 1, 11, 6] and stored.shape == (4, 64, 1009)
    assert data.stored([2])[0, 0, 0] == 3 and data.stored([6])[0, 0, 0] == 1
    names = lambda i: [data.labels[k] for k in data.label_ids(i)]  # noqa: E731
    assert [names(i) for i in range(12)] == LABELS * 2
    data = mixture(sets, "plain")  # whose own labels are b and c
    assert sets.plain.labels == ["b", "c"]
    assert [data.labels[k] for k in data.label_ids(7)] == ["b", "c"]
    assert targets_of(data, [6, 8], data.labels).tolist() == [[0, 0, 1], [0, 1, 0]]


def test_versions_of_other_clips_are_refused(sets, tmp_path):
    some = store(tmp_path, [LABELS[i] for i in range(5)], of=[*range(5)], version=[0] * 5)
    with pytest.raises(ValueError, match="versions of each clip"):
        Mixture(sets.real, some, Config(kind="inversion", times=1, alpha=0.5))


def test_the_worst_classes_are_amplified(sets, tmp_path):
    scores = [{"AP": {"a": 0.5, "b": 0.2, "c": 0.1}}, {"AP": {"a": 0.1, "b": 0.3, "c": 0.1}}]
    assert worst(scores, 1) == ["c"] and worst(scores, 2) == ["c", "b"]

    for times in (0, 2):
        data = mixture(sets, times=times, amplified=["c"], factor=3.0)
        # A label is drawn first: a, b or c with 1, 1, 3 parts of 5; clip 5 alone has c.
        share = drawn(data)
        of_c = share[5] + share[6:][10:].sum()
        assert abs(of_c - 3 / 5) < 0.015
        others = drawn(mixture(sets, times=times))
        assert abs(others[5] + others[6:][10:].sum() - 1 / 3) < 0.015
    plain = mixture(sets, "plain", alpha=1.0, amplified=["c"], factor=3.0).sampling_weights()[6:]
    # b and c with 1 and 3 parts of 4; each has 8 clips.
    torch.testing.assert_close(plain[:3], torch.tensor([3, 4, 1]).double() / 32)


# ---- what is generated ---------------------------------------------------------------------------


def test_balanced_subset():
    rows = [{"labels": x, "n": n} for n, x in enumerate([*LABELS, ["c"], ["c", "a"], [], ["b"]])]
    taken = [row["n"] for row in balanced_subset(rows, 2)]
    assert taken == [0, 1, 3, 4, 5, 6]  # clip 3 brings b, although there are two of a
    assert [row["n"] for row in balanced_subset(rows, 0)] == [0, 1, 2, 3, 4, 5, 6, 7, 9]


def test_plain_rows_are_one_to_three_classes_by_chance(tmp_path):
    real = store(tmp_path, [[x] for x in "abcdefgh"])
    rows = generated_rows("plain", real, 100, seed=0)
    assert len(rows) == 800 and len({row["id"] for row in rows}) == 800
    counts = np.bincount([len(row["labels"]) for row in rows])
    assert counts[0] == 0 and len(counts) == 4 and (np.abs(counts[1:] - 267) < 60).all()
    classes = np.unique([x for row in rows for x in row["labels"]], return_counts=True)[1]
    assert len(classes) == 8 and (np.abs(classes - 200) < 50).all()
    for row in rows:
        assert len(set(row["labels"])) == len(row["labels"])
        assert row["captions"] == ["The sound of " + ", ".join(row["labels"])]
    assert [row["version"] for row in rows[:17]] == [0] * 8 + [1] * 8 + [2]
    assert generated_rows("plain", real, 2, seed=0) == rows[:16]
    assert generated_rows("plain", real, 2, seed=1) != rows[:16]


def test_inversion_rows_are_versions_of_real_clips(sets):
    rows = generated_rows("inversion", sets.real, 2, seed=0)
    assert [row["of"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [row["version"] for row in rows] == [0, 1] * 6
    assert rows[6]["labels"] == ["a", "b"] and rows[6]["captions"] == ["The sound of <a>, <b>"]


# ---- end to end ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A random model, and six recordings of two classes, of which three are taken."""
    root = tmp_path_factory.mktemp("augment")
    save_model(root / "model")
    (root / "audio").mkdir()
    lines = ["file,labels"]
    for i in range(6):
        wave = 0.5 * np.sin(np.arange(40_000) * 0.05 * (i + 1))
        soundfile.write(root / "audio" / f"{i}.wav", wave, 16_000)
        lines.append(f"{i}.wav,{'Horn;Brass band' if i == 1 else ('Horn', 'Brass band')[i % 2]}")
    (root / "table.csv").write_text("\n".join(lines))
    table = ["encode", root / "audio", root / "table.csv", "--out", root / "test", "--workers", 0]
    classify.main([*map(str, table)])
    return root


def arguments(root, out, *options):
    made = ["--audio", root / "audio", "--table", root / "table.csv", "--per-class", 2]
    made += ["--model", root / "model", "--workers", 0, "--device", "cpu", "--precision", "fp32"]
    made += ["--denoising-steps", 2, "--inversion-steps", 2, "--out", out]
    return [*map(str, [*made, *options])]


def test_each_clip_is_generated_as_its_row_says(root, tmp_path, monkeypatch):
    asked = []

    def generate(model, prompts, *, indices, init_audio, **options):
        asked.append((prompts, indices, init_audio, options))
        return torch.tensor(indices)[:, None] / 255 * torch.ones(161_280)

    monkeypatch.setattr(generated.sample, "generate", generate)
    monkeypatch.setattr(generated, "LogMelCodec", Codec)
    generated.main(arguments(root, tmp_path, "--strength", 0.3))
    real, plain, versions = (LatentDataset(tmp_path / x) for x in ("real", "plain", "inversion"))
    assert [real.record(i)["file"] for i in range(len(real))] == ["0.wav", "1.wav", "3.wav"]
    for data in (plain, versions):
        assert len(data) == 6
        assert data.stored(range(6))[:, 0, 0].tolist() == [*range(6)]  # each is its own noise's
        captions = [data.record(i)["captions"][0] for i in range(6)]
        calls = asked[:1] if data is plain else asked[1:]
        assert captions == [prompt for call in calls for prompt in call[0]]
    assert asked.pop(0)[2] is None  # plain clips begin from noise
    assert [call[1] for call in asked] == [[0, 1], [2, 3], [4, 5]]
    for i, (prompts, _, start, options) in enumerate(asked):
        wave = soundfile.read(root / "audio" / real.record(i)["file"], dtype="float32")[0]
        np.testing.assert_allclose(start[: len(wave)], wave)
        words = ["<horn>", "<horn>, <brass_band>", "<brass_band>"][i]
        assert prompts == [f"The sound of {words}"] * 2
        assert options["strength"] == 0.3 and options["seed"] == 0
    words = load_file(tmp_path / "words" / "model" / "embedding.safetensors")
    assert words.keys() == {"<horn>", "<brass_band>"}
    asked.clear()
    generated.main(arguments(root, tmp_path, "--strength", 0.3))
    assert not asked  # all is there
    with pytest.raises(SystemExit, match="another table"):
        generated.main(arguments(root, tmp_path, "--strength", 0.4))

    # A class without a word would be read as letters.
    words, about = read_tensors(tmp_path / "words" / "model" / "embedding.safetensors")
    save_file({"<horn>": words["<horn>"]}, tmp_path / "one.safetensors", about)
    options = ["--kinds", "inversion", "--embedding", tmp_path / "one.safetensors"]
    with pytest.raises(SystemExit, match="has no word for <brass_band>$"):
        generated.main(arguments(root, tmp_path / "other", *options))


def test_the_table_end_to_end(root, tmp_path, monkeypatch, capsys):
    options = ["--test", root / "test", "--taggers", "cnn14:2", "--seeds", 0, 1]
    options += ["--steps", 2, "--batch-size", 4]
    augment.main(arguments(root, tmp_path, *options))
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| cnn14-2 |")]
    assert len(rows) == 4 and all(row.count("±") == 6 for row in rows)
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved["real clips"] == 3 and len(saved["rows"]) == 1 + 2 * (2 + 2 * 4)
    reals = [*tmp_path.glob("taggers/cnn14-2_mx+sp_real/seed-?/scores.json")]
    assert len(reals) == 2 and saved["worst"] == {
        "cnn14-2": worst([json.loads(x.read_text()) for x in reals], 1)
    }
    config = json.loads(
        (tmp_path / "taggers/cnn14-2_mx+sp_inversion_+1-worst/seed-1/scores.json").read_text()
    )["config"]
    assert config["alpha"] == 0.5 and config["times"] == 1 and config["factor"] == 2
    assert config["amplified"] == saved["worst"]["cnn14-2"]

    monkeypatch.setattr(classify, "train", lambda *_: pytest.fail("trained again"))
    augment.main(arguments(root, tmp_path, *options))
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("| cnn14-2 |")] == rows
    one = [*options, "--kinds", "plain", "--sets", "+1", "--seeds", 1]  # a row by itself
    augment.main(arguments(root, tmp_path, *one))
    assert "±" not in capsys.readouterr().out.split("| cnn14-2 |")[1]
    with pytest.raises(SystemExit, match="alpha") as e:
        augment.main(arguments(root, tmp_path, *one, "--alpha", 0.4))
    assert "\n" not in str(e.value.code)
    with pytest.raises(SystemExit, match="Tuba"):
        augment.main(arguments(root, tmp_path, *one, "--amplify", "Tuba"))


def test_bad_command_lines(root, tmp_path, capsys):
    for options, word in (
        (["--taggers", "cnn14"], "WIDTH"),
        (["--taggers", "taltrans:100"], "multiple of 16"),
        (["--strength", 0], "--strength is above 0"),
        (["--guidance", -1], "--guidance above 0"),
        (["--times", 1], "need 2"),
        (["--alpha", 2], "0 to 1"),
        (["--sets", "+3"], "invalid choice"),
        (["--sets", "+1-worst"], "which classes are worst"),
    ):
        with pytest.raises(SystemExit) as e:
            augment.main(arguments(root, tmp_path, *options))
        assert e.value.code == 2 and word in capsys.readouterr().err


def test_help_teaches():
    for module, word in (("augment", "AS-20k"), ("generated", "textual inversion")):
        command = [sys.executable, "-m", f"appendix.{module}", "--help"]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, text=True)
        assert done.returncode == 0 and word in done.stdout
