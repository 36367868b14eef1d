"""appendix/augment.py: what is generated, what is drawn, the table."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from appendix import augment, classify
from appendix.augment import Config, Mixed, balanced_subset, generated_rows, worst
from appendix.classify import LogMelCodec, balanced
from latents import LatentDataset, encode_dataset
from tests.conftest import save_model

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
    """Six real clips; with two versions of each; with twelve plain ones, of other labels."""
    root = tmp_path_factory.mktemp("sets")
    store(root / "real", LABELS)
    of, version = [i // 2 for i in range(12)], [i % 2 for i in range(12)]
    labels, real = LABELS + [LABELS[i] for i in of], [-1] * 6
    store(root / "inversion", labels, of=real + of, version=real + version)
    labels = LABELS + [["c"], ["b", "c"], ["b"]] * 4
    store(root / "plain", labels, of=[-1] * 18, version=real + [i // 6 for i in range(12)])
    return root


def mixed(sets, kind="inversion", times=2, alpha=0.5, **more):
    """The tagger that is to be trained, with what it draws from."""
    data = str(sets / (kind if times else "real"))
    more |= {"kind": kind, "times": times, "alpha": alpha, "model": "cnn14:1"}
    c = Config(data=data, val_data=data, **more)
    return Mixed(c, torch.device("cpu"))


# ---- equation (1) --------------------------------------------------------------------------------


def test_mixing_is_equation_1(sets):
    for alpha, times in ((0.5, 1), (0.3, 2)):
        task, n = mixed(sets, alpha=alpha, times=times), 40_000
        # Written out as it stands: i, then j, then a coin.
        p, rng = balanced(task.targets[:6]).numpy(), np.random.default_rng(1)
        i, j = rng.choice(6, n, p=p), rng.integers(times, size=n)
        clip = np.where(rng.random(n) < 1 - alpha, i, 6 + 2 * i + j)
        expected, drawn = (np.bincount(x, minlength=18) / n for x in (clip, task.choose(0, n)))
        assert (np.abs(drawn - expected) <= 4 * np.sqrt(2 * expected / n)).all()
    assert (task.choose(3, 50) != task.choose(4, 50)).any()


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

    real = LatentDataset(sets / "real")
    rows = generated_rows("inversion", real, 2, seed=0)  # versions of real clips
    assert [row["of"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [row["version"] for row in rows] == [0, 1] * 6
    assert rows[6]["labels"] == ["a", "b"] and rows[6]["captions"] == ["The sound of <a>, <b>"]

    real = store(tmp_path, [[x] for x in "abcdefgh"])  # plain: one to three classes by chance
    rows = generated_rows("plain", real, 100, seed=0)
    counts = np.bincount([len(set(row["labels"])) for row in rows])
    assert counts[0] == 0 and len(counts) == 4 and (np.abs(counts[1:] - 267) < 60).all()
    assert all(x["captions"] == ["The sound of " + ", ".join(x["labels"])] for x in rows)
    assert [row["version"] for row in rows[:17]] == [0] * 8 + [1] * 8 + [2]
    assert generated_rows("plain", real, 2, seed=0) == rows[:16]


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
    made = ["--audio", root / "audio", "--table", root / "table.csv", "--test", root / "test"]
    made += ["--per-class", 2]
    made += ["--model", root / "model", "--workers", 0, "--device", "cpu", "--precision", "fp32"]
    made += ["--denoising-steps", 2, "--inversion-steps", 2, "--out", out]
    return [*map(str, [*made, *options])]


def test_each_clip_is_generated_as_its_row_says(root, tmp_path, monkeypatch):
    asked = []

    def generate(model, prompts, *, indices, init_audio=None, **options):
        asked.append((prompts, indices, init_audio, options))
        return torch.tensor(indices)[:, None] / 255 * torch.ones(161_280)

    monkeypatch.setattr(augment.sample, "generate", generate)
    monkeypatch.setattr(augment, "LogMelCodec", Codec)
    augment.main(["--clips-only"] + arguments(root, tmp_path, "--strength", 0.3))
    real, plain, versions = (LatentDataset(tmp_path / x) for x in ("real", "plain", "inversion"))
    assert [real.record(i)["file"] for i in range(len(real))] == ["0.wav", "1.wav", "3.wav"]
    for data, calls in (plain, asked[:1]), (versions, asked[1:]):
        assert torch.equal(data.stored(range(3)), real.stored(range(3)))
        assert data.stored(range(3, 9))[:, 0, 0].tolist() == [*range(6)]  # each of its own noise
        captions = [data.record(i)["captions"][0] for i in range(3, 9)]
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
    augment.main(["--clips-only"] + arguments(root, tmp_path, "--strength", 0.3))
    assert not asked  # all is there
    with pytest.raises(SystemExit, match="another table"):
        augment.main(["--clips-only"] + arguments(root, tmp_path, "--strength", 0.4))
    # A model that has the words need not learn them.
    model = tmp_path / "words" / "model"
    assert load_file(model / "words.safetensors").keys() == {"<horn>", "<brass_band>"}
    options = ["--kinds", "inversion", "--model", model]
    augment.main(["--clips-only"] + arguments(root, tmp_path / "other", *options))
    assert not (tmp_path / "other" / "words").exists() and len(asked) == 3


def test_the_table_end_to_end(root, tmp_path, monkeypatch, capsys):
    whole = LogMelCodec.dequantize  # a quarter of the frames
    monkeypatch.setattr(LogMelCodec, "dequantize", lambda self, x: whole(self, x)[..., ::4])
    options = ["--taggers", "cnn14:1", "--seeds", 0, 1]
    options += ["--steps", 1, "--batch-size", 2]
    augment.main(arguments(root, tmp_path, *options))
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| cnn14:1 |")]
    assert len(rows) == 2 and all(row.count("±") == 6 for row in rows)
    taggers = tmp_path / "taggers"
    assert len([*taggers.iterdir()]) == 2 * (2 + 2 * 4)
    reals = [*taggers.glob("cnn14-1_real_seed-?/model/scores.json")]
    weak = worst([json.loads(path.read_text()) for path in reals], 1)
    one = taggers / "cnn14-1_inversion_+1-worst_seed-1"
    config = json.loads((one / "config.json").read_text())
    assert config["alpha"] == 0.5 and config["times"] == 1 and config["factor"] == 2
    assert config["amplified"] == weak and rows[1].endswith(f"| {weak[0]} |")

    monkeypatch.setattr(augment.train, "train", lambda *_: pytest.fail("trained again"))
    one = [*options, "--kinds", "plain", "--sets", "+1", "--seeds", 1]  # a row by itself
    augment.main(arguments(root, tmp_path, *one))
    assert "±" not in capsys.readouterr().out.split("| cnn14:1 |")[1]
    with pytest.raises(SystemExit, match="^error: .* alpha = 0.5, this command 0.4"):
        augment.main(arguments(root, tmp_path, *one, "--alpha", 0.4))


def test_bad_command_lines(root, tmp_path, capsys):
    for options, word in (
        (["--strength", 0], "--strength is above 0"),
        (["--times", 1], "need 2"),
        (["--sets", "+1-worst"], "which classes are worst"),
    ):
        with pytest.raises(SystemExit) as e:
            augment.main(arguments(root, tmp_path, *options))
        assert e.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(SystemExit, match="^error: taltrans:100: .*multiple of 16"):
        augment.main(arguments(root, tmp_path, "--taggers", "taltrans:100"))
