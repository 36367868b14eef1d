"""Inpainting, longer sounds, sounds between two prompts, and pictures: with any finished model.

    python -m appendix.edit "rain" --init-audio bark.wav --keep 0-3,6-10   rain where it isn't kept
    python -m appendix.edit "a train passing by" --seconds 30              by windows that overlap
    python -m appendix.edit "rain" --to "applause" -n 5                    in five files
    python -m appendix.edit "rain" --control bark.wav --controlnet runs/controlnet/model
    python -m appendix.edit "rain" --steps 45 --steps-image 1,15,30,45     P2, figure 8

All other options are sample.py's, and all of these can be combined. Each is something wrapped
around the U-Net, which sample.py then samples from as from any other:

    Known     of a recording that is kept x_0 is known, and with it, in any x_t, what the network
              should predict: so it does, and what it adds elsewhere goes with what is there
    Between   a third prediction a step, for the other prompt z:
              ε = ε_∅ + s·((1 − w)·ε_y + w·ε_z − ε_∅), with w from 0 in the first file to 1
    Watched   shows x_t on its way from noise to sound
              (and appendix/control.py's Controlled: as loud as a recording, frame by frame)

Beyond 10.08 s windows follow each other by half their length: what is known of each is the second
half of the one before. Of all this the papers have the picture of the steps.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import diffusion
import latents
import sample
from appendix.control import Controlled, add_control
from latents import CLIP_SAMPLES, FRAMES, GRID, SAMPLE_RATE, number, one_line_errors
from train import numbers

CLIP_SECONDS = CLIP_SAMPLES / SAMPLE_RATE  # 10.08
SETTINGS = (*sample.SETTINGS, "keep", "seconds", "to", "n", "control", "controlnet")


# ---- around the U-Net: called with [2B, …], first without and then with the prompts, or [B, …] ---


class Known(nn.Module):
    """The U-Net, and the right answer where x_0 [1 or B, C, 24, 21] is `kept`, a mask like it."""

    def __init__(self, model: sample.Model, x_0: Tensor, kept: Tensor):
        super().__init__()
        self.unet, self.x_0, self.kept = model.unet, x_0, kept
        self.prediction, self.alphas_cumprod = model.prediction, model.alphas_cumprod

    def forward(self, x_t: Tensor, t: int, *text: Tensor) -> Tensor:
        x_0 = self.x_0.repeat(len(x_t) // len(self.x_0), 1, 1, 1)  # of both halves, or one
        answer = x_0
        if self.prediction != "x0":
            answer = diffusion.eps_from_x0(x_0, x_t, t, self.alphas_cumprod)
        if self.prediction == "v":
            answer = diffusion.velocity(x_0, answer, t, self.alphas_cumprod)
        return torch.where(self.kept, answer, self.unet(x_t, t, *text))


class Between(nn.Module):
    """The U-Net, and in place of what it predicts for the prompts a mixture of that and what it
    predicts for `to`, of which there is `share` [B]: a call of it has B more."""

    def __init__(self, model: sample.Model, to: str, share: Tensor):
        super().__init__()
        self.unet, self.share = model.unet, share.view(-1, 1, 1, 1)
        self.text, self.mask = model.encoder([to] * len(share))

    def forward(self, x_t: Tensor, t: int, text: Tensor, mask: Tensor | None) -> Tensor:
        x_t = torch.cat([x_t, x_t[: len(self.share)]])
        text = torch.cat([text, self.text.to(text)])
        mask = None if mask is None else torch.cat([mask, self.mask])
        *null, one, other = self.unet(x_t, t, text, mask).float().split(len(self.share))
        return torch.cat([*null, torch.lerp(one, other, self.share)])


class Watched(nn.Module):
    """The U-Net, and watch(t, x_t [B, C, 24, 21]) whenever it is called."""

    capturable = False  # a CUDA graph would call no function

    def __init__(self, model: sample.Model, watch: Callable[[int, Tensor], None], batch: int):
        super().__init__()
        self.unet, self.watch, self.batch = model.unet, watch, batch

    def forward(self, x_t: Tensor, t: int, *text: Tensor) -> Tensor:
        self.watch(t, x_t[-self.batch :])
        return self.unet(x_t, t, *text)


# ---- sampling ------------------------------------------------------------------------------------


def kept_frames(keep: Sequence[tuple[float, float]]) -> Tensor:
    """bool [504]: the frames within these spans of seconds. ValueError for what is no span."""
    kept = torch.zeros(FRAMES, dtype=torch.bool)
    for start, end in keep:
        if not 0 <= start < end <= CLIP_SECONDS:
            raise ValueError(f"keep {start:g}-{end:g}: expected seconds of 0 to {CLIP_SECONDS}")
        kept[round(start * 50) : round(end * 50)] = True  # 50 frames a second
    return kept


@torch.no_grad()
def generate(
    model: sample.Model,
    prompts: list[str],
    *,
    keep: Sequence[tuple[float, float]] = (),
    seconds: float = CLIP_SECONDS,
    to: str = "",
    n: int = 2,
    watch: Callable[[int, Tensor], None] | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    init_audio: Tensor | None = None,
    **settings,
) -> Tensor:
    """`sample.generate` for one batch, with more settings: float32 [B, seconds · 16,000].

    keep: [(start, end), …] in seconds: what of init_audio is to stay, as the codec gives it back.
    seconds: above 10.08, window after window. to: another prompt; `n` samples lead there: sample i
    has the noise of number i // n, and (i % n) / (n − 1) of the other prompt. watch(t, x_t) is
    called whenever the network is, with x_t [B, C, 24, 21].
    """
    indices = list(range(len(prompts)) if indices is None else indices)
    settings |= {"indices": indices, "batch_size": len(prompts), "decode": False}
    mixed = model
    if to:
        share = torch.tensor([i % n / max(1, n - 1) for i in indices], device=model.device)
        mixed = replace(model, unet=Between(model, to, share))
        settings["indices"] = [i // n for i in indices]

    def window(number: int, init_audio: Tensor | None, known: Tensor, kept: Tensor) -> Tensor:
        """x_0 [B, C, 24, 21]; where it is kept, it is what is known."""
        inner = replace(mixed, unet=Known(mixed, known, kept)) if kept.any() else mixed
        inner = replace(inner, unet=Watched(inner, watch, len(prompts))) if watch else inner
        noise = seed + (number << 32)  # for each window another
        x_0 = sample.generate(inner, prompts, seed=noise, init_audio=init_audio, **settings)
        return torch.where(kept, known, x_0)  # the samplers end at ᾱ_0, not quite at 1

    # Of the first window is known what is kept of the recording,
    known = torch.zeros(1, model.codec.channels, *GRID, device=model.device)
    known = known if init_audio is None else model.latent(init_audio)
    kept = kept_frames(keep).to(model.device)
    kept = model.codec.to_grid(kept.expand(model.codec.to_sequence(known).shape))
    pieces = [window(0, init_audio, known, kept)]
    # of any other its first half. Rows of the grid are time: a row is 0.42 s.
    half = GRID[0] // 2
    kept = (torch.arange(GRID[0], device=model.device) < half)[:, None]  # [24, 1]
    for i in range(1, 1 + math.ceil(max(0.0, seconds / CLIP_SECONDS - 1) * 2)):
        known = F.pad(pieces[-1][..., -half:, :], (0, 0, 0, half))
        pieces.append(window(i, None, known, kept)[..., half:, :])
    return model.wave(torch.cat(pieces, dim=2))[..., : round(seconds * SAMPLE_RATE)]


def save_steps(path: Path, seen: dict[int, Tensor], title: str) -> None:
    """A PNG: latents x_t, {t: [C, 504]}, over frames and channels, from noise to sound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, size = len(seen), (8, 0.4 + 1.2 * len(seen))
    figure, axes = plt.subplots(rows, figsize=size, layout="constrained", squeeze=False)
    for axis, (t, x_t) in zip(axes[:, 0], sorted(seen.items(), reverse=True), strict=True):
        axis.imshow(x_t.cpu(), origin="lower", aspect="auto", vmin=-3, vmax=3)
        axis.set(xticks=[], yticks=[], ylabel=f"t = {t}")
    figure.suptitle(title[:80], parse_math=False)  # or "$" would begin a formula
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    latents.write_aside(sample.free_path(path), buffer.getvalue())


# ---- the command ---------------------------------------------------------------------------------


def spans(text: str) -> list[tuple[float, float]]:
    """ "0-3,6-10" -> [(0, 3), (6, 10)]."""
    pairs = [part.split("-") for part in text.split(",")]
    return [(float(start), float(end)) for start, end in pairs]


def main(arguments: list[str] | None = None) -> None:
    parser = sample.make_parser(__doc__)
    parser.set_defaults(strength=None)
    add = parser.add_argument
    add("--keep", type=spans, default=[], metavar="A-B,C-D", help="seconds of --init-audio to stay")
    add("--seconds", type=number(float, 1, 300), default=CLIP_SECONDS, help="length [10.08]")
    add("--to", default="", metavar="PROMPT", help="with -n 2 or more: go from prompt to prompt")
    add("--control", metavar="AUDIO", help="a recording whose loudness to follow, by")
    add("--controlnet", metavar="FOLDER", help="a ControlNet, what appendix.control made")
    add("--steps-image", type=numbers, default=(), metavar="I,J,…", help="PNGs of the latents")
    args = parser.parse_args(arguments)
    if args.strength is None:
        args.strength = 1.0 if args.keep else 0.8
    if args.keep and not args.init_audio:
        parser.error("--keep is for --init-audio")
    if args.to and args.n < 2:
        parser.error("--to needs -n 2 or more: that many sounds from the prompt to the other one")
    if bool(args.control) != bool(args.controlnet):
        parser.error("--control and --controlnet go together")
    if not 1 / SAMPLE_RATE <= args.seconds <= 300:
        parser.error(f"--seconds {args.seconds}: expected above 0, at most 300")
    seen = {}  # sample -> {t: latent}

    def make(model: sample.Model, prompts: list[str], control, controlnet, **settings) -> Tensor:
        if control and Controlled not in map(type, model.unet.modules()):  # at the first batch
            model.unet = add_control(model, controlnet, latents.load_audio(control)).unet
        timesteps = diffusion.timestep_sequence(len(model.alphas_cumprod), args.steps)
        if not all(1 <= i <= args.steps for i in args.steps_image):
            raise ValueError(f"--steps-image: expected steps of 1 to {args.steps}")
        wanted = {timesteps[i - 1] for i in args.steps_image}

        def watch(t: int, x_t: Tensor) -> None:
            for i, z in zip(settings["indices"], model.codec.to_sequence(x_t), strict=True):
                if t in wanted:
                    seen.setdefault(i, {})[t] = z.clone()

        return generate(model, prompts, watch=watch, **settings)

    with one_line_errors("the sounds so far are whole"):
        for i, path, _ in sample.run(args, make, SETTINGS):
            tqdm.write(f"{path}\n", end="")
            if i in seen:
                save_steps(path.with_name(f"{path.stem}-steps.png"), seen.pop(i), path.stem)


if __name__ == "__main__":
    main()
