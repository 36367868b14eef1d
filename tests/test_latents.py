"""latents.py: grid, statistics, both codecs, audio files, stored data sets, the command line."""

import functools
import json
import os
import pathlib
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import transformers

import latents
from latents import (
    CLIP_SAMPLES,
    FRAMES,
    EncodecCodec,
    LatentDataset,
    LatentStats,
    MelCodec,
    check_dataset,
    encode_dataset,
    load_audio,
    load_codec,
    read_table,
    save_audio,
    to_clips,
    to_grid,
    to_sequence,
)

ROOT = pathlib.Path(latents.__file__).parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sine(hertz, seconds=10.08, rate=16_000):
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)) / rate)


# ------------------------------------------------------------------ grid and statistics


def test_every_frame_has_its_place():
    z = torch.arange(2 * 3 * FRAMES).view(2, 3, FRAMES)
    x = to_grid(z)
    assert x.shape == (2, 3, 24, 21)
    for row in range(24):
        for col in range(21):
            assert torch.equal(x[:, :, row, col], z[:, :, 21 * row + col])
    assert torch.equal(to_sequence(x), z)
    assert to_grid(z[0]).shape == (3, 24, 21)


def test_statistics_of_parts_are_those_of_the_whole(tmp_path):
    z = torch.randn(60, 5, FRAMES, generator=generator()) * 3 + torch.arange(5.0)[:, None] * 100
    whole = LatentStats.of(z)
    flat = z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(whole.mean, flat.mean(1))
    torch.testing.assert_close(whole.std, flat.std(1, correction=0))
    a, b, c = (LatentStats.of(part) for part in (z[:7], to_grid(z[7:8]), z[8:]))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.std, whole.std, rtol=1e-12, atol=0)
        assert merged.count == whole.count == 60 * FRAMES
    nothing = LatentStats(torch.zeros(5), torch.zeros(5))
    assert nothing.merge(a) is a and a.merge(nothing) is a

    normal = whole.normalize(z)
    assert torch.equal(to_grid(normal), whole.normalize(to_grid(z)))
    torch.testing.assert_close(
        LatentStats.of(normal).mean, torch.zeros(5).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        LatentStats.of(normal).std, torch.ones(5).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(whole.denormalize(to_grid(normal)), to_grid(z))

    whole.save(tmp_path / "stats.safetensors")
    loaded = LatentStats.load(tmp_path / "stats.safetensors")
    assert torch.equal(loaded.mean, whole.mean) and torch.equal(loaded.std, whole.std)
    assert loaded.count == whole.count
    (tmp_path / "stats.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="stats.safetensors"):
        LatentStats.load(tmp_path / "stats.safetensors")


def test_a_constant_channel_is_harmless():
    z = torch.full((2, 1, FRAMES), 7.0)
    stats = LatentStats.of(z)
    assert stats.normalize(z).abs().max() == 0
    assert torch.equal(stats.denormalize(stats.normalize(z)), z)
    with pytest.raises(ValueError, match="statistics of 1 channels, latents of 2"):
        stats.normalize(torch.zeros(1, 2, FRAMES))


# ------------------------------------------------------------------ EnCodec


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the official format, with random weights: a state dict."""
    from encodec import EncodecModel

    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    with torch.no_grad():  # codebooks like what they quantise, so that many codes get used
        z = model.encoder(torch.randn(1, 1, 32_000, generator=generator()) * 0.3)[0]  # [128, T]
        for i, layer in enumerate(model.quantizer.vq.layers):
            noise = torch.randn(1024, 128) * z.std(1)
            layer._codebook.embed.copy_(noise + z.mean(1) if i == 0 else noise)
            layer._codebook.inited.fill_(1)
    path = tmp_path_factory.mktemp("encodec") / "encodec_24khz-d7cc33bc.th"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def encodec(weights):
    return EncodecCodec(weights)


def name_in_transformers(name):
    name = name.replace("quantizer.vq.", "quantizer.").replace("._codebook.", ".codebook.")
    name = name.replace("encoder.model.", "encoder.layers.").replace(
        "decoder.model.", "decoder.layers."
    )
    name = name.replace("convtr.convtr.", "conv.").replace("conv.conv.", "conv.")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(f".{old}", f".parametrizations.weight.{new}")
    return name


def test_encodec_is_that_of_transformers(encodec, weights):
    theirs = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    state = torch.load(weights, weights_only=True)
    theirs.load_state_dict({name_in_transformers(k): v for k, v in state.items()})
    wave = torch.randn(1, CLIP_SAMPLES, generator=generator(1)) * 0.3

    codes = encodec.encode(wave)
    assert codes.shape == (1, *encodec.stored_shape) and codes.dtype == torch.uint16
    assert all(len(book.unique()) > 30 for book in codes[0].int())  # not a trivial agreement
    with torch.no_grad():
        expected = theirs.encode(wave[:, None], bandwidth=6.0).audio_codes[0]
        assert torch.equal(codes.long(), expected)
        expected = theirs.decode(expected[None], [None]).audio_values[:, 0]
    z = encodec.dequantize(codes)
    assert z.shape == (1, encodec.channels, FRAMES) and z.dtype == torch.float32
    decoded = encodec.decode(z)
    assert decoded.shape == (1, CLIP_SAMPLES)
    assert (decoded - expected).norm() <= 1e-5 * expected.norm()


def test_dequantize_is_the_quantizer(encodec):
    codes = torch.randint(1024, (5, 8, FRAMES), generator=generator())
    codes[0, :, 0], codes[1, :, -1] = 0, 1023
    expected = encodec.model.quantizer.decode(codes.transpose(0, 1))
    torch.testing.assert_close(encodec.dequantize(codes.to(torch.uint16)), expected)
    # and by hand: z[:, t] = Σ_k q_k[c_k[t]]
    books = [layer.codebook for layer in encodec.model.quantizer.vq.layers[:8]]
    by_hand = sum(book[c] for book, c in zip(books, codes[3, :, 100], strict=True))
    torch.testing.assert_close(expected[3, :, 100], by_hand)


def test_weights_are_found_and_named(encodec, weights, tmp_path, monkeypatch):
    settings = encodec.settings()
    json.dumps(settings)
    assert load_codec(settings, weights=weights.parent).settings() == settings  # a folder
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # torch hub's cache
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / weights.name
    cached.write_bytes(weights.read_bytes())
    assert EncodecCodec().sha256 == encodec.sha256
    state = torch.load(weights, weights_only=True)
    state["decoder.model.0.conv.conv.bias"] += 1
    torch.save(state, tmp_path / "other.th")
    with pytest.raises(ValueError, match="made with another encodec"):
        load_codec(settings, weights=tmp_path / "other.th")

    def no_network(*args, **kwargs):
        raise URLError("no network")

    cached.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(OSError, match=r"checkpoints/encodec_24khz-d7cc33bc.th .*--encodec-weights"):
        EncodecCodec()
    with pytest.raises(OSError, match="nowhere.th"):
        EncodecCodec(tmp_path / "nowhere.th")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_weights_that_are_not_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder": Bomb()}, "bomb.th")
    torch.save({"encoder": torch.zeros(3)}, "other.th")
    torch.save([1, 2], "list.th")
    pathlib.Path("text.th").write_text("<html>404</html>")
    pathlib.Path("empty.th").touch()
    for name in ("bomb.th", "other.th", "list.th", "text.th", "empty.th"):
        with pytest.raises(ValueError, match=name) as error:
            EncodecCodec(name)
        assert "\n" not in str(error.value)
    assert not os.path.exists("exploded")


# ------------------------------------------------------------------ log-mel


def test_mel_round_trip():
    codec = MelCodec()
    clicks = torch.zeros(CLIP_SAMPLES)
    clicks[::8000] = 0.9
    noise = torch.randn(CLIP_SAMPLES, generator=generator()) * 0.1
    wave = torch.stack([sine(440), sine(3000) * torch.linspace(0, 1, CLIP_SAMPLES), noise, clicks])
    stored = codec.encode(wave)
    assert stored.shape == (4, 128, 504) and stored.dtype == torch.uint8
    z = codec.dequantize(stored)
    assert z.shape == (4, 128, 504) and z.dtype == torch.float32
    decibel = codec.unsharpen @ z
    steps = (decibel - codec.floor_db) * 255 / (codec.top_db - codec.floor_db)
    assert torch.equal(steps.round().to(torch.uint8), stored)  # storing loses nothing more

    decoded = codec.decode(z)
    assert decoded.shape == (4, CLIP_SAMPLES) and decoded.isfinite().all()
    alone = codec.decode(z[1:2])  # no randomness, and the batch doesn't matter
    torch.testing.assert_close(decoded[1:2], alone, atol=1e-4, rtol=0)
    again = codec.dequantize(codec.encode(decoded))
    error = (codec.unsharpen @ (again - z)).abs()
    # dB, where it is loud: low bands are narrower than the window's lobes, and skirts change more.
    error = [error[i][decibel[i] > -40].mean().item() for i in range(4)]
    assert max(error) < 2.7 and max(error[1:3]) < 0.3, error
    spectrum = torch.fft.rfft(decoded[0]).abs()
    assert abs(spectrum.argmax().item() / 10.08 - 440) < 5  # Hz


def test_noise_comes_back_as_noise():
    """The magnitudes of white noise are Rayleigh's: they vary by √(4/π − 1) = 0.523 of their mean.
    Smooth ones, with phases by Griffin-Lim, come out with 0.23: a buzz."""
    codec, noise = MelCodec(), 0.1 * torch.randn(1, CLIP_SAMPLES, generator=generator())
    decoded = codec.decode(codec.dequantize(codec.encode(noise)))
    for wave in (noise, decoded):
        magnitude = codec.stft(wave)[0, 150:, 20:-20].abs()
        varies = magnitude.std(0) / magnitude.mean(0)
        assert varies.mean() == pytest.approx((4 / torch.pi - 1) ** 0.5, abs=0.02)
    assert abs(decoded.std() / noise.std() - 1) < 0.05


def test_sharpened_decibels():
    """A cosine over the bands comes out √(1 + k) times as large, and loudness as it was."""
    codec, bands = MelCodec(), torch.arange(128)
    assert codec.settings()["tilt"] == 0.5
    for k in (0, 1, 12, 63):
        cosine = torch.cos(torch.pi * k * (bands.double() + 0.5) / 128).float()
        expected = (1 + k) ** 0.5 * cosine
        torch.testing.assert_close(codec.sharpen @ cosine, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(codec.unsharpen @ expected, cosine, atol=1e-4, rtol=0)


def test_mel_at_the_ends_of_its_range():
    codec = MelCodec()
    silence = torch.zeros(1, CLIP_SAMPLES)
    assert codec.encode(silence).max() == 0
    assert codec.decode(codec.dequantize(codec.encode(silence))).abs().max() < 1e-6
    assert codec.encode(sine(1000)[None] * 2).max() < 255  # a full-scale sine is not cut off
    wild = codec.decode(torch.full((1, 128, 504), 1e4))
    assert wild.isfinite().all()


def test_codecs_by_name(weights):
    assert load_codec("mel").settings() == load_codec(MelCodec().settings()).settings()
    for settings in ("mp3", {}, {"name": "mel", "n_fft": 512}, {"name": "mel", "colour": "red"}):
        with pytest.raises(ValueError, match="codec"):
            load_codec(settings)
    for shape in ((CLIP_SAMPLES,), (1, 1000), (1, 1, CLIP_SAMPLES)):
        with pytest.raises(ValueError, match="161280"):
            MelCodec().encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="128, frames"):
        MelCodec().decode(torch.zeros(1, 128, 24, 21))
    with pytest.raises(ValueError, match="128, frames"):
        MelCodec().decode(torch.zeros(1, 64, 504))
    assert MelCodec().decode(torch.zeros(1, 128, 30)).shape == (1, 30 * 320)


# ------------------------------------------------------------------ audio files


def peak_frequency(wave):
    spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave)))
    return spectrum.abs().argmax().item() * 16_000 / len(wave)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_load_audio(tmp_path, suffix, rate):
    path = tmp_path / f"tone.{suffix}"
    stereo = torch.stack([sine(1000, 2, rate), torch.zeros(2 * rate)], dim=1)
    soundfile.write(path, stereo.numpy(), rate)
    wave = load_audio(path)
    assert wave.dtype == torch.float32 and wave.dim() == 1 and abs(len(wave) - 32_000) <= 1
    assert abs(peak_frequency(wave) - 1000) < 1
    assert abs(wave[4000:-4000].abs().max() - 0.25) < 0.03  # the mean of the channels
    start = load_audio(path, seconds=1)
    assert len(start) == 16_000
    torch.testing.assert_close(start, wave[:16_000], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [44_056, 44_101, 47_999, 701_234])
def test_odd_rates_take_no_longer(tmp_path, rate):
    soundfile.write(tmp_path / "odd.wav", sine(1000, 3, rate).numpy(), rate)
    start = time.time()
    wave = load_audio(tmp_path / "odd.wav")
    assert time.time() - start < 5
    assert abs(len(wave) - 48_000) < 48_000 * 6e-4 and abs(peak_frequency(wave) - 1000) < 1


def test_to_clips():
    for seconds, several, n in ((0.01, True, 1), (10.08, True, 1), (11, True, 1), (11.08, True, 2)):
        wave = sine(100, seconds)
        clips = to_clips(wave, several)
        assert clips.shape == (n, CLIP_SAMPLES)
        length = min(len(wave), n * CLIP_SAMPLES)
        assert torch.equal(clips.flatten()[:length], wave[:length])
        assert clips.flatten()[length:].abs().sum() == 0
    assert to_clips(sine(100, 35)).shape == (1, CLIP_SAMPLES)


def test_audio_that_cannot_be_used(tmp_path):
    bad = {"nan.wav": (np.array([0, np.nan]), 16_000), "inf.wav": (np.array([np.inf, 0]), 16_000)}
    bad |= {"empty.wav": (np.zeros(0), 16_000), "slow.wav": (np.zeros(100), 999)}
    bad |= {"loud.wav": (np.array([1e20, 0]), 16_000)}
    for name, (samples, rate) in bad.items():
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "nothing.ogg").touch()
    for name in (*bad, "text.wav", "nothing.ogg"):
        with pytest.raises(ValueError, match=name) as error:
            load_audio(tmp_path / name)
        assert "\n" not in str(error.value)
    for name in ("missing.wav", "."):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_audio(tmp_path / name)


def test_save_audio(tmp_path, monkeypatch):
    path = tmp_path / "out.wav"
    save_audio(path, sine(440), comment="word " * 5000)  # more than libsndfile reads back
    assert b"word word" in path.read_bytes() and len(load_audio(path)) == CLIP_SAMPLES
    save_audio(path, sine(440), comment="dog barking\nΩ, seed 1")
    assert soundfile.info(path).subtype == "PCM_16" and soundfile.info(path).samplerate == 16_000
    assert soundfile.SoundFile(path).comment == "dog barking\nΩ, seed 1"
    torch.testing.assert_close(load_audio(path), sine(440), atol=1e-4, rtol=0)  # level is kept
    save_audio(path, sine(440) * 10)
    torch.testing.assert_close(load_audio(path), sine(440) * 1.98, atol=1e-3, rtol=0)  # not clipped
    save_audio(path, torch.zeros(10))
    before = path.read_bytes()
    for wave in (
        torch.tensor([0.0, float("nan")]),
        torch.tensor([float("inf")]),
        torch.zeros(1, 5),
    ):
        with pytest.raises(ValueError, match="out.wav"):
            save_audio(path, wave)
    with pytest.raises(OSError):
        save_audio(tmp_path / "nowhere" / "out.wav", sine(440))

    def disk_full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_audio(path, sine(440))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.wav"]


# ------------------------------------------------------------------ stored data sets


class FakeCodec:
    """EnCodec's shapes without its work: what is tested here is the storage."""

    name, channels, stored_shape, stored_dtype = "encodec", 3, (8, FRAMES), torch.uint16

    def settings(self):
        return {"name": "encodec", "sha256": "fake"}

    def encode(self, wave):
        codes = (wave[:, : 8 * FRAMES] * 1e6).long() % 1024
        return codes.view(-1, 8, FRAMES).to(torch.uint16)

    def dequantize(self, stored):
        return stored.float()[:, :3]


def load_noise(row):
    if row["id"] % 7 == 3:
        raise ValueError(f"{row['file']}: not\naudio")
    clips = 2 if row["id"] % 5 == 0 else 1
    return torch.rand(clips, CLIP_SAMPLES, generator=generator(row["id"]))


def noise_rows(n=23):
    labels = ["Rain", "Dog", "Ärger, laut"]
    return [
        {"id": i, "file": f"{i}.wav", "captions": [f"ein Ton\u2028 {i}"], "labels": labels[: i % 4]}
        for i in range(n)
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


encode_noise = functools.partial(
    encode_dataset,
    codec=FakeCodec(),
    rows=noise_rows(),
    load_clips=load_noise,
    shard_rows=4,
    batch_size=3,
)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    assert encode_noise(folder) is True
    return folder


def test_what_was_written_is_read(noise):
    data = LatentDataset(noise)
    kept = [
        (row, k)
        for row in noise_rows()
        if row["id"] % 7 != 3
        for k in range(1 + (row["id"] % 5 == 0))
    ]
    assert len(data) == len(kept) == 24
    assert data.codec == FakeCodec().settings() and data.labels == ["Dog", "Rain", "Ärger, laut"]
    indices = torch.randperm(24, generator=generator())
    indices = torch.cat([indices, indices[:5]])  # some of them twice
    stored = data.stored(indices)
    assert stored.dtype == torch.uint16 and stored.shape == (29, 8, FRAMES)
    for i, codes in zip(indices.tolist(), stored, strict=True):
        row, k = kept[i]
        assert torch.equal(codes.int(), FakeCodec().encode(load_noise(row)[k : k + 1])[0].int())
        assert data.record(i) == row | ({"clip": k} if row["id"] % 5 == 0 else {})
        assert [data.labels[n] for n in data.label_ids(i)] == row["labels"]
    everything = FakeCodec().dequantize(data.stored(range(24)))
    torch.testing.assert_close(data.stats.mean, LatentStats.of(everything).mean)
    torch.testing.assert_close(data.stats.std, LatentStats.of(everything).std)
    assert (noise / "skipped.csv").read_text() == "file,reason\n" + "".join(
        f"{i}.wav,{i}.wav: not audio\n" for i in (3, 10, 17)
    )
    for i in (-1, 24):
        with pytest.raises(IndexError, match="0 to 23"):
            data.stored([0, i])
    loader = torch.utils.data.DataLoader([0], collate_fn=lambda i: data.stored(i), num_workers=1)
    assert torch.equal(next(iter(loader)).int(), data.stored([0]).int())


def test_weights_are_balanced_over_labels(noise):
    data = LatentDataset(noise)
    weights = data.sampling_weights()
    assert weights.dtype == torch.float64 and weights.shape == (24,)
    clips = [set(data.label_ids(i)) for i in range(24)]
    sizes = {label: sum(label in clip for clip in clips) for label in range(3)}
    expected = [sum(1 / sizes[label] for label in clip) for clip in clips]
    without = sum(not clip for clip in clips)
    expected = torch.tensor([value or 1 / without for value in expected]).double()
    torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_write_the_same_bytes(noise, tmp_path, world_size):
    ranks = list(range(world_size))
    random.Random(0).shuffle(ranks)
    done = [encode_noise(tmp_path, rank=rank, world_size=world_size) for rank in ranks]
    assert True in done and done == sorted(done)  # complete when the last one with work is through
    assert contents(tmp_path) == contents(noise)


def test_workers_write_the_same_bytes(noise, tmp_path):
    encode_noise(tmp_path, workers=2)
    assert contents(tmp_path) == contents(noise)


def test_stopped_at_any_write(noise, tmp_path, monkeypatch):
    """Every file but the first n is missing, and a torn one lies about: n = 0, 1, 2, …"""
    replace, stop_at = os.replace, 0

    class Killed(BaseException):
        pass

    def replace_some(source, target):
        nonlocal stop_at
        if stop_at == 0:
            (target.parent / f".{target.name}.rank5.tmp").write_bytes(b"torn")
            raise Killed
        stop_at -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_some)
    for n in (0, 1, 2, 3, 9, 18, 20, 24):
        stop_at = n
        with pytest.raises(Killed):
            encode_noise(tmp_path / str(n))
        stop_at = -1
        assert n == 24 or not (tmp_path / str(n) / "dataset.json").exists()
        assert encode_noise(tmp_path / str(n)) is True
        assert contents(tmp_path / str(n)) == contents(noise)


def test_killed_and_resumed(noise, tmp_path):
    code = "import time, tests.test_latents as t; load = t.load_noise\n"
    code += "slow = lambda row: time.sleep(0.2) or load(row)\n"
    code += f"t.encode_noise({str(tmp_path)!r}, load_clips=slow)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "shard-00000.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "dataset.json").exists()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        LatentDataset(tmp_path)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.json")}
    assert encode_noise(tmp_path) is True
    assert contents(tmp_path) == contents(noise)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())  # kept


def test_a_disk_that_fills_up(noise, tmp_path):
    """Stood in for by a limit on the size of files, from the fourth shard on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row):
        if row["id"] == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return load_noise(row)

    try:
        with pytest.raises(OSError, match=r"shard-00003.npy: not written \(File too large\)"):
            encode_noise(tmp_path, load_clips=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = contents(tmp_path)
    assert len(left) == 1 + 3 * 3  # plan.json and three shards
    assert all(contents(noise)[name] == data for name, data in left.items())
    assert encode_noise(tmp_path) is True and contents(tmp_path) == contents(noise)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """Of a block of 64 MB that was there before, no page is new. By default, all 16,384 are."""
    code = """
import resource, sys, torch, latents
if sys.argv[1] == "kept":
    latents.keep_freed_memory()
for _ in range(4):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    folder, faults = pathlib.Path(latents.__file__).parent, {}
    for what in ("kept", "default"):
        command = [sys.executable, "-c", code, what]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        faults[what] = int(done.stdout)
    assert faults["kept"] < min(100, faults["default"]), faults


def test_another_table_or_codec_is_refused(noise):
    before = contents(noise)
    other = FakeCodec()
    other.settings = lambda: {"name": "encodec", "sha256": "other"}
    with pytest.raises(ValueError, match="another codec"):
        encode_noise(noise, codec=other)
    with pytest.raises(ValueError, match="another table"):
        encode_noise(noise, rows=noise_rows(22))
    assert encode_noise(noise) is True and contents(noise) == before  # the same: nothing to do


def test_no_labels_at_all(tmp_path):
    rows = [row | {"labels": []} for row in noise_rows(5)]
    encode_noise(tmp_path, rows=rows)
    data = LatentDataset(tmp_path)
    assert data.labels == [] and data.label_ids(0) == []
    assert data.sampling_weights().tolist() == [0.2] * 5


def test_nothing_to_encode(tmp_path):
    def broken(row):
        raise OSError("broken")

    with pytest.raises(ValueError, match="all 23 rows were skipped, such as 0.wav: broken"):
        encode_noise(tmp_path, load_clips=broken)
    assert (tmp_path / "skipped.csv").read_text().count("broken") == 23
    assert not (tmp_path / "dataset.json").exists()
    for key in ("batch_size", "shard_rows"):
        with pytest.raises(ValueError, match="1 or more"):
            encode_noise(tmp_path, **{key: 0})


def test_check_finds_any_damage(tmp_path):
    rows, codec = noise_rows(9), MelCodec()
    encode_dataset(tmp_path, codec, rows, load_noise, shard_rows=4)
    assert "10 clips, 3 labels, mel" in check_dataset(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for at in (0, len(whole) // 3, len(whole) - 2):
            if path.name != "plan.json":  # that one only matters while encoding
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                with pytest.raises(ValueError):
                    check_dataset(tmp_path)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="damaged|not a file"):
            check_dataset(tmp_path)
        path.unlink()
        with pytest.raises(OSError):
            check_dataset(tmp_path)
        path.write_bytes(whole)
    check_dataset(tmp_path)
    shard = tmp_path / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shard-00001.npy: damaged"):
        LatentDataset(tmp_path).stored([8])
    shard.write_bytes((tmp_path / "shard-00002.npy").read_bytes())
    with pytest.raises(ValueError, match="shard-00001.npy: damaged, 1 clips instead of 5"):
        LatentDataset(tmp_path).stored([8])


def test_two_million_clips(tmp_path):
    """Sizes of real files, extrapolated: codes and index take 16.2 GB or less (captions apart)."""
    rows = [{"id": i, "file": "f", "captions": ["c"], "labels": ["a", "b"]} for i in range(256)]
    wave = torch.rand(1, CLIP_SAMPLES)
    encode_dataset(tmp_path, FakeCodec(), rows, lambda row: wave, shard_rows=256)
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    clips, header = 2_000_000, 128  # of a .npy file
    total = clips * (size.pop("shard-00000.npy") - header) / 256
    for name in ("record_offsets.npy", "label_starts.npy", "label_ids.npy"):
        total += clips * (size.pop(name) - header) / 256
    size.pop("shard-00000.jsonl")  # captions and records
    shard = size.pop("shard-00000.json") * 128 / 3 + 2 * header  # statistics of 128 channels, not 3
    total += shard * clips / 2048 + sum(size.values())
    assert 16e9 < total <= 16.2e9, total


def test_two_million_clips_start_at_once(noise, tmp_path):
    clips, shards = 2_000_000, 977
    about = json.loads((noise / "dataset.json").read_bytes())
    about["shard_clips"] = [2048] * (shards - 1) + [clips - 2048 * (shards - 1)]
    about["labels"] = [f"label {i}" for i in range(527)]
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    (tmp_path / "latent_stats.safetensors").write_bytes(
        (noise / "latent_stats.safetensors").read_bytes()
    )
    np.save(tmp_path / "record_offsets.npy", np.arange(clips) % 2048 * 200)
    np.save(tmp_path / "label_starts.npy", np.arange(clips + 1) * 2)
    np.save(tmp_path / "label_ids.npy", np.arange(clips * 2, dtype=np.int32) % 527)
    start = time.time()
    data = LatentDataset(tmp_path)
    assert len(data) == clips and data.label_ids(clips - 1) == [
        (2 * clips - 2) % 527,
        (2 * clips - 1) % 527,
    ]
    assert time.time() - start < 1


# ------------------------------------------------------------------ tables and the command line


def run(monkeypatch, *args, **environment):
    """The command, in this process: its exit status or message."""
    monkeypatch.setattr(sys, "argv", ["latents.py", *map(str, args)])
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    try:
        latents.main()
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture
def sounds(tmp_path):
    folder = tmp_path / "sounds"
    (folder / "sub").mkdir(parents=True)
    soundfile.write(folder / "dog.wav", sine(300, 2).numpy(), 16_000)
    soundfile.write(folder / "sub" / "long.flac", sine(500, 25, 44_100).numpy(), 44_100)
    (folder / "broken.ogg").write_bytes(b"OggS and nothing else")
    return folder


def test_encode_a_csv(sounds, tmp_path, monkeypatch, capsys):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text(
        'file,caption,labels,licence\ndog.wav,"A dog, barking",Dog; Bark,CC0\n'
        "sub/long.flac,,Tone,CC0\nbroken.ogg,x,Dog,CC0\ngone.wav,x,Dog,CC0\n"
        "dog.wav,Woof,Dog;Animal,CC BY\ndog.wav,Woof,,CC0\nsub/long.flac,,Sine,CC0\n"
    )
    command = ("encode", sounds, table, "--out", out, "--codec", "mel", "--workers", 0)
    assert run(monkeypatch, *command) == 0
    assert "2 clips; 2 rows skipped" in capsys.readouterr().out
    data = LatentDataset(out)
    assert data.record(0) == {
        "id": "dog.wav",
        "file": "dog.wav",
        "labels": ["Dog", "Bark", "Animal"],
        "licence": "CC0",
        "captions": ["A dog, barking", "Woof"],
    }
    assert data.record(1)["captions"] == ["The sound of Tone, Sine"]
    codec = MelCodec()
    expected = codec.encode(to_clips(load_audio(sounds / "sub" / "long.flac")))
    assert (data.stored([1]).int() - expected.int()).abs().max() <= 1
    skipped = (out / "skipped.csv").read_text()
    assert "broken.ogg: can't be read as audio" in skipped and "gone.wav: no such file" in skipped
    assert run(monkeypatch, "check", out) == 0 and "all is well" in capsys.readouterr().out
    # two ranks, as torchrun starts them
    out = tmp_path / "ranks"
    command = ("encode", sounds, table, "--out", out, "--codec", "mel", "--shard-rows", 2)
    for rank in (1, 0):
        assert run(monkeypatch, *command, RANK=rank, WORLD_SIZE=2) == 0
    assert torch.equal(LatentDataset(out).stored([1, 0]), data.stored([1, 0]))
    shard = out / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x77")
    assert "shard-00001.npy: damaged" in run(monkeypatch, "check", out)


def test_encode_jsonl_and_long_files(sounds, tmp_path, monkeypatch):
    table, out = tmp_path / "t.jsonl", tmp_path / "out"
    rows = [{"file": "dog.wav", "captions": ["a dog", "ein Hund\u2028"], "labels": ["Dog"], "n": 1}]
    rows += [{"id": "L", "file": "sub/long.flac", "caption": "a tone", "source": {"by": "me"}}]
    table.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    command = ("encode", sounds, table, "--out", out, "--codec", "mel", "--several-clips")
    assert run(monkeypatch, *command) == 0
    data = LatentDataset(out)
    assert [data.record(i).get("clip") for i in range(4)] == [None, 0, 1, 2]
    assert data.record(0)["captions"] == ["a dog", "ein Hund"] and data.record(0)["n"] == 1
    assert data.record(3)["id"] == "L" and data.record(3)["source"] == {"by": "me"}
    assert data.label_ids(3) == []
    assert "another table" in run(monkeypatch, *command[:-1])  # one clip a file: other rows


def test_encode_audioset(sounds, tmp_path, monkeypatch):
    (sounds / "dog.wav").rename(sounds / "--4gqARaEJE.wav")
    (sounds / "sub" / "long.flac").rename(sounds / "sub" / "Y-0RWZT-miFs.flac")
    soundfile.write(sounds / "AbC_dEfGhIj_30.000.wav", sine(700, 1).numpy(), 16_000)
    table, classes, out = tmp_path / "eval.csv", tmp_path / "classes.csv", tmp_path / "out"
    table.write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=4, num_segs=4\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"\n'
        '-0RWZT-miFs, 420.000, 430.000, "/m/05zppz"\nAbC_dEfGhIj, 30.000, 40.000, "/m/0bt9lr"\n'
        'missing0000, 30.000, 40.000, "/m/0bt9lr"\n'
    )
    classes.write_text(
        'index,mid,display_name\n0,/m/05zppz,"Male speech, man speaking"\n'
        '1,/m/068hy,"Domestic animals, pets"\n2,/m/0bt9lr,"Dog"\n'
    )
    command = ["encode", sounds, table, "--out", out, "--codec", "mel", "--workers", 0]
    assert "--class-labels" in run(monkeypatch, *command)
    assert run(monkeypatch, *command, "--class-labels", classes) == 0
    data = LatentDataset(out)
    assert data.labels == ["Dog", "Domestic animals, pets", "Male speech, man speaking"]
    assert [data.record(i)["id"] for i in range(3)] == ["--4gqARaEJE", "-0RWZT-miFs", "AbC_dEfGhIj"]
    assert data.record(1)["captions"] == ["The sound of Male speech, man speaking"]
    assert data.record(2)["file"] == "AbC_dEfGhIj_30.000.wav" and data.label_ids(0) == [1, 0]
    assert "missing0000" in (out / "skipped.csv").read_text()
    with pytest.raises(ValueError, match="/m/xyz"):
        table.write_text('# YTID\n--4gqARaEJE, 0.000, 10.000, "/m/xyz"\n')
        read_table(table, sounds, classes)


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "file,caption\n", "no rows"),
        ("a.csv", "name,caption\na.wav,x\n", "row 1: expected file"),
        ("a.csv", "file,caption,labels\na.wav,x,\nb.wav,,\n", "row 2: b.wav has neither"),
        ("a.csv", "file,caption\na.wav,x,y,z\n", "row 1"),
        ("a.jsonl", '{"file": "a.wav", "caption": "x"}\n{"file": "b.wav", \n', "row 2"),
        ("a.jsonl", '["a.wav"]\n', "row 1"),
        ("a.jsonl", '{"file": "a.wav", "captions": [1]}\n', "row 1"),
        ("a.jsonl", '{"file": 3, "caption": "x"}\n', "row 1"),
        ("a.csv", b"file,caption\n\xff\xfe,x\n", "can't be read"),
    ],
)
def test_bad_tables(tmp_path, name, text, complaint):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=complaint) as error:
        read_table(tmp_path / name, tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_mistakes_get_one_line(sounds, tmp_path, monkeypatch):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("file,caption\ndog.wav,x\n")
    (tmp_path / "file").touch()
    command = ["encode", sounds, table, "--codec", "mel", "--workers", 0, "--out"]
    for args, complaint in (
        (["encode", tmp_path / "gone", *command[2:], out], "no such folder"),
        (["encode", sounds, tmp_path / "gone.csv", *command[3:], out], "gone.csv"),
        ([*command, out, "--device", "cuda"], "PyTorch finds only cpu"),
        ([*command, out, "--batch-size", 0], "1 or more"),
        ([*command, tmp_path / "file"], "File exists"),
        ([*command, out, "--codec", "encodec", "--encodec-weights", tmp_path / "w.th"], "w.th"),
        (["check", tmp_path / "gone"], "not a stored data set"),
    ):
        message = run(monkeypatch, *args)
        assert message.startswith("error: ") and complaint in message and "\n" not in message
    assert not out.exists()
    assert run(monkeypatch, "encode", "--colour") == 2


def test_as_a_script(tmp_path):
    command = [sys.executable, "latents.py", "check", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert (
        process.stderr == f"error: {tmp_path}: not a stored data set (there is no dataset.json)\n"
    )


def test_headerless_audio_is_refused(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(1000))  # libsndfile would have to be told the rate
    with pytest.raises(ValueError, match="can't be read as audio"):
        load_audio(tmp_path / "x.raw")


def test_statistics_without_a_count(tmp_path):
    safetensors.torch.save_file({"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "s")
    assert LatentStats.load(tmp_path / "s").count == 0
