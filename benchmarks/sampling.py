"""How long a clip takes at full width, here and with diffusers.

The papers' network (861,022,528 parameters, random: their values don't matter to speed), a text of
50 tokens of T5-large's width, PNDM, guidance 6.5. In turn, on the same weights, noise and threads,
each in a process of its own:

    diffusers, float32        Stable Diffusion's pipeline loop: UNet2DConditionModel, PNDMScheduler
    diffusers, bf16           the same at its best on a CPU: autocast, channels-last
      …, freed memory kept    and with what `sample.py` does on a CPU (`latents.keep_freed_memory`)
    here, float32 and bf16    sample.generate, from the text's states to the latent

The final latents are compared, and the matrix products of one step are counted and set against what
this machine does in one large product.

    python -m benchmarks.sampling                     45 steps, 3 rounds: 16 minutes on 2 cores
    python -m benchmarks.sampling --steps 10 --rounds 5 --only bf16
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from torch import Tensor

import diffusion
import sample
from benchmarks.arithmetic import TOKENS, forward_flops
from latents import GRID, LatentStats, keep_freed_memory, to_sequence
from unet import UNet, UNetConfig, to_diffusers_config

GUIDANCE = 6.5
RUNS = (
    "diffusers, float32",
    "diffusers, bf16",
    "diffusers, bf16, freed memory kept",
    "here, float32",
    "here, bf16",
)


class Given:
    """A text encoder for states that are there already."""

    def __init__(self, states: Tensor):
        self.states = states  # [2, L, D]: of the empty text, of the prompt

    def __call__(self, texts: list[str]) -> tuple[Tensor, None]:
        return self.states.repeat_interleave(len(texts) // 2, 0), None


def as_model(unet: UNet, states: Tensor) -> sample.Model:
    """The network as a model whose sounds are its latents."""
    channels = unet.config.in_channels
    return sample.Model(
        unet=unet,
        encoder=Given(states),
        codec=SimpleNamespace(channels=channels, to_sequence=to_sequence, decode=lambda z: z),
        stats=LatentStats(torch.zeros(channels), torch.ones(channels)),
        alphas_cumprod=diffusion.cosine_alphas_cumprod().to(states.device),
        prediction="eps",
        guidance=GUIDANCE,
        guidance_above=0,
        steps=45,
        device=states.device,
    )


def ours(model: sample.Model, n: int = 1, *, steps: int, precision: str) -> Tensor:
    """Latents [n, 128, 504]."""
    return sample.generate(model, [""] * n, steps=steps, precision=precision, batch_size=n)


def as_diffusers(unet: UNet) -> UNet2DConditionModel:
    """The same weights, held once."""
    with torch.device("meta"):
        peer = UNet2DConditionModel.from_config(to_diffusers_config(unet.config))
    peer.load_state_dict(unet.state_dict(), assign=True)
    return peer.eval()


@torch.no_grad()
def theirs(
    unet: UNet2DConditionModel, states: Tensor, n: int = 1, *, steps: int, bf16: bool
) -> Tensor:
    """The loop of diffusers' StableDiffusionPipeline, guidance as it does it. In bf16: on a CPU by
    autocast, which is faster there, on a GPU with weights in bf16, as its users do."""
    device, cpu = states.device, states.device.type == "cpu"
    betas = betas_of(diffusion.cosine_alphas_cumprod())
    scheduler = PNDMScheduler(
        trained_betas=betas, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    scheduler.set_timesteps(steps)
    size = (unet.config.in_channels, *GRID)
    generators = sample.noise_generators(0, range(n))
    x = torch.stack([torch.randn(size, generator=g) for g in generators]).to(device)
    states = states.repeat_interleave(n, 0).to(unet.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and cpu):  # casts the weights once
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([x] * 2), t).to(unet.dtype)
            if bf16 and cpu:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            eps = unet(inputs, t, encoder_hidden_states=states, return_dict=False)[0].float()
            eps_null, eps_text = eps.chunk(2)
            eps = eps_null + GUIDANCE * (eps_text - eps_null)
            x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x.flatten(2).cpu()  # 24 × 21 row by row: 504 frames


def betas_of(alphas_cumprod: Tensor) -> np.ndarray:
    """β_t, as diffusers' schedulers take them."""
    before = torch.cat([torch.ones(1, dtype=alphas_cumprod.dtype), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / before).numpy()


def seconds_now(device: torch.device) -> float:
    """What a clock says when the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(dtype: torch.dtype, size: int = 4096, device: str = "cpu") -> float:
    """A second, in the best of ten products of two square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(10):
        started = seconds_now(a.device)
        a @ b
        times.append(seconds_now(a.device) - started)
    return 2 * size**3 / min(times)


def measure(name: str, steps: int) -> tuple[float, np.ndarray]:
    """Seconds for a latent, and the latent, of one of RUNS; the first call of the network aside."""
    torch.manual_seed(0)
    states, unet, bf16 = torch.randn(2, TOKENS, 1024), UNet(UNetConfig()).eval(), "bf16" in name
    if name.startswith("here") or name.endswith("kept"):
        keep_freed_memory()  # as sample.load_model does
    if name.startswith("diffusers"):
        peer = as_diffusers(unet)
        if bf16:
            peer.to(memory_format=torch.channels_last)
        run = partial(theirs, peer, states, bf16=bf16)
    else:
        unet.to(memory_format=torch.channels_last)
        run = partial(ours, as_model(unet, states), precision="bf16" if bf16 else "fp32")
    run(steps=2)
    started = time.perf_counter()
    latent = run(steps=steps)
    return time.perf_counter() - started, latent.numpy()


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--steps", type=int, default=45, help="denoising steps [45]")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run [3]")
    parser.add_argument("--only", default="", help="those with this in their name [all]")
    args = parser.parse_args()

    with torch.device("meta"):
        flops = 2 * forward_flops(UNet(UNetConfig()))
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        peak = peak_flops(dtype)
        print(f"{name}: {peak / 1e9:.0f} GFLOP/s in a matrix product; a step's {flops / 1e9:.0f} "
              f"GFLOP take {flops / peak:.2f} s at that")  # fmt: skip

    names = [name for name in RUNS if args.only in name]
    if not names:
        parser.error(f"--only {args.only}: expected a part of {'; '.join(RUNS)}")
    times, latent = {name: [] for name in names}, {}
    for number in range(args.rounds):
        for name in names:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds, latent[name] = pool.submit(measure, name, args.steps).result()
            times[name].append(seconds)
            print(f"round {number + 1}: {name} {seconds:.1f} s", flush=True)

    first = names[0]
    print(f"\n{args.steps} steps, {torch.get_num_threads()} threads; ratios to '{first}', round by "
          "round: median (lowest to highest)\n")  # fmt: skip
    for name in names:
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        ratio = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        error = np.linalg.norm(latent[name] - latent[first]) / np.linalg.norm(latent[first])
        print(f"{name:36}{statistics.median(times[name]):7.1f} s   {ratio}   latent differs by "
              f"{error:.1e}")  # fmt: skip
        if not error < (1e-4 if "float32" in name and "float32" in first else 2e-2):
            sys.exit(f"error: {name} disagrees with {first}")


if __name__ == "__main__":
    main()
