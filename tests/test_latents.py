"""latents.py: grid, statistics, both codecs, audio files, tables, stored data sets, the command."""

import functools
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from urllib.error import URLError

import numpy as np
import pytest
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
    encode_dataset,
    find_audio,
    load_audio,
    load_codec,
    read_table,
    safe_name,
    save_audio,
    to_clip,
    to_grid,
    to_sequence,
)

ROOT = pathlib.Path(latents.__file__).parent
MALE, PETS = "Male speech, man speaking", "Domestic animals, pets"


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
    whole, flat = LatentStats.of(z), z.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(whole.mean, flat.mean(1))
    torch.testing.assert_close(whole.std, flat.std(1, correction=0))
    a, b, c = (LatentStats.of(part) for part in (z[:7], to_grid(z[7:8]), z[8:]))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.std, whole.std, rtol=1e-12, atol=0)
        assert merged.count == whole.count == 60 * FRAMES

    normal = whole.normalize(z)
    assert torch.equal(to_grid(normal), whole.normalize(to_grid(z)))
    assert LatentStats.of(normal).mean.abs().max() < 1e-5
    assert (LatentStats.of(normal).std - 1).abs().max() < 1e-5
    torch.testing.assert_close(whole.denormalize(to_grid(normal)), to_grid(z))
    constant = torch.full((2, 1, FRAMES), 7.0)  # is harmless
    assert LatentStats.of(constant).normalize(constant).abs().max() == 0
    with pytest.raises(ValueError, match="statistics of 1 channels, latents of 5"):
        LatentStats.of(constant).normalize(z)

    whole.save(tmp_path / "s")
    loaded = LatentStats.load(tmp_path / "s")
    assert torch.equal(loaded.mean, whole.mean) and torch.equal(loaded.std, whole.std)
    assert loaded.count == whole.count
    (tmp_path / "s").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="not a file of latent statistics"):
        LatentStats.load(tmp_path / "s")


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
    name = re.sub(r"(en|de)coder.model.", r"\1coder.layers.", name)
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
    with pytest.raises(OSError, match=r"checkpoints/encodec_24khz-d7cc33bc.th.*--encodec-weights"):
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


def test_codecs_by_name():
    assert load_codec("mel").settings() == load_codec(MelCodec().settings()).settings()
    for settings in ("mp3", {}, {"name": "mel", "n_fft": 512}, {"name": "mel", "colour": "red"}):
        with pytest.raises(ValueError, match="codec"):
            load_codec(settings)
    assert MelCodec().decode(torch.zeros(1, 128, 30)).shape == (1, 30 * 320)


# ------------------------------------------------------------------ audio files


def peak_frequency(wave):
    spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave)))
    return spectrum.abs().argmax().item() * 16_000 / len(wave)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
def test_load_audio(tmp_path, suffix, rate):
    path = tmp_path / f"tone.{suffix}"
    stereo = torch.stack([sine(1000, 2, rate), torch.zeros(2 * rate)], dim=1)
    soundfile.write(path, stereo.numpy(), rate)
    wave = load_audio(path)
    assert wave.dtype == torch.float32 and wave.dim() == 1
    assert abs(len(wave) - 32_000) <= (512 if suffix == "ogg" else 1)  # FFmpeg's Vorbis, at its end
    assert abs(peak_frequency(wave) - 1000) < 1
    assert abs(wave[4000:-4000].abs().max() - 0.25) < 0.03  # the mean of the channels
    start = load_audio(path, seconds=1)
    assert len(start) == 16_000
    torch.testing.assert_close(start, wave[:16_000], atol=1e-4, rtol=0)


def without_length(path):
    """Writes 5.0 s whose header doesn't know how long they are, or says something else."""
    start = path.with_name("whole" + path.suffix)
    soundfile.write(start, sine(440, 5, 44_100).numpy(), 44_100)
    data = bytearray(start.read_bytes())
    if path.suffix == ".mp3":  # of a variable bit rate, without a Xing header; or of 2³¹ frames
        xing = data.find(b"Xing")
        if "huge" in path.name:
            data[xing + 8 : xing + 12] = b"\x7f\xff\xff\xff"
        else:
            data = data[data.find(b"\xff\xfb", xing) :]
    elif path.suffix == ".flac":
        data[21] &= 0xF0
        data[22:26] = (2**32 - 1 if "huge" in path.name else 0).to_bytes(4)
    elif path.suffix == ".wav":
        size = data.find(b"data") + 4
        data[size : size + 4] = (2**32 - 1 if "huge" in path.name else 0).to_bytes(4, "little")
    elif path.suffix == ".ogg":  # chained: one file after another
        data = data[: len(data)] + data
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["a.mp3", "huge.mp3", "a.flac", "huge.flac", "a.wav", "huge.wav",
                                  "chained.ogg"])  # fmt: skip
def test_files_are_read_to_their_end(tmp_path, name):
    without_length(tmp_path / name)
    seconds = 10 if name == "chained.ogg" else 5
    assert len(load_audio(tmp_path / name)) / 16_000 == pytest.approx(seconds, abs=0.1)
    assert latents.duration(tmp_path / name) == pytest.approx(seconds, abs=0.1)


def test_half_a_file_is_no_file(tmp_path):
    soundfile.write(tmp_path / "a.flac", sine(440).numpy(), 16_000)
    os.truncate(tmp_path / "a.flac", (tmp_path / "a.flac").stat().st_size // 2)
    with pytest.raises(ValueError, match="a.flac"):
        load_audio(tmp_path / "a.flac")


def test_opposite_phases_are_not_silence(tmp_path):
    stereo = torch.stack([sine(1000, 2), -sine(1000, 2)], dim=1)
    soundfile.write(tmp_path / "a.wav", stereo.numpy(), 16_000)
    torch.testing.assert_close(load_audio(tmp_path / "a.wav"), stereo[:, 0], atol=1e-4, rtol=0)


def test_no_playlist_is_followed(tmp_path):
    soundfile.write(tmp_path / "secret.wav", sine(440, 2).numpy(), 16_000)
    (tmp_path / "a.wav").write_text("#EXTM3U\n#EXTINF:10,\nsecret.wav\n")
    with pytest.raises(ValueError, match="a.wav"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [44_056, 44_101, 701_234])
def test_odd_rates_take_no_large_filters(tmp_path, rate, monkeypatch):
    """44,101 : 16,000 has no common factor; its filters would take gigabytes."""
    soundfile.write(tmp_path / "odd.wav", sine(1000, 3, rate).numpy(), rate)
    resample = latents.AF.resample

    def small(wave, old, new):
        assert max(old, new) <= 1000
        return resample(wave, old, new)

    monkeypatch.setattr(latents.AF, "resample", small)
    wave = load_audio(tmp_path / "odd.wav")
    assert abs(len(wave) - 48_000) < 48_000 * 6e-4 and abs(peak_frequency(wave) - 1000) < 1


def test_to_clip():
    for seconds in (0.01, 10.08, 35):
        wave = sine(100, seconds)
        (clip,), n = to_clip(wave), min(len(wave), CLIP_SAMPLES)
        assert len(clip) == CLIP_SAMPLES and torch.equal(clip[:n], wave[:n])
        assert clip[n:].abs().sum() == 0


def test_audio_that_cannot_be_used(tmp_path):
    bad = {"nan.wav": (np.array([0, np.nan]), 16_000), "inf.wav": (np.array([np.inf, 0]), 16_000)}
    bad |= {"empty.wav": (np.zeros(0), 16_000), "slow.wav": (np.zeros(100), 999)}
    bad |= {"loud.wav": (np.array([1e20, 0]), 16_000)}
    for name, (samples, rate) in bad.items():
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("this is no audio")
    (tmp_path / "nothing.ogg").touch()
    (tmp_path / "x.raw").write_bytes(bytes(1000))  # libsndfile would have to be told the rate
    for name in (*bad, "text.wav", "nothing.ogg", "x.raw"):
        with pytest.raises(ValueError, match=name) as error:
            load_audio(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="missing.wav: no such file"):
        load_audio(tmp_path / "missing.wav")


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
    before = path.read_bytes()
    for wave in (torch.tensor([0.0, torch.nan]), torch.tensor([torch.inf]), torch.zeros(1, 5)):
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """Of a block of 64 MB that was there before, no page is new. By default, all 16,384 are."""
    code = "import resource, torch, latents\nlatents.keep_freed_memory()\n"
    code += "for _ in range(4): torch.ones(2**24)\n"
    code += "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    code += "before = faults(); torch.ones(2**24); print(faults() - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert int(done.stdout) < 100


@pytest.mark.parametrize("units", [True, False])
def test_precision(monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    cpu = latents.pick_device("cpu")
    assert latents.pick_precision("auto", cpu) == ("bf16" if units else "fp32")
    assert [latents.pick_precision(name, cpu) for name in ("bf16", "fp32")] == ["bf16", "fp32"]
    with pytest.raises(ValueError, match="expected auto, bf16"):
        latents.pick_precision("fp16", cpu)


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for gpus, rank, name, found in (
        (2, None, None, "cuda:0"),
        (2, None, "cuda:1", "cuda:1"),
        (2, "1", None, "cuda:1"),
        (2, "1", "cuda", "cuda:1"),
        (2, "1", "cuda:1", "cuda:1"),
        (2, "1", "cpu", "cpu"),
        (2, "1", "cuda:0", "this rank's is cuda:1; no two"),
        (1, "1", None, "device cuda:1: PyTorch finds only cuda:0, cpu"),
        (0, "1", None, "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        if " " in found:
            with pytest.raises(ValueError, match=found):
                latents.pick_device(name)
        else:
            assert latents.pick_device(name) == torch.device(found)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# ------------------------------------------------------------------ tables


TABLES = {  # name and text; what its records are
    "ours.jsonl": (
        '\ufeff{"file": "a/1.wav", "captions": ["a dog", " ein Hund\u2028"], "labels": ["Dog"], '
        '"n": 1}\n\n{"id": 7, "file": "2.wav", "caption": "a cat", "start": 3}\n'
        '{"labels": "Dog; Bark", "id": "x"}\n',
        [{"id": "a/1.wav", "file": "a/1.wav", "captions": ["a dog", "ein Hund"],
          "labels": ["Dog"], "n": 1},
         {"id": "7", "file": "2.wav", "captions": ["a cat"], "start": 3.0},
         {"id": "x", "captions": [], "labels": ["Dog", "Bark"]}],
    ),
    "ours.csv": (
        'file,caption,labels,licence\ndog.wav,"A dog, barking",Dog; Bark,CC0\nb.wav,,Tone,\n'
        "dog.wav,Woof,Dog;Animal,CC BY\ndog.wav,Woof,,CC0\n",
        [{"id": "dog.wav", "file": "dog.wav", "captions": ["A dog, barking", "Woof"],
          "labels": ["Dog", "Bark", "Animal"], "licence": "CC0"},
         {"id": "b.wav", "file": "b.wav", "captions": [], "labels": ["Tone"]}],
    ),
    "audiocaps.csv": (
        "audiocap_id,youtube_id,start_time,caption\n" + "".join(
            f"{i},-0xzrMun0Rs,30,Birds {i}\n" for i in range(5)),
        [{"id": "-0xzrMun0Rs", "captions": [f"Birds {i}" for i in range(5)], "start": 30.0}],
    ),
    "clotho.csv": (
        "file_name,caption_1,caption_2\na b.wav,rain,it rains\n",
        [{"id": "a b.wav", "file": "a b.wav", "captions": ["rain", "it rains"]}],
    ),
    "wavcaps.json": (
        '{"num": 1,\n "data": [{"id": "YabcDEF.wav", "caption": "a dog", "duration": 10.0}]}',
        [{"id": "YabcDEF.wav", "captions": ["a dog"], "duration": 10.0}],
    ),
    "list.json": ('[{"id": "x", "caption": "a dog"}]', [{"id": "x", "captions": ["a dog"]}]),
    "prompts.tsv": (
        "prompt\na dog, barking\nA dog (barking)\n",
        [{"id": "a_dog_barking", "captions": ["a dog, barking"]},
         {"id": "a_dog_barking", "captions": ["A dog (barking)"]}],
    ),
    "segments.csv": (
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# YTID, start_seconds, end_seconds, …\n"
        '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"\n'
        '-0RWZT-miFs, 420.000, 429.5, "/m/05zppz"\n',
        [{"id": "--4gqARaEJE", "start": 0.0, "end": 10.0, "labels": [PETS, "Dog"]},
         {"id": "-0RWZT-miFs", "start": 420.0, "end": 429.5, "labels": [MALE]}],
    ),
}  # fmt: skip


@pytest.fixture
def classes(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text(f'index,mid,display_name\n0,/m/05zppz,"{MALE}"\n1,/m/068hy,"{PETS}"\n'
                    "2,/m/0bt9lr,Dog\n")  # fmt: skip
    return path


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name, classes):
    text, expected = TABLES[name]
    (tmp_path / name).write_text(text)
    records = read_table(tmp_path / name, classes)
    assert len(records) == len(expected)
    for record, row in zip(records, expected, strict=True):
        row = {"captions": [], "labels": []} | row
        assert {key: record.get(key) for key in row} == row
        assert ("file" in record, "start" in record) == ("file" in row, "start" in row)


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.csv", "file,caption\n", "no rows"),
        ("a.csv", "a,b\n1,2\n", "row 1: expected columns such as id, name"),
        ("a.csv", "file,caption\na.wav,x\na.wav,x,y,z\n", "row 2"),
        ("a.csv", 'a_bcdefghij, 30.0, 40.0, "/m/1,/m/2"\n', "row 1: give --class-labels"),
        ("a.csv", "# YTID\na_bcdefghij, thirty, 40.0, /m/05zppz\n", "row 1: could not convert"),
        ("a.jsonl", '{"file": "a.wav", "caption": "x"}\n{"file": "b.wav", \n', "row 2: Expecting"),
        ("a.jsonl", '{"file": "a.wav", "captions": [1]}\n', "row 1"),
        ("a.jsonl", '{"file": "a.wav", "caption": "\\ud83d"}\n', "row 1.*surrogates"),
        ("a.csv", b"file,caption\n\xff\xfe,x\n", "row 1: 'utf-8' codec"),
        ("a.csv", "caption\n" + "x" * 200_000, "row 1: field larger"),
        ("a.json", '{"dogs": []}', "row 1: 'data'"),
        ("a.xlsx", "PK", "row 1: expected a .csv, .tsv"),
    ],
)
def test_bad_tables(tmp_path, name, text, complaint, classes):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=complaint) as error:
        read_table(tmp_path / name, classes)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_audio_is_found_by_file_or_id(tmp_path):
    """A record with these keys is at this path, below a folder, in a linked one, too."""
    wanted = [
        ({"id": "x", "file": "sub/a.wav"}, "sub/a.wav"),
        ({"id": "a"}, "sub/a.wav"),
        ({"id": "a.wav", "file": "elsewhere/a.wav"}, "sub/a.wav"),  # by safe_name
        ({"id": "--4gqARaEJE"}, "--4gqARaEJE.flac"),
        ({"id": "-0RWZT-miFs"}, "linked/Y-0RWZT-miFs.WAV"),
        ({"id": "AbC_dEfGhIj", "start": 30.0}, "AbC_dEfGhIj_30.000.wav"),
        ({"id": "AbC_dEfGhIj", "start": 5.0}, "AbC_dEfGhIj_000004.wav"),
        ({"id": "0123456789_"}, "linked/Y0123456789__30.ogg"),
        ({"id": "a dog: Bark!"}, "a_dog_bark.wav"),
        ({"id": "dog"}, None),  # dog.txt is no audio
        ({"id": "gone", "file": "gone.wav"}, None),
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    for path in (*filter(None, (path for _, path in wanted)), "dog.txt"):
        (tmp_path / "in" / path).touch()
    found = find_audio([record for record, _ in wanted], tmp_path / "in")
    assert [path and str(path.relative_to(tmp_path / "in")) for path in found] == [
        path for _, path in wanted
    ]


@pytest.mark.parametrize(
    "text, given, name",
    [
        ("Dog barking", False, "dog_barking"), ("../../etc/passwd", False, "etc_passwd"),
        ("🐶 \n", False, "sound"), ("Köln: 犬が吠える", False, "köln_犬が吠える"),
        ("half of an emoji \ud83d", False, "half_of_an_emoji"), ("犬" * 100, False, "犬" * 20),
        ("-0xzrMun0Rs", True, "-0xzrMun0Rs"), ("sub/a b.OGG", True, "a_b"), ("..", True, "sound"),
        (".hidden", True, "hidden"), ("c:\\take 1.5", True, "take_1.5"),
        ("n" * 300, True, "n" * 200),
    ],
)  # fmt: skip
def test_safe_names(text, given, name):
    assert safe_name(text, given) == name


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
    return torch.rand(1, CLIP_SAMPLES, generator=generator(row["id"]))


def noise_rows(n=23):
    return [{"id": i, "file": f"{i}.wav", "captions": [f"Ton\u2028 {i}"]} for i in range(n)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


encode_noise = functools.partial(
    encode_dataset, codec=FakeCodec(), rows=noise_rows(), load=load_noise, batch_size=3
)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    assert encode_noise(folder) is True
    return folder


def test_what_was_written_is_read(noise):
    names = "clips.jsonl codec.json codes.npy done latent_stats.safetensors skipped.csv"
    assert sorted(contents(noise)) == names.split()
    data, kept = LatentDataset(noise), [row for row in noise_rows() if row["id"] % 7 != 3]
    assert len(data) == len(kept) == 20 and len(data.codes) == 23
    assert data.codec == FakeCodec().settings()
    indices = torch.randperm(20, generator=generator())
    indices = torch.cat([indices, indices[:5]])  # some of them twice
    stored = data.stored(indices)
    assert stored.dtype == torch.uint16 and stored.shape == (25, 8, FRAMES)
    for i, codes in zip(indices.tolist(), stored, strict=True):
        assert torch.equal(codes.int(), FakeCodec().encode(load_noise(kept[i]))[0].int())
        assert data.record(i) == kept[i]
    everything = LatentStats.of(FakeCodec().dequantize(data.stored(range(20))))
    torch.testing.assert_close(data.stats.mean, everything.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(data.stats.std, everything.std, rtol=1e-12, atol=0)
    assert (noise / "skipped.csv").read_text() == "file,reason\n" + "".join(
        f"{i}.wav,{i}.wav: not audio\n" for i in (10, 17, 3)
    )
    with pytest.raises(IndexError):
        data.stored([0, 20])
    loader = torch.utils.data.DataLoader([0], collate_fn=data.stored, num_workers=1)
    assert torch.equal(next(iter(loader)).int(), data.stored([0]).int())


@pytest.mark.parametrize("world_size, workers", [(2, 0), (3, 0), (9, 0), (1, 2)])
def test_ranks_and_workers_write_the_same_bytes(noise, tmp_path, world_size, workers):
    options = {"world_size": world_size, "workers": workers}
    done = [encode_noise(tmp_path, rank=rank, **options) for rank in range(world_size)[::-1]]
    assert done[-1] is True and done == sorted(done)  # complete when the last one is through
    assert contents(tmp_path) == contents(noise)


def test_killed_again_and_again(noise, tmp_path):
    """Three processes that SIGKILL themselves at their fifth clip."""
    code = "import os, sys, tests.test_latents as t\ncalls = []\n"
    code += "def load(row):\n    calls.append(row)\n"
    code += "    return t.load_noise(row) if len(calls) < 5 else os.kill(os.getpid(), 9)\n"
    code += f"t.encode_noise({str(tmp_path)!r}, load=load, rank=int(sys.argv[1]), world_size=2)"
    for rank in (0, 0, 1):
        process = subprocess.run([sys.executable, "-c", code, str(rank)], cwd=ROOT, stderr=-3)
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(FileNotFoundError, match="unfinished"):
            LatentDataset(tmp_path)
    loaded = []
    load = lambda row: loaded.append(row["id"]) or load_noise(row)  # noqa: E731
    assert encode_noise(tmp_path, load=load) is True
    assert contents(tmp_path) == contents(noise)
    assert len(loaded) == 23 - 3 * 3  # the batches that were done aren't done again


@pytest.mark.parametrize("name", ["codec", "skipped", "clips", "latent_stats"])
def test_stopped_at_any_file(noise, tmp_path, monkeypatch, name):
    """A full disk at one of the files that are written whole: nothing is left of it."""

    def full(source, target):
        if target.stem == name:
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=rf"{name}\..*: not written"):
        patch.setattr(os, "replace", full)
        encode_noise(tmp_path)
    assert encode_noise(tmp_path) is True and contents(tmp_path) == contents(noise)


def test_a_second_command_is_refused(tmp_path, noise):
    code = "import sys, time, tests.test_latents as t\n"
    code += "t.encode_noise(sys.argv[1], load=lambda row: print(flush=True) or time.sleep(60))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=-3) as first:
        first.stdout.readline()  # it is at work
        with pytest.raises(OSError, match="done: another command is writing there"):
            encode_noise(tmp_path)
        first.kill()
    assert encode_noise(tmp_path) is True and contents(tmp_path) == contents(noise)


def die(row):
    os._exit(1)


def test_a_worker_that_dies_ends_the_command(tmp_path):
    with pytest.raises(RuntimeError, match="worker .* exited unexpectedly"):
        encode_noise(tmp_path, load=die, workers=1)


def test_workers_need_no_shared_memory(noise, tmp_path):
    """Docker gives /dev/shm 64 MB; stood in for by a limit on the size of files there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # a batch of waves has 1.9 MB
    try:
        assert encode_noise(tmp_path, workers=2) is True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == contents(noise)


def test_silent_clips_are_counted(tmp_path, capsys):
    encode_noise(tmp_path, load=lambda row: torch.rand(1, CLIP_SAMPLES) * (row["id"] > 2))
    assert "3 clips are silent" in capsys.readouterr().out and len(LatentDataset(tmp_path)) == 23


def test_something_else_is_refused(noise, tmp_path):
    other = FakeCodec()
    other.settings = lambda: {"name": "encodec", "sha256": "other"}
    before = contents(noise)
    for what in ({"codec": other}, {"rows": noise_rows(22)}):
        name = {"rows": "table"}.get(*what, *what)
        with pytest.raises(ValueError, match=f"begun with another {name}"):
            encode_noise(noise, **what)
    assert encode_noise(noise) is True and contents(noise) == before  # the same: nothing to do

    def broken(row):
        raise OSError("broken")

    with pytest.raises(ValueError, match="all rows were skipped"):
        encode_noise(tmp_path, load=broken)
    assert (tmp_path / "skipped.csv").read_text().count("broken") == 23
    with pytest.raises(FileNotFoundError, match="no stored data set"):
        LatentDataset(tmp_path / "nowhere")


def test_damage_that_would_go_on_silently(noise, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(noise, folder)
    codes = np.load(noise / "codes.npy")
    codes[1, 0, 0] = 1024
    np.save(folder / "codes.npy", codes)
    data = LatentDataset(folder)
    with pytest.raises(ValueError, match="damaged, EnCodec has no code 1024"):
        data.stored([0, 1])
    lines = (noise / "clips.jsonl").read_text().split("\n")
    for text in (lines[1:], []):  # of another number of rows
        (folder / "clips.jsonl").write_text("\n".join(text))
        with pytest.raises(ValueError, match="copy: damaged"):
            LatentDataset(folder)
    lines[1] = lines[1].replace("[", "")
    (folder / "clips.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="damaged at clip 1"):
        LatentDataset(folder).record(1)
    (folder / "codes.npy").write_bytes((noise / "codes.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        LatentDataset(folder)


# ------------------------------------------------------------------ the command


def run(monkeypatch, *args, **environment):
    """The command, in this process: its exit status or message."""
    monkeypatch.setattr(sys, "argv", ["latents.py", "encode", *map(str, args)])
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


def test_encode(sounds, tmp_path, monkeypatch, capsys):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("id,file,caption,labels\nD,dog.wav,Woof,Dog\nlong,,,Tone;Sine\n"
                     ",broken.ogg,x,Dog\ngone,,x,Dog\n")  # fmt: skip
    command = (sounds, table, "--codec", "mel", "--batch-size", 2, "--workers", 0, "--out")
    assert run(monkeypatch, *command, out) == 0
    assert "2 clips; 2 rows skipped" in capsys.readouterr().out
    data = LatentDataset(out)
    first = {"id": "D", "file": "dog.wav", "labels": ["Dog"], "captions": ["Woof"]}
    assert data.record(0) == first
    assert data.record(1)["captions"] == ["The sound of Tone, Sine"]
    assert data.record(1)["file"] == "sub/long.flac"
    expected = MelCodec().encode(to_clip(load_audio(sounds / "sub" / "long.flac")))
    assert (data.stored([1]).int() - expected.int()).abs().max() <= 1
    skipped = (out / "skipped.csv").read_text()
    assert "broken.ogg: can't be read as audio" in skipped and "gone: no such file" in skipped
    for rank in (1, 0):  # as torchrun starts them
        assert run(monkeypatch, *command, tmp_path / "two", RANK=rank, WORLD_SIZE=2) == 0
    assert contents(tmp_path / "two") == contents(out)

    assert run(monkeypatch, *command, tmp_path / "several", "--several-clips", WORLD_SIZE=1) == 0
    data = LatentDataset(tmp_path / "several")
    assert [data.record(i).get("clip") for i in range(4)] == [None, None, 1, 2]
    whole = load_audio(sounds / "sub" / "long.flac")  # 25 s
    pieces = torch.cat([to_clip(piece) for piece in whole.split(CLIP_SAMPLES)])
    assert (data.stored([1, 2, 3]).int() - MelCodec().encode(pieces).int()).abs().max() <= 1


def test_mistakes_get_one_line(sounds, tmp_path, monkeypatch):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("file,caption\ndog.wav,x\n")
    (tmp_path / "bare.csv").write_text("file\ndog.wav\n")
    (tmp_path / "file").touch()
    for args, complaint in (
        ([tmp_path / "gone", table, "--out", out], "no such folder"),
        ([sounds, tmp_path / "gone.csv", "--out", out], "gone.csv"),
        ([sounds, tmp_path / "bare.csv", "--out", out], "neither a caption nor labels"),
        ([sounds, table, "--out", out, "--device", "cuda"], "PyTorch finds only cpu"),
        ([sounds, table, "--out", tmp_path / "file", "--codec", "mel"], "file"),
        ([sounds, table, "--out", out, "--encodec-weights", tmp_path / "w.th"], "w.th"),
    ):
        message = run(monkeypatch, *args)
        assert message.startswith("error: ") and complaint in message and "\n" not in message
    assert not out.exists()
    assert run(monkeypatch, "--colour") == 2


def test_as_a_script():
    command = [sys.executable, "latents.py", "encode", "nowhere", "t.csv", "--out", "nowhere"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "error: nowhere: no such folder\n"
