"""evaluate.py: distances against scipy and known answers, Cnn14 against PANNs' definition written
out layer by layer, and the command on small folders of sounds with a small random classifier."""

import json
import math
import os
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
import torchaudio
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, RobertaTokenizerFast

import evaluate
from evaluate import (
    Cnn14,
    bootstrap,
    embed,
    extrapolated_frechet_distance,
    frechet_distance,
    inception_score,
    kl_divergence,
    load_sound,
    log_mel,
    mel_matrix,
    pair_divergences,
    shuffled,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = (4, 6, 8, 8, 12, 16)  # widths of the blocks


@pytest.fixture(autouse=True, scope="module")
def one_thread_here():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng_normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ---- distances


def scipy_fd(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)


def eigh_fd(x, y):
    """By eigenvalues, for covariances without an inverse, where sqrtm loses digits:
    tr(Σ₁Σ₂)^½ = Σ √λ of Σ₁^½·Σ₂·Σ₁^½."""
    x, y = x.double().numpy(), y.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = scipy.linalg.eigh(s1)
    values[values < 1e-12 * values.max()] = 0  # what rounding left of the null space
    half = vectors * np.sqrt(values) @ vectors.T
    values = scipy.linalg.eigvalsh(half @ s2 @ half)
    root = np.sqrt(values[values > 1e-12 * values.max()]).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root


@pytest.mark.parametrize("n, m, d", [(200, 150, 12), (40, 300, 12), (90, 90, 24)])
def test_fd_is_that_of_scipys_matrix_root(n, m, d):
    mix = rng_normal(d, d, seed=1)
    x, y = rng_normal(n, d) @ mix + 1, 2 * rng_normal(m, d, seed=2)
    assert frechet_distance(x, y) == pytest.approx(scipy_fd(x, y), rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    # fewer rows than dimensions: covariances without an inverse
    few_x, few_y = x[: d // 2], y[: d // 2 + 1]
    assert frechet_distance(few_x, few_y) == pytest.approx(eigh_fd(few_x, few_y), rel=1e-6)


def whitened(n, d, seed=0):
    """Rows whose mean is exactly 0 and whose unbiased covariance is exactly I."""
    x = rng_normal(n, d, seed=seed)
    x = x - x.mean(0)
    return torch.linalg.qr(x)[0] * (n - 1) ** 0.5


def test_fd_known_answers():
    x, shift = whitened(100, 8), torch.arange(8.0).double()
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    assert frechet_distance(x, 3 * x) == pytest.approx((1 - 3) ** 2 * 8, rel=1e-9)
    x = x @ rng_normal(8, 8, seed=3)  # Σ is no longer I: (1 − a)²·tr Σ, shifts add ‖m‖²
    trace = x.var(dim=0).sum().item()
    for a, m in ((0.5, 0.0), (3.0, 2.0), (0.0, -1.0)):
        expected = (1 - a) ** 2 * trace + 8 * m**2
        assert frechet_distance(x, a * x + m) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(x, x)) < 1e-9
    assert abs(frechet_distance(x.float(), x.float())) < 1e-9


def test_fd_extrapolates_to_what_many_samples_would_give():
    d, x, y = 24, rng_normal(250, 24), rng_normal(250, 24, seed=1)
    small = frechet_distance(x, y)  # the distributions are the same: the true FD is 0
    assert small > 0.5
    assert abs(extrapolated_frechet_distance(x, y)) < small / 4
    z = 1.5 * y + 0.5
    truth = d * (0.5**2 + 0.5**2)
    far = abs(frechet_distance(x, z) - truth)
    assert abs(extrapolated_frechet_distance(x, z) - truth) < far / 2
    assert extrapolated_frechet_distance(x, z) == extrapolated_frechet_distance(x, z)


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
    p, q = (scipy.special.expit(x.numpy()) for x in (a, b))
    expected = np.mean((p * np.log(p / (q + 1e-6))).sum(axis=1))
    assert kl_divergence(a, b, "sigmoid") == pytest.approx(expected, rel=1e-6)
    assert abs(kl_divergence(a, a)) <= 527e-6
    certain = torch.tensor([[0.0, 2000.0]])  # P = (0, 1) exactly: 0·log 0 = 0
    assert kl_divergence(certain, -certain) == pytest.approx(-math.log(1e-6), rel=1e-6)


def test_bootstrap_covers_the_mean():
    inside = 0
    for seed in range(200):
        values = rng_normal(60, seed=seed).exp()
        low, high = bootstrap(values, 300, seed)
        inside += low < math.exp(0.5) < high
    assert 0.85 < inside / 200 <= 0.99
    assert bootstrap(values) == bootstrap(values)


def test_bad_features_are_refused():
    x = rng_normal(20, 4)
    bad = x.clone()
    bad[3, 1] = math.nan
    for call in (
        lambda: frechet_distance(x, bad),
        lambda: frechet_distance(x, x[:1]),
        lambda: inception_score(x[:9]),
        lambda: inception_score(bad),
        lambda: kl_divergence(x, x[:10]),
        lambda: kl_divergence(bad, x),
    ):
        with pytest.raises(ValueError, match="features|pairs"):
            call()


def test_shuffled_pairs_nobody_with_itself():
    for n in (2, 3, 50):
        one, other = shuffled(n)
        assert sorted(one) == sorted(other) == list(range(n))
        assert (one != other).all()


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
    model, seen = small.double(), {}
    hooks = [
        getattr(model, f"conv_block{i}").register_forward_hook(
            lambda _m, _i, out, name=f"conv_block{i}": seen.__setitem__(name, out)
        )
        for i in range(1, 7)
    ]
    seen["log_mel"] = log_mel(wave.double(), model.mel)
    seen["embedding"], seen["logits"] = model(wave.double())
    for hook in hooks:
        hook.remove()
    model.float()
    for name, value in expected.items():
        # The window, the kernels and the mel matrix are rounded to float32.
        error = (seen[name] - value).norm() / value.norm()
        assert error < 1e-5, name


def test_full_width_is_panns_size():
    model = Cnn14()
    assert sum(p.numel() for p in model.parameters()) == 80_753_615
    assert model.state_dict()["conv_block6.conv2.weight"].shape == (2048, 2048, 3, 3)
    assert model.fc_audioset.weight.shape == (527, 2048)


def test_mel_matrix_is_slaneys():
    mel = mel_matrix().double().numpy()  # [257, 64]

    # Slaney's scale: linear below 1 kHz, logarithmic above; each triangle has an area of one.
    def to_mel(f):
        return np.where(
            f < 1000, 3 * f / 200, 15 + np.log(np.maximum(f, 1) / 1000) / (np.log(6.4) / 27)
        )

    grid = np.linspace(0, 8000, 800_001)
    edges = np.interp(np.linspace(to_mel(50.0), to_mel(8000.0), 66), to_mel(grid), grid)
    hertz = np.linspace(0, 8000, 257)[:, None]
    up = (hertz - edges[:-2]) / np.diff(edges)[:-1]
    down = (edges[2:] - hertz) / np.diff(edges)[1:]
    expected = np.maximum(0, np.minimum(up, down)) * 2 / (edges[2:] - edges[:-2])
    np.testing.assert_allclose(mel, expected, atol=2e-6)


@pytest.mark.parametrize("legacy", [False, True])
def test_loads_panns_file(small, tmp_path, legacy):
    """Weights under "model", and beside them what a training run of NumPy's time left behind."""
    sampler = {"indexes": [np.arange(4), np.arange(2.0)], "queue": [], "pointer": np.int64(3)}
    state = {"iteration": 880000, "model": panns_state(small), "sampler": sampler}
    path = tmp_path / "Cnn14_16k_mAP=0.438.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    if legacy:  # as NumPy 1 wrote it
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
        assert b"numpy.core.multiarray" in path.read_bytes()
    model = Cnn14.load(path)
    wave = rng_normal(1, 32_000).float()
    for ours, theirs in zip(model(wave), small(wave), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saves_and_loads_with_labels(small, tmp_path):
    small.save(tmp_path / "c.safetensors", trained_on="nothing")
    model = Cnn14.load(tmp_path / "c.safetensors")
    assert model.labels == ["dog", "cat", "rain", "owl", "bell"] and model.widths == SMALL
    wave = rng_normal(1, 32_000).float()
    torch.testing.assert_close(model(wave), small(wave), rtol=0, atol=0)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bombed",)


def test_files_that_are_no_classifier(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, other = panns_state(small), panns_state(small)
    other["spectrogram_extractor.stft.conv_real.weight"] = torch.zeros(513, 1, 1024)  # 32 kHz
    torch.save({"model": other}, "32k.pth")
    torch.save({"model": {k: v for k, v in state.items() if "fc1" not in k}}, "lacks.pth")
    torch.save({"model": state, "x": Bomb()}, "bomb.pth")
    torch.save(state, "bare.pth")
    Path("text.pth").write_text("hello")
    Path("torn.pth").write_text("torn")  # "t" is an opcode of pickle's: an IndexError
    Path("text.safetensors").write_text("hello")
    for name in (
        "32k.pth",
        "lacks.pth",
        "bomb.pth",
        "bare.pth",
        "text.pth",
        "torn.pth",
        "text.safetensors",
    ):
        with pytest.raises(ValueError, match=name):
            Cnn14.load(name)
    assert not Path("bombed").exists()
    with pytest.raises(FileNotFoundError, match="zenodo"):
        Cnn14.load("nowhere.pth")


# ---- sounds and features


def write(path, wave, rate=16_000, subtype="FLOAT"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(wave), rate, subtype=subtype)


def test_loading_follows_the_protocol(tmp_path):
    stereo = rng_normal(70_000, 2).float().numpy() * 0.1 + 0.3
    write(tmp_path / "a.wav", stereo)
    wave, rate = load_sound(tmp_path / "a.wav")
    first = stereo[:, 0]
    np.testing.assert_allclose(wave, first - first.mean(), atol=1e-6)  # not the mean of channels
    assert rate == 16_000
    write(tmp_path / "short.wav", 0.5 * np.ones(100))
    assert load_sound(tmp_path / "short.wav")[0].shape == (32_000,)
    t = np.arange(48_000 * 3) / 48_000
    write(tmp_path / "48.wav", np.sin(2 * np.pi * 440 * t), 48_000)
    wave, rate = load_sound(tmp_path / "48.wav")
    assert rate == 48_000 and wave.shape == (48_000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(48_000) / 16_000)
    np.testing.assert_allclose(wave[200:-200], expected[200:-200], atol=2e-3)


def test_features_are_cached_by_content(small, tmp_path):
    calls = []

    def network(waves):
        calls.append(len(waves))
        return torch.cat(small(waves), 1)

    waves = {name: 0.1 * rng_normal(32_000, seed=i).float() for i, name in enumerate("abc")}
    sounds = {name: lambda wave=wave: (wave, 16_000) for name, wave in waves.items()}
    first = embed(sounds, network, "x", cache=tmp_path)
    assert sum(calls) == 3 and first.names == ["a", "b", "c"]
    # Other names for the same sounds: nothing to compute. The same name for another: computed.
    renamed = {"1": sounds["c"], "2": sounds["a"]}
    second = embed(renamed, network, "x", cache=tmp_path)
    assert sum(calls) == 3
    torch.testing.assert_close(second.values, first.values[[2, 0]], rtol=0, atol=0)
    sounds["a"] = lambda: (waves["b"] + waves["c"], 16_000)
    third = embed(sounds, network, "x", cache=tmp_path)
    assert sum(calls) == 4 and not torch.equal(third.values[0], first.values[0])
    embed(sounds, network, "another classifier", cache=tmp_path)
    assert sum(calls) == 7
    for path in tmp_path.glob("*.npy"):  # torn files are computed again
        path.write_bytes(path.read_bytes()[:50])
    torch.testing.assert_close(embed(renamed, network, "x", cache=tmp_path).values, second.values)
    assert sum(calls) == 9


def test_sounds_of_many_lengths_do_not_pile_up(tmp_path):
    """What waits for others of its length is computed before it fills the memory."""
    done = []
    sounds = {f"{i:02d}": lambda i=i: (done.append(len(held)) or torch.ones(32_000 + i), 16_000)
              for i in range(40)}  # fmt: skip
    held = []

    def network(waves):
        held.extend(len(wave) for wave in waves)
        return waves[:, :2] * waves.shape[1]

    found = embed(sounds, network, "x", cache=None, batch_size=2)
    assert found.values[:, 0].tolist() == [32_000 + i for i in range(40)]
    assert done == [i // 16 * 16 for i in range(40)]


def test_batches_hold_sounds_of_one_length(small, tmp_path):
    sounds = {}
    for i, n in enumerate((32_000, 48_000, 32_000, 40_123, 48_000)):
        sounds[f"s{i}"] = lambda i=i, n=n: (0.1 * rng_normal(n, seed=i).float(), 16_000)
    together = embed(sounds, lambda w: torch.cat(small(w), 1), "", cache=None, batch_size=2)
    for i, name in enumerate(together.names):
        alone = torch.cat(small(sounds[name]()[0][None]), 1)[0]
        torch.testing.assert_close(together.values[i], alone, rtol=1e-4, atol=1e-4)


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
    options = ["--classifier", str(folders / "classifier.safetensors"), "--out", str(out)]
    evaluate.main([*map(str, arguments), *options, "--cache", str(folders / "cache")])
    return json.loads((out / "metrics.json").read_text())


def test_controls_behave(folders, tmp_path, capsys):
    metrics = command(
        folders,
        folders / "generated",
        folders / "reference",
        *("--controls", folders / "other", "--codec", "mel", "--variants"),
        out=tmp_path,
    )
    sets = metrics["sets"]
    assert set(sets) == {
        *("reference", "generated", "floor", "ceiling", "silence", "noise", "shuffled"),
    }
    for key in ("FD", "KL_softmax"):
        assert 0 < sets["floor"][key] < sets["generated"][key]
        assert sets["floor"][key] <= sets["ceiling"][key]
        assert sets["floor"][key] < sets["noise"][key] < sets["silence"][key]
    assert sets["generated"]["KL_softmax"] < sets["shuffled"]["KL_softmax"]
    low, high = sets["generated"]["KL_softmax_95"]
    assert low < sets["generated"]["KL_softmax"] < high
    assert set(sets["shuffled"]) == {
        *("N", "KL_softmax", "KL_softmax_95", "KL_sigmoid", "KL_sigmoid_95"),
    }
    assert sets["silence"]["silent"] == [f"{i:02d}" for i in range(12)]
    assert sets["generated"]["silent"] == [] and sets["generated"]["N"] == 12
    assert sets["generated"]["sample_rates"] == {"16000": 12}
    assert metrics["classifier"]["classes"] == 5 and len(metrics["classifier"]["sha256"]) == 64
    assert metrics["paired"] and "--controls" in metrics["command"]
    variants = metrics["variants"]
    assert variants["KL softmax"] == pytest.approx(sets["generated"]["KL_softmax"], rel=1e-9)
    assert variants["IS"] == pytest.approx(sets["generated"]["IS"], rel=1e-9)
    assert variants["KL softmax of probabilities taken for logits"] < variants["KL softmax"]
    printed = capsys.readouterr().out
    assert "12 silent" not in printed and "FD, N → ∞" in printed  # silence is meant to be

    # The numbers are those of the functions, on features made one by one.
    model = Cnn14.load(folders / "classifier.safetensors")
    rows = {
        kind: [model(load_sound(folders / kind / f"{i:02d}.wav")[0][None]) for i in range(12)]
        for kind in ("generated", "reference")
    }
    embeddings, logits = (
        {kind: torch.cat([row[k] for row in rows[kind]]) for kind in rows} for k in (0, 1)
    )
    fd = frechet_distance(embeddings["generated"], embeddings["reference"])
    assert sets["generated"]["FD"] == pytest.approx(fd, rel=1e-4)
    kl = pair_divergences(logits["reference"], logits["generated"]).mean().item()
    assert sets["generated"]["KL_softmax"] == pytest.approx(kl, rel=1e-4)


def test_seeds_and_unpaired_sets(folders, tmp_path, capsys):
    for seed in (1, 2):
        for i in range(12):
            wave = 0.1 * rng_normal(32_000, seed=100 * seed + i).numpy()
            write(tmp_path / f"gen{seed}" / f"x{i}.wav", wave)
    metrics = command(
        folders,
        tmp_path / "gen1",
        folders / "reference",
        *("--seeds", tmp_path / "gen2"),
        out=tmp_path,
    )
    assert len(metrics["FD_seeds"]) == 2 and not metrics["paired"]
    assert metrics["FD_seeds"][0] != metrics["FD_seeds"][1]
    assert "KL_softmax" not in metrics["sets"]["generated"]
    assert "no names in common" in capsys.readouterr().out


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
    metrics = command(
        folders,
        *(tmp_path / "gen", tmp_path / "real", "--table", tmp_path / "test.csv"),
        out=tmp_path,
    )
    assert metrics["sets"]["generated"]["N"] == metrics["sets"]["reference"]["N"] == 11
    assert metrics["sets"]["reference"]["missing"] == [ids[3]]
    assert abs(metrics["sets"]["generated"]["KL_softmax"]) < 1e-3  # every clip met itself
    printed = capsys.readouterr().out
    assert "12 clips, the first caption of each" in printed and ids[3] in printed


def test_clap_score(folders, tmp_path):
    """Real CLAP classes with small random weights: the score is the mean cosine."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 300, "intermediate_size": 32, "max_position_embeddings": 66}
    audio = {"depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8}
    audio |= {"hidden_size": 16, "num_mel_bins": 64, "spec_size": 256, "num_hidden_layers": 2}
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    ClapModel(config).save_pretrained(tmp_path / "clap")
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
    extractor.save_pretrained(tmp_path / "clap")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), "Ġ"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    RobertaTokenizerFast(vocab=vocab, merges=[]).save_pretrained(tmp_path / "clap")
    (tmp_path / "t.csv").write_text(
        "name,caption\n" + "".join(f"{i:02d},{i} a\n" for i in range(12))
    )
    metrics = command(
        folders,
        *(folders / "generated", folders / "reference", "--table", tmp_path / "t.csv"),
        *("--clap", tmp_path / "clap"),
        out=tmp_path,
    )
    # By transformers' own forward pass, which normalises and multiplies.
    model = ClapModel.from_pretrained(tmp_path / "clap").eval()
    tokenizer = RobertaTokenizerFast.from_pretrained(tmp_path / "clap")
    cosines = []
    for i in range(12):
        wave = load_sound(folders / "generated" / f"{i:02d}.wav")[0]
        wave = torchaudio.functional.resample(wave, 16_000, 48_000)
        heard = extractor(wave.numpy(), sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokenizer(f"{i} a", return_tensors="pt"), **heard)
        cosines.append((out.logits_per_audio / model.logit_scale_a.exp()).item())
    assert metrics["clap"]["score"] == pytest.approx(np.mean(cosines), abs=1e-5)

    # Above 10 s transformers takes a part at random, and we the beginning.
    sound = {"a": lambda: (0.1 * rng_normal(170_000).float(), 16_000)}
    arguments = (str(tmp_path / "clap"), sound, {"a": "x"}, torch.device("cpu"))
    assert len({evaluate.clap_score(*arguments, cache=None)["score"] for _ in range(4)}) == 1

    # A fused CLAP's extractor calls one clip of a batch longer than 10 s at random; none is.
    audio |= {"enable_fusion": True, "aff_block_r": 1}
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    ClapModel(config).save_pretrained(tmp_path / "clap")
    ClapFeatureExtractor(truncation="fusion").save_pretrained(tmp_path / "clap")
    sounds = {str(i): lambda i=i: (0.1 * rng_normal(32_000, seed=i).float(), 16_000)
              for i in range(6)}  # fmt: skip
    arguments = (str(tmp_path / "clap"), sounds, dict.fromkeys(sounds, "x"), torch.device("cpu"))
    scores = {evaluate.clap_score(*arguments, cache=tmp_path / "c")["score"]}
    scores |= {evaluate.clap_score(*arguments, cache=None)["score"] for _ in range(4)}
    assert len(scores) == 1
    # The cache knows how the sounds were prepared, too.
    ClapFeatureExtractor(truncation="fusion", padding="pad").save_pretrained(tmp_path / "clap")
    fresh = evaluate.clap_score(*arguments, cache=None)["score"]
    assert fresh not in scores
    assert evaluate.clap_score(*arguments, cache=tmp_path / "c")["score"] == fresh


def fails(folders, tmp_path, *arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as e:
        command(folders, *arguments, out=tmp_path)
    line = str(e.value.code)
    assert line.startswith("error: ") and "\n" not in line
    assert not (tmp_path / "metrics.json").exists()
    return line


def test_bad_sets_are_named(folders, tmp_path, monkeypatch):
    reference = folders / "reference"
    good = soundfile.read(reference / "00.wav")[0]
    assert "nowhere" in fails(folders, tmp_path, tmp_path / "nowhere", reference)
    (tmp_path / "empty").mkdir()
    assert "no audio" in fails(folders, tmp_path, tmp_path / "empty", reference)

    some = tmp_path / "some"
    for i in range(12):
        write(some / f"{i:02d}.wav", good)
    (some / "05.wav").write_bytes(b"RIFF no")
    write(some / "06.wav", np.full(40_000, np.nan))
    line = fails(folders, tmp_path, some, reference)
    assert "05.wav" in line and "06.wav" in line
    (some / "05.wav").unlink()
    (some / "06.wav").unlink()
    line = fails(folders, tmp_path, some, reference)
    assert "2 names" in line and "05, 06" in line
    write(some / "05.wav", good)
    write(some / "05.flac", good, subtype="PCM_16")
    assert "05.flac and 05.wav" in fails(folders, tmp_path, some, reference)

    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    table = ("--table", tmp_path / "t.csv")
    assert "t.csv" in fails(folders, tmp_path, reference, reference, *table)
    (tmp_path / "t.csv").write_text("youtube_id,caption\nx,y\n")
    assert "none of its 1 ids" in fails(folders, tmp_path, reference, reference, *table)
    for row in ("a dog", "00,a dog, a cat", ",a dog"):
        (tmp_path / "t.csv").write_text(f"name,caption\n01,rain\n{row}\n")
        assert "t.csv, row 2" in fails(folders, tmp_path, reference, reference, *table)
    write(some / "05.wav", good)
    (some / "05.flac").unlink()
    (some / "06.m4a").write_bytes(b"...")
    assert "06.m4a: convert it" in fails(folders, tmp_path, some, reference)
    clap = ("--clap", tmp_path / "empty")
    assert "CLAP" in fails(folders, tmp_path, reference, reference, *clap)


def test_unequal_rates_and_silent_files_are_counted(folders, tmp_path, capsys):
    for i in range(12):
        rate = 16_000 if i else 44_100
        wave = soundfile.read(folders / "generated" / f"{i:02d}.wav")[0]
        write(tmp_path / "gen" / f"{i:02d}.wav", wave if i != 4 else np.full(40_000, 0.2), rate)
    metrics = command(folders, tmp_path / "gen", folders / "reference", out=tmp_path)
    assert metrics["sets"]["generated"]["silent"] == ["04"]
    assert metrics["sets"]["generated"]["sample_rates"] == {"16000": 11, "44100": 1}
    printed = capsys.readouterr().out
    assert "1 silent" in printed and "44100" in printed
    # Sets that agree in themselves, not with each other, are told apart, too.
    for name in ("a", "b"):
        for i in range(12):
            wave = soundfile.read(folders / "generated" / f"{i:02d}.wav")[0]
            write(tmp_path / name / f"{i:02d}.wav", wave, 16_000 if name == "a" else 22_050)
    command(folders, tmp_path / "a", tmp_path / "b", out=tmp_path)
    assert "several sample rates" in capsys.readouterr().out
    command(folders, tmp_path / "a", tmp_path / "a", out=tmp_path)
    assert "several sample rates" not in capsys.readouterr().out


def test_two_ranks_give_what_one_gives(folders, tmp_path):
    one = command(folders, folders / "generated", folders / "reference", out=tmp_path / "one")
    options = ["--classifier", folders / "classifier.safetensors", "--out", tmp_path / "two"]
    options += ["--cache", tmp_path / "cache"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [ROOT / "evaluate.py", folders / "generated", folders / "reference", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for name, row in one["sets"].items():
        for key in ("N", "FD", "IS", "KL_softmax"):
            if key in row:
                assert two["sets"][name][key] == pytest.approx(row[key], rel=1e-4), (name, key)


def test_each_rank_computes_its_share(tmp_path):
    (tmp_path / "share.py").write_text("""
import sys

import torch
import torch.distributed as dist
import evaluate

dist.init_process_group("gloo")
sounds = {f"{i}": lambda i=i: (torch.full((32_000,), i / 10), 16_000) for i in range(5)}
heard = []

def network(waves):
    heard.extend(waves[:, 0].tolist())
    return waves[:, :1]

found = evaluate.embed(sounds, network, "x", cache=None)
with open(f"{sys.argv[1]}/{dist.get_rank()}.txt", "w") as file:  # printed, two ranks' lines mix
    print([round(10 * x) for x in sorted(heard)],
          [round(10 * x) for x in found.values[:, 0].tolist()], file=file)
dist.destroy_process_group()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*torchrun, tmp_path / "share.py", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.txt").read_text() == "[0, 2, 4] [0, 1, 2, 3, 4]\n"
    assert (tmp_path / "1.txt").read_text() == "[1, 3] [0, 1, 2, 3, 4]\n"


def test_help_teaches():
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "lower" in done.stdout and "--controls" in done.stdout
