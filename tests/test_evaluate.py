"""evaluate.py: distances against scipy and known answers, Cnn14 against PANNs' definition written
out layer by layer, and the command on small folders of sounds with a small random classifier."""

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

ROOT = Path(__file__).resolve().parent.parent
SMALL = (4, 6, 8, 8, 12, 16)  # widths of the blocks
pytestmark = pytest.mark.usefixtures("quick_sounds")


def rng_normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ---- distances


def scipy_fd(x, y):
    """tr (Σ₁Σ₂)^½ by scipy's matrix root, and as Σ √λ of Σ₁^½·Σ₂·Σ₁^½, since the root loses digits
    where a covariance has no inverse."""
    x, y = x.double().numpy(), y.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = scipy.linalg.eigh(s1)
    values[values < 1e-12 * values.max()] = 0  # what rounding left of the null space
    half = vectors * np.sqrt(values) @ vectors.T
    values = scipy.linalg.eigvalsh(half @ s2 @ half)
    root = np.sqrt(values[values > 1e-12 * values.max()]).sum()
    if len(x) > x.shape[1] and len(y) > y.shape[1]:
        assert root == pytest.approx(np.trace(scipy.linalg.sqrtm(s1 @ s2).real), rel=1e-6)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root


@pytest.mark.parametrize("n, m, d", [(200, 150, 12), (40, 300, 12), (90, 90, 24)])
def test_fd_is_that_of_scipys_matrix_root(n, m, d):
    mix = rng_normal(d, d, seed=1)
    x, y = rng_normal(n, d) @ mix + 1, 2 * rng_normal(m, d, seed=2)
    assert frechet_distance(x, y) == pytest.approx(scipy_fd(x, y), rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    # fewer rows than dimensions: covariances without an inverse
    x, y = x[: d // 2], y[: d // 2 + 1]
    assert frechet_distance(x, y) == pytest.approx(scipy_fd(x, y), rel=1e-6)


def test_fd_known_answers():
    """(1 − a)²·tr Σ for the same rows a times as large; a shift by m adds ‖m‖²."""
    x = rng_normal(100, 8) @ rng_normal(8, 8, seed=3)
    x -= x.mean(0)
    trace = x.var(dim=0).sum().item()
    for a, m in ((0.5, 0.0), (3.0, 2.0), (0.0, -1.0)):
        expected = (1 - a) ** 2 * trace + 8 * m**2
        assert frechet_distance(x, a * x + m) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(x.float(), x.float())) < 1e-9


def literal_is(logits, splits=10):
    order = np.random.RandomState(2020).permutation(len(logits))
    p = scipy.special.softmax(logits.double().numpy()[order], axis=1)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        mean = part.mean(axis=0)
        scores.append(math.exp(np.mean([scipy.special.rel_entr(row, mean).sum() for row in part])))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n", [10, 97, 200])
def test_is_against_a_literal_transcription(n):
    logits = 3 * rng_normal(n, 20)
    assert inception_score(logits) == pytest.approx(literal_is(logits), rel=1e-6, abs=1e-12)
    assert inception_score(logits, 3) == pytest.approx(literal_is(logits, 3), rel=1e-6)


def test_is_known_answers():
    assert inception_score(torch.ones(50, 7)) == pytest.approx((1, 0), abs=1e-12)
    one_hot = 1000.0 * torch.eye(5).repeat(40, 1)  # p of exactly 0 and 1
    assert inception_score(one_hot, 1)[0] == pytest.approx(5, rel=1e-9)


def test_kl_against_a_literal_transcription_and_known_answers():
    a, b = 4 * rng_normal(30, 527), 4 * rng_normal(30, 527, seed=1)
    p, q = (scipy.special.softmax(x.numpy(), axis=1) for x in (a, b))
    expected = np.mean((p * np.log(p / (q + 1e-6))).sum(axis=1))
    assert kl_divergence(a, b) == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(a, b) != pytest.approx(kl_divergence(b, a), rel=1e-3)
    assert abs(kl_divergence(a, a)) <= 527e-6
    certain = torch.tensor([[0.0, 2000.0]])  # P = (0, 1) exactly: 0·log 0 = 0
    assert kl_divergence(certain, -certain) == pytest.approx(-math.log(1e-6), rel=1e-6)


def test_bootstrap_covers_the_mean():
    inside = 0
    for seed in range(100):
        low, high = evaluate.bootstrap(rng_normal(60, seed=seed).exp(), 300, seed)
        inside += low < math.exp(0.5) < high
    assert 80 < inside < 100


# ---- Cnn14


def tone(i, noise, seed, samples=33_000):
    """A tone of 200·(i + 1) Hz in noise."""
    t = np.arange(samples) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * 200 * (i + 1) * t)
    return wave + noise * rng_normal(samples, seed=seed).numpy()


@pytest.fixture(scope="module")
def small():
    """A narrow random Cnn14 whose BatchNorms have heard something, so that its features differ."""
    torch.manual_seed(0)
    model = Cnn14(5, SMALL, ["dog", "cat", "rain", "owl", "bell"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    model.train()(torch.from_numpy(np.stack([tone(i, 0.1, i) for i in range(12)])).float())
    return model.eval()


def stft_kernels():
    k, n = np.arange(257)[:, None], np.arange(512)[None]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 512)  # periodic Hann
    real, imag = np.cos(2 * np.pi * k * n / 512), -np.sin(2 * np.pi * k * n / 512)
    return [torch.from_numpy((part * window)[:, None]).float() for part in (real, imag)]


def panns_state(model):
    """The state dict of PANNs' file, with its keys."""
    state = {k.replace("mel", "logmel_extractor.melW"): v for k, v in model.state_dict().items()}
    real, imag = stft_kernels()
    state["spectrogram_extractor.stft.conv_real.weight"] = real
    state["spectrogram_extractor.stft.conv_imag.weight"] = imag
    return state


def panns_layers(state, wave):
    """PANNs' definition, layer by layer, in float64, from the tensors of its file."""
    s = {k: v.double() for k, v in state.items()}

    def bn(x, name):
        shape = (1, -1, 1, 1)
        mean, var = s[f"{name}.running_mean"].view(shape), s[f"{name}.running_var"].view(shape)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * s[f"{name}.weight"].view(shape) + s[f"{name}.bias"].view(shape)

    x = F.pad(wave.double()[:, None], (256, 256), mode="reflect")
    real = F.conv1d(x, s["spectrogram_extractor.stft.conv_real.weight"], stride=160)
    imag = F.conv1d(x, s["spectrogram_extractor.stft.conv_imag.weight"], stride=160)
    power = (real**2 + imag**2).transpose(1, 2)[:, None]  # [B, 1, T, 257]
    x = 10 * torch.log10((power @ s["logmel_extractor.melW"]).clamp(min=1e-10))
    layers = {"log_mel": x[:, 0]}
    x = bn(x.transpose(1, 3), "bn0").transpose(1, 3)
    for i in range(1, 7):
        for j in (1, 2):
            x = F.conv2d(x, s[f"conv_block{i}.conv{j}.weight"], padding=1)
            x = bn(x, f"conv_block{i}.bn{j}").relu()
        layers[f"conv_block{i}"] = x
        if i < 6:
            x = F.avg_pool2d(x, 2)
    x = x.mean(dim=3)
    x = x.max(dim=2).values + x.mean(dim=2)
    embedding = (x @ s["fc1.weight"].T + s["fc1.bias"]).relu()
    layers["embedding"] = embedding
    layers["logits"] = embedding @ s["fc_audioset.weight"].T + s["fc_audioset.bias"]
    return layers


def test_cnn14_is_panns_layer_by_layer(small):
    wave = 0.1 * rng_normal(2, 40_000).float()
    expected = panns_layers(panns_state(small), wave)
    model, seen = copy.deepcopy(small).double(), {}
    for i in range(1, 7):
        block, name = getattr(model, f"conv_block{i}"), f"conv_block{i}"
        block.register_forward_hook(lambda *args, name=name: seen.__setitem__(name, args[2]))
    seen["log_mel"] = evaluate.log_mel(wave.double(), model.mel)
    seen["embedding"], seen["logits"] = model(wave.double())
    for name, value in expected.items():
        # The window, the kernels and the mel matrix are rounded to float32.
        error = (seen[name] - value).norm() / value.norm()
        assert error < 1e-5, name


def test_full_width_is_panns_size():
    assert sum(p.numel() for p in Cnn14().parameters()) == 80_753_615


def test_mel_matrix_is_slaneys():
    """Linear below 1 kHz, logarithmic above; each triangle has an area of one."""

    def to_mel(f):
        octaves = np.log(np.maximum(f, 1) / 1000) / (np.log(6.4) / 27)
        return np.where(f < 1000, 3 * f / 200, 15 + octaves)

    grid, hertz = np.linspace(0, 8000, 800_001), np.linspace(0, 8000, 257)[:, None]
    edges = np.interp(np.linspace(to_mel(50.0), to_mel(8000.0), 66), to_mel(grid), grid)
    up = (hertz - edges[:-2]) / np.diff(edges)[:-1]
    down = (edges[2:] - hertz) / np.diff(edges)[1:]
    expected = np.maximum(0, np.minimum(up, down)) * 2 / (edges[2:] - edges[:-2])
    np.testing.assert_allclose(evaluate.mel_matrix().double().numpy(), expected, atol=2e-6)


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


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


def test_files_that_are_no_classifier(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = panns_state(small)
    at_32_khz = state | {"logmel_extractor.melW": torch.zeros(513, 64)}
    torch.save({"model": at_32_khz}, "32k.pth")
    torch.save({"model": {k: v for k, v in state.items() if "fc1" not in k}}, "lacks.pth")
    torch.save({"model": state, "x": Bomb()}, "bomb.pth")
    torch.save(state, "bare.pth")
    Path("torn.pth").write_text("torn")  # "t" is an opcode of pickle's: an IndexError
    Path("text.safetensors").write_text("hello")
    for name in "32k.pth lacks.pth bomb.pth bare.pth torn.pth text.safetensors nowhere.pth".split():
        with pytest.raises(ValueError, match=f"^{name}: .*zenodo"):
            Cnn14.load(name)
    assert not Path("bombed").exists()


# ---- sounds and features


def write(path, wave, rate=16_000, subtype="FLOAT"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(wave), rate, subtype=subtype)


def test_loading_follows_the_protocol(tmp_path):
    stereo = rng_normal(70_000, 2).float().numpy() * 0.1 + 0.3
    write(tmp_path / "a.wav", stereo)
    wave, first = load_sound(tmp_path / "a.wav"), stereo[:, 0]
    np.testing.assert_allclose(wave, first - first.mean(), atol=1e-6)  # not the mean of channels
    write(tmp_path / "short.wav", 0.5 * np.ones(100))
    assert load_sound(tmp_path / "short.wav").shape == (32_000,)
    t = np.arange(48_000 * 3) / 48_000
    write(tmp_path / "48.wav", np.sin(2 * np.pi * 440 * t), 48_000)
    wave = load_sound(tmp_path / "48.wav")
    expected = np.sin(2 * np.pi * 440 * np.arange(48_000) / 16_000)
    np.testing.assert_allclose(wave[200:-200], expected[200:-200], atol=2e-3)


def test_features_are_cached_by_content(small, tmp_path):
    calls = []

    def network(wave):
        calls.append(1)
        return torch.cat(small(wave), 1)

    waves = {name: 0.1 * rng_normal(32_000, seed=i).float() for i, name in enumerate("abc")}
    sounds = {name: lambda wave=wave: wave for name, wave in waves.items()}
    first = evaluate.embed(sounds, network, "x", cache=tmp_path)
    assert sum(calls) == 3 and first.names == ["a", "b", "c"]
    # Other names for the same sounds: nothing to compute. The same name for another: computed.
    second = evaluate.embed({"1": sounds["c"], "2": sounds["a"]}, network, "x", cache=tmp_path)
    assert sum(calls) == 3
    torch.testing.assert_close(second.values, first.values[[2, 0]], rtol=0, atol=0)
    sounds["a"] = lambda: waves["b"] + waves["c"]
    third = evaluate.embed(sounds, network, "x", cache=tmp_path)
    assert sum(calls) == 4 and not torch.equal(third.values[0], first.values[0])
    evaluate.embed(sounds, network, "another classifier", cache=tmp_path)
    assert sum(calls) == 7


# ---- the command


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
    options += ["--cache", folders / "cache"]
    evaluate.main([*map(str, (*options, *arguments))])
    return json.loads((out / "metrics.json").read_text())


def test_controls_behave(folders, tmp_path, capsys):
    arguments = (folders / "generated", folders / "reference")
    options = ("--controls", folders / "other", "--codec", "mel")
    metrics = command(folders, *arguments, *options, out=tmp_path)
    sets = metrics["sets"]
    names = "reference generated floor ceiling silence noise shuffled"
    assert set(sets) == set(names.split())
    for key in ("FD", "KL_softmax"):
        assert 0 < sets["floor"][key] < sets["generated"][key]
        assert sets["floor"][key] <= sets["ceiling"][key]
        assert sets["floor"][key] < sets["noise"][key] < sets["silence"][key]
    assert sets["generated"]["KL_softmax"] < sets["shuffled"]["KL_softmax"]
    low, high = sets["generated"]["KL_softmax_95"]
    assert low < sets["generated"]["KL_softmax"] < high
    assert set(sets["shuffled"]) >= {"N", "KL_softmax", "KL_softmax_95"}
    assert sets["silence"]["silent"] == [f"{i:02d}" for i in range(12)]
    assert sets["generated"]["silent"] == [] and sets["generated"]["N"] == 12
    assert len(metrics["classifier"]["sha256"]) == 64 and metrics["folders"]["floor"]
    printed = capsys.readouterr().out
    assert "12 silent" not in printed  # silence is meant to be

    # The numbers are those of the functions, on features made one by one.
    model = Cnn14.load(folders / "classifier.safetensors")
    rows = {
        kind: [model(load_sound(folders / kind / f"{i:02d}.wav")[None]) for i in range(12)]
        for kind in ("generated", "reference")
    }
    embeddings, logits = (
        {kind: torch.cat([row[k] for row in rows[kind]]) for kind in rows} for k in (0, 1)
    )
    fd = frechet_distance(embeddings["generated"], embeddings["reference"])
    assert sets["generated"]["FD"] == pytest.approx(fd, rel=1e-4)
    kl = evaluate.pair_divergences(logits["reference"], logits["generated"]).mean().item()
    assert sets["generated"]["KL_softmax"] == pytest.approx(kl, rel=1e-4)


def test_seeds_and_unpaired_sets(folders, tmp_path, capsys):
    for seed in (1, 2):
        for i in range(12):
            wave = 0.1 * rng_normal(32_000, seed=100 * seed + i).numpy()
            write(tmp_path / f"gen{seed}" / f"x{i}.wav", wave if i else np.full(40_000, 0.2))
    arguments = (tmp_path / "gen1", folders / "reference", "--seeds", tmp_path / "gen2")
    sets = command(folders, *arguments, out=tmp_path)["sets"]
    fds = [sets[name]["FD"] for name in ("generated", "seed 2")]
    assert fds[0] != fds[1] and "KL_softmax" not in sets["generated"]
    assert sets["reference"]["N"] == 12 and sets["reference"]["missing"] == []
    printed = capsys.readouterr().out
    assert f"FD of 2 seeds: {np.mean(fds):.4g}" in printed
    assert "no names in common" in printed and "seed 2: 1 silent: x0" in printed


def test_a_table_chooses_the_clips(folders, tmp_path, capsys):
    """AudioCaps: five captions a clip, files under several names, some clips gone."""
    rows = ["audiocap_id,youtube_id,start_time,caption"]
    ids = [f"ab_-{i:07d}" for i in range(12)]
    for i, name in enumerate(ids):
        rows += [f"{5 * i + k},{name},30,caption {k} of {name}" for k in range(5)]
        sound = soundfile.read(folders / "generated" / f"{i:02d}.wav")[0]
        write(tmp_path / "gen" / f"{name}.wav", sound)
        if i != 3:
            real = (f"Y{name}", name, f"{name}_30", f"Y{name}_30.000")[i % 4]
            write(tmp_path / "real" / f"{real}.flac", sound, subtype="PCM_16")
    write(tmp_path / "real" / "unrelated.wav", sound)
    (tmp_path / "test.csv").write_text("\n".join(rows))
    arguments = (tmp_path / "gen", tmp_path / "real", "--table", tmp_path / "test.csv")
    sets = command(folders, *arguments, out=tmp_path)["sets"]
    assert sets["generated"]["N"] == sets["reference"]["N"] == 11
    assert sets["reference"]["missing"] == [ids[3]] and sets["generated"]["missing"] == []
    assert abs(sets["generated"]["KL_softmax"]) < 1e-3  # every clip met itself
    assert f"reference: 1 missing: {ids[3]}" in capsys.readouterr().out


def test_names_that_only_some_folders_have_are_named(folders, tmp_path):
    for i in range(10):
        shutil.copy(folders / "generated" / f"{i:02d}.wav", tmp_path)
    sets = command(folders, tmp_path, folders / "reference", out=tmp_path / "out")["sets"]
    assert sets["reference"]["N"] == sets["generated"]["N"] == 10
    assert sets["generated"]["missing"] == ["10", "11"] and sets["reference"]["missing"] == []


def test_what_cannot_be_compared_is_a_line(folders, tmp_path):
    reference, good = folders / "reference", folders / "generated" / "00.wav"
    for name in ("empty", "one", "torn", "twice"):
        (tmp_path / name).mkdir()
    shutil.copy(good, tmp_path / "one")
    shutil.copytree(reference, tmp_path / "torn", dirs_exist_ok=True)
    (tmp_path / "torn" / "05.wav").write_bytes(b"RIFF no")
    write(tmp_path / "twice" / "05.wav", np.ones(9))
    write(tmp_path / "twice" / "05.flac", np.ones(9), subtype="PCM_16")
    (tmp_path / "t.csv").write_text("youtube_id,caption\nx,y\n")
    for generated, options, expected in (
        ("nowhere", (), "nowhere"),
        ("empty", (), "empty: 0 audio files"),
        ("twice", (), "twice: 2 audio files of 1 names"),
        ("one", (), "1 names are in all of them"),
        ("torn", (), "05.wav"),
        ("torn", ("--table", tmp_path / "t.csv"), "torn: 0 audio files"),
        ("torn", ("--classifier", tmp_path / "t.csv"), "t.csv: no Cnn14 of zenodo"),
    ):
        with pytest.raises(SystemExit) as e:
            command(folders, tmp_path / generated, reference, *options, out=tmp_path)
        line = str(e.value.code)
        assert line.startswith("error: ") and "\n" not in line and expected in line


def test_two_ranks_give_what_one_gives(folders, tmp_path):
    one = command(folders, folders / "generated", folders / "reference", out=tmp_path / "one")
    options = ["--classifier", folders / "classifier.safetensors", "--out", tmp_path / "two"]
    options += ["--cache", tmp_path / "cache"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += [ROOT / "evaluate.py", folders / "generated", folders / "reference", *options]
    done = subprocess.run([*map(str, torchrun)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for name, row in one["sets"].items():
        for key in {"N", "FD", "IS", "KL_softmax"} & row.keys():
            assert two["sets"][name][key] == pytest.approx(row[key], rel=1e-4), (name, key)
