"""FD, IS and KL: how far generated sounds are from real ones (P1, section 5 and table 2).

A *classifier* (PANNs' Cnn14, trained on AudioSet) turns a sound into an *embedding*, its last
hidden layer, and into *logits*, one for each class, before any sigmoid or softmax. With μ, Σ the
mean and covariance of a set's embeddings, and p = softmax(logits) of a sound,

    FD = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½    two sets: quality, variety; lower is better
    IS = exp(mean of KL(p ‖ mean of p))                  the generated: clear, various; higher
    KL = mean of Σ P·log(P / Q)                          pairs: P the real, Q the generated; lower

As the field computes them (audioldm_eval with PANNs): first channel less its mean, 16 kHz, no
loudness normalisation, no crop. The papers' own IS (1.64) and KL (0.13 to 0.26) match no standard
definition; appendix/more_metrics.py shows what they could have been. Numbers by other classifiers
or of other numbers of clips don't compare: FD of few clips comes out too high.

    python evaluate.py GENERATED REFERENCE                      two folders, paired by file name
    python evaluate.py GENERATED REFERENCE --controls OTHER --codec mel
    torchrun --nproc_per_node 8 evaluate.py GENERATED REFERENCE --table test.csv --classifier …

A number means little without its controls. OTHER has other real sounds for the same names: the best
that can be hoped for (floor); through a codec, the best for a generator of that codec's latents
(ceiling). Silence and white noise are the worst by FD; generated sounds beside the wrong references
(shuffled) are what KL becomes when prompts are ignored.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn
from tqdm import tqdm

import latents
from latents import CLIP_SAMPLES, SAMPLE_RATE, write_aside

CLASSIFIER = Path(__file__).resolve().parent / "tiny" / "classifier.safetensors"
SHORTEST = 32_000  # samples; shorter sounds are zero-padded


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """FD of two sets of embeddings, [N, D] and [M, D], as if they were Gaussian (Heusel et al.,
    2017): ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½, with unbiased covariances."""
    x, y = x.double(), y.double()
    means = (x.mean(0) - y.mean(0)).square().sum()
    # A = (x − μ₁)/√(N − 1), so that Σ₁ = AᵀA and tr Σ₁ is the sum of its squares; and B likewise.
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    # Σ₁Σ₂ has the nonzero eigenvalues of (ABᵀ)(ABᵀ)ᵀ, so tr (Σ₁Σ₂)^½ is the sum of ABᵀ's singular
    # values: no root of a singular matrix. A's triangular factor R serves as well: RᵀR = AᵀA.
    a, b = (torch.linalg.qr(m, "r").R if len(m) > m.shape[1] else m for m in (a, b))
    root = torch.linalg.svdvals(a @ b.T).sum()
    return (means + a.square().sum() + b.square().sum() - 2 * root).item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """IS of logits [N, K] (Salimans et al., 2016): mean and population std over `splits` chunks of
    a fixed shuffle."""
    order = np.random.RandomState(2020).permutation(len(logits))
    p = logits.double().softmax(1)[order]
    scores = []
    for i in range(splits):  # chunks as audioldm_eval cuts them; np.array_split would cut others
        chunk = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        # KL(p ‖ mean of p); xlogy(0, 0) = 0
        divergence = torch.xlogy(chunk, chunk / chunk.mean(0)).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def pair_divergences(reference_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """KL of each pair, float64 [N]: Σ P·log(P / (Q + 1e-6)), P the reference, Q the generated."""
    p, q = (x.double().softmax(1) for x in (reference_logits, generated_logits))
    return (torch.xlogy(p, p) - p * (q + 1e-6).log()).sum(1)


def kl_divergence(reference_logits: Tensor, generated_logits: Tensor) -> float:
    """KL of paired logits [N, K]: the mean of `pair_divergences`."""
    return pair_divergences(reference_logits, generated_logits).mean().item()


def bootstrap(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [N], which are drawn again with replacement."""
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values.numpy()[rows].mean(1), (0.025, 0.975))
    return float(low), float(high)


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
    """PANNs' 14-layer CNN at 16 kHz (Kong et al., 2020), with its parameters' names, of any width:
    `widths` are the channels of the six blocks, the last of them the embedding's."""

    def __init__(self, classes=527, widths=(64, 128, 256, 512, 1024, 2048), labels=None):
        super().__init__()
        self.widths, self.labels = tuple(widths), labels  # labels: the classes' names, if known
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
        """PANNs' Cnn14_16k_mAP=0.438.pth (Zenodo record 3987831), or a file of ours (.safetensors),
        ready for use. Loads nothing that could run code. ValueError for any other file."""
        try:
            if Path(path).suffix == ".safetensors":
                with safetensors.safe_open(path, "pt") as file:
                    labels = json.loads((file.metadata() or {}).get("labels", "null"))
                    state = {name: file.get_tensor(name).float() for name in file.keys()}
            else:
                # PANNs' file has arrays of its sampler's, too, by the names that NumPy 1 gave.
                known = [np.ndarray, np.dtype, *map(type, map(np.dtype, "?bhilqfd"))]
                known += [(getattr(np._core.multiarray, name), f"numpy.core.multiarray.{name}")
                          for name in ("_reconstruct", "scalar")]  # fmt: skip
                with torch.serialization.safe_globals(known):
                    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
                state["mel"], labels = state.pop("logmel_extractor.melW"), None
                # Its STFT is two convolutions, which `log_mel` doesn't need.
                state = {name: x for name, x in state.items() if "spectrogram" not in name}
            widths = [state[f"conv_block{i}.conv2.weight"].shape[0] for i in range(1, 7)]
            model = cls(len(state["fc_audioset.bias"]), widths, labels)
            model.load_state_dict(state)
            model.sha256 = file_sha256(path)
        except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
            right = "Cnn14_16k_mAP=0.438.pth (for 16 kHz) of zenodo.org/record/3987831"
            raise ValueError(f"{path}: expected {right} ({e!r:.80})") from e
        return model.eval().requires_grad_(False)


@dataclass
class Features:
    """What a network says of a set of sounds, in the order of their names."""

    names: list[str]
    values: Tensor  # [N, D]
    silent: list[str]  # those that never leave ±0.0001 around their mean


def load_sound(path: Path) -> Tensor:
    """First channel less its mean, at 16 kHz, [samples ≥ 32,000]."""
    samples, rate = latents.read_audio(path)
    wave = latents.resample(samples[:, 0] - samples[:, 0].mean(), rate)
    return F.pad(wave, (0, max(0, SHORTEST - len(wave))))


def reconstruct(codec, path: Path) -> Tensor:
    """What the codec leaves of the first 10.08 s of a file."""
    stored = codec.encode(latents.to_clip(load_sound(path)))
    return codec.decode(codec.dequantize(stored))[0].cpu()


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def sounds_of(folder: str | Path, clips: list[dict] | None = None) -> dict[str, Path]:
    """The audio files of a folder by name, without suffix; of `clips` (a table's), by id."""
    if clips:
        pairs = zip(clips, latents.find_audio(clips, folder))
        paths = {clip["id"]: path for clip, path in pairs if path}
        if not paths:
            raise ValueError(f"{folder}: none of the table's clips, such as {clips[0]['id']}.wav")
        return paths
    found = sorted(x for x in Path(folder).glob("[!.]*.*") if x.suffix.lower() in latents.AUDIO)
    paths = {path.stem: path for path in found}
    if not found or len(paths) < len(found):
        raise ValueError(f"{folder}: {len(found)} audio files of {len(paths)} names")
    return paths


@torch.no_grad()
def embed(sounds: dict[str, Callable], network: Callable, title: str = "") -> Features:
    """network(wave [1, samples]) -> [1, D] of every sound, each computed by itself; under torchrun,
    a share on each rank. sounds: name -> function that loads it: 16 kHz, [samples]."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    names, found = sorted(sounds), {}  # found: name -> values [D], silent or not
    for name in tqdm(names[rank::ranks], desc=title, leave=False, disable=rank > 0 or None):
        wave = sounds[name]()
        silent = bool((wave - wave.mean()).abs().max() < 1e-4)
        found[name] = network(wave[None])[0].float().cpu(), silent
    if ranks > 1:
        shares = [None] * ranks
        dist.all_gather_object(shares, found)
        found = {name: row for share in shares for name, row in share.items()}
    values = torch.stack([found[name][0] for name in names])
    return Features(names, values, [name for name in names if found[name][1]])


def hear(sounds: dict[str, Callable], classifier: Cnn14, title: str = "") -> Features:
    """`embed` by a classifier: its embedding and its logits, side by side."""
    device = classifier.mel.device
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return embed(sounds, lambda wave: torch.cat(classifier(wave.to(device)), 1), title)


def in_common(sets: dict[str, dict[str, Path]]) -> tuple[dict[str, dict[str, Path]], dict]:
    """Set -> name -> file, of the names that all sets have; and set -> names that it lacks. Files
    of one name are a pair. A reference without any of the names is left as it is: unpaired."""
    made, real = sets["generated"], sets["reference"]
    paired = {k: paths for k, paths in sets.items() if k != "reference" or made.keys() & real}
    shared = sorted(set.intersection(*map(set, paired.values())))
    for names, where in ((shared, ", ".join(paired)), (real, "reference")):
        if len(names) < 2:
            raise ValueError(f"{where}: {len(names)} names; expected 2 or more in all of them")
    expected = made.keys() | (real if "reference" in paired else {})
    lacks = {k: sorted(expected - paths.keys()) for k, paths in paired.items()}
    return sets | {k: {n: paths[n] for n in shared} for k, paths in paired.items()}, lacks


def measure(features: Features, reference: Features | None, width: int, paired: bool) -> dict:
    """FD, IS and KL of a set against the reference. `width` of the features are the embedding."""
    embeddings, logits = features.values.tensor_split([width], 1)
    row = {"N": len(logits), "silent": features.silent}
    if len(logits) >= 10:
        row["IS"], row["IS_std"] = inception_score(logits)
    if reference is not None:
        real_embeddings, real_logits = reference.values.tensor_split([width], 1)
        row["FD"] = frechet_distance(embeddings, real_embeddings)
        if paired:
            values = pair_divergences(real_logits, logits)
            row["KL_softmax"], row["KL_softmax_95"] = values.mean().item(), bootstrap(values)
    return row


def notes(metrics: dict) -> list[str]:
    """What has to stand beside the table: uncertainties, and what is odd about the sets."""
    sets, made, lines = metrics["sets"], metrics["sets"]["generated"], []
    if "IS" in made:
        lines.append(f"generated: IS ± {made['IS_std']:.2g} (std of ten parts)")
    if "KL_softmax" in made:
        lines.append("generated: KL {:.4g} to {:.4g} (95 %)".format(*made["KL_softmax_95"]))
    else:
        lines.append("no names in common with the reference: no pairs, so no KL")
    fds = [row["FD"] for k, row in sets.items() if k == "generated" or k.startswith("seed")]
    if len(fds) > 1:
        lines.append(f"FD of {len(fds)} seeds: {np.mean(fds):.4g} ± {np.std(fds, ddof=1):.2g}")
    for k, row in sets.items():
        for what in ("silent", "missing"):
            if (names := row.get(what)) and k != "silence":
                lines.append(f"{k}: {len(names)} {what}: {', '.join(names[:20])}")
    return lines


def run(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    device = latents.pick_device(args.device)
    classifier = Cnn14.load(args.classifier).to(device)
    folders = {"generated": args.generated, "reference": args.reference}
    folders |= {f"seed {i}": folder for i, folder in enumerate(args.seeds, 2)}
    folders |= {"floor": args.controls} if args.controls else {}
    clips = latents.read_table(args.table) if args.table else None
    sets, lacks = in_common({k: sounds_of(folder, clips) for k, folder in folders.items()})
    sounds = {k: {n: partial(load_sound, p) for n, p in paths.items()} for k, paths in sets.items()}
    names = sorted(sets["generated"])
    if args.codec:
        codec = latents.load_codec(args.codec, device, args.encodec_weights)
        real = sets["floor" if args.controls else "reference"].items()
        sounds["ceiling"] = {name: partial(reconstruct, codec, path) for name, path in real}
    if args.controls:
        sounds["silence"] = dict.fromkeys(names, lambda: torch.zeros(CLIP_SAMPLES))
        generators = (torch.Generator().manual_seed(i) for i in range(len(names)))
        white = (partial(torch.normal, 0.0, 0.1, (CLIP_SAMPLES,), generator=g) for g in generators)
        sounds["noise"] = dict(zip(names, white))

    # Every rank takes a share of the sounds; one of them does the sums.
    heard = {k: hear(group, classifier, k) for k, group in sounds.items()}
    if int(os.environ.get("RANK", 0)) > 0:
        return
    width, reference, generated = classifier.widths[-1], heard.pop("reference"), heard["generated"]
    paired = reference.names == names
    rows = {"reference": measure(reference, None, width, False)}
    rows |= {k: measure(features, reference, width, paired) for k, features in heard.items()}
    if args.controls and paired:
        order = np.random.default_rng(0).permutation(len(names))
        wrong = generated.values[order], reference.values[np.roll(order, 1)]  # none with its own
        rows["shuffled"] = measure(*(Features(names, x, []) for x in wrong), width, True)
    about = {"file": args.classifier.name, "sha256": classifier.sha256, "sample_rate": SAMPLE_RATE}
    metrics = {
        "sets": {k: row | {"missing": lacks.get(k, [])} for k, row in rows.items()},
        "folders": {k: str(folder) for k, folder in folders.items()},
        "classifier": about,
        "versions": {"evaluate.py": file_sha256(__file__), "torch": torch.__version__},
        "command": " ".join(["python", *sys.argv]),
    }
    print(f"by {args.classifier} at 16 kHz\n{'':12}{'N':>12}{'FD':>12}{'IS':>12}{'KL':>12}")
    for k, row in rows.items():
        cells = (f"{row[c]:.4g}" if c in row else "" for c in ("N", "FD", "IS", "KL_softmax"))
        print(f"{k:12}" + "".join(f"{cell:>12}" for cell in cells))
    print("\n".join(notes(metrics)))
    path = (args.out or args.generated) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, (json.dumps(metrics, indent=2) + "\n").encode())
    print(path)


def main(arguments: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("generated", type=Path, help="folder of generated sounds")
    add("reference", type=Path, help="folder of real sounds; those of the same name are pairs")
    add("--classifier", type=Path, default=CLASSIFIER, help="PANNs' Cnn14_16k_mAP=0.438.pth, or a "
        "Cnn14 of ours [tiny/classifier.safetensors; its FD compares with no other's]")  # fmt: skip
    add("--table", type=Path, help="table of clips with ids (AudioCaps' test.csv): which to take")
    add("--seeds", type=Path, nargs="+", default=[], help="sets of other seeds: FD's spread")
    add("--controls", type=Path, metavar="OTHER", help="folder of other real sounds for the names")
    add("--codec", choices=("encodec", "mel"), help="also OTHER, else the reference, through it")
    add("--encodec-weights", help="EnCodec's weights")
    add("--out", type=Path, help="folder for metrics.json [the generated one]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    args = parser.parse_args(arguments)
    with latents.one_line_errors("start the same command again"):
        run(args)


if __name__ == "__main__":
    main()
