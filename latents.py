"""Audio ⇄ latents: codecs, their statistics, audio files, tables of clips, stored data sets.

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
"""

import argparse
import csv
import ctypes
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.torch
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

SAMPLE_RATE = 16_000
HOP = 320
FRAMES = 504
CLIP_SAMPLES = FRAMES * HOP  # 161,280
CLIP_SECONDS = CLIP_SAMPLES / SAMPLE_RATE  # 10.08
GRID = (24, 21)  # height, width


def to_grid(z: Tensor) -> Tensor:
    """[..., C, 504] -> [..., C, 24, 21], row by row: frame = 21·row + col."""
    return z.unflatten(-1, GRID)


def to_sequence(x: Tensor) -> Tensor:
    """[..., C, 24, 21] -> [..., C, 504], the inverse of `to_grid`."""
    return x.flatten(-2)


@dataclass(frozen=True, eq=False)
class LatentStats:
    """Mean and population std of each latent channel (float64 [C]), and how many values gave them:
    part of a trained model, since sampling has to undo exactly what training did."""

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
        """The statistics of both sets together (Chan et al., 1979)."""
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
        if self.mean.numel() != z.shape[1]:  # one channel's would be broadcast
            raise ValueError(f"statistics of {self.mean.numel()} channels, latents of {z.shape[1]}")
        shape = (-1,) + (1,) * (z.dim() - 2)
        std = self.std.clamp(min=1e-4)  # a channel that never changes must not give 0 / 0
        return self.mean.to(z).view(shape), std.to(z).view(shape)

    def save(self, path: str | Path) -> None:
        """Write latent_stats.safetensors of a model folder or a data set."""
        tensors = {"mean": self.mean, "std": self.std, "count": torch.tensor(self.count)}
        write_aside(path, safetensors.torch.save(tensors))

    @classmethod
    def load(cls, path: str | Path) -> "LatentStats":
        """Read what `save` wrote; ValueError for any other file."""
        try:
            found = safetensors.torch.load_file(path)
            return cls(found["mean"].double(), found["std"].double(), int(found.get("count", 0)))
        except (safetensors.SafetensorError, KeyError) as e:
            raise ValueError(f"{path}: not a file of latent statistics ({e!r:.120})") from e


# ---- codecs --------------------------------------------------------------------------------------


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
    to_grid, to_sequence = staticmethod(to_grid), staticmethod(to_sequence)

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        from encodec import EncodecModel  # slow to import, and the other codec doesn't need it

        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # old weight_norm
            self.model = EncodecModel.encodec_model_24khz(pretrained=False)
        name, safe = Path(self.url).name, {"map_location": "cpu", "weights_only": True}
        path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", name))
        path = path / name if path.is_dir() else path
        try:
            if weights or path.exists():
                state = torch.load(path, **safe)
            else:
                state = torch.hub.load_state_dict_from_url(self.url, check_hash=True, **safe)
            self.model.load_state_dict(state)
        except OSError as e:
            where = "put the file there, or say with --encodec-weights where it is"
            raise OSError(f"EnCodec's weights are not at {path}: get {self.url}, {where}") from e
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
        wave = wave.float().to(self.device)[:, None]  # [B, 1, 161280]
        codes, _ = self.model.encode(wave)[0]  # one frame: the 24 kHz model doesn't cut
        return codes.to(torch.uint16)

    @torch.no_grad()
    def dequantize(self, stored: Tensor) -> Tensor:
        """Codes [B, 8, 504] -> z, float32 [B, 128, 504], on the codes' device. One embedding_bag
        looks up and adds: ten times as fast as a loop over the codebooks."""
        codes = stored.to(torch.int32)  # uint16 tensors can do next to nothing
        rows = codes + 1024 * torch.arange(8, dtype=torch.int32, device=codes.device)[:, None]
        rows = rows.transpose(1, 2).reshape(-1, 8)  # [B·504, 8]
        # z[:, t] = Σ_k q_k[c_k[t]]
        z = F.embedding_bag(rows, self.codebooks.to(codes.device), mode="sum")  # [B·504, 128]
        return z.view(len(stored), FRAMES, self.channels).transpose(1, 2)  # [B, 128, 504]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """z, [B, 128, frames] -> 16 kHz wave, float32 [B, 320·frames]; a clip has 504 frames."""
        return self.model.decoder(latents.float().to(self.device))[:, 0]


class MelCodec:
    """Log-mel spectrogram, 128 bands × 504 frames, and Griffin-Lim back. Needs no weights.

    In the spirit of the papers' spectrogram row (P2, table 2), on EnCodec's frames. A value is
    20·log10(m + 10^(floor_db/20)), where m is the magnitude in a mel band (HTK scale) and a
    full-scale sine has 0 dB. Stored as uint8, 0.34 dB apart, floor_db … top_db.

    Latents are these dB sharpened across the bands, C orthonormal cosines, cos(π·k·(band + ½)/128):

        z = C · diag((1 + k)^tilt) · Cᵀ · dB

    Spectra of scenes fall as 130 dB / (1 + k): loudness and slope are nearly all of the variance,
    and the harmonics that make a tone a tone drown in the first bit of noise. Tilt ½ leaves half of
    that fall (0: plain dB; 1: white, and then loudness jitters), and the mean over the bands as is.
    `benchmarks/inversion.py` has what this and other choices are worth.
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
    to_grid, to_sequence = staticmethod(to_grid), staticmethod(to_sequence)

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
        wave = wave.float().to(self.device).double()
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
        """Sharpened dB, [B, 128, frames] -> 16 kHz wave, float32 [B, 320·frames].

        Each round of Griffin & Lim (1984), in the fast variant of Perraudin et al. (2013), takes
        magnitudes and phases of a sound and brings the magnitudes s nearer to the mel bands (Lee &
        Seung, 2000). The first sound is white noise, always the same: inside a band the magnitudes
        of real sounds rise and fall as those of noise do; a smooth spectrum with phases 0 buzzes.
        """
        latents = latents.float().to(self.device)
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
            spectrum = full_scale * s * phase
            wave = torch.istft(spectrum, self.n_fft, HOP, window=self.window, length=samples)
            rebuilt = self.stft(wave)
            s = rebuilt.abs() / full_scale
            phase = (rebuilt - self.momentum / (1 + self.momentum) * last).sgn()
            last = rebuilt
        return wave

    def stft(self, wave: Tensor) -> Tensor:
        """[…, samples] -> complex […, 513, frames + 1]."""
        return torch.stft(wave, self.n_fft, HOP, window=self.window, return_complex=True)


def load_codec(
    settings: dict | str, device: str | torch.device = "cpu", weights: str | Path | None = None
) -> EncodecCodec | MelCodec:
    """The codec with these `settings()`, or with the defaults: "encodec" or "mel". `weights` are
    EnCodec's, see there. ValueError if the codec that we have is another one."""
    name = settings.get("name") if isinstance(settings, dict) else settings
    if name not in ("encodec", "mel"):
        raise ValueError(f"unknown codec {name!r}; expected encodec or mel")
    codec = EncodecCodec(weights, device) if name == "encodec" else MelCodec(device)
    if settings not in (name, codec.settings()):
        raise ValueError(f"made with another {name} codec: {settings}, not {codec.settings()}")
    return codec


def pick_device(name: str | None) -> torch.device:
    """What `--device` means: a device's name, or nothing for CUDA where there is one. Under
    torchrun, "cuda" gives each rank a GPU of its own. ValueError for a device that isn't there.
    From here on, float32 on CUDA is float32: no TF32, whose products have ten bits."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    name = name or found[0].removesuffix(":0")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = own if name == "cuda" else name
    if name not in found:
        raise ValueError(f"device {name}: PyTorch finds only {', '.join(found)} here")
    if name not in ("cpu", own) and "LOCAL_RANK" in os.environ:
        raise ValueError(f"device {name}: this rank's is {own}; no two ranks can have one GPU")
    if name != "cpu":
        torch.cuda.set_device(name)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """What `--precision` means, "bf16" or "fp32": "auto" is bf16 where the device has units for
    it. Without them it is several times slower."""
    units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
    if name not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision {name}: expected auto, bf16 or fp32")
    return name if name != "auto" else "bf16" if units else "fp32"


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """What argparse takes as a type: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # nor NaN
            raise argparse.ArgumentTypeError(f"{text}: expected {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


natural, positive = number(int, 0), number(int, 1)


@contextmanager
def one_line_errors(
    interrupted: str = "the same command goes on", smaller: str = "a smaller --batch-size"
) -> Iterator[None]:
    """Bad input, a full disk or memory, the loss of another rank or Ctrl-C within end the process
    with one line and status 1: what an interruption means, what to try where memory is short."""
    rank = f"error on rank {os.environ['RANK']}" if "RANK" in os.environ else "error"
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted: {interrupted}")
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as e:
        sys.exit(f"{rank}: {e}")
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):
            sys.exit(f"{rank}: out of memory: try {smaller}")
        if not re.search("time(d )?out|connection|DataLoader worker", str(e), re.IGNORECASE):
            raise
        sys.exit(f"{rank}: no word from another process ({str(e).splitlines()[0]})")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def keep_freed_memory() -> None:
    """From here on, large blocks that are freed stay with this process, and serve its main thread
    again. glibc gives them back to the system, which clears each page when they are asked for
    again: on a CPU, half of a training step's time. Without glibc, nothing changes."""
    if platform.libc_ver()[0] == "glibc":
        mallopt, m_trim_threshold, m_mmap_max = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


# ---- files ---------------------------------------------------------------------------------------

AUDIO = set(".wav .w64 .aif .aiff .au .caf .flac .mp3 .ogg .oga .opus .mp4 .m4a .webm .aac".split())


def open_media(path: str | Path):
    """An audio or video file, as PyAV's container (FFmpeg). No playlist: it could name others."""
    import av  # here: sampling from a prompt doesn't need it

    formats = "wav,w64,aiff,au,caf,flac,mp3,ogg,mov,matroska,aac,avi"
    return av.open(str(Path(path).absolute()), options={"format_whitelist": formats})


def read_audio(path: str | Path, seconds: float = math.inf) -> tuple[Tensor, int]:
    """An audio or video file -> float32 [samples, channels], and its sample rate in Hz: all of it
    or, if that is longer, little more than these `seconds`.

    It is decoded to its end, whatever its header says about its length. FileNotFoundError;
    ValueError for a file that is no audio, is damaged, or has no samples or absurd ones.
    """
    import av

    pieces, rate, samples = [], 0, 0
    try:
        with open_media(path) as file:
            planar = av.AudioResampler("fltp")
            for frame in file.decode(file.streams.audio[0]):
                rate = rate or frame.sample_rate
                pieces += [torch.from_numpy(x.to_ndarray()) for x in planar.resample(frame)]
                samples += frame.samples
                # A little more than wanted, so that the resampling filter doesn't hear the cut.
                if samples > (seconds + 0.1) * rate:
                    break
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such file") from e
    except (av.FFmpegError, LookupError, ValueError, OSError) as e:
        raise ValueError(f"{path}: can't be read as audio ({e})") from e
    wave = torch.cat(pieces, dim=1).T if pieces else torch.empty(0, 1)  # [samples, channels]
    if len(wave) == 0 or not 1_000 <= rate <= 768_000:
        raise ValueError(f"{path}: {len(wave)} samples at {rate} Hz can't be used")
    if not -1e15 < wave.min() <= wave.max() < 1e15:  # false for NaN, too
        raise ValueError(f"{path}: has samples that are NaN, infinite or above 1e15")
    return wave, rate


def duration(path: str | Path) -> float:
    """Seconds of sound in a file: the sum of its packets', since headers only guess."""
    import av

    try:
        with open_media(path) as file:
            stream = file.streams.audio[0]
            ticks = sum(packet.duration or 0 for packet in file.demux(stream))
            return float(ticks * stream.time_base)
    except (av.FFmpegError, LookupError) as e:
        raise ValueError(f"{path}: can't be read as audio ({e})") from e


def resample(wave: Tensor, rate: int, to: int = SAMPLE_RATE) -> Tensor:
    """[..., samples] at `rate` Hz -> at `to` Hz: torchaudio's windowed sinc."""
    # Its filters grow with the terms of the ratio (44,101 : 16,000 would take gigabytes), so we
    # round terms above 1,000. Usual rates stay exact, others are 0.05 % off at worst.
    ratio = Fraction(rate, to).limit_denominator(1000 * to // max(rate, to))
    return AF.resample(wave, ratio.numerator, ratio.denominator)


def load_audio(path: str | Path, seconds: float = math.inf) -> Tensor:
    """Any audio file -> 16 kHz mono, float32 [samples], no more than these `seconds`: the mean of
    its channels, or the first, where opposite phases cancel. Errors are those of `read_audio`."""
    samples, rate = read_audio(path, seconds)
    mono = samples.mean(dim=1)
    if mono.square().mean() < 1e-3 * samples.square().mean():  # 30 dB
        mono = samples[:, 0]
    wave = resample(mono, rate)
    return wave[: round(min(seconds * SAMPLE_RATE, len(wave)))]


def to_clip(wave: Tensor) -> Tensor:
    """[samples] -> [1, 161280]: cut to 10.08 s, or filled up with silence."""
    return F.pad(wave[:CLIP_SAMPLES], (0, max(0, CLIP_SAMPLES - len(wave))))[None]


def save_audio(path: str | Path, wave: Tensor, comment: str | None = None) -> None:
    """16 kHz in −1 … 1, [samples] -> 16-bit WAV file, whole or not at all.

    A clip that goes above 0.99 is scaled down as a whole, so nothing is clipped; others keep their
    level. `comment` becomes metadata (libsndfile reads no more than 2,000 bytes of it back).
    ValueError for NaN or infinite samples.
    """
    wave = torch.as_tensor(wave).detach().float().cpu()
    if wave.dim() != 1 or not wave.isfinite().all():
        raise ValueError(f"{path}: not written, no wave [samples] of finite numbers")
    wave = wave * min(1.0, 0.99 / max(wave.abs().max().item(), 1e-9))
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as file:
        if comment:
            file.comment = comment
        file.write(wave.numpy())
    write_aside(path, buffer.getvalue())


def write_aside(path: str | Path, data: bytes | Callable) -> None:
    """A whole file or none: written beside it, flushed to the disk, renamed. `data` is bytes, or a
    function that writes into the open file. OSError names the file that there was no room for."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data) if isinstance(data, bytes) else data(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:  # a full disk; torch.save has words of its own for it
        raise OSError(f"{path}: not written ({str(e).splitlines()[0]})") from e
    finally:
        aside.unlink(missing_ok=True)


def lock(file: IO, place: int = 0) -> None:
    """Keep others away from this place of an open file, until this process closes it or dies.
    OSError if somebody else is there: two of the same command would spoil each other's work."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError) as e:
        raise OSError(f"{file.name}: another command is writing there") from e
    except (ImportError, OSError):  # on Windows; on a disk that knows no locks
        pass


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that has these keys; ValueError for anything else."""
    try:
        value = json.loads(path.read_bytes())
        if set(keys) <= value.keys():
            return value
    except (ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: damaged ({e})") from e
    raise ValueError(f"{path}: damaged, expected an object with {', '.join(keys)}")


def safe_name(text: str, given: bool = False) -> str:
    """A file name for any prompt: lower case, letters and digits of any script, "sound" if there
    are none. One that was `given` keeps its case, dots and hyphens: YouTube's ids need them."""
    if given:
        name = re.sub(r"[^\w.-]+", "_", re.split(r"[/\\]", text)[-1]).lstrip(".")
        name = Path(name).stem if Path(name).suffix.lower() in AUDIO else name
    else:
        name = re.sub(r"[\W_]+", "_", text.lower()).strip("_")
        name = name.encode()[:60].decode(errors="ignore").rstrip("_")
    return name.encode()[:200].decode(errors="ignore") or "sound"  # whole characters


# ---- tables of clips -----------------------------------------------------------------------------

# What columns and keys may be called
NAMES = ("id", "name", "youtube_id", "ytid", "file", "file_name", "audiocap_id")
FILES = ("file", "file_name")
CAPTIONS = ("prompt", "captions", "caption", "text", *(f"caption_{i}" for i in range(1, 6)))
STARTS = ("start", "start_time", "start_seconds")


def read_table(path: str | Path, class_labels: str | Path | None = None) -> list[dict]:
    """A table of clips -> records with id, captions and labels (lists), file and start (seconds) if
    known, and the table's other columns or keys.

    .jsonl: a JSON object a line; .json: a list of them, or WavCaps' object with one as "data".
    .txt: a caption a line. .csv, .tsv: with a header line. Clips are named by id, name, youtube_id,
    ytid, file, file_name or audiocap_id, or else by their caption. Captions are prompt, captions,
    caption, text or caption_1 … caption_5; labels are separated by ';'.
    AudioSet's segments ("# YTID, start_seconds, …"): labels by `class_labels`, the path of
    class_labels_indices.csv.
    Several rows of one file or name become one record. ValueError names the row that is wrong.
    """
    records, number = {}, 1  # of the row that comes next
    try:
        for number, record in enumerate(map(_record, _rows(Path(path), class_labels)), 2):
            name = record.get("file") or record["id"] or number
            first = records.setdefault(name, record | {"captions": [], "labels": []})
            for key in ("captions", "labels"):
                first[key] = list(dict.fromkeys(first[key] + record[key]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as e:
        raise ValueError(f"{path}, row {number}: {e}") from e
    if not records:
        raise ValueError(f"{path}: has no rows")
    for record in records.values():
        record["id"] = record["id"] or safe_name("".join(record["captions"][:1]))
    return list(records.values())


def _rows(path: Path, class_labels: str | Path | None) -> Iterator[dict]:
    suffix, text = path.suffix.lower(), {"encoding": "utf-8-sig", "newline": ""}
    with open(path, **text) as file:
        first = file.readline()
        file.seek(0)
        if suffix == ".json":
            found = json.load(file)
            yield from found if isinstance(found, list) else found["data"]
        elif suffix == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
        elif suffix == ".txt":
            yield from ({"caption": line} for line in file if line.strip())
        elif suffix not in (".csv", ".tsv"):
            raise ValueError("expected a .csv, .tsv, .jsonl, .json or .txt file")
        elif re.match(r'#|[^,]+,\s*[\d.]+,\s*[\d.]+,\s*"?/', first):  # AudioSet's segments
            with open(class_labels or os.devnull, **text) as other:
                names = {row["mid"]: row["display_name"] for row in csv.DictReader(other)}
            lines = (line for line in file if line.strip() and not line.startswith("#"))
            for ytid, start, end, mids in csv.reader(lines, skipinitialspace=True):
                if unknown := set(mids.split(",")) - names.keys():
                    raise ValueError(
                        f"give --class-labels class_labels_indices.csv, with {unknown}"
                    )
                labels = [names[mid] for mid in mids.split(",")]
                yield {"id": ytid, "start": float(start), "end": float(end), "labels": labels}
        else:
            yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")


def _record(row: dict) -> dict:
    if None in row or not row.keys() & {*NAMES, *CAPTIONS}:
        raise ValueError(f"expected columns such as {', '.join(NAMES + CAPTIONS[:4])}, got {row}")
    json.dumps(row, ensure_ascii=False).encode()  # fails at half of a \ud83d\udc36
    known = {key: value for key, value in row.items() if value not in (None, "")}
    name, file, start = (str(next((known[x] for x in keys if x in known), ""))
                         for keys in (NAMES, FILES, STARTS))  # fmt: skip
    captions = [known[key] for key in CAPTIONS if key in known]
    captions = [x for found in captions for x in ([found] if isinstance(found, str) else found)]
    labels = known.get("labels", [])
    labels = labels.split(";") if isinstance(labels, str) else labels  # "Male speech, man" is one
    record = {key: row[key] for key in row if key not in (*CAPTIONS, *FILES, *STARTS)}
    record["id"] = name
    for key, texts in (("captions", captions), ("labels", labels)):
        record[key] = [stripped for text in texts if (stripped := text.strip())]
    return record | ({"file": file} if file else {}) | ({"start": float(start)} if start else {})


def find_audio(records: list[dict], folder: str | Path) -> list[Path | None]:
    """The audio file of each record below a folder, links followed: its `file` as it stands, or by
    its id ID.*, YID.*, ID_START.*, YID_START.* (of several the nearest), or `safe_name` of it."""
    files: dict[str, Path] = {}  # by name without suffix
    starts: dict[str, list[tuple[float, Path]]] = {}  # by what stands before _START
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for stem, suffix in map(os.path.splitext, sorted(names)):
            if suffix.lower() in AUDIO:
                path = files.setdefault(stem, Path(parent, stem + suffix))
                if cut := re.fullmatch(r"(.+)_(\d+(?:\.\d+)?)", stem):
                    starts.setdefault(cut[1], []).append((float(cut[2]), path))
    paths = []
    for record in records:
        name, start = record["id"], record.get("start", 0.0)
        named, saved = (name, f"Y{name}"), (safe_name(name, given=True), safe_name(name))
        near = [pair for stem in named for pair in starts.get(stem, ())]
        found = [path for path in [Path(folder, record.get("file", ""))] if path.is_file()]
        found += [files[stem] for stem in named if stem in files]
        found += [path for _, path in sorted((abs(number - start), path) for number, path in near)]
        found += [files[stem] for stem in saved if stem in files]
        paths.append(found[0] if found else None)
    return paths


def template(labels: list[str]) -> str:
    """The caption of a clip that has none (P2, A.2)."""
    return "The sound of " + ", ".join(labels)


def rows_to_encode(table, audio_folder, class_labels=None, several_clips=False) -> list[dict]:
    """A table's records, each with its file and a caption, for `encode_dataset` with `load_row`.

    `several_clips`: a record for each 10.08 s of a long file instead of one for its beginning; a
    rest of less than a second gives none. ValueError for a record with neither caption nor labels.
    """
    if not Path(audio_folder).is_dir():
        raise FileNotFoundError(f"{audio_folder}: no such folder")
    rows, records = [], read_table(table, class_labels)
    for record, path in zip(records, find_audio(records, audio_folder)):
        if not record["captions"] + record["labels"]:
            raise ValueError(f"{table}: {record['id']} has neither a caption nor labels")
        record["captions"] = record["captions"] or [template(record["labels"])]
        if path:
            record["file"] = os.path.relpath(path, audio_folder)
        rows.append(record)
        if several_clips and path:
            with suppress(ValueError):  # what can't be read is skipped
                n = int((duration(path) - 1) / CLIP_SECONDS) + 1
                rows += [record | {"clip": k} for k in range(1, n)]
    return rows


def load_row(row: dict, audio_folder: str | Path) -> Tensor:
    """The clip of one of `rows_to_encode`, [1, 161280]."""
    path, first = Path(audio_folder, row.get("file", row["id"])), row.get("clip", 0) * CLIP_SAMPLES
    wave = load_whole(path)[first:] if first else load_audio(path, CLIP_SECONDS)
    if len(wave) == 0:
        raise ValueError(f"{path}: ends before clip {row['clip']}")
    return to_clip(wave)


load_whole = functools.lru_cache(1)(load_audio)  # its clips follow one another


# ---- stored data sets ----------------------------------------------------------------------------
#
#   codes.npy                  the integers of all clips, [rows, *stored_shape]
#   clips.jsonl                line i is about row i of codes.npy: {"id", "captions", …}
#   skipped.csv                file, reason of what could not be read: rows and lines left empty
#   codec.json                 the codec's settings, and what tells whether a run may go on
#   latent_stats.safetensors   LatentStats over all clips; written last
#   done                       a byte per row: 0 not yet, 1 a clip, 2 skipped, 3 a silent clip
#
# A batch is a function of its rows: the result depends on neither ranks nor interruptions.

COMPLETING = 2**40  # an offset in "done" that no row has: who locks it writes the last files


def encode_dataset(
    folder: str | Path,
    codec: EncodecCodec | MelCodec,
    rows: list[dict],
    load: Callable[[dict], Tensor],
    *,
    batch_size: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> bool:
    """Write the stored data set of `rows`, or this rank's share of it. True once it is complete.

    A row is a dict of JSON values with id, captions (list) and whatever else is worth keeping;
    load(row) gives its clip [1, 161280], in one of `workers` processes. A row for which it raises
    ValueError or OSError is skipped.

    Ranks share nothing but the folder: rank r does batches r, r + world_size, …, and whoever then
    finds all rows done completes the set. Called again after a kill, it goes on after the last
    finished batch. ValueError if it was begun with something else, or if all rows are skipped.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows]
    table = hashlib.sha256(b"".join(lines)).hexdigest()
    about = {"codec": codec.settings(), "table": table}
    if (folder / "codec.json").exists():
        old = read_json(folder / "codec.json", *about)
        if wrong := [key for key in about if old[key] != about[key]]:
            raise ValueError(f"{folder}: begun with another {wrong[0]}; choose another folder")
        if (folder / "latent_stats.safetensors").exists():
            return True
    else:
        write_aside(folder / "codec.json", json.dumps(about).encode())

    for name in ("codes.npy", "done", "skipped.csv"):
        (folder / name).touch()
    clip = torch.empty(codec.stored_shape, dtype=codec.stored_dtype).numpy()
    header = {"descr": clip.dtype.str, "fortran_order": False, "shape": (len(rows), *clip.shape)}
    with (
        open(folder / "codes.npy", "r+b") as codes,
        open(folder / "done", "r+b") as done,
        open(folder / "skipped.csv", "a", encoding="utf-8") as skipped,
    ):
        lock(done, rank)
        # Each rank gives the files the same header and size; what isn't written takes no room yet.
        np.lib.format.write_array_header_1_0(codes, header)
        start = codes.tell()
        codes.truncate(start + len(rows) * clip.nbytes)
        done.truncate(len(rows))
        firsts, marks = range(0, len(rows), batch_size)[rank::world_size], done.read()
        todo = [first for first in firsts if 0 in marks[first : first + batch_size]]
        # The loader is a pool of workers: its "data set" are the batches' first rows.
        collate = functools.partial(load_batch, rows, load, batch_size)
        loader = DataLoader(todo, batch_size=None, collate_fn=collate, num_workers=workers)
        for first, waves, batch, reasons in tqdm(loader, unit="batch", disable=rank > 0):
            kept = [i for i, mark in enumerate(batch, first) if mark != 2]
            stored = codec.encode(torch.from_numpy(waves)).cpu().numpy() if kept else ()
            for i, clip in zip(kept, stored):
                codes.seek(start + i * clip.nbytes)
                codes.write(clip.tobytes())
            csv.writer(skipped).writerows(reasons)
            for file in (codes, skipped):
                file.flush()
                os.fsync(file.fileno())
            done.seek(first)
            done.write(bytes(batch))
            done.flush()
        done.seek(0)
        marks = np.frombuffer(done.read(), np.uint8)
        if marks.all():  # else another rank is still at work
            try:
                lock(done, COMPLETING)
            except OSError:  # another rank is at it
                return False
            complete(folder, codec, lines, marks)
    return (folder / "latent_stats.safetensors").exists()


def load_batch(rows: list[dict], load: Callable, batch_size: int, first: int) -> tuple:
    """What a worker does: the clips of some rows, their marks in "done", and what was skipped. (An
    array goes through a pipe; a tensor would go through /dev/shm, which may be small.)"""
    waves, marks, skipped = [torch.empty(0, CLIP_SAMPLES)], [], []
    for row in rows[first : first + batch_size]:
        try:
            waves.append(load(row))
            marks.append(1 if waves[-1].abs().max() > 1e-4 else 3)
        except (ValueError, OSError) as e:
            marks.append(2)
            skipped.append([row.get("file", row["id"]), " ".join(str(e).split())])
    return first, torch.cat(waves).numpy(), marks, skipped


def complete(folder: Path, codec, lines: list[bytes], marks: np.ndarray) -> None:
    """Write the files about all clips."""
    kept, silent = np.flatnonzero(marks != 2), (marks == 3).sum()
    if silent:
        print(f"{folder}: {silent} clips are silent")
    report = sorted(set((folder / "skipped.csv").read_text("utf-8").splitlines()))
    report = "".join(line + "\n" for line in report if line != "file,reason")
    write_aside(folder / "skipped.csv", f"file,reason\n{report}".encode())
    if len(kept) == 0:
        raise ValueError(
            f"{folder}: all rows were skipped, see skipped.csv; to try again, delete the folder"
        )
    there = set(kept.tolist())
    texts = (line if i in there else b"\n" for i, line in enumerate(lines))
    write_aside(folder / "clips.jsonl", b"".join(texts))
    codes = np.load(folder / "codes.npy", "r")
    batches = (codes[kept[i : i + 64]] for i in range(0, len(kept), 64))  # whatever the batch size
    stats = (LatentStats.of(codec.dequantize(torch.from_numpy(batch))) for batch in batches)
    stats = functools.reduce(LatentStats.merge, stats)
    for torn in folder.glob(".*.tmp"):  # by a kill
        torn.unlink()
    stats.save(folder / "latent_stats.safetensors")


class LatentDataset:
    """A stored data set, memory-mapped: two million clips open within a second.

    codec: its settings, for `load_codec`. stats: LatentStats. FileNotFoundError if the folder holds
    no data set, or an unfinished one; ValueError if it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "latent_stats.safetensors").exists():
            begun = (self.folder / "codec.json").exists()
            what = "unfinished, run what made it again" if begun else "no stored data set"
            raise FileNotFoundError(f"{folder}: {what} (there is no latent_stats.safetensors)")
        self.codec = read_json(self.folder / "codec.json", "codec")["codec"]
        self.stats = LatentStats.load(self.folder / "latent_stats.safetensors")
        try:
            self.codes = np.load(self.folder / "codes.npy", "r")
            self.text = np.memmap(self.folder / "clips.jsonl", np.uint8, "r")
        except Exception as e:  # of many types: NumPy parses the header as Python
            raise ValueError(f"{folder}: damaged ({e!r:.120})") from e
        pieces = range(0, len(self.text), 2**26)  # of 64 MB
        ends = [i + 1 + np.flatnonzero(self.text[i : i + 2**26] == ord("\n")) for i in pieces]
        self.lines = np.concatenate([[0], *ends])  # line i is text[lines[i]:lines[i + 1]]
        if len(self.lines) != len(self.codes) + 1:
            raise ValueError(
                f"{folder}: damaged, {len(self.codes)} rows, {len(self.lines) - 1} lines"
            )
        self.rows = np.flatnonzero(np.diff(self.lines) > 1)  # where clip i is; skipped are empty

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, indices: Sequence[int]) -> Tensor:
        """The stored integers of these clips, in this order: [B, *codec.stored_shape]."""
        codes = self.codes[self.rows[np.asarray(indices)]]
        if self.codec.get("name") == "encodec" and codes.max() > 1023:  # no GPU survives that
            raise ValueError(f"{self.folder}: damaged, EnCodec has no code {codes.max()}")
        return torch.from_numpy(codes)

    def record(self, i: int) -> dict:
        """What the table says of clip i: id, captions, and whatever else."""
        row = self.rows[i]
        try:
            record = json.loads(self.text[self.lines[row] : self.lines[row + 1]].tobytes())
            if {type(caption) for caption in record["captions"]} != {str}:
                raise ValueError("no captions")
            return record
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise ValueError(f"{self.folder}/clips.jsonl: damaged at clip {i} ({e})") from e


# ---- the command ---------------------------------------------------------------------------------


def main() -> None:
    about = """audio files and a table of captions -> stored data set. What can't be read is listed
in skipped.csv. A killed run is continued by the same command; torchrun shares the work.\n\n"""
    parser = argparse.ArgumentParser(
        description=about + "TABLE: " + inspect.cleandoc(read_table.__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=["encode"])
    add("audio_folder", type=Path, help="where the table's files are, by name or by id")
    add("table", type=Path, help="a .csv, .tsv, .jsonl, .json or .txt file")
    add("--out", type=Path, required=True, help="folder of the data set; continued if begun")
    add("--codec", choices=["encodec", "mel"], default="encodec", help="default: encodec")
    add("--class-labels", type=Path, help="AudioSet's class_labels_indices.csv")
    add("--several-clips", action="store_true", help="all of a long file, not its first 10.08 s")
    add("--batch-size", type=positive, default=16, help="clips encoded at a time (default: 16)")
    add("--workers", type=natural, default=2, help="processes that load audio (default: 2)")
    add("--device", help="cpu or cuda, one GPU per rank [cuda where there is one]")
    add("--encodec-weights", type=Path, help="encodec_24khz-d7cc33bc.th, or its folder")
    args = parser.parse_args()
    with one_line_errors("the same command goes on after the last finished batch"):
        device, table = pick_device(args.device), (args.table, args.audio_folder, args.class_labels)
        rows = rows_to_encode(*table, several_clips=args.several_clips)
        codec = load_codec(args.codec, device, args.encodec_weights)
        load = functools.partial(load_row, audio_folder=args.audio_folder)
        options = {"batch_size": args.batch_size, "workers": args.workers}
        options |= {"rank": int(os.environ.get("RANK", 0))}
        options |= {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
        if encode_dataset(args.out, codec, rows, load, **options):
            n = len(LatentDataset(args.out))
            print(f"{args.out}: {n} clips; {len(rows) - n} rows skipped, see its skipped.csv")


if __name__ == "__main__":
    main()
