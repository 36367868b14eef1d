"""From a mel spectrogram back to sound: what each choice of `latents.MelCodec` is worth.

Scenes of held-out recordings (tiny.judge's) are stored by the codec and decoded in several ways.
No model takes part: what is lost here is lost to any model in this latent space.

    start      the first spectrogram: white noise's, or all magnitudes alike, phases random or none
    magnitude  kept as first found from the mel bands, or found anew in every round of Griffin-Lim
    rounds     of Griffin-Lim
    n_fft, floor, power    of the spectrogram that is stored; others would need another model

Kept magnitudes get 32 rounds, as torchaudio's; the others 16, as the codec. Rows after the codec's
own change one thing each.

"off" is by how much mel bands above −60 dB change when the sound is encoded again. FD and KL
(evaluate.py's, by tiny/classifier.safetensors) are between the scenes and what is decoded. "noise"
is by how much of their mean the magnitudes of white noise vary after it went through: by 0.523
(Rayleigh's √(4/π − 1)) if it is noise still, less if it buzzes, more if it clicks.

    python -m benchmarks.inversion                         128 scenes, on one thread
    python -m benchmarks.inversion --clips 256
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.transforms as T
from torch import Tensor
from tqdm import tqdm

import evaluate
from latents import CLIP_SAMPLES, HOP, SAMPLE_RATE, MelCodec
from tiny import judge
from tiny.compose import HERE, Recordings, compose_scene, draw_scenes

BATCH = 16


class Variant(MelCodec):
    """MelCodec's `encode` and `decode` with every choice an option; without any, the same sound."""

    start, together, power = "noise", True, 1

    def __init__(self, **options):
        for name, value in options.items():
            setattr(self, name, value)
        super().__init__()

    def mel_of(self, wave: Tensor) -> Tensor:
        """[B, samples] -> dB, [B, 128, frames], in steps as stored."""
        magnitude = self.stft(wave)[..., :-1].abs() / (self.window.sum() / 2)
        mel = (self.mel @ magnitude**self.power) ** (1 / self.power)
        step = (self.top_db - self.floor_db) / 255
        decibel = 20 * torch.log10(mel + 10 ** (self.floor_db / 20))
        return self.floor_db + step * ((decibel - self.floor_db) / step).round().clamp(0, 255)

    def wave_of(self, decibel: Tensor) -> Tensor:
        samples, full_scale = HOP * decibel.shape[-1], self.window.sum() / 2
        decibel = F.pad(decibel, (0, 1), mode="replicate")
        mel = (10 ** (decibel / 20) - 10 ** (self.floor_db / 20)).clamp(min=0) ** self.power
        generator = torch.Generator().manual_seed(0)
        spectrum = self.stft(torch.randn(samples, generator=generator)).expand(len(mel), -1, -1)
        s, phase, last = spectrum.abs() / full_scale, spectrum.sgn(), 0
        if self.start != "noise":
            s = torch.full_like(s, s.mean().item())
            angle = 2 * torch.pi * torch.rand(s.shape, generator=generator)
            phase = torch.polar(torch.ones_like(s), angle * (self.start == "random"))
        target = self.mel.T @ mel
        for i in range(self.iterations):
            for _ in range(3 if self.together else 0 if i else 30):
                q = s**self.power
                s = (q * target / (self.mel.T @ (self.mel @ q) + 1e-9)) ** (1 / self.power)
            spectrum = full_scale * s * phase
            wave = torch.istft(spectrum, self.n_fft, HOP, window=self.window, length=samples)
            rebuilt = self.stft(wave)
            s = rebuilt.abs() / full_scale if self.together else s
            phase = (rebuilt - self.momentum / (1 + self.momentum) * last).sgn()
            last = rebuilt
        return wave


class Torchaudio(Variant):
    """Its InverseMelScale (least squares) and GriffinLim (random phases), 32 rounds."""

    def wave_of(self, decibel: Tensor) -> Tensor:
        padded = F.pad(decibel, (0, 1), mode="replicate")
        mel = 10 ** (padded / 20) - 10 ** (self.floor_db / 20)
        bins, sizes = self.n_fft // 2 + 1, {"n_fft": self.n_fft, "hop_length": HOP, "power": 1}
        inverse = T.InverseMelScale(bins, self.channels, SAMPLE_RATE, self.fmin, self.fmax)
        torch.manual_seed(0)
        griffin_lim = T.GriffinLim(n_iter=32, **sizes, length=HOP * decibel.shape[-1])
        return griffin_lim(inverse(mel) * (self.window.sum() / 2))


VARIANTS = {
    "torchaudio's InverseMelScale and GriffinLim": Torchaudio(),
    "magnitude kept, start: no phases": Variant(start="zero", together=False, iterations=32),
    "magnitude kept, start: random phases": Variant(start="random", together=False, iterations=32),
    "magnitude kept, start: noise": Variant(together=False, iterations=32),
    "magnitude anew, start: no phases": Variant(start="zero"),
    "magnitude anew, start: random phases": Variant(start="random"),
    "**magnitude anew, start: noise, 16 rounds: `MelCodec`**": Variant(),
    "4 rounds": Variant(iterations=4),
    "8 rounds": Variant(iterations=8),
    "32 rounds": Variant(iterations=32),
    "64 rounds": Variant(iterations=64),
    "no momentum": Variant(momentum=0.0),
    "n_fft 512": Variant(n_fft=512),
    "n_fft 2048": Variant(n_fft=2048),
    "floor −60 dB": Variant(floor_db=-60.0),
    "floor −100 dB": Variant(floor_db=-100.0),
    "bands of power, not of magnitude": Variant(power=2),
}


def hear(waves: Tensor, tagger: evaluate.Cnn14) -> evaluate.Features:
    """As evaluate.py hears a file."""
    waves = waves - waves.mean(1, keepdim=True)
    sounds = {f"{i:04d}": lambda wave=wave: wave for i, wave in enumerate(waves)}
    return evaluate.hear(sounds, tagger)


def varies(codec: Variant) -> float:
    """The column "noise": std over mean of the magnitudes of a frame's neighbouring bins."""
    noise = 0.1 * torch.randn(1, CLIP_SAMPLES, generator=torch.Generator().manual_seed(1))
    decoded = codec.wave_of(codec.mel_of(noise))
    # 1024 samples whatever the codec's n_fft; not the ends, not the lowest bands, narrow as bins
    spectrum = torch.stft(decoded, 1024, HOP, window=torch.hann_window(1024), return_complex=True)
    magnitude = spectrum[0, 150:, 20:-20].abs()
    return (magnitude.std(0) / magnitude.mean(0)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=128, help="scenes [128]")
    args = parser.parse_args()
    if args.clips < 10:  # inception_score's chunks
        parser.error("--clips is 10 or more")
    torch.set_num_threads(1)
    recordings = Recordings(HERE / "recordings.csv", "test")
    scenes = draw_scenes(recordings, "test", args.clips, judge.SEED)
    waves = torch.stack([compose_scene(scene, recordings) for scene in scenes])
    tagger = evaluate.Cnn14.load(evaluate.CLASSIFIER)
    width, reference = tagger.widths[-1], hear(waves, tagger)
    print("| | s a clip | off, dB | noise | FD | KL (95 %) |\n| --- |" + " ---: |" * 5)
    for name, codec in VARIANTS.items():
        decoded, off, seconds = [], [], 0.0
        for batch in tqdm(waves.split(BATCH), desc=name, leave=False):
            before, started = codec.mel_of(batch), time.perf_counter()
            decoded.append(codec.wave_of(before))
            seconds += time.perf_counter() - started
            error = (codec.mel_of(decoded[-1]) - before).abs()
            off += [e[b > -60].mean().item() for e, b in zip(error, before, strict=True)]
        row = evaluate.measure(hear(torch.cat(decoded), tagger), reference, width, True)
        low, high = row["KL_softmax_95"]
        print(f"| {name} | {seconds / len(waves):.2f} | {np.mean(off):.2f} | "
              f"{varies(codec):.2f} | {row['FD']:.0f} | "
              f"{row['KL_softmax']:.2f} ({low:.2f} to {high:.2f}) |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
