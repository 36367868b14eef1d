"""Noise schedules, the forward process, guidance and samplers: pure functions on tensors.

Papers: section 2 (eqs. 1 and 2), section 4 "Noise schedule" (cosine, PNDM). The samplers' own
papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2020), PNDM (Liu et al. 2022), guidance (Ho and
Salimans 2021), v-prediction (Salimans and Ho 2022), x_0-prediction (Li and He 2025).

    x_0      a clean latent, normalised per channel     eps (ε)   Gaussian noise, same shape
    t        timestep, 0 (almost clean) … T−1 = 999     β_t       variance added at step t
    ᾱ_t      alphas_cumprod[t] = Π_{s≤t} (1 − β_s): how much of the signal's power is left

    x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε                         the forward process
    v_t = √ᾱ_t·ε − √(1−ᾱ_t)·x_0                         what a v-predicting network is trained on

A sampler walks from x_T, pure noise, to x_0: one function with one loop,

    x_0 = pndm(eps_model, x_T, alphas_cumprod, steps)   where eps_model(x_t, t: int) → ε

It knows neither text nor guidance nor what the network predicts: those are wrapped around the
network first (`guided`, `predicts_eps`). Not in the papers: predictions of v and x_0, `shifted`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PREDICTIONS = ("eps", "v", "x0")  # what a network may be trained to predict
EpsModel = Callable[[Tensor, int], Tensor]  # (x_t [B, C, H, W], t) -> eps [B, C, H, W]
Generators = Sequence[torch.Generator] | None  # one per sample


def cosine_alphas_cumprod(
    num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999
) -> Tensor:
    """ᾱ_t of the cosine schedule (papers, section 4), float64 [num_steps].

    f(t) = cos²((t/T + s)/(1 + s)·π/2);  β_t = min(1 − f(t+1)/f(t), max_beta)
    """
    t = torch.arange(num_steps + 1, dtype=torch.float64)
    f = torch.cos((t / num_steps + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
    return torch.cumprod(1 - betas, dim=0)


def scaled_linear_alphas_cumprod(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Tensor:
    """ᾱ_t of Stable Diffusion's and AudioLDM's schedule (√β linear in t), float64 [num_steps]."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


SCHEDULES = {"cosine": cosine_alphas_cumprod, "scaled-linear": scaled_linear_alphas_cumprod}


def shifted(alphas_cumprod: Tensor, shift: float) -> Tensor:
    """The schedule with its signal-to-noise ratio ᾱ/(1−ᾱ) multiplied by shift² at every t.
    Neighbouring values of a latent repeat each other, so noise hides them less than a small
    picture's pixels: unshifted, the last timesteps still show what sound it is, and the network
    never needs the text. 1: as in the papers; below 1: noisier (Hoogeboom et al. 2023, 2.1)."""
    signal = shift**2 * alphas_cumprod
    return signal / (signal + 1 - alphas_cumprod)


def signal_and_noise(t: Tensor | int, alphas_cumprod: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1−ᾱ_t), shaped [B, 1, 1, 1] to multiply `x` [B, C, H, W]."""
    a = alphas_cumprod[t].view(-1, *[1] * (x.ndim - 1))
    return a.sqrt().to(x), (1 - a).sqrt().to(x)


def add_noise(x_0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (eq. 1 in closed form); x_0 and noise [B, C, H, W], t [B]."""
    signal, sigma = signal_and_noise(t, alphas_cumprod, x_0)
    return signal * x_0 + sigma * noise


def velocity(x_0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v_t = √ᾱ_t·ε − √(1−ᾱ_t)·x_0 (Salimans and Ho, appendix D)."""
    signal, sigma = signal_and_noise(t, alphas_cumprod, x_0)
    return signal * noise - sigma * x_0


def eps_from_x0(x_0: Tensor, x_t: Tensor, t, alphas_cumprod: Tensor) -> Tensor:
    """ε = (x_t − √ᾱ_t·x_0) / √(1−ᾱ_t), from x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε."""
    signal, sigma = signal_and_noise(t, alphas_cumprod, x_t)
    return (x_t - signal * x_0) / sigma


def predicts_eps(model: EpsModel, prediction: str, alphas_cumprod: Tensor) -> EpsModel:
    """The network as an ε-model, whatever it was trained to predict: "eps", "v" or "x0".
    Why not always ε: at high t an error of ε reaches x_0 multiplied by √((1−ᾱ_t)/ᾱ_t), 21 at
    t = 969, an error of v does not. And a small network had better predict x_0: noise fills all
    dimensions of the latent, sounds few of them, so x_0 is far less to say (Li and He 2025)."""

    def eps_of_v(x_t: Tensor, t: int) -> Tensor:  # ε = √ᾱ_t·v + √(1−ᾱ_t)·x_t
        signal, sigma = signal_and_noise(t, alphas_cumprod, x_t)
        return signal * model(x_t, t) + sigma * x_t

    if prediction == "eps":
        return model
    if prediction == "v":
        return eps_of_v
    if prediction == "x0":
        return lambda x_t, t: eps_from_x0(model(x_t, t), x_t, t, alphas_cumprod)
    raise ValueError(f"prediction is {prediction!r}: expected one of {', '.join(PREDICTIONS)}")


def guided(eps_model: EpsModel, scale: float, above: int = 0) -> EpsModel:
    """Classifier-free guidance: ε = ε_∅ + scale·(ε_y − ε_∅), over all channels. From t = `above`
    down it is ε_y: there it costs variety and adds loudness (Kynkäänniemi et al. 2024). `eps_model`
    gets [x_t, x_t], to be denoised without (or with a negative) and with the prompt; or x_t, with
    the prompt. An earlier version of the paper has (w+1)·ε_y − w·ε_∅: scale = w + 1.
    """

    def eps(x_t: Tensor, t: int) -> Tensor:
        if scale == 1 or t <= above:
            return eps_model(x_t, t)
        eps_null, eps_text = eps_model(torch.cat([x_t, x_t]), t).chunk(2)
        return eps_null + scale * (eps_text - eps_null)

    return eps


def timestep_sequence(num_steps: int, steps: int) -> list[int]:
    """`steps` timesteps from high to low, "leading" spacing with offset 1 as Stable Diffusion's:
    45 of 1000 → 969, 947, … 23, 1. The start matters: t = 999 of the cosine schedule has 1/√ᾱ ≈
    2·10⁴ and multiplies any error of ε by it; much below it, latents are not pure noise yet."""
    if steps == num_steps:
        return list(range(num_steps))[::-1]
    if not 1 <= steps <= num_steps:
        raise ValueError(f"{steps} denoising steps: expected 1 to {num_steps}")
    stride = num_steps // steps
    start = (steps - 1) * stride + 1
    if steps > 100 and start < 0.89 * num_steps:
        raise ValueError(
            f"{steps} denoising steps would start at t = {start}, where latents are not pure noise:"
            f" take 100 or fewer, or as many as divide {num_steps}"
        )
    return list(range(start, 0, -stride))


def steps_and_targets(
    alphas_cumprod: Tensor, steps: int, timesteps: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(t, next t) of each step, by `timesteps` where given. The last step ends at ᾱ_0, not at 1, as
    in Stable Diffusion v1.4 (diffusers' `set_alpha_to_one=False`)."""
    num_steps = len(alphas_cumprod)
    ts = timestep_sequence(num_steps, steps) if timesteps is None else list(map(int, timesteps))
    if not ts or ts != sorted(set(ts), reverse=True) or ts[0] >= num_steps or ts[-1] < 0:
        raise ValueError(f"timesteps must fall from below {num_steps} to 0 or more, not {ts}")
    return list(zip(ts, ts[1:] + [0], strict=True))


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise, drawn on the CPU, for each sample from its own generator: what it gets
    depends neither on the device nor on the batch it is in."""
    generators = generators or [None] * len(x)
    noise = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in generators]
    return torch.stack(noise).to(x.device)


def ddpm(
    eps_model: EpsModel,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    generator: Generators = None,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Ancestral sampling (DDPM, algorithm 2), on all timesteps or some. x_T [B, C, H, W] noise.
    Unlike DDIM and PNDM it ends at ᾱ = 1, so the last step is x_0 itself."""
    a, x_t = alphas_cumprod.tolist(), x_T
    sequence = steps_and_targets(alphas_cumprod, steps, timesteps)
    for i, (t, t_next) in enumerate(sequence):
        last = i == len(sequence) - 1
        a_t, a_next = a[t], 1.0 if last else a[t_next]
        beta = 1 - a_t / a_next
        eps = eps_model(x_t, t)
        x_0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)  # eq. 15
        mean = math.sqrt(a_next) * beta / (1 - a_t) * x_0  # eq. 7
        mean = mean + math.sqrt(a_t / a_next) * (1 - a_next) / (1 - a_t) * x_t
        variance = beta * (1 - a_next) / (1 - a_t)  # eq. 7, β̃_t
        x_t = mean if last else mean + math.sqrt(variance) * randn_like(x_t, generator)
    return x_t


def ddim(
    eps_model: EpsModel,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    eta: float = 0.0,
    generator: Generators = None,
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """DDIM, eq. 12. eta = 0: deterministic; eta = 1: as noisy as DDPM. x_T [B, C, H, W] noise."""
    a, x_t = alphas_cumprod.tolist(), x_T
    for t, t_next in steps_and_targets(alphas_cumprod, steps, timesteps):
        eps = eps_model(x_t, t)
        x_0 = (x_t - math.sqrt(1 - a[t]) * eps) / math.sqrt(a[t])  # eq. 9
        sigma = eta * math.sqrt((1 - a[t_next]) / (1 - a[t]) * (1 - a[t] / a[t_next]))  # eq. 16
        x_t = math.sqrt(a[t_next]) * x_0 + math.sqrt(1 - a[t_next] - sigma**2) * eps  # eq. 12
        if sigma > 0:
            x_t = x_t + sigma * randn_like(x_t, generator)
    return x_t


def pndm(
    eps_model: EpsModel,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    steps: int,
    warmup: str = "plms",
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Pseudo numerical methods (PNDM): the papers' sampler. x_T [B, C, H, W] noise. A linear
    multistep method on ε: each step uses the last four ε. Until there are four:

    "plms"         lower orders, as Stable Diffusion does it: steps + 1 network calls
    "runge-kutta"  three steps with four calls each, the PNDM paper's own (F-PNDM, algorithm 2)
    """
    if warmup not in ("plms", "runge-kutta"):
        raise ValueError(f"warmup is {warmup!r}: expected 'plms' or 'runge-kutta'")
    a, x_t = alphas_cumprod.tolist(), x_T

    def transfer(x: Tensor, eps: Tensor, t: int, t_next: int) -> Tensor:  # eq. 11, φ(x, ε, t, t')
        x_0 = (x - math.sqrt(1 - a[t]) * eps) / math.sqrt(a[t])
        return math.sqrt(a[t_next]) * x_0 + math.sqrt(1 - a[t_next]) * eps

    history = []  # ε at the last timesteps, newest last
    for i, (t, t_next) in enumerate(steps_and_targets(alphas_cumprod, steps, timesteps)):
        e = eps_model(x_t, t)
        history = history[-3:] + [e]
        if warmup == "runge-kutta" and i < 3:  # eq. 13
            middle = t - (t - t_next) // 2
            e2 = eps_model(transfer(x_t, e, t, middle), middle)
            e3 = eps_model(transfer(x_t, e2, t, middle), middle)
            e4 = eps_model(transfer(x_t, e3, t, t_next), t_next)
            e = (e + 2 * e2 + 2 * e3 + e4) / 6
        elif len(history) == 1:  # improved Euler, a second call at t_next: 969, 947, 947, 925, …
            e = (e + eps_model(transfer(x_t, e, t, t_next), t_next)) / 2
        elif len(history) == 2:
            e = (3 * e - history[-2]) / 2
        elif len(history) == 3:
            e = (23 * e - 16 * history[-2] + 5 * history[-3]) / 12
        else:
            e = (55 * e - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24  # eq. 12
        x_t = transfer(x_t, e, t, t_next)
    return x_t
