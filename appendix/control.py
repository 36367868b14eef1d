"""Sounds that follow the loudness of a recording: a ControlNet (Zhang et al., 2023) for any model.

P2, appendix D, says that a model like the papers' can be adapted in the ways that were found for
pictures. A ControlNet is a copy of the U-Net's way down that sees one more picture, here the
loudness ℓ of each frame, and adds what it makes of it to the skips of the U-Net, which itself stays
as it is:

    h_0    = conv_in(x_t) + Z(silu(W·ℓ))         where the copy begins
    skip_i ← skip_i + Z_i(copy_i(x_t, t, y, ℓ))  and the output of the mid block likewise

Z are convolutions that are 0 at first: training begins with the model's own sounds. It minimises
the loss that the model was trained with; only the copy and Z learn.

    python -m appendix.control                                  train, into runs/controlnet
    python -m appendix.edit "rain" --control RECORDING.wav --controlnet runs/controlnet/model

The first has train.py's options, loop and checkpoints (the same command goes on). A ControlNet for
any sound wants as much data as the model had. Folders are those of diffusers' `ControlNetModel`,
which leaves the projection of the text to its caller.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import latents
import sample
import train
from appendix import make_parser
from unet import UNet, UNetConfig

# Half of the captions are dropped, so that it learns to go by the signal (their section 3.3).
LOOP = "--out runs/controlnet --steps 5000 --warmup-steps 250 --batch-size 8 --lr 1e-4 "
LOOP += "--caption-dropout 0.5"
# What its config.json says, beside what the U-Net's does.
DIFFUSERS = {"_class_name": "ControlNetModel", "conditioning_channels": 1}
DIFFUSERS |= {"conditioning_embedding_out_channels": [16]}


@torch.no_grad()
def loudness(codec: latents.EncodecCodec | latents.MelCodec, stored: Tensor) -> Tensor:
    """The loudness of each frame of stored clips, as a picture [B, 1, 24, 21]: 0 is −40 dB, 1 is
    −20 dB. Computed from what is stored, so any data set has it."""
    if codec.name == "mel":  # the level of each band: no need to make a wave of it
        power = (10 ** (codec.decibel(stored) / 10)).sum(1)  # [B, 504]
    else:
        wave = codec.decode(codec.dequantize(stored))
        power = wave.unflatten(1, (latents.FRAMES, latents.HOP)).square().mean(2) + 1e-8
    return codec.to_grid((10 * torch.log10(power) + 40) / 20)[:, None]


# ---- the network ---------------------------------------------------------------------------------


def zero_conv(in_channels: int, out_channels: int, size: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class ControlNet(UNet):
    """A U-Net's way down with a picture, and a Z for each skip and for the middle."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        del self.up_blocks, self.conv_norm_out, self.conv_out
        widths = config.block_out_channels
        skips = [widths[0]]
        for width, level in zip(widths, self.down_blocks, strict=True):
            skips += [width] * (len(level.resnets) + hasattr(level, "downsamplers"))
        convs = {"conv_in": nn.Conv2d(1, 16, 3, padding=1), "conv_out": zero_conv(16, widths[0], 3)}
        self.controlnet_cond_embedding = nn.ModuleDict(convs)
        self.controlnet_down_blocks = nn.ModuleList([zero_conv(width, width) for width in skips])
        self.controlnet_mid_block = zero_conv(widths[-1], widths[-1])

    @classmethod
    def copy_of(cls, unet: UNet) -> "ControlNet":
        net = cls(unet.config)
        net.load_state_dict(unet.state_dict(), strict=False)
        return net

    def forward(
        self, picture: Tensor, x_t, t, text, text_mask=None, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        """What is to be added to each skip, and last to the middle. picture [B, 1, H, W]; the rest
        as for the U-Net."""
        embedding, dtype = self.controlnet_cond_embedding, self.conv_in.weight.dtype
        x_t, picture = x_t.to(dtype), picture.to(dtype)
        h = self.conv_in(x_t) + embedding["conv_out"](F.silu(embedding["conv_in"](picture)))
        layer = self.layers(x_t, t, text, text_mask, gradient_checkpointing)
        h, skips = self.way_down(h, layer)
        more = [conv(s) for conv, s in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*more, self.controlnet_mid_block(h)]

    def save_pretrained(self, folder: str | Path) -> None:
        super().save_pretrained(folder)
        path = Path(folder, "config.json")
        path.write_text(json.dumps(latents.read_json(path) | DIFFUSERS, indent=2) + "\n")


class Controlled(nn.Module):
    """A U-Net and the ControlNet that makes it follow `picture` [1 or B, 1, 24, 21]; called as the
    U-Net is. `shift`: what is done to x_t before that, picture and t -> picture."""

    def __init__(self, unet: UNet, net: nn.Module, picture: Tensor, shift: Callable | None = None):
        super().__init__()
        self.unet, self.net, self.picture = unet, net, picture
        self.shift = shift or (lambda picture, t: picture)

    def forward(
        self, x_t: Tensor, t, text: Tensor, text_mask=None, gradient_checkpointing: bool = False
    ) -> Tensor:
        unet, rest = self.unet, (x_t, t, text, text_mask, gradient_checkpointing)
        picture = self.shift(self.picture, t).expand(len(x_t), -1, -1, -1)
        return unet(*rest, more=self.net(picture, *rest))


# ---- training ------------------------------------------------------------------------------------


class Control(train.Denoiser):
    """Trains a ControlNet beside a U-Net that stays as it is."""

    def make_network(self) -> ControlNet:
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.unet = super().make_network().requires_grad_(False)
        self.unet.to(self.device, memory_format=layout)
        return ControlNet.copy_of(self.unet)

    def loss(self, network: nn.Module, captions, stored, t, noise) -> Tensor:
        picture = loudness(self.codec, stored.to(self.device))  # [B, 1, 24, 21]
        return super().loss(Controlled(self.unet, network, picture), captions, stored, t, noise)

    def write(self, network: ControlNet, folder: Path) -> None:
        network.save_pretrained(folder)


def parse_args(arguments: list[str] | None = None) -> train.Config:
    parser = make_parser(__doc__, epilog=f"and train.py's options: [{LOOP}]")
    parser.add_argument("--model", default=sample.TINY, help="the one to control [tiny/model]")
    args, rest = parser.parse_known_args(arguments)
    train.read_settings(args.model)  # an error now if it is none
    return train.parse_args([f"--init={args.model}", *LOOP.split(), *rest])


# ---- sampling ------------------------------------------------------------------------------------


def add_control(model: sample.Model, folder: str | Path, wave: Tensor) -> sample.Model:
    """The model, following the loudness of `wave`, 16 kHz [samples], by a ControlNet's folder.
    ValueError for another U-Net's."""
    net, shifted = ControlNet.from_pretrained(folder), isinstance(model.unet, sample.ShiftedRows)
    unet = model.unet.unet if shifted else model.unet
    if net.config != unet.config:
        raise ValueError(f"{folder}: the ControlNet of another U-Net")
    net.eval().to(model.device, memory_format=torch.channels_last)
    stored = model.codec.encode(latents.to_clip(wave).to(model.device))
    picture = loudness(model.codec, stored)  # [1, 1, 24, 21]
    if not shifted:
        return replace(model, unet=Controlled(unet, net, picture))
    rows = sample.ShiftedRows(unet, model.codec)
    rows.unet = Controlled(unet, net, picture, rows.shift)
    return replace(model, unet=rows.to(model.device))


def main(arguments: list[str] | None = None) -> None:
    with latents.one_line_errors("the same command goes on from the last checkpoint"):
        print(train.train(parse_args(arguments), Control))


if __name__ == "__main__":
    main()
