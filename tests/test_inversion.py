"""benchmarks/inversion.py: what it varies is what the codec does."""

import torch

from benchmarks.inversion import Variant
from latents import CLIP_SAMPLES, MelCodec


def test_without_options_it_is_the_codec():
    codec, variant = MelCodec(), Variant()
    wave = 0.1 * torch.randn(1, CLIP_SAMPLES, generator=torch.Generator().manual_seed(3))
    stored, decibel = codec.encode(wave), variant.mel_of(wave)
    same = (decibel - codec.decibel(stored)).abs() < 1e-3
    assert same.float().mean() > 0.999  # the codec rounds in float64
    expected = codec.decode(codec.sharpen @ decibel)
    assert (variant.wave_of(decibel) - expected).norm() < 1e-2 * expected.norm()
