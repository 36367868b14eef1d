"""FD, IS and KL: how far generated sounds are from real ones (P1, section 5 and table 2).

Glossary. A *classifier* (PANNs' Cnn14, trained on AudioSet) turns a sound into an *embedding*, its
last hidden layer, and into *logits*, one for each class, before any sigmoid or softmax. With μ, Σ
the mean and covariance of a set's embeddings, and p = softmax(logits) of a sound,

    FD = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½    two sets, unpaired: quality and variety
    IS = exp(mean of KL(p ‖ mean of p))                  the generated alone: clear, various classes
    KL = mean of Σ P·log(P / Q)                          pairs: P of the real, Q of the generated

FD and KL are better when lower, IS when higher. All depend on the classifier, the sample rate and
the number of clips, so these stand beside every number. FD of few clips comes out too high, the
more so the wider the embedding: compare sets of one size, or the extrapolation to N → ∞.

How the field computes them (audioldm_eval with PANNs), and so does this file: first channel, its
mean subtracted, 16 kHz, no loudness normalisation, no crop. The papers' own IS (1.64) and KL (0.13
to 0.26) match no standard definition; `--variants` shows what they could have been.

    python evaluate.py GENERATED REFERENCE               two folders, paired by file name
    python evaluate.py GENERATED REFERENCE --classifier Cnn14_16k_mAP=0.438.pth --table test.csv
    python evaluate.py GENERATED REFERENCE --controls OTHER --codec mel --variants

A number means little without its controls. OTHER holds other real sounds for the same names: the
best that can be hoped for (floor). The same through a codec is the best for a generator in that
codec's latents (ceiling). Silence and white noise are the worst by FD; and the generated sounds
paired with the wrong references (shuffled) are what KL becomes when prompts are ignored: with a
classifier that is sure of itself, more than noise has, of which it is less sure.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn
from tqdm import tqdm

from latents import (
    CLIP_SAMPLES,
    SAMPLE_RATE,
    load_codec,
    pick_device,
    read_audio,
    resample,
    to_clips,
    write_aside,
)

CLASSIFIER = Path(__file__).resolve().parent / "tiny" / "classifier.safetensors"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "audio-journey"
SHORTEST = 32_000  # samples; shorter sounds are zero-padded
UNREADABLE = {".aac", ".amr", ".m4a", ".mka", ".mkv", ".mov", ".mp4", ".webm", ".wma"}
COMPUTED = ("ceiling", "silence", "noise", "shuffled")  # sets that are no folder's
SILENT = 1e-4  # a sound that never leaves ±0.0001 around its mean

# ---- distances: tensors in, floats out, computed in float64 --------------------------------------


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """FD of two sets of embeddings, [N, D] and [M, D], as if they were Gaussian (Heusel et al.,
    2017). Covariances are unbiased. ValueError for fewer than two rows, or for NaN."""
    x, y = _rows(x, 2), _rows(y, 2)
    # A = (x − μ₁)/√(N − 1), so that Σ₁ = AᵀA; and B likewise.
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    # Σ₁Σ₂ has the nonzero eigenvalues of (ABᵀ)(ABᵀ)ᵀ, so tr (Σ₁Σ₂)^½ is the sum of ABᵀ's singular
    # values: no root of a singular matrix. A's triangular factor R serves as well: RᵀR = AᵀA.
    a, b = (torch.linalg.qr(m, "r").R if len(m) > m.shape[1] else m for m in (a, b))
    root = torch.linalg.svdvals(a @ b.T).sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + a.square().sum() + b.square().sum() - 2 * root).item()


def extrapolated_frechet_distance(x: Tensor, y: Tensor, draws: int = 4, seed: int = 0) -> float:
    """FD at N → ∞ (Chong & Forsyth, 2020): FD(n) = a + b/n fitted to random subsets of N/2 … N rows
    of both sets, and a. Rough as long as N isn't well above D."""
    x, y = _rows(x, 8), _rows(y, 8)
    most, generator = min(len(x), len(y)), torch.Generator().manual_seed(seed)
    sizes, values = [], []
    for n in torch.linspace(most // 2, most, 6).round().long().tolist() * draws:
        x_n = x[torch.randperm(len(x), generator=generator)[:n]]
        y_n = y[torch.randperm(len(y), generator=generator)[:n]]
        sizes.append([1.0, 1 / n])
        values.append(frechet_distance(x_n, y_n))
    line = torch.linalg.lstsq(torch.tensor(sizes).double(), torch.tensor(values).double()[:, None])
    return line.solution[0].item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """IS of logits [N, K] (Salimans et al., 2016): mean and population std over `splits` chunks of
    a fixed shuffle. ValueError for fewer rows than chunks, or for NaN."""
    logits = _rows(logits, splits)
    order = np.random.RandomState(2020).permutation(len(logits))
    p = logits[torch.from_numpy(order)].softmax(1)
    scores = []
    for i in range(splits):  # chunks as audioldm_eval cuts them; np.array_split would cut others
        chunk = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        # KL(p ‖ mean of p); xlogy(0, 0) = 0
        divergence = torch.xlogy(chunk, chunk / chunk.mean(0)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def pair_divergences(reference_logits: Tensor, generated_logits: Tensor, kind="softmax") -> Tensor:
    """KL of each pair, float64 [N]: Σ P·log(P / (Q + 1e-6)), P the reference, Q the generated.

    kind "sigmoid": the same sum over each class's own probability. These don't add up to 1, so it
    is no divergence, and can be negative; the field reports it all the same.
    """
    reference, generated = _rows(reference_logits, 1), _rows(generated_logits, 1)
    if reference.shape != generated.shape:
        raise ValueError(f"pairs: {list(reference.shape)} against {list(generated.shape)} logits")
    to_p = {"softmax": lambda a: a.softmax(1), "sigmoid": torch.sigmoid}[kind]
    p, q = to_p(reference), to_p(generated)
    return (torch.xlogy(p, p) - p * (q + 1e-6).log()).sum(1)


def kl_divergence(reference_logits: Tensor, generated_logits: Tensor, kind="softmax") -> float:
    """KL of paired logits [N, K]: the mean of `pair_divergences`."""
    return pair_divergences(reference_logits, generated_logits, kind).mean().item()


def bootstrap(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [N], which are drawn again with replacement."""
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values.numpy()[rows].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _rows(x: Tensor, least: int) -> Tensor:
    if x.dim() != 2 or len(x) < least:
        raise ValueError(f"expected {least} or more rows of features, got {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("features have NaN or infinite values")
    return x.detach().cpu().double()


# ---- the classifier ------------------------------------------------------------------------------


def mel_matrix() -> Tensor:
    """[257, 64]: the energy of 64 bands (50 Hz to 8 kHz, Slaney's scale and norm) from FFT bins."""
    return AF.melscale_fbanks(257, 50, 8000, 64, SAMPLE_RATE, norm="slaney", mel_scale="slaney")


def log_mel(wave: Tensor, mel: Tensor) -> Tensor:
    """16 kHz [B, samples] -> dB [B, frames, 64], a frame every 10 ms."""
    window = torch.hann_window(512, dtype=wave.dtype, device=wave.device)
    spectrum = torch.stft(wave, 512, 160, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum.abs().square().transpose(1, 2)  # [B, frames, 257]
    return 10 * (power @ mel).clamp(min=1e-10).log10()


class ConvBlock(nn.Module):
    """[B, C, time, mel] -> [B, C', time, mel]: two 3 × 3 convolutions."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class Cnn14(nn.Module):
    """PANNs' 14-layer CNN at 16 kHz (Kong et al., 2020), of any width. Parameters have its names.

    classes: how many. widths: channels of the six blocks; the last is the embedding's. labels:
    names of the classes, if known.
    """

    def __init__(self, classes=527, widths=(64, 128, 256, 512, 1024, 2048), labels=None):
        super().__init__()
        self.classes, self.widths, self.labels = classes, tuple(widths), labels
        self.sha256 = ""  # of the file it was loaded from
        self.register_buffer("mel", mel_matrix())
        self.bn0 = nn.BatchNorm2d(64)
        for i, pair in enumerate(zip((1, *widths), widths, strict=False), 1):
            self.add_module(f"conv_block{i}", ConvBlock(*pair))
        self.fc1 = nn.Linear(widths[-1], widths[-1])
        self.fc_audioset = nn.Linear(widths[-1], classes)

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """dB [B, frames, 64] -> embedding [B, widths[-1]] and logits [B, classes]."""
        x = self.bn0(x.transpose(1, 2)[..., None])  # each mel band normalised: [B, 64, T, 1]
        x = x.permute(0, 3, 2, 1)  # [B, 1, T, 64]
        for i in range(1, 7):
            x = getattr(self, f"conv_block{i}")(x)
            x = F.avg_pool2d(x, 2) if i < 6 else x
            x = F.dropout(x, 0.2, self.training)
        x = x.mean(3)  # over mel: [B, C, T / 32]
        x = x.amax(2) + x.mean(2)
        x = F.relu(self.fc1(F.dropout(x, 0.5, self.training)))
        return x, self.fc_audioset(x)

    def forward(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """16 kHz [B, samples ≥ 32,000] -> embedding and logits."""
        return self.classify(log_mel(wave, self.mel))

    def save(self, path: str | Path, **metadata: str) -> None:
        """A safetensors file, which `load` reads; the labels go with it."""
        metadata |= {"labels": json.dumps(self.labels)}
        tensors = {k: v.contiguous() for k, v in self.state_dict().items()}
        write_aside(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Cnn14":
        """PANNs' Cnn14_16k_mAP=0.438.pth, or a file of ours (.safetensors), ready for use.

        Loads nothing that could run code. FileNotFoundError, or ValueError for any other file.
        """
        path, metadata = Path(path), {}
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; PANNs' classifier is Cnn14_16k_mAP=0.438.pth of "
                "https://zenodo.org/record/3987831"
            )
        try:
            if path.suffix == ".safetensors":
                with safetensors.safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            else:
                # Beside the weights, PANNs' file may keep its sampler's state: harmless arrays.
                with torch.serialization.safe_globals(_numpy_globals()):
                    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
                _check_stft(path, state)
                state["mel"] = state.pop("logmel_extractor.melW")
            widths = [state[f"conv_block{i}.conv2.weight"].shape[0] for i in range(1, 7)]
            labels = json.loads(metadata.get("labels", "null"))
            model = cls(len(state["fc_audioset.bias"]), widths, labels)
            model.load_state_dict(state)
        except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
            raise ValueError(f"{path}: damaged, unsafe, or no Cnn14 for 16 kHz ({e!r:.80})") from e
        model.sha256 = file_sha256(path)
        return model.eval().requires_grad_(False)


def _check_stft(path: Path, state: dict) -> None:
    """PANNs' file holds its STFT as two convolutions. Take them out, and see that it is ours."""
    names = [f"spectrogram_extractor.stft.conv_{part}.weight" for part in ("real", "imag")]
    kernels = [state.pop(name) for name in names]  # [257, 1, 512] each
    angle = 2 * torch.pi * torch.arange(257).double()[:, None] * torch.arange(512) / 512
    window = torch.hann_window(512, dtype=torch.float64)
    for kernel, wave in zip(kernels, (angle.cos(), -angle.sin()), strict=True):
        if kernel.shape != (257, 1, 512) or (kernel[:, 0] - wave * window).abs().max() > 1e-4:
            raise ValueError(f"{path}: its STFT isn't that of a Cnn14 for 16 kHz")


def _numpy_globals() -> list:
    from numpy._core.multiarray import _reconstruct, scalar

    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    old = [(f, f"numpy.core.multiarray.{f.__name__}") for f in (_reconstruct, scalar)]
    return [np.ndarray, np.dtype, _reconstruct, scalar, *old, *kinds]


# ---- from files to features ----------------------------------------------------------------------

Sounds = dict[str, Callable[[], tuple[Tensor, int]]]  # name -> load it: 16 kHz [samples], its rate


@dataclass
class Features:
    """What a network says of a set of sounds, in the order of their names."""

    names: list[str]
    values: Tensor  # [N, D]
    silent: list[str] = field(default_factory=list)
    rates: dict[int, int] = field(default_factory=dict)  # sample rate of the file -> how many

    def about(self) -> dict:
        return {"N": len(self.names), "silent": self.silent, "sample_rates": self.rates}


def load_sound(path: Path) -> tuple[Tensor, int]:
    """First channel less its mean, at 16 kHz, [samples ≥ 32,000]; and the file's own rate."""
    samples, rate = read_audio(path)
    wave = resample(samples[:, 0] - samples[:, 0].mean(), rate)
    return F.pad(wave, (0, max(0, SHORTEST - len(wave)))), rate


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def sounds_of(folder: str | Path) -> dict[str, Path]:
    """The audio files of a folder by name, without suffix. ValueError if there are none, or two of
    one name."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    formats = (*soundfile.available_formats(), "opus", "oga", "aif")
    suffixes, paths = {f".{name.lower()}" for name in formats}, {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in UNREADABLE:
            raise ValueError(f"{path}: convert it to FLAC or WAV: {path.suffix} can't be read")
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in paths:
                raise ValueError(f"{folder}: {paths[path.stem].name} and {path.name}: which one?")
            paths[path.stem] = path
    if not paths:
        raise ValueError(f"{folder}: no audio files in it")
    return paths


@torch.no_grad()
def embed(
    sounds: Sounds,
    network: Callable[[Tensor], Tensor],
    tag: str,
    *,
    cache: Path | None = CACHE,
    batch_size: int = 16,
    title: str = "",
) -> Features:
    """network(waves [B, samples]) -> [B, D] of every sound; under torchrun, a share on each rank.

    Kept in `cache` by what was computed: `tag` (the network and its weights) and the samples of the
    sound. Names play no part. ValueError lists the files that can't be read.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    names, found, bad = sorted(sounds), {}, []
    waiting = defaultdict(list)  # sounds of one length are computed together, without padding

    def compute(batch: list) -> None:
        values = network(torch.stack([wave for *_, wave in batch])).float().cpu()
        for (name, path, *about, _), value in zip(batch, values, strict=True):
            found[name] = (value.numpy(), *about)
            if path:
                buffer = io.BytesIO()
                np.save(buffer, value.numpy())
                path.parent.mkdir(parents=True, exist_ok=True)
                write_aside(path, buffer.getvalue())

    bar = tqdm(names[rank::ranks], desc=title, unit="clip", leave=False, disable=rank > 0 or None)
    for name in bar:
        try:
            wave, rate = sounds[name]()
        except (ValueError, OSError) as e:
            bad.append(str(e))
            continue
        silent = bool((wave - wave.mean()).abs().max() < SILENT)
        key = hashlib.sha256(tag.encode() + wave.contiguous().numpy().tobytes()).hexdigest()
        path = cache and cache / f"{key}.npy"
        try:
            found[name] = (np.load(path), silent, rate) if path else None
        except (OSError, ValueError, EOFError):  # not there, or torn
            pass
        if found.get(name) is None:
            batch = waiting[len(wave)]
            batch.append((name, path, silent, rate, wave))
            if len(batch) == batch_size:
                compute(waiting.pop(len(wave)))
            elif sum(map(len, waiting.values())) == 8 * batch_size:  # of many lengths
                for batch in waiting.values():
                    compute(batch)
                waiting.clear()
    for batch in waiting.values():
        compute(batch)

    parts = [(found, bad)]
    if ranks > 1:
        parts = [None] * ranks
        dist.all_gather_object(parts, (found, bad))
    if bad := [line for _, lines in parts for line in lines]:
        more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
        raise ValueError("; ".join(bad[:3]) + more)
    found = {name: about for part, _ in parts for name, about in part.items()}
    values = torch.from_numpy(np.stack([found[name][0] for name in names]))
    rates = Counter(found[name][2] for name in names)
    return Features(names, values, [name for name in names if found[name][1]], dict(rates))


def hear(sounds: Sounds, classifier: Cnn14, **options) -> Features:
    """`embed` by a classifier: its embedding and its logits, side by side."""

    def network(waves: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat(classifier(waves.to(classifier.mel.device)), 1)

    tag = f"cnn14 {classifier.sha256} {file_sha256(Path(__file__))}"  # other code, other numbers
    return embed(sounds, network, tag, **options)


@torch.no_grad()
def clap_score(name: str, group: Sounds, captions: dict[str, str], device, **options) -> dict:
    """Mean cosine of CLAP's embeddings of sounds and captions. `name`: folder or hub id; options:
    those of `embed`. Comparable for one checkpoint only, so its hash stands beside it."""
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    try:
        model, info = ClapModel.from_pretrained(name, output_loading_info=True, weights_only=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        extractor = ClapFeatureExtractor.from_pretrained(name)
    except Exception as e:  # of many types: the hub's, transformers', safetensors', torch's
        raise ValueError(f"CLAP {name}: can't be loaded ({str(e).splitlines()[0]})") from e
    if missing := sorted(key for key in info["missing_keys"] if "position_ids" not in key):
        raise ValueError(f"CLAP {name}: {len(missing)} weights are missing ({missing[0]}, …)")
    model = model.to(device).eval()

    def listen(waves: Tensor) -> Tensor:
        # The first 10 s: of anything longer the extractor would take a part at random.
        rate = extractor.sampling_rate
        waves = resample(waves, SAMPLE_RATE, rate)[:, : extractor.nb_max_samples].numpy()
        inputs = extractor(list(waves), sampling_rate=rate, return_tensors="pt").to(device)
        if "is_longer" in inputs:  # of a fused CLAP; the extractor says so of one clip, at random
            inputs["is_longer"] = torch.zeros_like(inputs["is_longer"])
        return F.normalize(model.get_audio_features(**inputs).pooler_output, dim=1)

    digest, how = hashlib.sha256(), extractor.to_json_string()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    tag = f"clap {digest.hexdigest()} {how} {file_sha256(Path(__file__))}"
    heard = embed(group, listen, tag, title="CLAP", **options)
    cosines = []
    for n, audio in zip(heard.names, heard.values, strict=True):
        text = tokenizer(captions[n], truncation=True, return_tensors="pt").to(device)
        text = model.get_text_features(**text).pooler_output[0].cpu()
        cosines.append(F.cosine_similarity(audio, text, dim=0).item())
    return {"score": float(np.mean(cosines)), "model": name, "sha256": digest.hexdigest()}


# ---- the command ---------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, str]:
    """id -> caption, from a CSV with the columns name (or youtube_id) and prompt (or caption).
    Of several captions the first counts: AudioCaps' test.csv has five a clip."""
    captions, rows = {}, 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                rows += 1
                name = row["name"] if "name" in row else row["youtube_id"]
                caption = row["prompt"] if "prompt" in row else row["caption"]
                if not name or not caption or None in row:
                    raise ValueError(f"{path}, row {rows}: a name and a caption are expected, in "
                                     "quotation marks if there are commas in it")  # fmt: skip
                captions.setdefault(name, caption)
    except (UnicodeDecodeError, csv.Error, KeyError) as e:
        raise ValueError(f"{path}, row {rows}: expected the columns name (or youtube_id) and "
                         f"prompt (or caption) ({e!r})") from e  # fmt: skip
    if not captions:
        raise ValueError(f"{path}: no rows")
    return captions


def select(paths: dict[str, Path], ids: list[str]) -> dict[str, Path]:
    """The files of these ids, as far as there are any: ID.*, YID.* or ID_START.*"""
    starts = {re.sub(r"_\d+(\.\d+)?$", "", name): path for name, path in paths.items()}
    found = ((i, d[n]) for i in ids for d in (starts, paths) for n in (f"Y{i}", i) if n in d)
    return dict(found)  # the last one found counts: ID.* itself


def reconstruct(codec, path: Path) -> tuple[Tensor, int]:
    """What the codec leaves of the first 10.08 s of a file."""
    stored = codec.encode(to_clips(load_sound(path)[0]))
    return codec.decode(codec.dequantize(stored))[0].cpu(), SAMPLE_RATE


def noise(number: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(number)
    return 0.1 * torch.randn(CLIP_SAMPLES, generator=generator), SAMPLE_RATE


def shuffled(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of 0 … n − 1 of which none is of a number with itself."""
    order = np.random.default_rng(seed).permutation(n)
    return order, np.roll(order, 1)


def measure(features: Features, reference: Features | None, width: int, paired: bool) -> dict:
    """FD, IS and KL of a set against the reference. `width` of the features are the embedding."""
    embeddings, logits = features.values[:, :width], features.values[:, width:]
    row = features.about()
    if len(logits) >= 10:
        row["IS"], row["IS_std"] = inception_score(logits)
    if reference is None:
        return row
    real_embeddings, real_logits = reference.values[:, :width], reference.values[:, width:]
    row["FD"] = frechet_distance(embeddings, real_embeddings)
    if min(len(embeddings), len(real_embeddings)) >= 16:
        row["FD_extrapolated"] = extrapolated_frechet_distance(embeddings, real_embeddings)
    if paired:
        for kind in ("softmax", "sigmoid"):
            values = pair_divergences(real_logits, logits, kind)
            row[f"KL_{kind}"] = values.mean().item()
            row[f"KL_{kind}_95"] = bootstrap(values)
    return row


def variants(generated: Tensor, reference: Tensor) -> dict[str, float]:
    """What comes of common mistakes, from the same logits."""
    p, q = reference.sigmoid(), generated.sigmoid()
    return {
        "IS": inception_score(generated)[0],
        "IS of probabilities taken for logits": inception_score(q)[0],
        "IS in chunks of two clips": inception_score(generated, len(generated) // 2)[0],
        "IS in one chunk": inception_score(generated, 1)[0],
        "KL softmax": kl_divergence(reference, generated),
        "KL softmax, generated against reference": kl_divergence(generated, reference),
        "KL softmax of probabilities taken for logits": kl_divergence(p, q),
        "KL sigmoid": kl_divergence(reference, generated, "sigmoid"),
        "KL sigmoid, a mean over the classes": kl_divergence(reference, generated, "sigmoid")
        / generated.shape[1],
    }


def notes(metrics: dict) -> list[str]:
    """What has to stand beside the table: uncertainties, and what is odd about the sets."""
    sets, made, lines = metrics["sets"], metrics["sets"]["generated"], []
    if "IS" in made:
        lines.append(f"generated: IS ± {made['IS_std']:.2g} (std of ten parts)")
    for kind in ("softmax", "sigmoid"):
        if f"KL_{kind}_95" in made:
            low, high = made[f"KL_{kind}_95"]
            lines.append(f"generated: KL {kind} {low:.4g} to {high:.4g} (95 %, bootstrap)")
    if not metrics["paired"]:
        lines.append("no names in common with the reference: no pairs, so no KL")
    if fds := metrics.get("FD_seeds"):
        lines.append(f"FD of {len(fds)} seeds: {np.mean(fds):.4g} ± {np.std(fds, ddof=1):.2g}")
    width = metrics["classifier"]["embedding"]
    if "FD_extrapolated" in made and made["N"] < 2 * width:
        lines.append(f"N → ∞ is rough: {made['N']} clips for {width} dimensions")
    if clap := metrics.get("clap"):
        lines.append(f"CLAP score of the generated: {clap['score']:.4f} ({clap['model']})")
    rates = {k: row["sample_rates"] for k, row in sets.items() if k not in COMPUTED}
    if len(set().union(*rates.values())) > 1:
        lines.append(f"files of several sample rates were resampled (rate: how many): {rates}")
    for k in rates:
        for what in ("silent", "missing"):
            if names := sets[k].get(what):
                more = ", …" if len(names) > 20 else ""
                lines.append(f"{k}: {len(names)} {what}: {', '.join(names[:20])}{more}")
    return lines + ([metrics["captions"]] if "captions" in metrics else [])


def show(metrics: dict) -> None:
    """The table of `metrics`, for the terminal."""
    sets = metrics["sets"]
    classifier, folders = metrics["classifier"], metrics["folders"]
    print(
        f"{folders['generated']} against {folders['reference']}, by {classifier['file']} "
        f"({classifier['sha256'][:12]}) at 16 kHz; FD, KL: lower is better; IS: higher"
    )
    columns = ("N", "FD", "FD_extrapolated", "IS", "KL_softmax", "KL_sigmoid")
    heads = ("N", "FD", "FD, N → ∞", "IS", "KL", "KL sigmoid")
    print(f"{'':12}" + "".join(f"{head:>12}" for head in heads))
    for k, row in sets.items():
        cells = [f"{row[c]:.4g}" if c in row else "" for c in columns]
        print(f"{k:12}" + "".join(f"{cell:>12}" for cell in cells))
    print("\n".join(notes(metrics)))
    for name, value in metrics.get("variants", {}).items():
        print(f"  {name:46}{value:10.4f}")


def choose(args: argparse.Namespace) -> tuple[dict[str, dict[str, Path]], dict, dict, bool]:
    """Which files belong to which set; captions and missing ids, if a table chose; paired or not.

    Pairs are of one name. A set that lacks some of the names is refused; a reference that has none
    of them is taken as unpaired.
    """
    folders = {"generated": args.generated, "reference": args.reference}
    folders |= {f"seed {i}": folder for i, folder in enumerate(args.seeds, 2)}
    folders |= {"floor": args.controls} if args.controls else {}
    paths, captions, missing = {k: sounds_of(folder) for k, folder in folders.items()}, {}, {}
    if args.table:
        captions = read_table(args.table)
        paths = {k: select(found, list(captions)) for k, found in paths.items()}
        missing = {k: sorted(captions.keys() - found.keys()) for k, found in paths.items()}
        everywhere = set.intersection(*map(set, paths.values()))
        if not everywhere:
            raise ValueError(f"{args.table}: none of its {len(captions)} ids has all its files")
        paths = {k: {i: found[i] for i in everywhere} for k, found in paths.items()}
    names = paths["generated"].keys()
    paired = bool(names & paths["reference"].keys())
    for k, found in paths.items():
        odd = sorted(found.keys() ^ names)
        if odd and (paired or k != "reference"):
            raise ValueError(
                f"{folders[k]}: {len(odd)} names without a partner in {args.generated}, or the "
                f"other way round ({', '.join(odd[:5])}): make them equal, or choose with --table"
            )
    return paths, captions, missing, paired


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    classifier = Cnn14.load(args.classifier).to(device)
    paths, captions, missing, paired = choose(args)
    names, out = sorted(paths["generated"]), args.out or args.generated
    out.mkdir(parents=True, exist_ok=True)
    if args.variants and (not paired or len(names) < 10):
        raise ValueError("--variants needs 10 or more pairs")
    sounds = {
        k: {n: partial(load_sound, path) for n, path in found.items()} for k, found in paths.items()
    }
    if args.controls and args.codec:
        codec = load_codec(args.codec, device, args.encodec_weights)
        floor = paths["floor"].items()
        sounds["ceiling"] = {n: partial(reconstruct, codec, path) for n, path in floor}
    if args.controls:
        sounds["silence"] = dict.fromkeys(names, lambda: (torch.zeros(CLIP_SAMPLES), SAMPLE_RATE))
        sounds["noise"] = {n: partial(noise, i) for i, n in enumerate(names)}

    # Every rank takes a share of the sounds; one of them does the sums.
    options = {"cache": args.cache, "batch_size": args.batch_size}
    features = {k: hear(group, classifier, title=k, **options) for k, group in sounds.items()}
    metrics = {}
    if args.clap:
        texts = captions or {n: caption_of(path) for n, path in paths["generated"].items()}
        metrics["clap"] = clap_score(args.clap, sounds["generated"], texts, device, **options)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    width = classifier.widths[-1]
    reference, generated = features.pop("reference"), features["generated"]
    sets = {"reference": measure(reference, None, width, paired)}
    sets |= {k: measure(f, reference, width, paired) for k, f in features.items()}
    if args.controls and paired:
        one, other = shuffled(len(names))
        wrong = Features(names, generated.values[one]), Features(names, reference.values[other])
        row = measure(*wrong, width, True)
        sets["shuffled"] = {k: row[k] for k in row if k == "N" or k.startswith("KL")}
    for k, ids in missing.items():
        sets[k]["missing"] = ids
    metrics |= {"sets": sets, "paired": paired}
    if args.table:
        metrics["captions"] = f"{args.table.name}: {len(captions)} clips, the first caption of each"
    if args.seeds:
        metrics["FD_seeds"] = [sets[k]["FD"] for k in sets if k == "generated" or "seed" in k]
    if args.variants:
        metrics["variants"] = variants(generated.values[:, width:], reference.values[:, width:])
    metrics |= {
        "folders": {"generated": str(args.generated), "reference": str(args.reference)},
        "classifier": {"file": args.classifier.name, "sha256": classifier.sha256,
                       "sample_rate": SAMPLE_RATE, "classes": classifier.classes,
                       "embedding": width},
        "versions": {"evaluate.py": file_sha256(__file__),
                     "torch": torch.__version__},
        "command": shlex.join(["python", "evaluate.py", *map(str, args.arguments)]),
    }  # fmt: skip
    show(metrics)
    write_aside(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    print(out / "metrics.json")


def caption_of(path: Path) -> str:
    """The prompt that sample.py leaves in a WAV's comment."""
    try:
        with soundfile.SoundFile(path) as file:
            return str(json.loads(file.comment)["prompt"])
    except (soundfile.LibsndfileError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: no prompt in it; CLAP needs captions: give --table") from e


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("generated", type=Path, help="folder of generated sounds")
    add("reference", type=Path, help="folder of real sounds; those of the same name are pairs")
    add("--classifier", type=Path, default=CLASSIFIER, help="PANNs' Cnn14_16k_mAP=0.438.pth, or a "
        "Cnn14 of ours [tiny/classifier.safetensors; its FD compares with no other's]")  # fmt: skip
    add("--table", type=Path, help="CSV of name or youtube_id, and caption: which clips to take")
    add(
        "--seeds",
        type=Path,
        nargs="+",
        default=[],
        help="more generated sets, of other seeds: FD's spread",
    )
    add("--controls", type=Path, metavar="OTHER", help="folder of other real sounds for the names")
    add("--codec", choices=("encodec", "mel"), help="with --controls: the ceiling for this codec")
    add("--encodec-weights", help="EnCodec's weights")
    add("--clap", metavar="MODEL", help="CLAP score by this folder or hub id; captions are "
        "those of the table, or the prompts that sample.py left in its WAVs")  # fmt: skip
    add("--variants", action="store_true", help="also what common mistakes would give")
    add("--out", type=Path, help="folder for metrics.json [the generated one]")
    add("--cache", type=Path, default=CACHE, help=f"folder of features, by content [{CACHE}]")
    add("--batch-size", type=int, default=16, help="sounds at a time [16]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    args.arguments = sys.argv[1:] if arguments is None else arguments
    if args.batch_size < 1:
        parser.error("--batch-size is 1 or more")
    if args.codec and not args.controls:
        parser.error("--codec is for --controls")
    try:
        run(args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was embedded is kept in the cache")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
