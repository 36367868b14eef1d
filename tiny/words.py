"""Teaches the tiny model more words for what it knows, with the model itself as the teacher.

A model hears hardly any difference between captions: of its loss on a clip, text explains some
thousandths, noise the rest, and so new words for old sounds are learned slowly from clips. Its own
answer to words that it knows has no noise in it. So a copy θ of the model φ learns to answer any
caption y of a scene as the model answers the scene's plain one, y_0 ("dog barking"):

    loss = w(t)·‖f_θ(x_t, t, τ(y)) − f_φ(x_t, t, τ(y_0))‖²       w: train.py's weights of t

with x_t as in training, for t in 700 … 999, where the text decides what the sound will be. It is
distillation (Hinton et al. 2015); only the condition differs. Not in the papers. The repository's
model is what came of it; that of commit 4d2e716 is the one that it began with.

    python -m tiny.words --init tiny/model            runs/words/model; train.py's options, its loop
"""

import copy

import torch
from torch import Tensor, nn

import diffusion
import train
from appendix import make_parser
from latents import one_line_errors

LOOP = "--out runs/words --steps 2200 --batch-size 32 --lr 5e-4 --beta2 0.99 --warmup-steps 20 "
LOOP += "--weight-decay 0 --checkpoint-every 100 --validate-every 550"
LOW = 700  # no lower t


class Words(train.Denoiser):
    """Trains what answers to any caption as the model that it began as does to the plain one."""

    def make_network(self) -> nn.Module:
        network = super().make_network()
        self.teacher = copy.deepcopy(network).requires_grad_(False).to(self.device)
        for name, p in network.named_parameters():
            p.requires_grad_("attn2" in name)  # cross-attention; in the rest it would only wander
        return network

    def captions_of(self, record: dict) -> list[tuple[str, str]]:
        plain, *others = record["captions"]
        return [(plain, caption) for caption in (plain, *others)]

    def loss(self, network: nn.Module, captions, stored, t, noise) -> Tensor:
        pairs = [pair or ("", "") for pair in captions]  # "": a dropped caption
        t, noise = LOW + t.to(self.device) * (1000 - LOW) // 1000, noise.to(self.device)
        x_t = diffusion.add_noise(self.latent(stored), noise, t, self.alphas_cumprod)
        plain, other = (self.encoder([*texts]) for texts in zip(*pairs, strict=True))
        with torch.no_grad():
            target = self.predict(self.teacher, x_t, t, *plain)
        return self.error(self.predict(network, x_t, t, *other), target, t)


def parse_args(arguments: list[str] | None = None) -> train.Config:
    parser = make_parser(__doc__, epilog=f"and train.py's options: [{LOOP}]")
    parser.add_argument("--init", default=str(train.TINY / "model"), help="[tiny/model]")
    args, rest = parser.parse_known_args(arguments)
    train.read_settings(args.init)  # an error now if it is none
    return train.parse_args([f"--init={args.init}", *LOOP.split(), *rest])


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors("the same command goes on from the last checkpoint"):
        print(train.train(parse_args(arguments), Words))


if __name__ == "__main__":
    main()
