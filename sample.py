"""From a prompt to a sound: papers, section 4; P2 appendix E for image-to-image.

    x_T ~ N(0, I)                                               from (seed, number of the sample)
    ε   = ε_θ(x_t, t, ∅) + s·(ε_θ(x_t, t, y) − ε_θ(x_t, t, ∅))  guidance, s = 6.5 (the papers)
    x_0 = sampler(ε, x_T)                                       PNDM, 45 steps
    wave = decode(x_0·std + mean)                               10.08 s at 16 kHz

y is the prompt, ∅ the empty text or the negative prompt. Image-to-image takes only the last share
`strength` of the steps, from a recording's latent noised up to there: near 0 it gives the recording
back; at 1 it takes all steps, from x_T as without a recording, and nothing of it is left. What of a
recording is to be kept is inpainted around: there ε is known, since x_0 is. Beyond ten seconds each
window keeps the last half of the one before it in the same way.

    python sample.py "dog barking"                              the tiny model; dog_barking.wav
    python sample.py "rain" "a cat meowing" -n 4 --seed 1 --out sounds
    python sample.py "rain" --init-audio bark.wav --keep 0-3,6-10      rain where it isn't kept
    python sample.py "a train passing by" --seconds 30          by windows that overlap
    python sample.py "rain" --to "applause" -n 5                from one to the other, in five files
    torchrun --nproc_per_node 8 sample.py --prompts test.csv --model runs/paper/model --out sounds

or from Python:

    from sample import generate, load_model
    model = load_model("tiny/model")
    waves = generate(model, ["dog barking"], seed=0)            # [1, 161280]

The same seed gives the same noise, bit for bit, whatever the batch size, the number of ranks or the
device, and so the same sound up to rounding (to the bit at an equal batch size on the same CPU). A
WAV's comment holds prompt, number and settings: `generate` with indices=[number] makes it again by
itself. An empty prompt is allowed: what comes is any sound.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import diffusion
import latents
from captions import TextEncoder
from latents import CLIP_SAMPLES, SAMPLE_RATE
from unet import ControlNet, UNet

TINY = Path(__file__).resolve().parent / "tiny" / "model"
CLIP_SECONDS = CLIP_SAMPLES / SAMPLE_RATE  # 10.08
MAX_SECONDS = 300.0
FRAME_RATE = latents.FRAMES / CLIP_SECONDS  # 50 a second
PROMPT_KEYS, NAME_KEYS = ("prompt", "caption", "captions"), ("name", "file", "youtube_id")


@dataclass
class Model:
    """A model folder, loaded: all that stands between a prompt and a sound."""

    unet: nn.Module  # a UNet, perhaps with a ControlNet
    encoder: TextEncoder
    codec: latents.EncodecCodec | latents.MelCodec
    stats: latents.LatentStats
    alphas_cumprod: Tensor  # of the noise schedule
    prediction: str  # what the U-Net predicts: "eps", "v" or "x0"
    guidance: float  # the scale to use when nobody says
    device: torch.device


def load_model(
    folder: str | Path = TINY, device: str | None = None, encodec_weights: str | None = None
) -> Model:
    """Load a model folder (train.py writes them) onto "cpu" or "cuda" (None: cuda if there is).

    From here on this process also keeps freed memory (see latents.py), which is faster on CPUs.
    FileNotFoundError or ValueError, one line, if it isn't one or its parts don't fit together.
    """
    folder, device = Path(folder).resolve(), latents.pick_device(device)
    latents.keep_freed_memory()
    if not (folder / "model.json").is_file():
        raise FileNotFoundError(f"{folder}: not a model folder (no model.json); train.py makes one")
    try:
        about = json.loads((folder / "model.json").read_bytes())
        text = about["text_encoder"], int(about["max_length"]), about["mask"]
        codec, prediction = dict(about["codec"]), about["prediction"]
        if prediction not in diffusion.PREDICTIONS:
            raise ValueError(f"prediction {prediction!r}")
        alphas_cumprod = diffusion.SCHEDULES[about["schedule"]]()
        alphas_cumprod = diffusion.shifted(alphas_cumprod, about.get("schedule_shift", 1)).to(
            device
        )
        guidance = float(about.get("guidance", 6.5))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{folder}/model.json: damaged, or not of a model folder ({e!r})") from e
    encoder = TextEncoder(*text, device=device)
    codec = latents.load_codec(codec, device, encodec_weights)
    unet = UNet.from_pretrained(folder / "unet").eval()
    stats = latents.LatentStats.load(folder / "latent_stats.safetensors")

    c, shapes = unet.config, [list(stats.mean.shape), list(stats.std.shape)]
    if not c.in_channels == c.out_channels == codec.channels or shapes != [[codec.channels]] * 2:
        raise ValueError(
            f"{folder}: its parts don't fit together: the codec has {codec.channels} channels, the "
            f"U-Net {c.in_channels} in and {c.out_channels} out, the statistics {shapes}"
        )
    if encoder.dim != (c.text_dim or c.cross_attention_dim):
        raise ValueError(f"{folder}: its U-Net is not for text states {encoder.dim} wide")
    unet.to(device, memory_format=torch.channels_last)
    return Model(unet, encoder, codec, stats, alphas_cumprod, prediction, guidance, device)


# ---- what appendix/adapt.py makes, added to a model ----------------------------------------------


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file and its metadata; ValueError for any other."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: damaged, or no safetensors file ({e})") from e


def add_embedding(model: Model, path: str | Path) -> None:
    """New words for prompts: textual inversion. ValueError for another text encoder's."""
    words, about = read_tensors(path)
    if about.get("text_encoder") != model.encoder.identity():
        raise ValueError(f"{path}: no words for this model's text encoder, {model.encoder.name}")
    if not words:
        raise ValueError(f"{path}: no words in it")
    model.encoder.add_words(words)


@torch.no_grad()
def add_lora(model: Model, path: str | Path, scale: float = 1.0) -> None:
    """W ← W + scale·B·A, low-rank changes of some of the U-Net's weights; those of several files
    add up. ValueError, before anything is changed, for a file that isn't of this architecture."""
    tensors, about = read_tensors(path)
    try:
        about = json.loads(about.get("lora_adapter_metadata", "{}"))  # diffusers'
        about = {key.removeprefix("unet."): value for key, value in about.items()}
        scale *= about.get("lora_alpha", 1) / about.get("r", 1)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        raise ValueError(f"{path}: its metadata are damaged ({e!r:.80})") from e
    weights, changes = dict(model.unet.named_parameters()), {}
    for name in sorted({key.partition(".lora_")[0] for key in tensors}):
        A, B = (tensors.pop(f"{name}.lora_{x}.weight", torch.empty(0, 0)) for x in "AB")
        W = weights.get(name.removeprefix("unet.") + ".weight", torch.empty(0))
        if W.dim() != 2 or (*B.shape[:1], *A.shape[1:]) != W.shape or B.shape[1:] != A.shape[:1]:
            raise ValueError(f"{path}: no LoRA for this U-Net: {name} doesn't fit")
        changes[W] = scale * (B.to(W) @ A.to(W))
    if tensors or not changes:
        raise ValueError(f"{path}: expected NAME.lora_A.weight and NAME.lora_B.weight, and no more")
    for W, change in changes.items():
        W += change


def add_control(model: Model, folder: str | Path, wave: Tensor) -> None:
    """From now on the sounds follow the loudness of `wave`, 16 kHz [samples], by a ControlNet.
    ValueError for another U-Net's."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if isinstance(model.unet, Controlled):
        raise ValueError(f"{folder}: a second ControlNet; there can be one, and LoRA before it")
    net = ControlNet.from_pretrained(folder)
    if net.config != model.unet.config:
        raise ValueError(f"{folder}: the ControlNet of another U-Net")
    net.eval().to(model.device, memory_format=torch.channels_last)
    stored = model.codec.encode(latents.to_clips(wave).to(model.device))
    model.unet = Controlled(model.unet, net, latents.loudness(model.codec, stored))


class Controlled(nn.Module):
    """A U-Net and the ControlNet that makes it follow `picture` [1, 1, 24, 21]."""

    def __init__(self, unet: UNet, net: ControlNet, picture: Tensor):
        super().__init__()
        self.unet, self.net, self.picture = unet, net, picture

    def forward(self, x_t: Tensor, *rest) -> Tensor:
        control = self.net(self.picture.expand(len(x_t), -1, -1, -1), x_t, *rest)
        return self.unet(x_t, *rest, control=control)


def file_and_scale(text: str) -> tuple[str, float]:
    """ "FILE:0.5" -> (FILE, 0.5); without a scale 1."""
    file, _, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


# ---- sampling ------------------------------------------------------------------------------------


def noise_generators(seed: int, indices: list[int]) -> list[torch.Generator]:
    """A CPU generator for each sample, from (seed, number of the sample) and nothing else."""
    states = [np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(s) % 2**63) for s in states]


def kept_frames(keep: list[tuple[float, float]]) -> Tensor:
    """bool [504]: the frames within these spans of seconds. ValueError for what is no span."""
    kept = torch.zeros(latents.FRAMES, dtype=torch.bool)
    for start, end in keep:
        if not 0 <= start < end <= CLIP_SECONDS:
            raise ValueError(f"keep {start:g}-{end:g}: expected seconds of 0 to {CLIP_SECONDS}")
        kept[round(start * FRAME_RATE) : round(end * FRAME_RATE)] = True
    return kept


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[str],
    *,
    seed: int = 0,
    steps: int = 45,
    guidance: float | None = None,
    sampler: str = "pndm",
    negative: str = "",
    to: str = "",
    shares: list[float] | None = None,
    seconds: float = CLIP_SECONDS,
    init_audio: Tensor | None = None,
    strength: float = 0.8,
    keep: list[tuple[float, float]] | None = None,
    batch_size: int = 8,
    indices: list[int] | None = None,
    precision: str = "bf16",
    progress: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sounds for `prompts`: float32 [N, seconds · 16,000] at 16 kHz, on the CPU.

    seed, indices: sample i's noise comes from (seed, indices[i]); indices default to 0 … N−1.
    guidance: the scale s, 0: ignore the prompt, 1: no guidance; None: the model folder's own.
    negative: prompt to lead away from. to, shares: another prompt, and how much of it is in each
    sample: 0, only the sample's own, to 1. sampler: "pndm", "ddim" or "ddpm". precision: "bf16" or
    "fp32", of the U-Net. seconds: above 10.08, window after window, each the continuation of the
    last half of the one before. init_audio: samples at 16 kHz to start from. strength: the share of
    the steps to take, above 0 … 1. keep: [(start, end), …] in seconds: what of init_audio is to
    stay, as the codec gives it back.
    watch(t, x_t [B, C, 504]) is called whenever the network is. ValueError for what can't be done.
    """
    guidance = model.guidance if guidance is None else guidance
    indices = list(range(len(prompts)) if indices is None else indices)
    alphas_cumprod, device = model.alphas_cumprod, model.device
    samplers = {"pndm": diffusion.pndm, "ddim": diffusion.ddim, "ddpm": diffusion.ddpm}
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision {precision!r}: expected bf16 or fp32")
    if isinstance(prompts, str) or not 0 < len(prompts) == len(indices):
        raise ValueError(f"expected a list of prompts, as long as indices, not {prompts!r:.60}")
    if sampler not in samplers:
        raise ValueError(f"sampler {sampler!r}: expected one of {', '.join(samplers)}")
    if not 0 <= guidance < np.inf:
        raise ValueError(f"guidance {guidance}: expected 0 or more, the papers use 3.5 to 7.5")
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength}: expected above 0 (the recording) to 1 (pure noise)")
    if not 1 / SAMPLE_RATE <= seconds <= MAX_SECONDS:
        raise ValueError(f"{seconds:g} seconds: expected above 0, at most {MAX_SECONDS:g}")
    if to and not (len(shares or []) == len(prompts) and all(0 <= w <= 1 for w in shares)):
        raise ValueError(f"shares {shares}: expected a number of 0 to 1 for each of the prompts")
    if keep and init_audio is None:
        raise ValueError("keep: there is no recording (init_audio) to keep anything of")

    # The first window starts from init_audio and keeps what it is told to keep of it; any other one
    # keeps the second half of the window before it, as its own first half.
    windows, half = 1 + math.ceil(max(0.0, seconds / CLIP_SECONDS - 1) * 2), latents.GRID[0] // 2
    first_half = (torch.arange(latents.GRID[0], device=device) < half)[:, None]  # [24, 1]
    kept = latents.to_grid(kept_frames(keep or [])).to(device)  # [24, 21]
    x_init = torch.zeros(1, model.codec.channels, *latents.GRID, device=device)
    timesteps = first = diffusion.timestep_sequence(len(alphas_cumprod), steps)
    if init_audio is not None:
        stored = model.codec.encode(latents.to_clips(init_audio).to(device))
        x_init = latents.to_grid(model.stats.normalize(model.codec.dequantize(stored)))
        first = timesteps[-max(1, round(strength * steps)) :]

    # In bf16 once. Autocast alone would cast those of Conv3x3 at every step: it keeps no views.
    weights = dict(model.unet.named_parameters()) if precision == "bf16" else {}
    weights = {name: W.bfloat16() for name, W in weights.items() if W.dim() > 1}

    batches = range(0, len(prompts), batch_size)
    calls = len(first) + (windows - 1) * steps + windows * (sampler == "pndm")
    bar = tqdm(total=calls * len(batches), unit="step", leave=False, disable=not progress or None)
    waves = []
    for start in batches:
        part = slice(start, start + batch_size)
        texts, generators = list(prompts[part]), noise_generators(seed, indices[part])
        # One call of the network a step: first part of the batch without, second with the prompt;
        # the third, if there is one, with the prompt to share with.
        parts, share = [negative] * len(texts) + texts, None
        if to:
            parts += [to] * len(texts)
            share = torch.tensor(shares[part], dtype=torch.float32, device=device)
            share = share.view(-1, 1, 1, 1)
        text, mask = model.encoder(parts)
        text = text.float()  # on CUDA the encoder gives bf16

        def network(x_t: Tensor, t: int, text=text, mask=mask, n=len(texts)) -> Tensor:
            bar.update()
            if watch is not None:
                watch(t, latents.to_sequence(x_t[:n]))
            return functional_call(model.unet, weights, (x_t, t, text, mask)).float()

        eps = diffusion.predicts_eps(network, model.prediction, alphas_cumprod)
        eps = diffusion.guided(eps, guidance, share)
        options = {"generator": generators} if sampler == "ddpm" else {}

        def denoise(known, kept, timesteps, noised, eps=eps, rngs=generators, options=options):
            """A window [B, C, 24, 21], from what is `known` if that is to be `noised`, or else from
            noise; where it is `kept` it stays."""
            size = (len(rngs), model.codec.channels, *latents.GRID)
            x = diffusion.randn_like(torch.empty(size, device=device), rngs)
            if noised:
                t = torch.tensor(timesteps[:1], device=device)
                x = diffusion.add_noise(known, x, t, alphas_cumprod)
            eps = diffusion.inpainted(eps, known, kept, alphas_cumprod)
            x = samplers[sampler](eps, x, alphas_cumprod, steps, timesteps=timesteps, **options)
            return torch.where(kept, known, x)  # the samplers end at ᾱ_0, not quite at 1

        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            pieces = [denoise(x_init, kept, first, init_audio is not None and strength < 1)]
            for _ in range(windows - 1):  # rows of the grid are time: a row is 0.42 s
                known = F.pad(pieces[-1][..., -half:, :], (0, 0, 0, half))
                pieces.append(denoise(known, first_half, timesteps, False)[..., half:, :])
        z = latents.to_sequence(torch.cat(pieces, dim=2))  # [B, C, 504 + 252·(windows − 1)]
        waves.append(model.codec.decode(model.stats.denormalize(z)).float().cpu())
    bar.close()
    return torch.cat(waves)[:, : round(seconds * SAMPLE_RATE)]


# ---- the command ---------------------------------------------------------------------------------


def cut(text: str, size: int) -> str:
    """As many whole characters as fit into `size` bytes."""
    return text.encode()[:size].decode(errors="ignore")


def safe_name(text: str, given: bool = False) -> str:
    """A file name for any prompt: lower case, letters and digits of any script, "sound" if there
    are none. One that was `given` keeps its case, dots and hyphens: YouTube's ids need them."""
    if given:
        name = re.sub(r"[^\w.-]+", "_", re.split(r"[/\\]", text)[-1]).lstrip(".")
        name = re.sub(r"\.(wav|flac|ogg|mp3|m4a)$", "", name, flags=re.I)
    else:
        name = cut(re.sub(r"[\W_]+", "_", text.lower()).strip("_"), 60).rstrip("_")
    return cut(name, 200) or "sound"


def free_path(path: Path, taken: Collection[Path] = ()) -> Path:
    """`path`, or the first of path-2, path-3, … that is not taken, and whose PNG isn't either."""
    first, n = path, 1
    while path in taken or path.exists() or path.with_suffix(".png").exists():
        n += 1
        path = first.with_stem(f"{first.stem}-{n}")
    return path


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(file name, prompt) pairs from a text file (a prompt a line), a CSV or a JSONL file.

    CSV and JSONL: `prompt`, `caption` or `captions`; `name`, `file` or `youtube_id` if files are to
    be called by it. Of prompts with one name the first is taken, and a warning says so: AudioCaps'
    test.csv has five captions a clip. ValueError names the record that is wrong.
    """
    kind, pairs = path.suffix.lower(), {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [line.strip() for line in text.split("\n") if line.strip()]
        if kind == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: can't be read as a list of prompts ({e})") from e
    for number, row in enumerate(rows, 1):
        try:
            if kind != ".csv":
                row = json.loads(row) if kind in (".jsonl", ".json") else {"prompt": row}
            name, prompt = (
                next((row[key] for key in keys if row.get(key) is not None), None)
                for keys in (NAME_KEYS, PROMPT_KEYS)
            )
            name = None if name == "" else name
            prompt = prompt[0] if isinstance(prompt, list) else prompt
            if not isinstance(prompt, str) or None in row:
                raise ValueError("more fields than columns" if None in row else "no prompt")
        except (ValueError, AttributeError, IndexError, RecursionError) as e:
            expected = f"one of {', '.join(PROMPT_KEYS)} and perhaps of {', '.join(NAME_KEYS)}"
            raise ValueError(f"{path}, record {number}: {e}; expected {expected}") from e
        file_name = safe_name(prompt) if name is None else safe_name(str(name), given=True)
        pairs.setdefault(number if name is None else str(name), (file_name, prompt))
    if not pairs:
        raise ValueError(f"{path}: no prompts in it")
    if len(pairs) < len(rows):
        first = f"{len(rows)} prompts for {len(pairs)} names, the first of each is taken"
        warnings.warn(f"{path}: {first}", stacklevel=2)
    return list(pairs.values())


def save_spectrogram(path: Path, wave: Tensor, title: str) -> None:
    """A PNG: level in dB over time and frequency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = torch.hann_window(1024)
    spectrum = torch.stft(wave, 1024, 256, window=window, pad_mode="constant", return_complex=True)
    decibel = 20 * torch.log10(spectrum.abs().clamp(min=1e-4))
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    extent, top = (0, len(wave) / SAMPLE_RATE, 0, SAMPLE_RATE / 2000), decibel.max().item()
    axis.imshow(decibel, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top)
    axis.set_title(title[:80], parse_math=False)  # or "$" would begin a formula
    axis.set(xlabel="seconds", ylabel="kHz")
    save_figure(path, figure)


def save_figure(path: Path, figure) -> None:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    latents.write_aside(path, buffer.getvalue())


def save_steps(path: Path, seen: dict[int, Tensor], title: str) -> None:
    """A PNG: latents x_t, {t: [C, 504]}, over frames and channels, from noise to sound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (8, 0.4 + 1.2 * len(seen))
    figure, axes = plt.subplots(len(seen), figsize=size, layout="constrained", squeeze=False)
    for axis, (t, x_t) in zip(axes[:, 0], sorted(seen.items(), reverse=True), strict=True):
        axis.imshow(x_t.cpu(), origin="lower", aspect="auto", vmin=-3, vmax=3)
        axis.set(xticks=[], yticks=[], ylabel=f"t = {t}")
    figure.suptitle(title[:80], parse_math=False)
    save_figure(path, figure)


def spans(text: str) -> list[tuple[float, float]]:
    """ "0-3,6-10" -> [(0, 3), (6, 10)]."""
    pairs = [part.split("-") for part in text.split(",")]
    return [(float(start), float(end)) for start, end in pairs]


def step_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="*", help="what to hear; several make several files")
    add("--prompts", type=Path, help="file of prompts: text (one a line), CSV or JSONL")
    add("--model", type=Path, default=TINY, help="model folder [tiny/model]")
    add("--embedding", action="append", default=[], metavar="FILE", help="new words for prompts; "
        "may be repeated (this and the next three: appendix/adapt.py)")  # fmt: skip
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="low-rank changes of "
        "the U-Net's weights; may be repeated, they add up")  # fmt: skip
    add("--controlnet", metavar="FOLDER", help="what makes the sounds follow --control")
    add("--control", metavar="AUDIO", help="recording whose loudness to follow")
    add("--out", type=Path, default=Path("."), help="folder, or a .wav for a single sound [.]")
    add("-n", type=int, default=1, help="sounds for each prompt [1]")
    add("--seed", type=int, default=0, help="same seed, same noise [0]")
    add("--steps", type=int, default=45, help="denoising steps: more are slower, finer [45]")
    add("--guidance", type=float, help="the scale s: how closely to follow the prompt, at the cost "
        "of variety; 1 is no guidance [what the model folder says, else 6.5]")  # fmt: skip
    add("--sampler", choices=("pndm", "ddim", "ddpm"), default="pndm", help="[pndm]")
    add("--negative", default="", help="prompt to lead away from")
    add("--to", default="", metavar="PROMPT", help="with -n 2 or more: go from the prompt to this "
        "one, with one and the same noise")  # fmt: skip
    add("--seconds", type=float, default=CLIP_SECONDS, help="length; above 10.08 by windows that "
        "continue each other [10.08]")  # fmt: skip
    add("--init-audio", type=Path, help="recording to start from (image-to-image)")
    add("--strength", type=float, help="how far from it: 1 forgets it [0.8; with --keep 1]")
    add("--keep", type=spans, default=[], metavar="A-B,C-D", help="seconds of it that stay as they "
        "are, whatever the strength (inpainting)")  # fmt: skip
    add("--spectrogram", action="store_true", help="write a PNG beside each WAV")
    add("--steps-image", type=step_numbers, default=[], metavar="I,J,…", help="write a PNG of the "
        "latent at these denoising steps (P2, figure 8), say 1,10,20,30,40,45")  # fmt: skip
    add("--batch-size", type=int, default=8, help="sounds at a time [8]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the U-Net [bf16]")
    add("--encodec-weights", help="EnCodec's weights, for models that decode with it")
    args = parser.parse_args(arguments)
    if bool(args.prompt) == bool(args.prompts):
        parser.error('say what to hear: python sample.py "dog barking", or --prompts FILE')
    if bool(args.control) != bool(args.controlnet):
        parser.error("--control and --controlnet go together")
    if args.control and args.seconds > CLIP_SAMPLES / SAMPLE_RATE:
        parser.error("--control is the loudness of one clip: --seconds 10.08 at most")
    if args.n < 1 or args.batch_size < 1 or args.seed < 0:
        parser.error("-n and --batch-size are 1 or more, --seed is 0 or more")
    if not 1 / SAMPLE_RATE <= args.seconds <= MAX_SECONDS:
        parser.error(f"--seconds {args.seconds}: expected above 0, at most {MAX_SECONDS:g}")
    if args.strength is None:
        args.strength = 1.0 if args.keep else 0.8
    if args.keep and not args.init_audio:
        parser.error("--keep is for --init-audio")
    if args.to and args.n < 2:
        parser.error("--to needs -n 2 or more: that many sounds from the prompt to the other one")
    if not all(1 <= i <= args.steps for i in args.steps_image):
        parser.error(f"--steps-image: expected steps of 1 to {args.steps}")
    if args.init_audio and args.steps_image and 0 < args.strength <= 1:
        skipped = args.steps - max(1, round(args.strength * args.steps))
        if min(args.steps_image) <= skipped:
            parser.error(f"--steps-image: with this --strength the first step is {skipped + 1}")
    return args


def run(args: argparse.Namespace) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    pairs = read_prompts(args.prompts) if args.prompts else [(safe_name(p), p) for p in args.prompt]
    if not all(prompt.strip() for _, prompt in pairs):
        warnings.warn("an empty prompt: what comes is any sound", stacklevel=2)
    names, prompts = zip(*[pair for pair in pairs for _ in range(args.n)], strict=True)
    # What isn't Unicode, half of a \ud83d\udc36, becomes "?": no tokenizer takes it.
    prompts = [prompt.encode(errors="replace").decode() for prompt in prompts]

    folder, paths = args.out, {}
    if folder.suffix.lower() == ".wav":
        if len(prompts) > 1:
            raise ValueError(f"--out {folder}: one file for {len(prompts)} sounds: give a folder")
        folder, names = folder.parent, [folder.stem]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise OSError(f"--out {folder}: not a folder to write to ({e.strerror})") from e
    for name in names:
        paths[free_path(folder / f"{name}.wav", paths)] = name
    paths = list(paths)
    if ranks > 1:  # rank 0 looked before there was any sound of this run: all take its names
        dist.init_process_group("gloo")
        dist.broadcast_object_list(paths)

    init_audio = latents.load_audio(args.init_audio, CLIP_SECONDS) if args.init_audio else None
    model = load_model(args.model, args.device, args.encodec_weights)
    for path in args.embedding:
        add_embedding(model, path)
    for lora in args.lora:
        add_lora(model, *file_and_scale(lora))
    if args.control:
        add_control(model, args.controlnet, latents.load_audio(args.control))
    args.guidance = model.guidance if args.guidance is None else args.guidance
    keys = ("seed", "steps", "guidance", "sampler", "negative", "to", "seconds", "strength", "keep")
    settings = {key: getattr(args, key) for key in (*keys, "precision")}
    # Cut: libsndfile reads back 2,000 bytes at most, and the text encoder takes 50 tokens or so.
    about = settings | {"negative": cut(args.negative, 300), "to": cut(args.to, 300)}
    about["model"] = "/".join(args.model.resolve().parts[-2:])
    adapted = [*args.embedding, *args.lora, args.controlnet, args.control]
    if adapted := ["/".join(Path(x).parts[-3:]) for x in adapted if x]:
        about["adapted"] = cut(", ".join(adapted), 300)
    about["init_audio"] = args.init_audio and args.init_audio.name

    timesteps = diffusion.timestep_sequence(len(model.alphas_cumprod), args.steps)
    if timesteps[0] < 0.89 * len(model.alphas_cumprod) and args.init_audio is None:
        print(f"warning: {args.steps} steps begin at t = {timesteps[0]}, as if noise were nearly a "
              "sound: take 10 or more", file=sys.stderr)  # fmt: skip
    seen = {timesteps[i - 1]: None for i in args.steps_image}

    def watch(t: int, x_t: Tensor) -> None:
        if t in seen:
            seen[t] = x_t.clone()

    mine = list(range(rank, len(prompts), ranks))
    batches = [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    for batch in tqdm(batches, unit="batch", disable=rank > 0 or len(batches) < 2):
        numbers = batch
        if args.to:  # a prompt's sounds have one noise, and share more and more with the other
            numbers = [i // args.n for i in batch]
            settings["shares"] = [i % args.n / (args.n - 1) for i in batch]
        settings |= {"indices": numbers, "batch_size": len(batch), "progress": rank == 0}
        settings |= {"init_audio": init_audio, "watch": watch}
        waves = generate(model, [prompts[i] for i in batch], **settings)
        for k, (i, wave) in enumerate(zip(batch, waves, strict=True)):
            comment = {"prompt": cut(prompts[i], 600), "sample": numbers[k], **about}
            if args.to:
                comment["share"] = settings["shares"][k]
            path = free_path(paths[i])  # another command may write to this folder, too
            path.touch(exist_ok=False)
            try:
                latents.save_audio(path, wave, json.dumps(comment, ensure_ascii=False))
            finally:
                if path.stat().st_size == 0:
                    path.unlink()
            if args.spectrogram:
                save_spectrogram(path.with_suffix(".png"), wave, prompts[i])
            if latent := {t: x_t[k] for t, x_t in seen.items() if x_t is not None}:
                image = free_path(path.with_name(f"{path.stem}-steps.png"))
                save_steps(image, latent, prompts[i])
            tqdm.write(f"{path}\n", end="")  # in one piece: several ranks write at once


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_: tqdm.write(f"warning: {text}", file=sys.stderr)
        try:
            run(args)
        except (ValueError, OSError, torch.OutOfMemoryError) as e:
            sys.exit(f"error: {e}")
        except KeyboardInterrupt:
            sys.exit("\ninterrupted: the sounds written so far are whole")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    main()
