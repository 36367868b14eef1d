"""benchmarks/inversion.py: what it varies is what the codec does."""

import torch

from benchmarks.inversion import VARIANTS, Variant, varies
from latents import MelCodec


def test_without_options_it_is_the_codec():
    codec, variant = MelCodec(), Variant()
    wave = 0.1 * torch.randn(2, 161_280, generator=torch.Generator().manual_seed(3))
    stored, decibel = codec.encode(wave), variant.mel_of(wave)
    same = (decibel - codec.decibel(stored)).abs() < 1e-3
    assert same.float().mean() > 0.999  # the codec rounds in float64
    expected = codec.decode(codec.sharpen @ decibel)
    error = (variant.wave_of(decibel) - expected).norm() / expected.norm()
    assert error < 1e-2


def test_every_variant_is_another_sound_of_the_same_size():
    wave = 0.1 * torch.randn(1, 161_280, generator=torch.Generator().manual_seed(3))
    wave = torch.cat([wave, wave.cumsum(1) / 50])
    found = [codec.wave_of(codec.mel_of(wave)) for codec in VARIANTS.values()]
    assert all(x.shape == wave.shape and x.isfinite().all() for x in found)
    for i, a in enumerate(found):
        assert all((a - b).norm() > 0.01 * a.norm() for b in found[:i])


def test_only_noise_varies_as_noise_does():
    """Smooth magnitudes buzz; without phases, a sound of pulses fits a smooth spectrum."""
    assert abs(varies(Variant()) - 0.523) < 0.03
    assert varies(Variant(start="random", together=False)) < 0.35  # noise: 0.523
    assert varies(Variant(start="zero")) > 0.8
