"""Audio ⇄ latents: the codecs, their statistics, and stored data sets.

Glossary. A *clip* is 10.08 s of 16 kHz mono audio: 161,280 samples = 504 frames of 320 samples.
A *codec* turns a clip into small integers, which are stored (`encode`), these into a continuous
*latent* of C channels × 504 frames, which the diffusion model learns (`dequantize`), and a latent
into sound (`decode`). A *stored data set* is a folder of such integers with their captions.

The papers' latent ("Generation Latent Space") is EnCodec's after its residual vector quantisation:
the sum of one vector from each of eight codebooks q_k, chosen by the codes c_k,

    z[:, t] = Σ_k q_k[c_k[t]]        [128, 504]

seen row by row as a picture of 128 channels, each brought to mean 0 and standard deviation 1:

    x[:, row, col] = z[:, 21·row + col]      x_0 = (x − mean) / std        [128, 24, 21]

As in the papers, 16 kHz audio goes into the 24 kHz EnCodec without resampling, and what comes out
is played at 16 kHz. Departures: height 24 and width 21, as in their code (the text says 21 × 24);
codes are stored as uint16, a quarter of their 63 GB and lossless; there is a second codec that
needs no weights, a log-mel spectrogram, sharpened across its bands, with Griffin-Lim.

    python latents.py encode AUDIO_FOLDER TABLE --out FOLDER      (torchrun: a share for each rank)
    python latents.py check FOLDER
"""

import argparse
import csv
import ctypes
import functools
import hashlib
import inspect
import io
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

SAMPLE_RATE = 16_000
HOP = 320
FRAMES = 504
CLIP_SAMPLES = FRAMES * HOP  # 161,280
GRID = (24, 21)  # height, width


def to_grid(z: Tensor) -> Tensor:
    """[..., C, 504] -> [..., C, 24, 21], row by row: frame = 21·row + col."""
    return z.unflatten(-1, GRID)


def to_sequence(x: Tensor) -> Tensor:
    """[..., C, 24, 21] -> [..., C, 504], the inverse of `to_grid`."""
    return x.flatten(-2)


@dataclass(frozen=True, eq=False)
class LatentStats:
    """Mean and population std of each latent channel (float64 [C]), and how many values gave them.

    They are part of a trained model: sampling has to undo exactly what training did.
    """

    mean: Tensor
    std: Tensor
    count: int = 0

    @classmethod
    def of(cls, latents: Tensor) -> "LatentStats":
        """The statistics of a batch, [B, C, 504] or [B, C, 24, 21]."""
        others = [dim for dim in range(latents.dim()) if dim != 1]
        std, mean = torch.std_mean(latents.detach().double(), dim=others, correction=0)
        return cls(mean.cpu(), std.cpu(), latents.numel() // latents.shape[1])

    def merge(self, other: "LatentStats") -> "LatentStats":
        """The statistics of both sets together (Chan et al., 1979): shards add up to the whole."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        # Σ (x − mean)², from each set's own sum and the distance of the two means
        squares = self.std**2 * self.count + other.std**2 * other.count
        squares = squares + delta**2 * self.count * other.count / count
        return LatentStats(mean, (squares / count).sqrt(), count)

    def normalize(self, z: Tensor) -> Tensor:
        """(z − mean) / std per channel; z is [B, C, 504] or [B, C, 24, 21], on any device."""
        mean, std = self._like(z)
        return (z - mean) / std

    def denormalize(self, x: Tensor) -> Tensor:
        """x·std + mean: the inverse of `normalize`."""
        mean, std = self._like(x)
        return x * std + mean

    def _like(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean.numel() != z.shape[1]:
            raise ValueError(f"statistics of {self.mean.numel()} channels, latents of {z.shape[1]}")
        shape = (-1,) + (1,) * (z.dim() - 2)
        std = self.std.clamp(min=1e-4)  # a channel that never changes must not give 0 / 0
        return self.mean.to(z).view(shape), std.to(z).view(shape)

    def to_bytes(self) -> bytes:
        tensors = {"mean": self.mean, "std": self.std, "count": torch.tensor(self.count)}
        return safetensors.torch.save(tensors)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (latent_stats.safetensors of a model folder or data set)."""
        write_aside(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "LatentStats":
        """Read what `save` wrote. FileNotFoundError, or ValueError for any other file."""
        try:
            tensors = safetensors.torch.load_file(path)
            mean, std = tensors["mean"].double(), tensors["std"].double()
            if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
                raise ValueError("numbers that are no mean and std")
            return cls(mean, std, int(tensors.get("count", 0)))
        except OSError:
            raise
        except Exception as e:  # of many types: safetensors', torch's, Python's
            raise ValueError(f"{path}: not a file of latent statistics ({e!r:.120})") from e


# ---------------------------------------------------------------------------------- codecs


class EncodecCodec:
    """EnCodec 24 kHz at 6 kbps (Défossez et al., 2022), as the papers used it.

    `weights`: the official encodec_24khz-d7cc33bc.th, or a folder that holds it; without it, torch
    hub's cache, downloaded when missing. OSError if that fails, ValueError for any other file.
    """

    name = "encodec"
    channels = 128
    stored_shape = (8, FRAMES)
    stored_dtype = torch.uint16
    url = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        from encodec import EncodecModel  # slow to import, and the other codec doesn't need it

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the package uses an old weight_norm
            self.model = EncodecModel.encodec_model_24khz(pretrained=False)
        file = Path(self.url).name
        path = weights or Path(torch.hub.get_dir(), "checkpoints", file)
        path = Path(path, file) if Path(path).is_dir() else path
        try:
            if weights is None:
                state = torch.hub.load_state_dict_from_url(
                    self.url, map_location="cpu", check_hash=True, weights_only=True
                )
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state)
        except OSError as e:
            raise OSError(
                f"EnCodec's weights are not at {path} ({e}): download {self.url} and put the file "
                f"there, or say with --encodec-weights where it is"
            ) from e
        except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
            raise ValueError(f"{path}: damaged, unsafe, or not EnCodec's 24 kHz weights") from e
        self.model.set_target_bandwidth(6.0)  # 8 codebooks; without it there would be 32
        self.model.requires_grad_(False)
        # Codes mean something only together with the weights that made them: name these by a hash.
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        self.sha256 = digest.hexdigest()
        self.device = torch.device(device)
        self.model.to(self.device)
        # All codebooks in one table: entry c of codebook k is row 1024·k + c.       [8·1024, 128]
        self.codebooks = torch.cat([layer.codebook for layer in self.model.quantizer.vq.layers[:8]])

    def settings(self) -> dict:
        return {"name": self.name, "bandwidth": 6.0, "sha256": self.sha256}

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """16 kHz in −1 … 1, [B, 161280] -> codes, uint16 [B, 8, 504]."""
        wave = _expect(wave, CLIP_SAMPLES).to(self.device)
        codes, _ = self.model.encode(wave[:, None])[0]  # one frame: the 24 kHz model doesn't cut
        return codes.to(torch.uint16)

    @torch.no_grad()
    def dequantize(self, stored: Tensor) -> Tensor:
        """Codes [B, 8, 504] -> z, float32 [B, 128, 504], on the codes' device.

        One embedding_bag looks up and adds: ten times as fast as a loop over the codebooks. The
        result is a transposed view, channels last in memory.
        """
        codes = stored.to(torch.int32)  # uint16 tensors can do next to nothing
        rows = codes + 1024 * torch.arange(8, dtype=torch.int32, device=codes.device)[:, None]
        rows = rows.transpose(1, 2).reshape(-1, 8)  # [B·504, 8]
        # z[:, t] = Σ_k q_k[c_k[t]]
        z = F.embedding_bag(rows, self.codebooks.to(codes.device), mode="sum")  # [B·504, 128]
        return z.view(len(stored), FRAMES, self.channels).transpose(1, 2)  # [B, 128, 504]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """z, [B, 128, frames] -> 16 kHz wave, float32 [B, 320·frames]; a clip has 504 frames."""
        latents = _expect(latents, self.channels, None)
        return self.model.decoder(latents.to(self.device))[:, 0]


class MelCodec:
    """Log-mel spectrogram, 128 bands × 504 frames, and Griffin-Lim back. Needs no weights.

    In the spirit of the papers' spectrogram row (P2, table 2), on EnCodec's frames. A value is
    20·log10(m + 10^(floor_db/20)), where m is the magnitude in a mel band (HTK scale) and a
    full-scale sine has 0 dB. Stored as uint8, linear in dB over floor_db … top_db (0.34 dB a step).
    `decode` looks for a sound with this spectrogram: each round of Griffin & Lim (1984), in the
    fast variant of Perraudin et al. (2013), takes magnitudes and phases of a sound and brings the
    magnitudes s nearer to the mel bands (Lee & Seung, 2000: s ← s · Mᵀmel / MᵀMs).
    `benchmarks/inversion.py` has what this and other choices are worth.

    Latents are these dB sharpened across the bands, C orthonormal cosines, cos(π·k·(band + ½)/128):

        z = C · diag((1 + k)^tilt) · Cᵀ · dB

    Spectra of scenes fall as 130 dB / (1 + k): loudness and slope are nearly all of the variance,
    and the harmonics that make a tone a tone drown in the first bit of noise. Tilt ½ leaves half of
    that fall (0: plain dB; 1: white, and then loudness jitters); the mean over the bands, the
    loudness, stays what it is.
    """

    name = "mel"
    channels = 128
    stored_shape = (128, FRAMES)
    stored_dtype = torch.uint8
    n_fft = 1024
    fmin, fmax = 20.0, 8000.0  # Hz
    floor_db, top_db = -80.0, 6.0
    tilt = 0.5
    iterations, momentum = 16, 0.99  # of Griffin-Lim

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.window = torch.hann_window(self.n_fft).to(device)
        bins = self.n_fft // 2 + 1
        mel = AF.melscale_fbanks(bins, self.fmin, self.fmax, self.channels, SAMPLE_RATE).T
        self.mel = mel.to(device)  # [128, 513]
        k = torch.arange(self.channels, dtype=torch.float64)
        cosines = torch.cos(torch.pi * k * (k[:, None] + 0.5) / self.channels)  # [band, k]
        cosines /= cosines.norm(dim=0)  # orthonormal
        gain = (1 + k) ** self.tilt
        # z = C · diag(gain) · Cᵀ · dB, and back
        self.sharpen = (cosines * gain @ cosines.T).float().to(device)  # [128, 128]
        self.unsharpen = (cosines / gain @ cosines.T).float().to(device)

    def settings(self) -> dict:
        names = ("name", "channels", "n_fft", "fmin", "fmax", "floor_db", "top_db", "tilt")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """16 kHz in −1 … 1, [B, 161280] -> uint8 [B, 128, 504]."""
        # In float64, so that the rounded result is the same on (nearly) every machine.
        wave = _expect(wave, CLIP_SAMPLES).to(self.device).double()
        window = self.window.double()
        spectrum = torch.stft(wave, self.n_fft, HOP, window=window, return_complex=True)
        # Frame k is centred on sample 320·k: the 505th, centred on the end, is left out.
        magnitude = spectrum[..., :FRAMES].abs() * (2 / window.sum())  # [B, 513, 504], sine: 1
        decibel = 20 * torch.log10(self.mel.double() @ magnitude + 10 ** (self.floor_db / 20))
        steps = (decibel - self.floor_db) * (255 / (self.top_db - self.floor_db))
        return steps.round().clamp(0, 255).to(torch.uint8)  # [B, 128, 504]

    @torch.no_grad()
    def dequantize(self, stored: Tensor) -> Tensor:
        """uint8 [B, 128, 504] -> sharpened dB, float32 of the same shape, on its device."""
        return self.sharpen.to(stored.device) @ self.decibel(stored)

    def decibel(self, stored: Tensor) -> Tensor:
        """uint8 -> the level of each band in dB, float32 of the same shape."""
        return stored.float() * ((self.top_db - self.floor_db) / 255) + self.floor_db

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Sharpened dB, [B, 128, frames] -> 16 kHz wave, float32 [B, 320·frames]; a clip has 504
        frames. It starts from white noise, always the same: inside a band the magnitudes of real
        sounds rise and fall as those of noise do, where a smooth spectrum with phases 0 buzzes."""
        latents = _expect(latents, self.channels, None).to(self.device)
        decibel = (self.unsharpen @ latents).clamp(self.floor_db, self.top_db)
        decibel = F.pad(decibel, (0, 1), mode="replicate")  # frames 0 … n, the last at the end
        mel = 10 ** (decibel / 20) - 10 ** (self.floor_db / 20)  # [B, 128, frames + 1]
        samples, full_scale = HOP * latents.shape[-1], self.window.sum() / 2
        noise = torch.randn(samples, generator=torch.Generator().manual_seed(0)).to(self.device)
        spectrum = self.stft(noise).expand(len(mel), -1, -1)  # [B, 513, frames + 1]
        s, phase, last = spectrum.abs() / full_scale, spectrum.sgn(), 0
        target = self.mel.T @ mel  # M: self.mel [128, 513]
        for _ in range(self.iterations):
            for _ in range(3):  # s ← s · Mᵀmel / MᵀMs
                s = s * target / (self.mel.T @ (self.mel @ s) + 1e-9)
            wave = self.istft(full_scale * s * phase, samples)
            rebuilt = self.stft(wave)
            s = rebuilt.abs() / full_scale
            phase = (rebuilt - self.momentum / (1 + self.momentum) * last).sgn()
            last = rebuilt
        return wave

    def stft(self, wave: Tensor) -> Tensor:
        """[…, samples] -> complex […, 513, frames + 1]."""
        return torch.stft(wave, self.n_fft, HOP, window=self.window, return_complex=True)

    def istft(self, spectrum: Tensor, samples: int) -> Tensor:
        return torch.istft(spectrum, self.n_fft, HOP, window=self.window, length=samples)


def _expect(batch: Tensor, *shape: int | None) -> Tensor:
    """A batch of this shape, where None is any size."""
    sizes = [n if n is not None else m for n, m in zip(shape, batch.shape[1:], strict=False)]
    if list(batch.shape[1:]) != sizes or len(sizes) != len(shape):
        expected = ", ".join("frames" if n is None else str(n) for n in shape)
        raise ValueError(f"expected a batch of [{expected}], got a tensor {list(batch.shape)}")
    return batch.float()


def pick_device(name: str | None) -> torch.device:
    """What `--device` means: a device's name, or nothing for CUDA where there is one. Under
    torchrun, "cuda" gives each rank a GPU of its own. ValueError for a device that isn't there."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    name = name or found[0].removesuffix(":0")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in found:
        raise ValueError(f"device {name}: PyTorch finds only {', '.join(found)} here")
    if name != "cpu":
        torch.cuda.set_device(name)
    return torch.device(name)


def keep_freed_memory() -> None:
    """From here on, large blocks that are freed stay with this process, and serve its main thread
    again. glibc gives them back to the system, which clears each page when they are asked for
    again: on a CPU, half of a training step's time. Without glibc, nothing changes."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, m_trim_threshold, m_mmap_max = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def load_codec(
    settings: dict | str, device: str | torch.device = "cpu", weights: str | Path | None = None
) -> EncodecCodec | MelCodec:
    """The codec with these `settings()`, or with the defaults: "encodec" or "mel".

    `weights`: where EnCodec's are, see there. ValueError if they aren't those of the settings.
    """
    name = settings if isinstance(settings, str) else settings.get("name")
    if name not in ("encodec", "mel"):
        raise ValueError(f"unknown codec {name!r}; expected encodec or mel")
    codec = EncodecCodec(weights, device) if name == "encodec" else MelCodec(device)
    mine = codec.settings()
    for key in mine | settings if isinstance(settings, dict) else ():
        if settings.get(key) != mine.get(key):
            what = f"{key} {settings.get(key)}, and this one has {mine.get(key)}"
            raise ValueError(f"made with another {codec.name} codec: {what}")
    return codec


@torch.no_grad()
def loudness(codec: EncodecCodec | MelCodec, stored: Tensor) -> Tensor:
    """The loudness of each frame of stored clips, as a picture [B, 1, 24, 21]: what a ControlNet
    follows. 0 is −40 dB, 1 is −20 dB. Computed from what is stored, so any data set has it."""
    if codec.name == "mel":  # the level of each band: no need to make a wave of it
        power = (10 ** (codec.decibel(stored) / 10)).sum(1)  # [B, 504]
    else:
        wave = codec.decode(codec.dequantize(stored))
        power = wave.unflatten(1, (FRAMES, HOP)).square().mean(2) + 1e-8
    return to_grid((10 * torch.log10(power) + 40) / 20)[:, None]


# ---------------------------------------------------------------------------------- audio files


def read_audio(path: str | Path, seconds: float | None = None) -> tuple[Tensor, int]:
    """Any file that libsndfile reads -> float32 [samples, channels], and its sample rate in Hz.

    `seconds`: read little more than that. FileNotFoundError; ValueError for a file that is no
    audio, is empty, has NaN, infinite or absurd samples or a rate outside 1,000 to 768,000 Hz.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            # A little more than wanted, so that the resampling filter doesn't hear the cut.
            frames = -1 if seconds is None else int((seconds + 0.1) * rate)
            samples = file.read(frames, dtype="float32", always_2d=True)  # [samples, channels]
    except (soundfile.LibsndfileError, MemoryError, TypeError) as e:  # TypeError: a .raw file
        raise ValueError(f"{path}: can't be read as audio ({e})") from e
    if len(samples) == 0:
        raise ValueError(f"{path}: empty, there are no samples")
    if not -1e15 < samples.min() <= samples.max() < 1e15:  # false for NaN, too
        raise ValueError(f"{path}: has samples that are NaN, infinite or above 1e15")
    if not 1_000 <= rate <= 768_000:
        raise ValueError(f"{path}: {rate} samples a second; expected 1,000 to 768,000")
    return torch.from_numpy(samples), rate


def resample(wave: Tensor, rate: int, to: int = SAMPLE_RATE) -> Tensor:
    """[..., samples] at `rate` Hz -> at `to` Hz: torchaudio's windowed sinc."""
    # Its filters grow with the terms of the ratio (44,101 : 16,000 would take gigabytes), so we
    # round terms above 1,000. Usual rates stay exact, others are 0.05 % off at worst.
    ratio = Fraction(rate, to)
    ratio = ratio.limit_denominator(1000 * to // max(rate, to))
    return AF.resample(wave, ratio.numerator, ratio.denominator)


def load_audio(path: str | Path, seconds: float | None = None) -> Tensor:
    """Any file that libsndfile reads -> 16 kHz mono, float32 [samples]; channels are averaged.

    `seconds`: no more than that. Errors are those of `read_audio`.
    """
    samples, rate = read_audio(path, seconds)
    wave = resample(samples.mean(dim=1), rate)
    return wave if seconds is None else wave[: round(seconds * SAMPLE_RATE)]


def to_clips(wave: Tensor, several: bool = False) -> Tensor:
    """[samples] -> [n, 161280]: the first 10.08 s, zero-padded, or all of it as `several` clips.

    The last of several is padded; a rest below one second is dropped, unless there is nothing else.
    """
    n = 1
    if several:
        n = max(1, (len(wave) + CLIP_SAMPLES - SAMPLE_RATE) // CLIP_SAMPLES)
    wave = wave[: n * CLIP_SAMPLES]
    return F.pad(wave, (0, n * CLIP_SAMPLES - len(wave))).view(n, CLIP_SAMPLES)


def save_audio(path: str | Path, wave: Tensor, comment: str | None = None) -> None:
    """16 kHz in −1 … 1, [samples] -> 16-bit WAV file, whole or not at all.

    Peaks: a clip that goes above 0.99 is scaled down as a whole to 0.99, so nothing is clipped; all
    others keep their level. `comment` becomes metadata (libsndfile writes any length, but reads no
    more than 2,000 bytes back). ValueError for NaN or infinite samples.
    """
    wave = torch.as_tensor(wave).detach().float().cpu()
    if wave.dim() != 1 or len(wave) == 0:
        raise ValueError(f"{path}: expected a wave [samples], got {list(wave.shape)}")
    if not wave.isfinite().all():
        raise ValueError(f"{path}: not written, the wave has NaN or infinite samples")
    wave = wave * min(1.0, 0.99 / max(wave.abs().max().item(), 1e-9))
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as file:
        if comment:
            file.comment = comment
        file.write(wave.numpy())
    write_aside(path, buffer.getvalue())


def write_aside(path: str | Path, data: bytes, tag: str | None = None) -> None:
    """A whole file or none: written to .NAME.TAG.tmp beside it, flushed to the disk, renamed.
    OSError names the file that there was no room for."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{tag or os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as e:
        raise OSError(f"{path}: not written ({e.strerror or e})") from e
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- stored data set
#
#   plan.json                 codec, hash of the table, rows a shard: a resumed run must agree
#   shard-00000.npy           the integers of rows 0 … shard_rows − 1: [clips, *stored_shape]
#   shard-00000.jsonl         their records, a line a clip: id, file, captions, labels, …
#   shard-00000.json          clips, skipped rows, statistics, hashes; written last: "shard is done"
# and, once every shard is done:
#   record_offsets.npy        int64 [N], where clip i's line begins in its shard's .jsonl
#   label_starts.npy          int64 [N + 1], and label_ids.npy, int32: clip i has the labels
#                             label_ids[label_starts[i]:label_starts[i + 1]]
#   latent_stats.safetensors
#   skipped.csv               file, reason
#   dataset.json              codec, labels by name, clips of each shard; the last: "all done"
#
# A shard is a function of its rows alone, so its bytes depend neither on the number of ranks nor on
# interruptions. A clip takes 8,064 bytes of EnCodec codes and 24 of index (at two labels).


def encode_dataset(
    folder: str | Path,
    codec: EncodecCodec | MelCodec,
    rows: list[dict],
    load_clips: Callable[[dict], Tensor],
    *,
    shard_rows: int = 2048,
    batch_size: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> bool:
    """Write the stored data set of `rows`, or this rank's shards of it. True once it is complete.

    A row is a dict of JSON values with id, file, captions (list), labels (list) and whatever else
    is worth keeping; load_clips(row) gives its clips [n, 161280], in one of `workers` processes. A
    row for which it raises ValueError or OSError is skipped, and listed in skipped.csv.

    Ranks share nothing but the folder: rank r does shards r, r + world_size, …, and whoever then
    finds all shards done writes the rest. Called again after a kill, it goes on after the last
    finished shard. ValueError if the folder has another table or codec, or if all rows are skipped.
    """
    if shard_rows < 1 or batch_size < 1:
        raise ValueError("the batch size and the rows of a shard must be 1 or more")
    folder, tag = Path(folder), f"rank{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    table = hashlib.sha256(b"".join(map(_json, rows))).hexdigest()
    plan = {"codec": codec.settings(), "table": table, "rows": len(rows), "shard_rows": shard_rows}
    if not (folder / "plan.json").exists():
        write_aside(folder / "plan.json", _json(plan), tag)
    old = read_json(folder / "plan.json", *plan)
    if old != plan:
        other = "codec" if old["codec"] != plan["codec"] else "table (or shard size)"
        raise ValueError(f"{folder}: begun with another {other}; delete it or choose anew")
    for torn in folder.glob(".*.rank*.tmp"):  # by a kill; each is removed by one rank
        if int(torn.suffixes[-2].removeprefix(".rank")) % world_size == rank:
            torn.unlink(missing_ok=True)

    shards = [
        (folder / f"shard-{i // shard_rows:05d}.npy", rows[i : i + shard_rows])
        for i in range(0, len(rows), shard_rows)
    ]
    mine = shards[rank::world_size]
    with tqdm(total=sum(len(part) for _, part in mine), unit="row", disable=rank > 0) as bar:
        for path, part in mine:
            if path.with_suffix(".json").exists():
                bar.update(len(part))
                continue
            # The loader keeps the order of the rows, whatever the number of workers.
            load = functools.partial(_load_or_say_why, load_clips)
            loader = DataLoader(part, batch_size=None, collate_fn=load, num_workers=workers)
            for suffix, data in _encode_shard(codec, part, loader, batch_size, bar).items():
                write_aside(path.with_suffix(suffix), data, tag)
    if not all(path.with_suffix(".json").exists() for path, _ in shards):
        return False  # another rank is still at work, and will find that all are done
    for name, data in _index(folder).items():
        write_aside(folder / name, data, tag)
    return True


def _load_or_say_why(load_clips: Callable[[dict], Tensor], row: dict) -> Tensor | str:
    """What a worker process does for a row: its clips, or why there are none, in one line."""
    try:
        return _expect(load_clips(row), CLIP_SAMPLES)
    except (ValueError, OSError) as e:
        return " ".join(str(e).split())


def _encode_shard(codec, rows: list[dict], loader, batch_size: int, bar: tqdm) -> dict[str, bytes]:
    """The three files of a shard, by suffix, the one that says "done" last."""
    stored = [torch.empty(0, *codec.stored_shape, dtype=codec.stored_dtype).numpy()]
    records, skipped = [], []
    stats = LatentStats(torch.zeros(codec.channels), torch.zeros(codec.channels))
    waiting = torch.empty(0, CLIP_SAMPLES)  # loaded, not yet encoded
    for i, (row, clips) in enumerate(zip(rows, loader, strict=True)):
        if isinstance(clips, str):
            skipped.append([row["file"], clips])
        else:
            records += [row | {"clip": k} if len(clips) > 1 else row for k in range(len(clips))]
            waiting = torch.cat([waiting, clips])
        last = i == len(rows) - 1
        while len(waiting) >= batch_size or (last and len(waiting) > 0):
            codes = codec.encode(waiting[:batch_size])
            waiting = waiting[batch_size:]
            stats = stats.merge(LatentStats.of(codec.dequantize(codes)))
            stored.append(codes.cpu().numpy())
        bar.update()
    files = {".npy": _npy(np.concatenate(stored)), ".jsonl": b"".join(map(_json, records))}
    done = {"clips": len(records), "skipped": skipped, "count": stats.count}
    done |= {"mean": stats.mean.tolist(), "std": stats.std.tolist()}
    done |= {suffix: hashlib.sha256(data).hexdigest() for suffix, data in files.items()}
    return files | {".json": _json(done)}


def _index(folder: Path) -> dict[str, bytes]:
    """The files that make one data set of the shards, by name, computed from the shards.
    ValueError if a shard is damaged or all rows were skipped."""
    try:
        return _join(folder)
    except (LookupError, TypeError, OverflowError, RuntimeError, csv.Error) as e:
        raise ValueError(f"{folder}: damaged, shards don't fit together ({e!r:.80})") from e


def _join(folder: Path) -> dict[str, bytes]:
    plan = read_json(folder / "plan.json", "codec", "rows", "shard_rows")
    stats = LatentStats(torch.zeros(0), torch.zeros(0))
    clips, skipped, offsets, label_ids, label_starts = [], [], [], [], [0]
    numbers: dict[str, int] = {}  # label -> its number, in the order met
    for i in range(0, plan["rows"], plan["shard_rows"]):
        path = folder / f"shard-{i // plan['shard_rows']:05d}.json"
        done = read_json(path, "clips", "skipped", "count", "mean", "std")
        skipped += done["skipped"]
        mean, std = torch.tensor([done["mean"], done["std"]], dtype=torch.float64)
        stats = stats.merge(LatentStats(mean, std, done["count"]))
        offset = 0
        with open(path.with_suffix(".jsonl"), "rb") as file:
            for line in file:
                offsets.append(offset)
                offset += len(line)
                for label in json.loads(line)["labels"]:
                    label_ids.append(numbers.setdefault(label, len(numbers)))
                label_starts.append(len(label_ids))
        if done["clips"] != len(offsets) - sum(clips):
            raise ValueError(f"{path}: damaged, {done['clips']!r:.40} clips are not its lines'")
        clips.append(done["clips"])
    report = io.StringIO()
    csv.writer(report, lineterminator="\n").writerows([["file", "reason"], *skipped])
    if not offsets:
        if skipped:
            write_aside(folder / "skipped.csv", report.getvalue().encode())
        first = f", such as {': '.join(skipped[0])}" if skipped else ""
        raise ValueError(
            f"{folder}: all {len(skipped)} rows were skipped{first}; delete the folder to try again"
        )
    labels = sorted(numbers)
    place = {label: i for i, label in enumerate(labels)}
    places = np.array([place[label] for label in numbers], np.int32)  # by number
    dataset = {"codec": plan["codec"], "sample_rate": SAMPLE_RATE, "clips": len(offsets)}
    dataset |= {"skipped": len(skipped), "labels": labels, "shard_clips": clips}
    return {
        "record_offsets.npy": _npy(np.array(offsets, np.int64)),
        "label_starts.npy": _npy(np.array(label_starts, np.int64)),
        "label_ids.npy": _npy(places[np.array(label_ids, np.int64)]),
        "latent_stats.safetensors": stats.to_bytes(),
        "skipped.csv": report.getvalue().encode(),
        "dataset.json": _json(dataset),
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _json(value: dict) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that has these keys; ValueError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: damaged ({e})") from e
    if not isinstance(value, dict) or not set(keys) <= value.keys():
        raise ValueError(f"{path}: damaged, expected an object with {', '.join(keys)}")
    return value


class LatentDataset:
    """A stored data set, opened in an instant whatever its size: all arrays are memory-mapped.

    codec: its settings, for `load_codec`. stats: LatentStats. labels: names, sorted.
    FileNotFoundError if the folder holds none, or an unfinished one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "dataset.json").exists():
            begun = (self.folder / "plan.json").exists()
            what = "unfinished, run what made it again" if begun else "not a stored data set"
            raise FileNotFoundError(f"{folder}: {what} (there is no dataset.json)")
        about = read_json(self.folder / "dataset.json", "codec", "labels", "shard_clips")
        self.codec, self.labels, clips = (about[key] for key in ("codec", "labels", "shard_clips"))
        kinds = (self.codec, dict), (self.labels, list), (clips, list)
        fits = all(isinstance(value, kind) for value, kind in kinds)
        if not fits or not all(type(n) is int and 0 <= n < 2**40 for n in clips):
            raise ValueError(f"{folder}/dataset.json: damaged, it has values of another kind")
        self.stats = LatentStats.load(self.folder / "latent_stats.safetensors")
        self._shards: dict[int, np.ndarray] = {}  # those that have been opened
        self._starts = np.cumsum([0, *clips])  # each shard's first clip
        self._offsets = self._map("record_offsets.npy")
        self._label_ids = self._map("label_ids.npy")
        self._label_starts = self._map("label_starts.npy")
        sizes = (len(self),), (len(self) + 1,)
        if (self._offsets.shape, self._label_starts.shape) != sizes:
            raise ValueError(f"{folder}: damaged, its files don't fit together")

    def _map(self, name: str, dims: int = 1) -> np.ndarray:
        """An array of integers of so many dimensions, memory-mapped."""
        try:
            array = np.load(self.folder / name, mmap_mode="r")
            if array.ndim != dims or array.dtype.kind not in "iu":
                raise ValueError(f"{array.dtype} {list(array.shape)}")
            return array
        except OSError:
            raise
        except Exception as e:  # of many types: numpy's header is Python, a .zip will do, too
            raise ValueError(f"{self.folder / name}: damaged ({e})".splitlines()[0]) from e

    def _shard(self, i: int) -> np.ndarray:
        """Shard i's integers, memory-mapped: [clips, *stored_shape]."""
        shard = self._shards.get(i)
        if shard is None:
            name, clips = f"shard-{i:05d}.npy", self._starts[i + 1] - self._starts[i]
            shard = self._map(name, dims=3)
            if len(shard) != clips:
                path = self.folder / name
                raise ValueError(f"{path}: damaged, {len(shard)} clips instead of {clips}")
            shapes = {codec.name: codec.stored_shape for codec in (EncodecCodec, MelCodec)}
            shape = shapes.get(self.codec.get("name"), shard.shape[1:])
            if shard.shape[1:] != shape:
                raise ValueError(f"{self.folder / name}: damaged, a clip has {shard.shape[1:]}")
            if len(self._shards) < 640:  # a map keeps its file open, and 1,024 is a common limit
                self._shards[i] = shard
        return shard

    def __reduce__(self):  # on its way to a worker process: opened again there
        return LatentDataset, (self.folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def stored(self, indices: Sequence[int]) -> Tensor:
        """The stored integers of these clips, in this order: [B, *codec.stored_shape]."""
        indices = np.asarray(indices, np.int64)
        shards = self._shard_of(indices)
        first = self._shard(shards[0])
        out = np.empty((len(indices), *first.shape[1:]), first.dtype)
        for shard in np.unique(shards):  # one gather a shard
            here = np.flatnonzero(shards == shard)
            out[here] = self._shard(shard)[indices[here] - self._starts[shard]]
        if out.dtype == np.uint16 and out.max() > 1023:  # a GPU would not survive looking it up
            raise ValueError(f"{self.folder}: damaged, EnCodec has no code {out.max()}")
        return torch.from_numpy(out)

    def _shard_of(self, indices: np.ndarray) -> np.ndarray:
        if indices.size == 0 or indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"{self.folder}: clips are numbered 0 to {len(self) - 1}")
        return np.searchsorted(self._starts, indices, side="right") - 1

    def record(self, i: int) -> dict:
        """Clip i's record: id, file, captions, labels, and whatever else its row had."""
        shard = int(self._shard_of(np.asarray(i)))
        with open(self.folder / f"shard-{shard:05d}.jsonl", "rb") as file:
            try:
                file.seek(self._offsets[i])
                record = json.loads(file.readline())
                captions = record["captions"]
                if type(captions) is not list or {type(text) for text in captions} != {str}:
                    raise ValueError("no captions")
                return record
            except (ValueError, LookupError, TypeError, RecursionError, OSError) as e:
                raise ValueError(f"{file.name}: damaged at clip {i} ({e!r:.80})") from e

    def label_ids(self, i: int) -> list[int]:
        """Clip i's labels, as numbers of `labels`."""
        return self._label_ids[self._label_starts[i] : self._label_starts[i + 1]].tolist()

    def sampling_weights(self) -> Tensor:
        """The probability of each clip, float64 [N], in a draw that is balanced over labels.

        First a label is drawn, all alike, then one of its clips: p(clip) ∝ Σ 1 / (clips of label)
        over the clip's labels. Clips without any are taken as having one more label of their own.
        """
        counts, ids = np.diff(self._label_starts), self._label_ids
        known = len(ids) == 0 or 0 <= ids.min() <= ids.max() < len(self.labels)
        if not known or counts.min() < 0 or counts.sum() != len(ids):
            raise ValueError(f"{self.folder}: damaged, its labels don't fit together")
        inverse = 1 / np.bincount(ids, minlength=len(self.labels)).clip(min=1)
        clip = np.repeat(np.arange(len(self)), counts)  # the clip of each label id
        weights = np.bincount(clip, inverse[ids], minlength=len(self)).astype(float)
        weights[counts == 0] = 1 / max(1, np.sum(counts == 0))
        return torch.from_numpy(weights / weights.sum())


def check_dataset(folder: str | Path) -> str:
    """Verify a stored data set to the byte. A line that sums it up, or ValueError: what is wrong.

    Shards by their hashes, the rest by computing it from the shards again. Needs no codec.
    """
    data = LatentDataset(folder)
    for i in tqdm(range(len(data._starts) - 1), unit="shard"):
        path = data.folder / f"shard-{i:05d}.json"
        done = read_json(path, ".npy", ".jsonl")
        for suffix in (".npy", ".jsonl"):
            with open(path.with_suffix(suffix), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != done[suffix]:
                    raise ValueError(f"{path.with_suffix(suffix)}: damaged, its bytes have changed")
    for name, expected in _index(data.folder).items():
        if (data.folder / name).read_bytes() != expected:
            raise ValueError(f"{data.folder / name}: damaged, it isn't what the shards give")
    codec = data.codec.get("name")
    return f"{folder}: {len(data)} clips, {len(data.labels)} labels, {codec}: all is well"


# ---------------------------------------------------------------------------------- tables


def read_table(
    table: str | Path, audio_folder: str | Path, class_labels: str | Path | None = None
) -> list[dict]:
    """A table of captions -> rows with id, file, captions, labels and the table's other columns.

    .jsonl: a JSON object a line: file, caption or captions (list), labels (list).
    .csv:   with a header line: file, caption, labels (separated by ';').
    AudioSet's segments ("# YTID, start_seconds, …"): labels by `class_labels`. The file YTID.*,
    YYTID.* or YTID_START.* below the audio folder is taken to be the segment, cut out already.
    Several rows of one file become one, with all their captions and labels. Without a caption:
    "The sound of LABEL" (P2, A.2). ValueError names the row that is wrong.
    """
    table = Path(table)
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".jsonl":
            rows = [line for line in text.split("\n") if line.strip()]
        elif text.startswith("#"):
            rows = _audioset_rows(text.split("\n"), Path(audio_folder), class_labels)
        else:
            rows = list(csv.DictReader(io.StringIO(text)))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{table}: can't be read as a table ({e})") from e
    if not rows:
        raise ValueError(f"{table}: has no rows")
    by_file: dict[str, dict] = {}
    for n, raw in enumerate(rows, 1):
        row = _row(raw, f"{table}, row {n}")
        first = by_file.setdefault(row["file"], row)
        for key in ("labels", "captions"):
            first[key] += [text for text in row[key] if text not in first[key]]
    for row in by_file.values():
        row["captions"] = row["captions"] or ["The sound of " + ", ".join(row["labels"])]
    return list(by_file.values())


def _row(raw: dict | str, where: str) -> dict:
    try:
        raw = json.loads(raw) if isinstance(raw, str) else raw
        labels, captions = raw.get("labels") or [], raw.get("captions") or raw.get("caption") or []
        if isinstance(labels, str):
            labels = labels.split(";")  # not ',': "Male speech, man speaking" is one label
        captions = [captions] if isinstance(captions, str) else captions
        labels = list(dict.fromkeys(x.strip() for x in labels if x.strip()))
        captions = [x.strip() for x in captions if x.strip()]
    except (ValueError, AttributeError, TypeError, RecursionError) as e:
        raise ValueError(f"{where}: captions and labels must be texts ({e}): {raw!r:.200}") from e
    if not isinstance(raw.get("file"), str) or not raw["file"] or None in raw:
        raise ValueError(f"{where}: expected file, caption, labels (as columns or keys), got {raw}")
    if not captions and not labels:
        raise ValueError(f"{where}: {raw['file']} has neither a caption nor labels")
    row = {key: value for key, value in raw.items() if key != "caption"}
    return row | {"id": raw.get("id") or raw["file"], "labels": labels, "captions": captions}


def _audioset_rows(lines: list[str], audio_folder: Path, class_labels) -> list[dict]:
    if class_labels is None:
        raise ValueError("a table of AudioSet's needs --class-labels class_labels_indices.csv")
    with open(class_labels, encoding="utf-8-sig", newline="") as file:
        try:
            names = {row["mid"]: row["display_name"] for row in csv.DictReader(file)}
        except KeyError as e:
            raise ValueError(f"{class_labels}: expected the columns index,mid,display_name") from e
    suffixes = {f".{name.lower()}" for name in (*soundfile.available_formats(), "opus", "oga")}
    files = {}  # name without suffix -> path
    for folder, _, found in os.walk(audio_folder):
        for stem, suffix in map(os.path.splitext, found):
            if suffix.lower() in suffixes:
                files[stem] = os.path.relpath(os.path.join(folder, stem + suffix), audio_folder)
    rows = []
    segments = (line for line in lines if line.strip() and not line.startswith("#"))
    for fields in csv.reader(segments, skipinitialspace=True):
        try:
            ytid, start, _, mids = fields
            labels = [names[mid] for mid in mids.split(",")]
            stems = [ytid, f"Y{ytid}", f"{ytid}_{start}", f"{ytid}_{int(float(start))}"]
        except (KeyError, ValueError, OverflowError) as e:
            raise ValueError(f"not a segment with known labels: {fields} ({e})") from e
        file = next((files[stem] for stem in stems if stem in files), f"{ytid}.*")
        rows.append({"id": ytid, "file": file, "start": float(start), "labels": labels})
    return rows


def load_row(row: dict, audio_folder: Path) -> Tensor:
    """The clips of a row of `read_table`, [n, 161280]."""
    several = row.get("several_clips", False)
    seconds = None if several else CLIP_SAMPLES / SAMPLE_RATE
    return to_clips(load_audio(audio_folder / row["file"], seconds), several)


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode audio into, or check, a stored data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="verify a stored data set to the byte")
    check.add_argument("folder", type=Path)
    encode = commands.add_parser(
        "encode",
        help="audio files and a table of captions -> stored data set",
        description="Encode audio into a stored data set. What can't be read is skipped and listed "
        "in skipped.csv.\nA killed run is continued by the same command; torchrun shares the work."
        f"\n\nTABLE: {inspect.cleandoc(read_table.__doc__)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = encode.add_argument
    add("audio_folder", type=Path, help="the table's file names are relative to it")
    add("table", type=Path, help="a .csv or .jsonl file, or one of AudioSet's segment files")
    add("--out", type=Path, required=True, help="folder of the data set; continued if begun")
    add("--codec", choices=["encodec", "mel"], default="encodec", help="default: encodec")
    add("--class-labels", type=Path, help="AudioSet's class_labels_indices.csv")
    add("--several-clips", action="store_true", help="all of a long file, not its first 10.08 s")
    add("--batch-size", type=int, default=16, help="clips encoded at a time (default: 16)")
    add("--shard-rows", type=int, default=2048, help="rows a shard (default: 2048)")
    add("--workers", type=int, default=2, help="processes that load audio (default: 2)")
    add("--device", help="default: cuda (under torchrun, one GPU a rank) if there is one, else cpu")
    add("--encodec-weights", type=Path, help="encodec_24khz-d7cc33bc.th, or its folder")
    args = parser.parse_args()
    try:
        if args.command == "check":
            print(check_dataset(args.folder))
            return
        device = pick_device(args.device)
        if not args.audio_folder.is_dir():
            raise FileNotFoundError(f"{args.audio_folder}: no such folder")
        rows = read_table(args.table, args.audio_folder, args.class_labels)
        if args.several_clips:
            rows = [row | {"several_clips": True} for row in rows]
        complete = encode_dataset(
            args.out,
            load_codec(args.codec, device, args.encodec_weights),
            rows,
            functools.partial(load_row, audio_folder=args.audio_folder),
            shard_rows=args.shard_rows,
            batch_size=args.batch_size,
            workers=args.workers,
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )
        if complete:
            made = read_json(args.out / "dataset.json")
            clips, skipped = made["clips"], made["skipped"]
            print(f"{args.out}: {clips} clips; {skipped} rows skipped, see skipped.csv")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
