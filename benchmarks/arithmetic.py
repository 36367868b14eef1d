"""What the papers' training run would take on GPUs: arithmetic.

Nothing here is measured on a GPU, unless you give it what was.

    operations   the matrix products and convolutions of one clip's forward pass, counted; a
                 backward pass is two forward passes, gradient checkpointing one more
    step         operations / (peak × utilisation) + what of the gradients' exchange isn't hidden
    exchange     4 bytes a parameter around a ring: 2·(n − 1)/n times through its slowest link,
                 beside the backward pass (half of the step), as DistributedDataParallel does it;
                 hidden down to so many clips a GPU, and below that it is what takes the time
    MFU          the operations without checkpointing's, over peak × time of a step
    memory       what a forward pass keeps for the backward pass, counted on tensors without content
                 and with attention by a fused kernel: all in bf16, or all in float32 (autocast
                 lies between). What a layer needs for a moment comes on top

    python -m benchmarks.arithmetic                       utilisation 40 %, batch 192 a GPU
    python -m benchmarks.arithmetic --utilisation 0.3 --batch-size 48
    python -m benchmarks.arithmetic --measured 280        clips/s that one GPU was seen to train on
                                                          (benchmarks.gpu), in place of utilisation
"""

import argparse
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latents import GRID
from unet import UNet, UNetConfig

STEPS, TOKENS = 60_000, 50
MACHINES = {  # GPUs, dense bf16 FLOP/s of one, bytes/s of the slowest link in one direction
    "8 × A100 (NVLink)": (8, 312e12, 300e9),
    "8 × H100 (NVLink)": (8, 989e12, 450e9),
    "4 nodes of 8 × A100 (8 × 200 Gbit/s a node)": (32, 312e12, 200e9),
    "4 nodes of 8 × H100 (8 × 400 Gbit/s a node)": (32, 989e12, 400e9),
    "4 nodes of 8 × A100 (100 Gbit/s a node)": (32, 312e12, 12.5e9),
}


def forward_flops(unet: UNet) -> int:
    """Of one clip, 24 × 21 and TOKENS tokens of text; 2 for a multiplication and addition."""
    x = torch.empty(1, unet.config.in_channels, *GRID, device="meta")
    width = unet.config.text_dim or unet.config.cross_attention_dim
    text = torch.empty(1, TOKENS, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, 1, text)
    return counter.get_total_flops()


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel would: no matrix of weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def kept_bytes(unet: UNet, gradient_checkpointing: bool) -> int:
    """What one clip's forward pass keeps for the backward pass, weights not counted."""

    def count(clips: int) -> int:
        options = {"device": "meta", "dtype": next(unet.parameters()).dtype}
        x = torch.empty(clips, unet.config.in_channels, *GRID, **options)
        text = torch.empty(clips, TOKENS, unet.config.text_dim, **options)
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, mock.patch("unet.attention", FusedAttention.apply):
            _ = unet(x, 1, text, gradient_checkpointing=gradient_checkpointing)
        return sum(kept.values())

    return count(2) - count(1)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--batch-size", type=int, default=192, help="clips a GPU [192]")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of the peak [0.4]")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                        default=True, help="[on]")  # fmt: skip
    parser.add_argument("--measured", type=float, help="clips/s of one GPU, measured")
    args = parser.parse_args()
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    parameters = sum(p.numel() for p in unet.parameters())
    forward = forward_flops(unet)
    passes = 4 if args.gradient_checkpointing else 3
    print(f"{parameters:,} parameters, {forward / 1e9:.1f} GFLOP a clip and forward pass, "
          f"{passes} passes a clip; weights, gradients, two moments and EMA: "
          f"{5 * 4 * parameters / 2**30:.1f} GiB a GPU")  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        kept = [kept_bytes(unet.to(dtype), x) * args.batch_size / 2**30 for x in (False, True)]
        print(f"kept for the backward pass of {args.batch_size} clips in {dtype}: {kept[0]:.1f} "
              f"GiB, with gradient checkpointing {kept[1]:.1f}")  # fmt: skip
    print(f"\n| machine | batch | step | exchange | MFU | clips a second | {STEPS:,} steps | "
          "hidden down to |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (gpus, peak, link) in MACHINES.items():
        compute = passes * forward * args.batch_size / (peak * args.utilisation)
        if args.measured:
            compute = args.batch_size / args.measured
        exchange = 4 * parameters * 2 * (gpus - 1) / gpus / link
        step = compute + max(0.0, exchange - compute / 2)
        mfu = 3 * forward * args.batch_size / (peak * step)
        clips = gpus * args.batch_size
        hidden = 2 * exchange / compute * args.batch_size  # clips a GPU, where it is half a step
        hours = STEPS * step / 3600
        print(f"| {name} | {clips:,} | {step:.2f} s | {exchange:.2f} s | {mfu:.0%} | "
              f"{clips / step:,.0f} | {hours:.1f} h | {hidden:.0f} clips a GPU |")  # fmt: skip


if __name__ == "__main__":
    main()
