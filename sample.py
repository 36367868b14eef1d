"""From a prompt to a sound: papers, section 4; P2 appendix E for image-to-image.

    x_T ~ N(0, I)                                               from (seed, number of the sample)
    ε   = ε_θ(x_t, t, ∅) + s·(ε_θ(x_t, t, y) − ε_θ(x_t, t, ∅))  guidance; s: papers 3.5 to 7.5
    x_0 = sampler(ε, x_T)                                       PNDM, 45 steps (the papers)
    wave = decode(x_0·std + mean)                               10.08 s at 16 kHz

y is the prompt, ∅ the empty text or the negative prompt. Image-to-image takes only the last share
`strength` of the steps, from a recording's latent noised up to there: near 0 it gives the recording
back; at 1 it takes all steps, from x_T as without a recording, and nothing of it is left.

    python sample.py "dog barking"                              the tiny model; dog_barking.wav
    python sample.py "rain" "a cat meowing" -n 4 --seed 1 --out sounds
    python sample.py "an owl hooting" --init-audio bark.wav --strength 0.6
    torchrun --nproc_per_node 8 sample.py --prompts test.csv --model runs/paper/model --out sounds

or from Python: `generate(load_model("tiny/model"), ["dog barking"], seed=0)`, a wave [1, 161280].

The same seed gives the same noise, bit for bit, whatever the batch size, the number of ranks or the
device, and so the same sound up to rounding. A WAV's comment holds prompt, number and settings:
`generate` with indices=[number] makes it again by itself. Not in the papers: guidance at high noise
only, and rows of the picture that shift from step to step (ShiftedRows), where a model folder asks
for them. For inpainting, longer sounds, sounds between two prompts, pictures: appendix/edit.py.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import diffusion
import latents
from captions import TextEncoder
from latents import natural, number, positive
from unet import UNet

TINY = Path(__file__).resolve().parent / "tiny" / "model"
SAMPLERS = {"pndm": diffusion.pndm, "ddim": diffusion.ddim, "ddpm": diffusion.ddpm}
SETTINGS = ("seed", "steps", "guidance", "sampler", "negative", "strength", "precision")
# What model.json says beside its codec, by train.py's names
MODEL_SETTINGS = ("text_encoder", "max_length", "mask", "prediction", "schedule", "schedule_shift")
MODEL_SETTINGS += ("guidance", "guidance_above", "denoising_steps", "shifted_rows")


@dataclass
class Model:
    """A model folder, loaded: all that stands between a prompt and a sound."""

    unet: nn.Module  # (x_t, t, text, text_mask) → prediction: a UNet, or what is wrapped around one
    encoder: TextEncoder
    codec: latents.EncodecCodec | latents.MelCodec
    stats: latents.LatentStats
    alphas_cumprod: Tensor  # of the noise schedule
    prediction: str  # what the U-Net predicts: "eps", "v" or "x0"
    guidance: float  # its scale, when nobody says
    guidance_above: int  # the t down to which it is used
    steps: int  # to take, when nobody says
    device: torch.device
    graphs: dict = field(default_factory=dict, init=False)  # of the U-Net's call, by shapes

    def latent(self, wave: Tensor) -> Tensor:
        """A recording [samples], 16 kHz, cut or padded to 10.08 s -> its x_0 [1, C, 24, 21]."""
        stored = self.codec.encode(latents.to_clip(wave).to(self.device))
        return self.codec.to_grid(self.stats.normalize(self.codec.dequantize(stored)))

    def wave(self, x_0: Tensor) -> Tensor:
        """x_0 [B, C, 24, 21] -> waves [B, 161280] on the CPU: for each row of the 24, 6,720."""
        z = self.stats.denormalize(self.codec.to_sequence(x_0))  # [B, C, 504]
        return self.codec.decode(z).float().cpu()


class ShiftedRows(nn.Module):
    """A U-Net whose picture's rows begin at other frames at each t. A row's last frame and the next
    row's first are neighbours in time, but not in the picture: there a network leaves seams. As the
    rows move, so do the seams, and a sampler's calls average them out. The frames before the first
    row go behind the last."""

    def __init__(self, unet: nn.Module, codec: latents.EncodecCodec | latents.MelCodec):
        super().__init__()
        self.unet, self.codec = unet, codec
        shifts = torch.randint(latents.GRID[1], (1000,), generator=torch.Generator().manual_seed(0))
        self.register_buffer("shifts", shifts, persistent=False)

    def shift(self, x: Tensor, t: int | Tensor, sign: int = 1) -> Tensor:
        """[B, C, 24, 21], of which frame i becomes frame i − shifts[t]; or back."""
        frames = torch.arange(latents.FRAMES, device=x.device) + sign * self.shifts[t]
        z = self.codec.to_sequence(x)[..., frames % latents.FRAMES]
        return self.codec.to_grid(z)

    def forward(self, x_t: Tensor, t: int | Tensor, *text: Tensor | None) -> Tensor:
        return self.shift(self.unet(self.shift(x_t, t), t, *text), t, -1)


def read_settings(folder: str | Path) -> dict:
    """MODEL_SETTINGS and codec of a model folder, with the hub id of its text encoder or the path
    of the one that it holds."""
    about = latents.read_json(Path(folder, "model.json"), "codec", *MODEL_SETTINGS)
    if (own := Path(folder, str(about["text_encoder"]))).is_dir():
        about["text_encoder"] = str(own.resolve())
    return {key: about[key] for key in ("codec", *MODEL_SETTINGS)}


def load_model(
    folder: str | Path = TINY,
    device: str | None = None,
    encodec_weights: str | None = None,
    precision: str = "auto",
) -> Model:
    """Load a model folder (train.py writes them) onto "cpu" or "cuda" (None: cuda if there is).

    precision: what `generate` will be asked for. On CUDA, bf16 weights are all that is held there.
    From here on this process also keeps freed memory (see latents.py), which is faster on CPUs.
    """
    folder, device = Path(folder).resolve(), latents.pick_device(device)
    latents.keep_freed_memory()
    about = read_settings(folder)
    try:
        size = about["max_length"], about["mask"]
        encoder = TextEncoder(about["text_encoder"], *size, device=device)
        if (folder / "words.safetensors").is_file():  # learned by textual inversion
            encoder.add_words(load_file(folder / "words.safetensors"))
        codec = latents.load_codec(about["codec"], device, encodec_weights)
        stats = latents.LatentStats.load(folder / "latent_stats.safetensors")
        alphas_cumprod = diffusion.SCHEDULES[about["schedule"]]()
        alphas_cumprod = diffusion.shifted(alphas_cumprod, about["schedule_shift"]).to(device)
        unet = UNet.from_pretrained(folder / "unet").eval()
        unet = ShiftedRows(unet, codec) if about["shifted_rows"] else unet
        rest = about["prediction"], float(about["guidance"]), int(about["guidance_above"])
        rest += (int(about["denoising_steps"]),)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"{folder}: damaged, or its parts don't fit together ({e!r:.80})") from e
    half = device.type == "cuda" and latents.pick_precision(precision, device) == "bf16"
    unet.to(device, torch.bfloat16 if half else None, memory_format=torch.channels_last)
    return Model(unet, encoder, codec, stats, alphas_cumprod, *rest, device)


def noise_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for each sample, from (seed, number of the sample) and nothing else."""
    states = [np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(s) % 2**63) for s in states]


def capture(function: Callable, inputs: Sequence[Tensor]) -> Callable:
    """`function` of tensors of these shapes, which has run before, as one CUDA graph; itself, if
    that fails. A U-Net is a thousand small kernels, and a CPU takes longer to launch each than a
    GPU to run it. A call overwrites what the call before it returned."""
    held, stream = [x.clone() for x in inputs], torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may load data
            output = function(*held)
    except RuntimeError as e:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own
        warnings.warn(f"no CUDA graph, so it takes longer: {e!s:.120}", stacklevel=2)
        return function

    def replay(*inputs: Tensor):
        for place, x in zip(held, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        return output

    return replay


GRAPHS = {"cuda": capture}  # by type of device


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    sampler: str = "pndm",
    negative: str = "",
    init_audio: Tensor | None = None,
    strength: float = 0.8,
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    precision: str = "auto",
    progress: bool = False,
    decode: bool = True,
) -> Tensor:
    """Sounds for `prompts`: float32 [N, 161280] at 16 kHz, on the CPU; or x_0, not to `decode`.

    steps, guidance: None for the model's own; guidance 0 ignores the prompts, 1 is no guidance.
    seed, indices: sample i's noise comes from (seed, indices[i]); indices default to 0 … N−1.
    sampler: one of SAMPLERS. negative: prompt to lead away from. init_audio: samples at 16 kHz to
    start from; strength: the share of the steps to take then, 0 … 1, but one at least. precision:
    of the U-Net, "bf16", "fp32" or "auto", see latents.pick_precision.
    """
    alphas_cumprod, device = model.alphas_cumprod, model.device
    steps = model.steps if steps is None else steps
    guidance = model.guidance if guidance is None else guidance
    indices = range(len(prompts)) if indices is None else indices
    bf16 = latents.pick_precision(precision, device) == "bf16"
    if isinstance(prompts, str) or not 0 < len(prompts) == len(indices):
        raise ValueError(f"expected a list of prompts, as long as indices, not {prompts!r:.60}")
    if negative and guidance == 1:
        raise ValueError("a negative prompt does nothing at guidance 1, where it isn't asked for")
    timesteps, start = diffusion.timestep_sequence(len(alphas_cumprod), steps), None
    if init_audio is not None and strength < 1:
        timesteps = timesteps[-max(1, round(strength * steps)) :]
        start = model.latent(init_audio)
    # In bf16 once. Autocast remembers its casts of parameters, but not those of views of them, such
    # as Conv3x3's. On CUDA it would take norms to float32 and back: there, all is in bf16 without.
    cuda, weights = device.type == "cuda", dict(model.unet.named_parameters())
    if not bf16 and any(W.dtype == torch.bfloat16 for W in weights.values()):
        raise ValueError('for precision fp32, load the model with precision="fp32"')
    weights = {k: W.bfloat16() for k, W in weights.items() if bf16 and (cuda or W.dim() > 1)}
    graph = GRAPHS.get(device.type) if getattr(model.unet, "capturable", True) else None

    def call(x_t: Tensor, t: int | Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not cuda):
            return functional_call(model.unet, weights, (x_t, t, text, mask)).float()

    batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    calls = len(batches) * (len(timesteps) + (sampler == "pndm"))
    bar, sounds = tqdm(total=calls, unit="step", leave=False, disable=not progress or None), []
    for batch in batches:
        # One call of the network per step, for 2B: the first half without, the second with prompts;
        # or for the second half alone.
        text, mask = model.encoder([negative] * len(prompts[batch]) + list(prompts[batch]))
        text = text.float()  # on CUDA the encoder gives bf16

        def network(x_t: Tensor, t: int, text=text, mask=mask) -> Tensor:
            bar.update()
            inputs = x_t, t, *(x[-len(x_t) :] for x in (text, mask) if x is not None)
            if graph is None:
                return call(*inputs)
            inputs = x_t, torch.full((1,), t, device=device), *inputs[2:]
            key = model.unet, bf16, *(x.shape for x in inputs)
            if key not in model.graphs:  # a graph doesn't keep alive the weights that it reads
                call(*inputs)
                model.graphs[key] = graph(call, inputs), weights
            return model.graphs[key][0](*inputs).clone()  # or the next call would overwrite it

        eps_model = diffusion.predicts_eps(network, model.prediction, alphas_cumprod)
        # Guidance: ε = ε_∅ + s·(ε_y − ε_∅)
        above = model.guidance_above if guidance > 1 else 0  # at 0, no prompt is heard at any t
        eps_model = diffusion.guided(eps_model, guidance, above)

        generators = noise_generators(seed, indices[batch])
        x_t = torch.empty(len(generators), model.codec.channels, *latents.GRID, device=device)
        x_t = diffusion.randn_like(x_t, generators)
        if start is not None:
            t = torch.tensor(timesteps[:1], device=device)
            x_t = diffusion.add_noise(start, x_t, t, alphas_cumprod)
        rest = {"timesteps": timesteps} | ({"generator": generators} if sampler == "ddpm" else {})
        x_0 = SAMPLERS[sampler](eps_model, x_t, alphas_cumprod, steps, **rest)
        sounds.append(model.wave(x_0) if decode else x_0)
    bar.close()
    return torch.cat(sounds)


# ---- the command ---------------------------------------------------------------------------------


def make_parser(description: str) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    add, prompts = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("prompt", nargs="*", default=[], help="what to hear; one or several")
    prompts.add_argument("--prompts", type=Path, help="or a file: .txt, a line each, or a table")
    add("--model", type=Path, default=TINY, help="model folder [tiny/model]")
    add("--out", type=Path, default=Path("."), help="folder, or a .wav for a single sound [.]")
    add("-n", type=positive, default=1, help="sounds for each prompt [1]")
    add("--seed", type=natural, default=0, help="same seed, same noise [0]")
    add("--steps", type=number(int, 1, 1000), help="denoising; below 10: too few [the model's]")
    add("--guidance", type=number(float, 0), help="the scale s; 1: no effect [the model's]")
    add("--sampler", choices=SAMPLERS, default="pndm", help="[pndm]")
    add("--negative", default="", help="prompt to lead away from")
    add("--init-audio", type=Path, help="recording to start from (image-to-image)")
    add("--strength", type=number(float, 0, 1), default=0.8, help="1: nothing of it stays [0.8]")
    add("--batch-size", type=positive, default=8, help="sounds at a time [8]")
    add("--device", help="cpu or cuda [cuda where there is one]")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="never TF32 [auto]")
    add("--encodec-weights", help="EnCodec's weights, for models that decode with it")
    return parser


def plan(args: argparse.Namespace) -> tuple[list[str], list[Path]]:
    """The prompt and the file of each sound."""
    pairs = [(latents.safe_name(prompt), prompt) for prompt in args.prompt]
    if args.prompts:
        clips = [clip for clip in latents.read_table(args.prompts) if clip["captions"]]
        pairs = [(latents.safe_name(clip["id"], given=True), clip["captions"][0]) for clip in clips]
    if not pairs:
        raise ValueError(f"{args.prompts}: no prompts in it")
    folder, files = args.out, {}
    if folder.suffix.lower() in latents.AUDIO - {".wav"}:
        raise ValueError(f"{folder}: sounds are written as .wav")
    if folder.suffix.lower() == ".wav":
        folder, pairs = folder.parent, [(folder.stem, prompt) for _, prompt in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompt in pairs:
        for _ in range(args.n):
            path = free_path(folder / f"{name}.wav", files)
            files[path] = prompt.encode(errors="replace").decode()  # no tokenizer takes "\ud83d"
    prompts, paths = list(files.values()), list(files)
    if "WORLD_SIZE" in os.environ:  # rank 0 names all files, before there are any of this run
        dist.init_process_group("gloo")
        dist.broadcast_object_list(paths)
        dist.destroy_process_group()
    return prompts, paths


def free_path(path: Path, taken: Collection[Path] = ()) -> Path:
    """`path`, or the first of path-2, path-3, … that is not taken and doesn't exist."""
    first, n = path, 1
    while path in taken or path.exists():
        n += 1
        path = first.with_stem(f"{first.stem}-{n}")
    return path


def run(
    args: argparse.Namespace, make: Callable[..., Tensor] = generate, keys: tuple = SETTINGS
) -> Iterator[tuple[int, Path, Tensor]]:
    """Write the sounds that `args` ask for, and yield number, file and wave of each: from `make`,
    which is like `generate`, with these keys of its settings."""
    warnings.showwarning = lambda text, *_: tqdm.write(f"warning: {text}", file=sys.stderr)
    prompts, paths = plan(args)
    init_audio = args.init_audio and latents.load_audio(args.init_audio, latents.CLIP_SECONDS)
    model = load_model(args.model, args.device, args.encodec_weights, args.precision)
    args.steps = model.steps if args.steps is None else args.steps
    args.guidance = model.guidance if args.guidance is None else args.guidance
    args.precision = latents.pick_precision(args.precision, model.device)
    settings = {key: getattr(args, key) for key in keys}
    about = settings | {"model": "/".join(args.model.resolve().parts[-2:])}
    about["init_audio"] = args.init_audio and args.init_audio.name
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = range(rank, len(prompts), ranks)
    batches = [mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    settings |= {"batch_size": args.batch_size, "progress": rank == 0, "init_audio": init_audio}
    for batch in tqdm(batches, unit="batch", disable=rank > 0 or len(batches) < 2):
        waves = make(model, [prompts[i] for i in batch], indices=batch, **settings)
        for i, wave in zip(batch, waves, strict=True):
            comment = json.dumps({"prompt": prompts[i], "sample": i} | about, ensure_ascii=False)
            path = free_path(paths[i])  # another command may write to this folder, too
            latents.save_audio(path, wave, comment)
            yield i, path, wave


def main(arguments: list[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(arguments)
    smaller = f"--batch-size {max(1, args.batch_size // 2)}"
    with latents.one_line_errors("the sounds so far are whole", smaller):
        for _, path, _ in run(args):
            tqdm.write(f"{path}\n", end="")  # in one piece: several ranks write at once


if __name__ == "__main__":
    main()
