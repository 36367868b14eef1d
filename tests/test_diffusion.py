"""diffusion.py against known constants, diffusers' schedulers and exact solutions."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

import diffusion
from diffusion import add_noise, cosine_alphas_cumprod, ddim, ddpm, eps_from_x0, guided, pndm

COSINE = cosine_alphas_cumprod()
OPTIONS = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network(x_t, t, calls=None):
    """A stand-in for ε_θ that is far from linear, in x and in t."""
    if calls is not None:
        calls.append(t)
    return torch.sin(1.3 * x_t + 0.01 * t) * 0.9 + 0.1 * x_t


def diffusers_walk(scheduler, steps, **options):
    """diffusers' own loop, on our ᾱ (theirs are float32), and the timesteps it visits."""
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = COSINE, COSINE[0]
    scheduler.set_timesteps(steps)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, int(t)), t, x, **options).prev_sample
    return x, scheduler.timesteps.tolist()


def test_cosine_constants():
    expected = {0: 0.99995872, 499: 0.493844, 968: 2.332232e-03, 980: 8.765294e-04, 999: 2.4288e-09}
    for t, value in expected.items():
        assert COSINE[t].item() == pytest.approx(value, rel=2e-5)
    assert COSINE.dtype == torch.float64 and (COSINE.diff() < 0).all()


@pytest.mark.parametrize(
    "ours, name",
    [(COSINE, "squaredcos_cap_v2"), (diffusion.scaled_linear_alphas_cumprod(), "scaled_linear")],
)
def test_schedules_are_diffusers(ours, name):
    betas = 1 - ours / torch.cat([torch.ones(1), ours[:-1]])
    theirs = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule=name)
    torch.testing.assert_close(betas.float(), theirs.betas, rtol=2e-4, atol=1e-7)


def test_noise_and_velocity_are_diffusers():
    x_0, eps, t = noise(1), noise(2), torch.tensor([10, 700])
    x_t, scheduler = add_noise(x_0, eps, t, COSINE), DDPMScheduler(1000)
    scheduler.alphas_cumprod = COSINE
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, t))
    v = diffusion.velocity(x_0, eps, t, COSINE)
    torch.testing.assert_close(v, scheduler.get_velocity(x_0, eps, t))
    torch.testing.assert_close(eps_from_x0(x_0, x_t, t, COSINE), eps)
    assert add_noise(x_0.float(), eps.float(), t, COSINE).dtype == torch.float32


def test_a_shift_is_a_scaling_of_the_signal():
    """x_t of the shifted schedule is, up to a factor, x_t of the unshifted one for shift · x_0."""
    moved, t, x_0, eps = diffusion.shifted(COSINE, 0.2), torch.tensor([30, 900]), noise(1), noise(2)
    ratio = ((1 - moved[t]) / (1 - COSINE[t])).sqrt().view(-1, 1, 1, 1)
    expected = ratio * add_noise(0.2 * x_0, eps, t, COSINE)
    torch.testing.assert_close(add_noise(x_0, eps, t, moved), expected)
    torch.testing.assert_close(diffusion.shifted(COSINE, 1.0), COSINE)


def test_timesteps():
    assert diffusion.timestep_sequence(1000, 45) == list(range(969, 0, -22))
    assert diffusion.timestep_sequence(1000, 1000) == list(range(999, -1, -1))
    assert diffusion.timestep_sequence(1000, 50)[0] == 981
    for steps in (1, 10, 100, 111, 333, 500, 1000):
        assert len(diffusion.timestep_sequence(1000, steps)) == steps
    calls = []
    ddim(partial(network, calls=calls), noise(), COSINE, 0, timesteps=[500, 100, 7])
    assert calls == [500, 100, 7]


def test_impossible_settings_are_refused():
    for steps in (0, 1001, 334):
        with pytest.raises(ValueError, match=f"{steps} denoising steps"):
            diffusion.timestep_sequence(1000, steps)
    for bad in ([], [5, 5], [1000, 1], [5, -1]):
        with pytest.raises(ValueError, match="timesteps must fall"):
            ddim(network, noise(), COSINE, 0, timesteps=bad)
    with pytest.raises(ValueError, match="expected 'plms' or 'runge-kutta'"):
        pndm(network, noise(), COSINE, 10, warmup="euler")
    with pytest.raises(ValueError, match="expected one of eps, v, x0"):
        diffusion.predicts_eps(network, "w", COSINE)


@pytest.mark.parametrize("warmup, steps", [("plms", 3), ("plms", 45), ("runge-kutta", 50)])
def test_pndm_is_diffusers(warmup, steps):
    plms, calls = warmup == "plms", []
    scheduler = PNDMScheduler(1000, skip_prk_steps=plms, steps_offset=1)
    expected, timesteps = diffusers_walk(scheduler, steps)
    x_0 = pndm(partial(network, calls=calls), noise(), COSINE, steps, warmup)
    torch.testing.assert_close(x_0, expected, rtol=1e-10, atol=1e-10)
    assert calls == timesteps and len(calls) == steps + (1 if plms else 9)
    if plms and steps == 45:  # the second timestep comes twice
        assert calls[:4] == [969, 947, 947, 925] and calls[-2:] == [23, 1]


@pytest.mark.parametrize("steps", [3, 45])
def test_ddim_and_ddpm_are_diffusers(steps):
    for eta in (0.0, 0.7):
        random = {"eta": eta, "generator": generators(3, 4)}
        expected, _ = diffusers_walk(DDIMScheduler(1000, **OPTIONS), steps, **random)
        found = ddim(network, noise(), COSINE, steps, eta, generators(3, 4))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    options = {"steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False}
    expected, _ = diffusers_walk(DDPMScheduler(1000, **options), steps, generator=generators(3, 4))
    found = ddpm(network, noise(), COSINE, steps, generators(3, 4))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prediction, theirs", [("v", "v_prediction"), ("x0", "sample")])
def test_networks_of_v_and_x0_sample_as_diffusers(prediction, theirs):
    found = ddim(diffusion.predicts_eps(network, prediction, COSINE), noise(), COSINE, 20)
    scheduler = DDIMScheduler(1000, prediction_type=theirs, **OPTIONS)
    torch.testing.assert_close(found, diffusers_walk(scheduler, 20)[0], rtol=1e-9, atol=1e-9)


RUNGE_KUTTA = partial(pndm, warmup="runge-kutta")


@pytest.mark.parametrize("steps", [1, 3, 45, 1000])
def test_a_perfect_network_recovers_the_signal(steps):
    x_0, eps, t = noise(1), noise(2), diffusion.timestep_sequence(1000, steps)[0]
    x_T = add_noise(x_0, eps, torch.tensor([t, t]), COSINE)
    expected = add_noise(x_0, eps, torch.tensor([0, 0]), COSINE)  # DDIM and PNDM end at ᾱ_0
    for sampler in (ddim, pndm, RUNGE_KUTTA):
        found = sampler(lambda x, t: eps, x_T, COSINE, steps)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def oracle(x_t, t):  # the noise that is really in x_t
        return eps_from_x0(x_0, x_t, t, COSINE)

    found = ddpm(oracle, noise(2), COSINE, steps, generators(1, 2))  # it ends at ᾱ = 1
    torch.testing.assert_close(found, x_0, rtol=1e-9, atol=1e-9)


def gaussian_error(sampler, steps):
    """Error against the exact flow for data N(0, 0.5²), from t = 800 to t = 50 whatever `steps`.

    The exact ε is √(1−ᾱ)·x_t / (ᾱ·s² + 1 − ᾱ), and the flow scales x by the marginal's std.
    """

    def variance(t):
        return 0.25 * COSINE[t] + 1 - COSINE[t]

    def exact(x_t, t):
        return (1 - COSINE[t + 50]).sqrt() * x_t / variance(t + 50)

    # The samplers go on from their last timestep to 0; a schedule that begins at t = 50 makes
    # its index 0 the fixed end.
    timesteps = [750 * (steps - i) // steps for i in range(steps)]
    x = sampler(exact, noise(), COSINE[50:], steps, timesteps=timesteps)
    return (x - noise() * (variance(50) / variance(800)).sqrt()).abs().max().item()


@pytest.mark.parametrize(
    "sampler, least, most", [(ddim, 0.75, 1.5), (pndm, 1.75, 9), (RUNGE_KUTTA, 2.25, 9)]
)
def test_order_of_convergence(sampler, least, most):
    """Twice the steps: half the error for DDIM, a quarter or less for PNDM."""
    few, many = (gaussian_error(sampler, n) for n in (30, 150))
    assert least < math.log(few / many) / math.log(5) < most


def test_guidance_moves_every_channel():
    """Code copied from three-channel models guides the first three only."""

    def two_texts(x_t, t):  # first half: no text, second half: the prompt, alone at scale 1
        *null, text = x_t.split(3)
        assert len(null) == (scale != 1) and all(torch.equal(x, text) for x in null)
        return torch.cat([*(0 * x for x in null), torch.ones_like(text)])

    x_t = torch.randn(3, 128, 4, 4)
    for scale in (6.5, 1.0, 0.0):
        eps = guided(two_texts, scale)(x_t, 10)
        assert torch.equal(eps, torch.full_like(x_t, scale))


def test_where_guidance_is_none_the_prompt_alone_is_asked_for():
    """That is, at scale 1 and where there is little noise: half the work."""
    sizes, x_t = [], torch.randn(3, 128, 4, 4)

    def eps_model(x_t, t):
        sizes.append((t, len(x_t)))
        return x_t

    for scale, t in ((2.0, 401), (2.0, 400), (2.0, 1), (1.0, 999)):
        assert torch.equal(guided(eps_model, scale, above=400)(x_t, t), x_t)
    assert sizes == [(401, 6), (400, 3), (1, 3), (999, 3)]


@pytest.mark.parametrize("sampler", [ddpm, partial(ddim, eta=1.0)])
def test_noise_is_the_samples_own(sampler):
    """A sample drawn in a batch of two equals the same sample drawn alone."""
    both = sampler(network, noise(), COSINE, 10, generator=generators(11, 22))
    second = sampler(network, noise()[1:], COSINE, 10, generator=generators(22))
    torch.testing.assert_close(both[1:], second, rtol=0, atol=0)
    assert not torch.allclose(both, sampler(network, noise(), COSINE, 10, generator=None))
