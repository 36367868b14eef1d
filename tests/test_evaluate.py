"""evaluate.py: distances against scipy and known answers, Cnn14 against PANNs' definition written
out, and the command on small folders of sounds with a small random classifier."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import soundfile
import torch
import torch.nn.functional as F

import evaluate
from evaluate import Cnn14, frechet_distance, inception_score, kl_divergence, load_sound
from tests.conftest import Bomb

pytestmark = pytest.mark.usefixtures("quick_sounds")


def rng_normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("n, m, d", [(200, 150, 12), (40, 300, 12), (6, 7, 12)])
def test_fd_is_that_of_scipys_matrix_root(n, m, d):
    """Where covariances have no inverse, as with fewer rows than dimensions, it loses digits."""
    x, y = rng_normal(n, d) @ rng_normal(d, d, seed=1) + 1, 2 * rng_normal(m, d, seed=2)
    (m1, s1), (m2, s2) = ((z.mean(0).numpy(), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    root = np.trace(scipy.linalg.sqrtm(s1 @ s2).real)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6 if n > d else 1e-3)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_fd_known_answers():
    """(1 − a)²·tr Σ for the same rows a times as large; a shift by m adds ‖m‖²."""
    x = rng_normal(100, 8) @ rng_normal(8, 8, seed=3)
    x -= x.mean(0)
    for a, m in ((1.0, 0.0), (0.5, 0.0), (3.0, 2.0), (0.0, -1.0)):
        expected = (1 - a) ** 2 * x.var(dim=0).sum().item() + 8 * m**2
        assert frechet_distance(x, a * x + m) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def literal_is(logits, splits):
    order = np.random.RandomState(2020).permutation(len(logits))
    p, scores = scipy.special.softmax(logits.numpy()[order], axis=1), []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        divergences = scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1)
        scores.append(math.exp(divergences.mean()))
    return np.mean(scores), np.std(scores)


def test_is_against_a_literal_transcription_and_known_answers():
    for n, splits in ((10, 10), (97, 10), (97, 3)):
        logits = 3 * rng_normal(n, 20)
        expected = pytest.approx(literal_is(logits, splits), rel=1e-6, abs=1e-12)
        assert inception_score(logits, splits) == expected
    assert inception_score(torch.ones(50, 7)) == pytest.approx((1, 0), abs=1e-12)
    one_hot = 1000.0 * torch.eye(5).repeat(40, 1)  # p of exactly 0 and 1
    assert inception_score(one_hot, 1)[0] == pytest.approx(5, rel=1e-9)


def test_kl_against_a_literal_transcription_and_known_answers():
    a, b = 4 * rng_normal(30, 527), 4 * rng_normal(30, 527, seed=1)
    p, q = (scipy.special.softmax(x.numpy(), axis=1) for x in (a, b))
    expected = np.mean((p * np.log(p / (q + 1e-6))).sum(axis=1))
    assert kl_divergence(a, b) == pytest.approx(expected, rel=1e-6)
    assert abs(kl_divergence(a, a)) <= 527e-6
    certain = torch.tensor([[0.0, 2000.0]])  # P = (0, 1) exactly: 0·log 0 = 0
    assert kl_divergence(certain, -certain) == pytest.approx(-math.log(1e-6), rel=1e-6)


def tone(i, noise, seed, samples=33_000):
    """A tone of 200·(i + 1) Hz in noise."""
    t = np.arange(samples) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * 200 * (i + 1) * t)
    return wave + noise * rng_normal(samples, seed=seed).numpy()


@pytest.fixture(scope="module")
def small():
    """A narrow random Cnn14 whose BatchNorms have heard something, so that its features differ."""
    torch.manual_seed(0)
    model = Cnn14(5, (4, 6, 8, 8, 12, 16), ["dog", "cat", "rain", "owl", "bell"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    model.train()(torch.from_numpy(np.stack([tone(i, 0.1, i) for i in range(12)])).float())
    return model.eval()


def panns_state(model):
    """The state dict of PANNs' file, with its keys: its STFT is two convolutions."""
    state = {k.replace("mel", "logmel_extractor.melW"): v for k, v in model.state_dict().items()}
    angle = 2 * np.pi * np.arange(257)[:, None] * np.arange(512) / 512
    window = 0.5 - 0.5 * np.cos(angle[1])  # periodic Hann
    for part, wave in (("real", np.cos(angle)), ("imag", -np.sin(angle))):
        kernel = torch.from_numpy((wave * window)[:, None]).float()
        state[f"spectrogram_extractor.stft.conv_{part}.weight"] = kernel
    return state


def panns(state, wave):
    """Embedding and logits by PANNs' definition, in float64, from the tensors of its file."""
    s = {k: v.double() for k, v in state.items()}

    def bn(x, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(s[f"{name}.{part}"] for part in parts))

    x = F.pad(wave.double()[:, None], (256, 256), mode="reflect")
    real = F.conv1d(x, s["spectrogram_extractor.stft.conv_real.weight"], stride=160)
    imag = F.conv1d(x, s["spectrogram_extractor.stft.conv_imag.weight"], stride=160)
    power = (real**2 + imag**2).transpose(1, 2)[:, None]  # [B, 1, T, 257]
    x = 10 * torch.log10((power @ s["logmel_extractor.melW"]).clamp(min=1e-10))
    x = bn(x.transpose(1, 3), "bn0").transpose(1, 3)
    for i in range(1, 7):
        for j in (1, 2):
            x = F.conv2d(x, s[f"conv_block{i}.conv{j}.weight"], padding=1)
            x = bn(x, f"conv_block{i}.bn{j}").relu()
        x = F.avg_pool2d(x, 2) if i < 6 else x
    x = x.mean(dim=3)
    x = x.max(dim=2).values + x.mean(dim=2)
    embedding = (x @ s["fc1.weight"].T + s["fc1.bias"]).relu()
    return embedding, embedding @ s["fc_audioset.weight"].T + s["fc_audioset.bias"]


def test_cnn14_is_panns(small):
    assert sum(p.numel() for p in Cnn14().parameters()) == 80_753_615
    wave = 0.1 * rng_normal(2, 40_000)
    expected = panns(panns_state(small), wave)
    for ours, theirs in zip(copy.deepcopy(small).double()(wave), expected, strict=True):
        # The window, the kernels and the mel matrix are rounded to float32.
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_loads_panns_file(small, tmp_path):
    """Weights under "model", and beside them what a training run of NumPy 1's time left behind."""
    sampler = {"indexes": [np.arange(4), np.arange(2.0)], "queue": [], "pointer": np.int64(3)}
    state = {"iteration": 880000, "model": panns_state(small), "sampler": sampler}
    path = tmp_path / "Cnn14_16k_mAP=0.438.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray" in path.read_bytes()
    model = Cnn14.load(path)
    wave = rng_normal(1, 32_000).float()
    for ours, theirs in zip(model(wave), small(wave), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_files_that_are_no_classifier(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = panns_state(small)
    at_32_khz = state | {"logmel_extractor.melW": torch.zeros(513, 64)}
    torch.save({"model": at_32_khz}, "32k.pth")
    torch.save({"model": state, "x": Bomb(os.mkdir, "bombed")}, "bomb.pth")
    torch.save(state, "bare.pth")
    Path("torn.pth").write_text("torn")  # "t" is an opcode of pickle's: an IndexError
    Path("text.safetensors").write_text("hello")
    for name in "32k.pth bomb.pth bare.pth torn.pth text.safetensors nowhere.pth".split():
        with pytest.raises(ValueError, match=f"^{name}: .*zenodo"):
            Cnn14.load(name)
    assert not Path("bombed").exists()


def write(path, wave, rate=16_000, subtype="FLOAT"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(wave), rate, subtype=subtype)


def test_loading_follows_the_protocol(tmp_path):
    stereo = rng_normal(70_000, 2).float().numpy() * 0.1 + 0.3
    write(tmp_path / "a.wav", stereo)
    first = stereo[:, 0] - stereo[:, 0].mean()  # not the mean of channels
    np.testing.assert_allclose(load_sound(tmp_path / "a.wav"), first, atol=1e-6)
    write(tmp_path / "short.wav", 0.5 * np.ones(100))
    assert load_sound(tmp_path / "short.wav").shape == (32_000,)
    t = np.arange(48_000 * 3) / 48_000
    write(tmp_path / "48.wav", np.sin(2 * np.pi * 440 * t), 48_000)
    wave = load_sound(tmp_path / "48.wav")
    expected = np.sin(2 * np.pi * 440 * np.arange(48_000) / 16_000)
    np.testing.assert_allclose(wave[200:-200], expected[200:-200], atol=2e-3)


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    small.save(root / "classifier.safetensors")
    for kind, noise, seed in (("reference", 0.02, 0), ("other", 0.02, 50), ("generated", 0.1, 99)):
        for i in range(12):
            write(root / kind / f"{i:02d}.wav", tone(i, noise, seed + i))
    return root


def command(folders, *arguments, out):
    options = ["--classifier", folders / "classifier.safetensors", "--out", out]
    evaluate.main([*map(str, (*options, *arguments))])
    return json.loads((out / "metrics.json").read_text())


def test_controls_behave(folders, tmp_path):
    arguments = (folders / "generated", folders / "reference")
    options = ("--controls", folders / "other", "--codec", "mel")
    sets = command(folders, *arguments, *options, out=tmp_path)["sets"]
    assert [*sets] == "reference generated floor ceiling silence noise shuffled".split()
    for key in ("FD", "KL_softmax"):
        row = {name: sets[name].get(key) for name in sets}
        assert 0 < row["floor"] < row["generated"] and row["floor"] <= row["ceiling"]
        assert row["floor"] < row["noise"] < row["silence"]
    low, high = sets["generated"]["KL_softmax_95"]
    assert low < row["generated"] < high and row["generated"] < row["shuffled"]
    assert len(sets["silence"]["silent"]) == 12 and sets["generated"]["silent"] == []

    # The numbers are those of the functions, on features made one by one.
    model = Cnn14.load(folders / "classifier.safetensors")
    x, y = (
        [torch.cat(z) for z in zip(*(model(load_sound(p)[None]) for p in sorted(f.iterdir())))]
        for f in arguments
    )
    assert sets["generated"]["FD"] == pytest.approx(frechet_distance(x[0], y[0]), rel=1e-4)
    assert row["generated"] == pytest.approx(kl_divergence(y[1], x[1]), rel=1e-4)


def test_seeds_and_unpaired_sets(folders, tmp_path, capsys):
    for i in range(12):
        for kind, wave in (
            ("x", tone(i, 0.1, i)),
            ("y", tone(i, 0.2, i) if i else np.ones(40_000)),
        ):
            write(tmp_path / kind / f"x{i}.wav", wave)
    arguments = (tmp_path / "x", folders / "reference", "--seeds", tmp_path / "y")
    sets = command(folders, *arguments, out=tmp_path)["sets"]
    fds = [sets[name]["FD"] for name in ("generated", "seed 2")]
    assert fds[0] != fds[1] and "KL_softmax" not in sets["generated"]
    assert sets["reference"]["N"] == 12 and sets["reference"]["missing"] == []
    printed = capsys.readouterr().out
    assert f"FD of 2 seeds: {np.mean(fds):.4g}" in printed
    assert "no names in common" in printed and "seed 2: 1 silent: x0" in printed


def test_a_table_chooses_the_clips(folders, tmp_path, capsys):
    """AudioCaps: several captions a clip, files under several names, some clips gone."""
    rows, ids = ["audiocap_id,youtube_id,start_time,caption"], [f"ab_-{i:07d}" for i in range(12)]
    for i, name in enumerate(ids):
        rows += [f"{2 * i + k},{name},30,caption {k} of {name}" for k in range(2)]
        sound, _ = soundfile.read(folders / "generated" / f"{i:02d}.wav")
        write(tmp_path / "gen" / f"{name}.wav", sound)
        real = (f"Y{name}", name, f"{name}_30", "unrelated")[i % 4]
        write(tmp_path / "real" / f"{real}.flac", sound, subtype="PCM_16")
    (tmp_path / "test.csv").write_text("\n".join(rows))
    arguments = (tmp_path / "gen", tmp_path / "real", "--table", tmp_path / "test.csv")
    sets = command(folders, *arguments, out=tmp_path)["sets"]
    assert sets["generated"]["N"] == sets["reference"]["N"] == 9
    assert sets["reference"]["missing"] == ids[3::4] and sets["generated"]["missing"] == []
    assert abs(sets["generated"]["KL_softmax"]) < 1e-3  # every clip met itself
    assert f"reference: 3 missing: {ids[3]}" in capsys.readouterr().out


def test_what_cannot_be_compared_is_a_line(folders, tmp_path):
    shutil.copytree(folders / "reference", tmp_path / "torn")
    (tmp_path / "torn" / "05.wav").write_bytes(b"RIFF no")
    for path in (tmp_path / "one" / "05.wav", tmp_path / "twice" / "05.wav"):
        path.parent.mkdir()
        shutil.copy(folders / "reference" / "05.wav", path)
    (tmp_path / "twice" / "05.flac").touch()
    (tmp_path / "t.csv").write_text("youtube_id,caption\nx,y\n")
    for generated, options, expected in (
        ("twice", (), "twice: 2 audio files of 1 names"),
        ("one", (), "1 names; expected 2 or more"),
        ("torn", (), "05.wav"),
        ("torn", ("--table", tmp_path / "t.csv"), "torn: none of the table's clips"),
        ("torn", ("--classifier", tmp_path / "t.csv"), "t.csv: expected Cnn14_16k"),
    ):
        with pytest.raises(SystemExit) as e:
            command(folders, tmp_path / generated, folders / "reference", *options, out=tmp_path)
        line = str(e.value.code)
        assert line.startswith("error: ") and "\n" not in line and expected in line


def test_two_ranks_give_what_one_gives(folders, tmp_path):
    one = command(folders, folders / "generated", folders / "reference", out=tmp_path / "one")
    options = ["--classifier", folders / "classifier.safetensors", "--out", tmp_path / "two"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += [evaluate.__file__, folders / "generated", folders / "reference", *options]
    done = subprocess.run([*map(str, torchrun)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for name, row in one["sets"].items():
        for key in {"N", "FD", "IS", "KL_softmax"} & row.keys():
            assert two["sets"][name][key] == pytest.approx(row[key], rel=1e-4), (name, key)
