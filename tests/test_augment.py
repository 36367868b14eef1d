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
from safetensors.torch import load_file, save_file

from appendix import augment, classify, generated
from appendix.augment import Config, Mixed, worst
from appendix.classify import LogMelCodec, balanced, labels_of, targets_of
from appendix.generated import balanced_subset, generated_rows
from latents import LatentDataset, encode_dataset
from tests.conftest import save_model

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("quick_sounds")


class Codec(LogMelCodec):
    """Writes what the clip's first sample says into all of its frames: quick to encode."""

    def encode(self, wave):
        return (wave[:, :1] * 255).round().to(torch.uint8)[..., None].expand(-1, 64, 1009)


def store(folder, labels, **more):
    """A data set of clips with these labels; clip i is full of the integer i + 1."""
    rows = [{"id": str(i), "captions": ["x"], "labels": x, "number": i}
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
    of, version = [i // 2 for i in range(12)], [i % 2 for i in range(12)]
    store(root / "inversion", [LABELS[i] for i in of], of=of, version=version)
    labels = [["c"], ["b", "c"], ["b"]] * 4
    plain = store(root / "plain", labels, of=[None] * 12, version=[i // 6 for i in range(12)])
    return SimpleNamespace(root=root, real=store(root / "real", LABELS), plain=plain)


def mixed(sets, kind="inversion", times=2, alpha=0.5, **more):
    """The tagger that is to be trained, with what it draws from."""
    real = str(sets.root / "real")
    c = Config(data=real, val_data=real, width=1, kind=kind, times=times, alpha=alpha, **more)
    return Mixed(c, torch.device("cpu"))


def balance(data):
    return balanced(targets_of(data, range(len(data)), labels_of(data)))


# ---- equation (1) --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, times", [(0.5, 1), (0.5, 2), (0.3, 2)])
def test_mixing_is_equation_1(sets, alpha, times):
    data, p, n = mixed(sets, alpha=alpha, times=times), balance(sets.real).numpy(), 40_000
    assert data.clips == 6 + 6 * times
    # Written out as it stands: i, then j, then a coin.
    rng = np.random.default_rng(1)
    i, j = rng.choice(6, n, p=p), rng.integers(times, size=n)
    clip = np.where(rng.random(n) < 1 - alpha, i, 6 + times * i + j)
    expected = np.bincount(clip, minlength=data.clips) / n
    drawn = np.bincount(data.choose(0, n), minlength=data.clips) / n
    error = np.sqrt(2 * expected / n)
    assert (np.abs(drawn - expected) < 4 * error).all()
    assert abs(drawn[6:].sum() - alpha) < 0.015
    assert (data.choose(3, 50) != data.choose(4, 50)).any()


@pytest.mark.parametrize("kind", ["inversion", "plain"])
def test_limits_of_alpha(sets, kind):
    real, made = (mixed(sets, kind, alpha=alpha).p for alpha in (0.0, 1.0))
    assert len(real) == len(made) == 18 and real[6:].sum() == made[:6].sum() == 0
    torch.testing.assert_close(real[:6], balance(sets.real))
    if kind == "plain":  # balanced over their own labels
        torch.testing.assert_close(made[6:], balance(sets.plain))


def test_clips_come_from_where_they_are(sets):
    task = mixed(sets, times=1)  # the versions with even numbers
    stored = task.data.stored(np.array([7, 0, 11, 5]))
    assert stored[:, 0, 0].tolist() == [3, 1, 11, 6] and stored.shape == (4, 64, 1009)
    assert [task.data.record(i)["labels"] for i in range(12)] == LABELS * 2
    assert torch.equal(task.targets[:6], task.targets[6:])
    task = mixed(sets, "plain")  # whose own labels are b and c
    assert task.labels == [*"abc"]
    assert task.targets[[6, 8]].tolist() == [[False, False, True], [False, True, False]]
    some = [LABELS[i] for i in range(5)]
    store(sets.root / "some", some, of=[*range(5)], version=[0] * 5)
    with pytest.raises(ValueError, match="versions of each clip"):
        mixed(sets, "some", times=1)


def test_the_worst_classes_are_amplified(sets):
    scores = [{"AP": {"a": 0.5, "b": 0.2, "c": 0.1}}, {"AP": {"a": 0.1, "b": 0.3, "c": 0.1}}]
    assert worst(scores, 1) == ["c"] and worst(scores, 2) == ["c", "b"]
    for times in (0, 2):
        # A label is drawn first: a, b or c with 1, 1, 3 parts of 5; clip 5 alone has c.
        alpha = 0.5 if times else 0.0
        for amplified, share in (["c"], 3 / 5), ([], 1 / 3):
            p = mixed(sets, times=times, alpha=alpha, amplified=amplified, factor=3.0).p
            assert (p[5] + p[6:][10:].sum()).item() == pytest.approx(share)
    plain = mixed(sets, "plain", alpha=1.0, amplified=["c"], factor=3.0).p[6:]
    # b and c with 1 and 3 parts of 4; each has 8 clips.
    torch.testing.assert_close(plain[:3], torch.tensor([3, 4, 1]).double() / 32)


# ---- what is generated ---------------------------------------------------------------------------


def test_rows_to_generate(sets, tmp_path):
    rows = [{"labels": x, "n": n} for n, x in enumerate([*LABELS, ["c"], ["c", "a"], [], ["b"]])]
    taken = [row["n"] for row in balanced_subset(rows, 2)]
    assert taken == [0, 1, 3, 4, 5, 6]  # clip 3 brings b, although there are two of a
    assert [row["n"] for row in balanced_subset(rows, 0)] == [0, 1, 2, 3, 4, 5, 6, 7, 9]

    rows = generated_rows("inversion", sets.real, 2, seed=0)  # versions of real clips
    assert [row["of"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [row["version"] for row in rows] == [0, 1] * 6
    assert rows[6]["labels"] == ["a", "b"] and rows[6]["captions"] == ["The sound of <a>, <b>"]

    real = store(tmp_path, [[x] for x in "abcdefgh"])  # plain: one to three classes by chance
    rows = generated_rows("plain", real, 100, seed=0)
    counts = np.bincount([len(set(row["labels"])) for row in rows])
    assert counts[0] == 0 and len(counts) == 4 and (np.abs(counts[1:] - 267) < 60).all()
    classes = np.unique([x for row in rows for x in row["labels"]], return_counts=True)[1]
    assert len(classes) == 8 and (np.abs(classes - 200) < 50).all()
    assert all(x["captions"] == ["The sound of " + ", ".join(x["labels"])] for x in rows)
    assert [row["version"] for row in rows[:17]] == [0] * 8 + [1] * 8 + [2]
    assert generated_rows("plain", real, 2, seed=0) == rows[:16]
    assert generated_rows("plain", real, 2, seed=1) != rows[:16]


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

    def generate(model, prompts, *, indices, init_audio=None, **options):
        asked.append((prompts, indices, init_audio, options))
        return torch.tensor(indices)[:, None] / 255 * torch.ones(161_280)

    monkeypatch.setattr(generated.sample, "generate", generate)
    monkeypatch.setattr(generated, "LogMelCodec", Codec)
    generated.main(arguments(root, tmp_path, "--strength", 0.3))
    real, plain, versions = (LatentDataset(tmp_path / x) for x in ("real", "plain", "inversion"))
    assert [real.record(i)["file"] for i in range(len(real))] == ["0.wav", "1.wav", "3.wav"]
    for data, calls in (plain, asked[:1]), (versions, asked[1:]):
        assert data.stored(range(6))[:, 0, 0].tolist() == [*range(6)]  # each is its own noise's
        captions = [data.record(i)["captions"][0] for i in range(len(data))]
        assert captions == [prompt for call in calls for prompt in call[0]]
    assert asked.pop(0)[2] is None  # plain clips begin from noise
    assert [call[1] for call in asked] == [[0, 1], [2, 3], [4, 5]]
    for i, (prompts, _, start, options) in enumerate(asked):
        wave = soundfile.read(root / "audio" / real.record(i)["file"], dtype="float32")[0]
        np.testing.assert_allclose(start[: len(wave)], wave)
        words = ["<horn>", "<horn>, <brass_band>", "<brass_band>"][i]
        assert prompts == [f"The sound of {words}"] * 2
        assert options["strength"] == 0.3 and options["seed"] == 0
    asked.clear()
    generated.main(arguments(root, tmp_path, "--strength", 0.3))
    assert not asked  # all is there
    with pytest.raises(SystemExit, match="another table"):
        generated.main(arguments(root, tmp_path, "--strength", 0.4))

    # A class without a word would be read as letters.
    model = tmp_path / "words" / "model"
    words = load_file(model / "words.safetensors")
    assert words.keys() == {"<horn>", "<brass_band>"}
    save_file({"<horn>": words["<horn>"]}, model / "words.safetensors")
    options = ["--kinds", "inversion", "--words-model", model]
    with pytest.raises(SystemExit, match="has no word for <brass_band>$"):
        generated.main(arguments(root, tmp_path / "other", *options))


def test_the_table_end_to_end(root, tmp_path, monkeypatch, capsys):
    options = ["--test", root / "test", "--taggers", "cnn14:1", "--seeds", 0, 1]
    options += ["--steps", 1, "--batch-size", 2]
    augment.main(arguments(root, tmp_path, *options))
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| cnn14-1 |")]
    assert len(rows) == 4 and all(row.count("±") == 6 for row in rows)
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved["real clips"] == 3 and len(saved["rows"]) == 1 + 2 * (2 + 2 * 4)
    reals = [*tmp_path.glob("taggers/cnn14-1_mx+sp_real/seed-?/model/scores.json")]
    scores = [json.loads(path.read_text()) for path in reals]
    assert len(scores) == 2 and saved["worst"] == {"cnn14-1": worst(scores, 1)}
    one = tmp_path / "taggers" / "cnn14-1_mx+sp_inversion_+1-worst" / "seed-1"
    config = json.loads((one / "config.json").read_text())
    assert config["alpha"] == 0.5 and config["times"] == 1 and config["factor"] == 2
    assert config["amplified"] == saved["worst"]["cnn14-1"]

    monkeypatch.setattr(augment.train, "train", lambda *_: pytest.fail("trained again"))
    augment.main(arguments(root, tmp_path, *options))
    again = capsys.readouterr().out.splitlines()
    assert [line for line in again if line.startswith("| cnn14-1 |")] == rows
    one = [*options, "--kinds", "plain", "--sets", "+1", "--seeds", 1]  # a row by itself
    augment.main(arguments(root, tmp_path, *one))
    assert "±" not in capsys.readouterr().out.split("| cnn14-1 |")[1]
    for wrong, word in (["--alpha", 0.4], "alpha"), (["--amplify", "Tuba"], "Tuba"):
        with pytest.raises(SystemExit, match=word) as e:
            augment.main(arguments(root, tmp_path, *one, *wrong))
        assert "\n" not in str(e.value.code)


def test_bad_command_lines(root, tmp_path, capsys):
    for options, word in (
        (["--taggers", "cnn14"], "WIDTH"),
        (["--taggers", "taltrans:100"], "multiple of 16"),
        (["--strength", 0], "--strength is above 0"),
        (["--times", 1], "need 2"),
        (["--sets", "+1-worst"], "which classes are worst"),
        (["--steps", 0], "--steps"),
    ):
        with pytest.raises(SystemExit) as e:
            augment.main(arguments(root, tmp_path, *options))
        assert e.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("module, word", [("augment", "AS-20k"), ("generated", "textual inv")])
def test_help_teaches(module, word):
    command = [sys.executable, "-m", f"appendix.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 0 and word in done.stdout
