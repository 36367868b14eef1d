"""diffusion.py against known constants, diffusers' schedulers and exact solutions."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from diffusion import (
    add_noise,
    cosine_alphas_cumprod,
    ddim,
    ddpm,
    eps_from_x0,
    guided,
    pndm,
    predicts_eps,
    scaled_linear_alphas_cumprod,
    shifted,
    timestep_sequence,
    velocity,
)

COSINE = cosine_alphas_cumprod()
SHAPE = (2, 6, 5, 4)


def betas_of(alphas_cumprod):
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x_t, t):
    """A stand-in for ε_θ that is far from linear, in x and in t."""
    return torch.sin(1.3 * x_t + 0.01 * t) * 0.9 + 0.1 * x_t


def recorded(eps_model, calls):
    def eps(x_t, t):
        calls.append(t)
        return eps_model(x_t, t)

    return eps


def diffusers_walk(scheduler, steps, x, model=network, **options):
    """diffusers' own loop, on our ᾱ (theirs are float32), and the timesteps it visits."""
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = COSINE, COSINE[0]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, int(t)), t, x, **options).prev_sample
    return x, scheduler.timesteps.tolist()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- schedules -----------------------------------------------------------------------------------


def test_cosine_constants():
    betas = betas_of(COSINE)
    expected = {0: 4.128422e-05, 1: 4.614175e-05, 500: 3.155691e-03, 998: 0.749999, 999: 0.999}
    for t, beta in expected.items():
        assert betas[t].item() == pytest.approx(beta, rel=2e-6)
    expected = {0: 0.99995872, 499: 0.493844, 968: 2.332232e-03, 980: 8.765294e-04, 999: 2.4288e-09}
    for t, value in expected.items():
        assert COSINE[t].item() == pytest.approx(value, rel=2e-5)
    assert COSINE.dtype == torch.float64 and (COSINE.diff() < 0).all()


@pytest.mark.parametrize(
    "ours, name",
    [(COSINE, "squaredcos_cap_v2"), (scaled_linear_alphas_cumprod(), "scaled_linear")],
)
def test_schedules_are_diffusers(ours, name):
    theirs = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule=name)
    torch.testing.assert_close(betas_of(ours).float(), theirs.betas, rtol=2e-4, atol=1e-7)


def test_forward_process_v_and_x0():
    x_0, eps, t = noise(1), noise(2), torch.tensor([10, 700])
    x_t = add_noise(x_0, eps, t, COSINE)
    for i in range(2):
        a = COSINE[t[i]]
        torch.testing.assert_close(x_t[i], a.sqrt() * x_0[i] + (1 - a).sqrt() * eps[i])
    torch.testing.assert_close(eps_from_x0(x_0, x_t, t, COSINE), eps)
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    scheduler.alphas_cumprod = COSINE
    torch.testing.assert_close(scheduler.add_noise(x_0, eps, t), x_t)
    v = velocity(x_0, eps, t, COSINE)
    torch.testing.assert_close(scheduler.get_velocity(x_0, eps, t), v)
    assert add_noise(x_0.float(), eps.float(), t, COSINE).dtype == torch.float32


# ---- timesteps -----------------------------------------------------------------------------------


def test_timesteps():
    assert timestep_sequence(1000, 45) == list(range(969, 0, -22))
    assert timestep_sequence(1000, 1000) == list(range(999, -1, -1))
    assert timestep_sequence(1000, 50)[0] == 981
    for steps in (1, 10, 100, 111, 333, 500, 1000):
        assert len(timestep_sequence(1000, steps)) == steps


@pytest.mark.parametrize("steps", [0, -1, 1001, 334, 501, 112])
def test_impossible_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} denoising steps"):
        timestep_sequence(1000, steps)


def test_custom_timesteps():
    calls = []
    ddim(recorded(network, calls), noise(), COSINE, 0, timesteps=[500, 100, 7])
    assert calls == [500, 100, 7]
    for bad in ([], [5, 5], [1, 5], [1000, 1], [5, -1]):
        with pytest.raises(ValueError, match="timesteps must fall"):
            ddim(network, noise(), COSINE, 0, timesteps=bad)


# ---- samplers against diffusers ------------------------------------------------------------------

BETAS = betas_of(COSINE).tolist()
OPTIONS = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


@pytest.mark.parametrize(
    "warmup, steps",
    [*(("plms", n) for n in (2, 3, 10, 27, 45)), *(("runge-kutta", n) for n in (10, 31, 45, 50))],
)
def test_pndm_is_diffusers(warmup, steps):
    plms, calls = warmup == "plms", []
    scheduler = PNDMScheduler(1000, trained_betas=BETAS, skip_prk_steps=plms, steps_offset=1)
    expected, timesteps = diffusers_walk(scheduler, steps, noise())
    x_0 = pndm(recorded(network, calls), noise(), COSINE, steps, warmup)
    torch.testing.assert_close(x_0, expected, rtol=1e-10, atol=1e-10)
    assert len(calls) == steps + (1 if plms else 9)
    if plms or 1000 // steps % 2 == 0:  # Runge-Kutta: at odd strides diffusers is a timestep off
        assert calls == timesteps
    if plms and steps == 45:  # the second timestep comes twice
        assert calls[:4] == [969, 947, 947, 925] and calls[-2:] == [23, 1]


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("steps", [3, 10, 27, 45, 50])
def test_ddim_is_diffusers(steps, eta):
    scheduler = DDIMScheduler(1000, trained_betas=BETAS, **OPTIONS)
    expected, _ = diffusers_walk(scheduler, steps, noise(), eta=eta, generator=generators(3, 4))
    found = ddim(network, noise(), COSINE, steps, eta, generators(3, 4))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 45])
def test_ddpm_is_diffusers(steps):
    options = {"steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False}
    scheduler = DDPMScheduler(1000, trained_betas=BETAS, **options)
    expected, _ = diffusers_walk(scheduler, steps, noise(), generator=generators(3, 4))
    ours = ddpm(network, noise(), COSINE, steps, generators(3, 4))
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)


# ---- samplers against exact solutions ------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 45, 1000])
def test_a_perfect_network_recovers_the_signal(steps):
    x_0, eps = noise(1), noise(2)
    t, a = timestep_sequence(1000, steps)[0], COSINE[0].item()
    x_T = add_noise(x_0, eps, torch.tensor([t, t]), COSINE)
    expected = math.sqrt(a) * x_0 + math.sqrt(1 - a) * eps  # DDIM and PNDM end at ᾱ_0
    for sampler, options in ((ddim, {}), (pndm, {}), (pndm, {"warmup": "runge-kutta"})):
        found = sampler(lambda x, t: eps, x_T, COSINE, steps, **options)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def oracle(x_t, t):  # the noise that is really in x_t
        return eps_from_x0(x_0, x_t, t, COSINE)

    found = ddpm(oracle, noise(2), COSINE, steps, generators(1, 2))  # it ends at ᾱ = 1
    torch.testing.assert_close(found, x_0, rtol=1e-9, atol=1e-9)


def gaussian_error(sampler, steps):
    """Error against the exact flow for data N(0, 0.5²), from t = 800 to t = 50 whatever `steps`.

    The exact ε is √(1−ᾱ)·x_t / (ᾱ·s² + 1 − ᾱ), and the flow scales x by the marginal's std.
    """
    s2 = 0.25

    def variance(t):
        a = COSINE[t].item()
        return a * s2 + 1 - a

    def exact(x_t, t):
        return math.sqrt(1 - COSINE[t].item()) * x_t / variance(t)

    # The samplers go on from their last timestep to 0; a schedule that begins at t = 50 makes
    # its index 0 the fixed end.
    tail = COSINE[50:]
    timesteps = [750 * (steps - i) // steps for i in range(steps)]
    x_T = noise()
    x = sampler(lambda x, t: exact(x, t + 50), x_T, tail, steps, timesteps=timesteps)
    return (x - x_T * math.sqrt(variance(50) / variance(800))).abs().max().item()


@pytest.mark.parametrize(
    "name, sampler, order",
    [
        ("ddim", ddim, 1),
        ("pndm", pndm, 2),
        ("pndm runge-kutta", lambda *a, **k: pndm(*a, warmup="runge-kutta", **k), 2.5),
    ],
)
def test_order_of_convergence(name, sampler, order):
    """Twice the steps: half the error for DDIM, a quarter or less for PNDM."""
    errors = [gaussian_error(sampler, n) for n in (15, 30, 75, 150)]
    measured = math.log(errors[1] / errors[3]) / math.log(5)
    assert measured > order - 0.25, (name, errors, measured)
    if name == "ddim":
        assert measured < 1.5


# ---- guidance ------------------------------------------------------------------------------------


def test_guidance_moves_every_channel():
    """Code copied from three-channel models guides the first three only."""
    calls = []

    def two_texts(x_t, t):  # first half: no text, second half: the prompt
        calls.append(len(x_t))
        null, text = x_t.chunk(2)
        assert torch.equal(null, text)
        return torch.cat([0 * null, torch.ones_like(text)])

    x_t = noise(shape=(3, 128, 4, 4))
    eps = guided(two_texts, 6.5)(x_t, 10)
    assert torch.equal(eps, torch.full_like(eps, 6.5)) and calls == [6]
    assert torch.equal(guided(two_texts, 1.0)(x_t, 10), torch.ones_like(eps))
    assert torch.equal(guided(two_texts, 0.0)(x_t, 10), torch.zeros_like(eps))


@pytest.mark.parametrize("prediction, theirs", [("v", "v_prediction"), ("x0", "sample")])
def test_networks_of_every_kind_sample_as_eps_networks(prediction, theirs):
    """The same function, once as ε and once as v or x_0: samplers must not see a difference."""

    def other(x_t, t):
        a = COSINE[t].item()
        if prediction == "v":
            return (network(x_t, t) - math.sqrt(1 - a) * x_t) / math.sqrt(a)
        return (x_t - math.sqrt(1 - a) * network(x_t, t)) / math.sqrt(a)

    ours = ddim(predicts_eps(other, prediction, COSINE), noise(), COSINE, 20)
    torch.testing.assert_close(ours, ddim(network, noise(), COSINE, 20))
    scheduler = DDIMScheduler(1000, trained_betas=BETAS, prediction_type=theirs, **OPTIONS)
    x, _ = diffusers_walk(scheduler, 20, noise(), other)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


# ---- randomness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [ddpm, lambda *a, **k: ddim(*a, eta=1.0, **k)])
def test_noise_is_the_samples_own(sampler):
    """A sample drawn in a batch of two equals the same sample drawn alone."""

    both = sampler(network, noise(), COSINE, 10, generator=generators(11, 22))
    second = sampler(network, noise()[1:], COSINE, 10, generator=generators(22))
    torch.testing.assert_close(both[1:], second, rtol=0, atol=0)
    assert not torch.allclose(both, sampler(network, noise(), COSINE, 10, generator=None))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected 'plms' or 'runge-kutta'"):
        pndm(network, noise(), COSINE, 10, warmup="euler")
    with pytest.raises(ValueError, match="expected one of eps, v, x0"):
        predicts_eps(network, "w", COSINE)


# ---- the shifted schedule ------------------------------------------------------------------------


def test_a_shift_is_a_scaling_of_the_signal():
    """x_t of the shifted schedule is, up to a factor, x_t of the unshifted one for shift · x_0."""
    moved, t = shifted(COSINE, 0.2), torch.tensor([30, 900])
    x_0, eps = noise(1), noise(2)
    ratio = ((1 - moved[t]) / (1 - COSINE[t])).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        add_noise(x_0, eps, t, moved), ratio * add_noise(0.2 * x_0, eps, t, COSINE)
    )
    torch.testing.assert_close(shifted(COSINE, 1.0), COSINE)
    assert ((0 < moved) & (moved < COSINE)).all() and (moved.diff() < 0).all()
