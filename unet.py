"""ε_θ(x_t, t, text): the Stable Diffusion v1.4 U-Net, with the 128 channels of EnCodec's latents.

Papers: section 4 "U-Net ε_θ Design" (the Wide Channel U-Net), P2 appendix C (cross-attention).

    x_t   noisy latent [B, 128, 24, 21]: 504 EnCodec frames as a 24 × 21 image
    t     timestep, 0 … 999
    text  states of a frozen text encoder [B, L, 1024] (T5-large, L = 50)

    level    size    width   each residual block (2 down, 3 up) followed by
      0     24×21     320    a spatial transformer
      1     12×11     640    a spatial transformer
      2      6×6     1280    a spatial transformer
      3      3×3     1280    nothing; the mid block (residual, transformer, residual) is here too

    residual block        h + conv(silu(norm(conv(silu(norm(h))) + W·emb(t))))
    spatial transformer   h + W·block(W·norm(h)); block: self-attention, cross-attention, GEGLU
    cross-attention       softmax(QKᵀ/√d)·V,  Q = W_Q·h,  K = W_K·text,  V = W_V·text   (P2 eq. 1)

Parameter names and folders are those of diffusers' `UNet2DConditionModel`: weights go either way.
Where we depart from Stable Diffusion: 128 channels in and out, a Linear(1024 → 768) on the text
(diffusers calls it `encoder_hid_proj`), and an optional mask on the text.

    python -c "from unet import *; print(sum(p.numel() for p in UNet().parameters()))"
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """The defaults are the papers' network: 861,022,528 parameters."""

    in_channels: int = 128
    out_channels: int = 128
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # a spatial transformer at this level?
    layers_per_block: int = 2
    num_heads: int = 8  # Stable Diffusion's config calls it attention_head_dim
    cross_attention_dim: int = 768
    text_dim: int | None = 1024  # width of the text states; None: no projection, already 768

    def __post_init__(self):
        widths, heads = self.block_out_channels, self.num_heads
        if len(self.attention) != len(widths) or any(n % 32 or n % heads for n in widths):
            raise ValueError(
                f"block_out_channels {widths}, attention {self.attention}: expected one value for "
                f"each level, and multiples of 32 and of num_heads, {heads}"
            )
        if not 1 <= self.layers_per_block <= 100:
            raise ValueError(f"layers_per_block {self.layers_per_block}: expected 1 to 100")


class TimeEmbedding(nn.Module):
    """t → [cos(t·ω), sin(t·ω)] → two linear layers; ω from 1 down to 1/10,000."""

    def __init__(self, channels: int, time_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        half = self.linear_1.in_features // 2
        omega = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None].float() * omega  # [B, channels / 2]
        emb = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(emb)))  # [B, time_dim]


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution, padded by 1. On a CPU, that of a few pixels is done as a matrix product:
    oneDNN lays the weights out anew at each call, which takes longer than the arithmetic."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        step, (height, width) = self.stride[0], x.shape[2:]
        pixels = len(x) * -(-height // step) * -(-width // step)  # of the output
        if x.device.type != "cpu" or 2 * pixels > self.out_channels:
            return super().forward(x)
        x_padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        patches = x_padded.unfold(1, 3, step).unfold(2, 3, step)  # [B, H', W', in_channels, 3, 3]
        patches = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)  # [B, H', W', 9 · in_channels]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [out_channels, 9 · in_channels]
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """On a GPU in the dtype of what comes, where autocast would take float32, and bf16 again for
    the convolution that follows. (Its kernel adds up in float32 anyway.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            weights = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, *weights, self.eps)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, width: int, time_dim: int):
        super().__init__()
        self.norm1 = GroupNorm(32, in_channels)
        self.conv1 = Conv3x3(in_channels, width)
        self.time_emb_proj = nn.Linear(time_dim, width)
        self.norm2 = GroupNorm(32, width)
        self.conv2 = Conv3x3(width, width)
        same = in_channels == width
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """P2 eq. 1: softmax(QKᵀ/√d)·V for q [B, heads, N, d], k and v [B, heads, L, d], mask
    [B, 1, 1, L] or none. In bf16 the scores are rounded before the softmax."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # [B, heads, N, L]
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=3) @ v


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.to_q(x), self.to_k(context), self.to_v(context)
        # [B, N, width] -> [B, heads, N, d]
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in qkv)
        # On CPUs, the gradient of PyTorch's kernel takes several times as long as ours.
        attend = F.scaled_dot_product_attention if x.is_cuda else attention
        z = attend(q, k, v, mask)
        return self.to_out[0](z.transpose(1, 2).flatten(2))  # [B, N, width]


class FeedForward(nn.Module):
    """GEGLU: one half of the inner values, times gelu of the other half."""

    def __init__(self, width: int):
        super().__init__()
        inner = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})
        # The Identity is Stable Diffusion's dropout of 0: it keeps the numbering of the names.
        self.net = nn.ModuleList([inner, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0]["proj"](x).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, text_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, num_heads, context_dim=width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, num_heads, context_dim=text_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), text, text_mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, num_heads: int, text_dim: int):
        super().__init__()
        self.norm = GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, num_heads, text_dim)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2)  # [B, width, H·W]
        h = h.transpose(1, 2)  # [B, H·W, width]: a pixel is a token
        h = self.transformer_blocks[0](h, text, text_mask)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # [B, width, H, W]
        return x + self.proj_out(h)


def resampler(width: int, stride: int) -> nn.ModuleList:
    """The convolution that halves (stride 2, odd sizes round up) or follows an upsampling."""
    return nn.ModuleList([nn.ModuleDict({"conv": Conv3x3(width, width, stride)})])


class Level(nn.Module):
    """One resolution on the way down or up, or the mid block: a residual block for each entry of
    `in_channels`, a spatial transformer after each of the first `num_attentions` of them."""

    def __init__(self, in_channels: list[int], width: int, num_attentions: int, c: UNetConfig):
        super().__init__()
        time_dim, sizes = 4 * c.block_out_channels[0], (width, c.num_heads, c.cross_attention_dim)
        self.resnets = nn.ModuleList(ResnetBlock(n, width, time_dim) for n in in_channels)
        self.attentions = nn.ModuleList(SpatialTransformer(*sizes) for _ in range(num_attentions))

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Tensor, text_mask: Tensor | None):
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, text, text_mask) if i < len(self.attentions) else x


class UNet(nn.Module):
    """ε_θ (or v_θ, or x_0: what it predicts is for the model folder to say)."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = c = config
        widths, depth, last = c.block_out_channels, c.layers_per_block, len(c.attention) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        if c.text_dim is not None:
            self.encoder_hid_proj = nn.Linear(c.text_dim, c.cross_attention_dim)

        # conv_in, every residual block and every halving leave a skip for the way up.
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, width in enumerate(widths):
            level = Level([skips[-1]] + [width] * (depth - 1), width, depth * c.attention[i], c)
            if i < last:
                level.downsamplers = resampler(width, stride=2)
            self.down_blocks.append(level)
            skips += [width] * (depth + (i < last))

        self.mid_block = Level([width, width], width, 1, c)

        self.up_blocks, channels = nn.ModuleList(), width
        for i, width in reversed(list(enumerate(widths))):
            inputs = [n + skips.pop() for n in [channels] + [width] * depth]
            level = Level(inputs, width, (depth + 1) * c.attention[i], c)
            if i > 0:
                level.upsamplers = resampler(width, stride=1)
            self.up_blocks.append(level)
            channels = width

        self.conv_norm_out = GroupNorm(32, widths[0])
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def forward(
        self, x_t: Tensor, t, text: Tensor, text_mask=None, gradient_checkpointing=False, more=None
    ) -> Tensor:
        """Predict the noise in `x_t`.

        x_t [B, in_channels, H, W] with H, W ≥ 8, t [B] or one number, text [B, L, text_dim],
        text_mask [B, L] (True or 1: attend) or None: attend to all. `gradient_checkpointing` keeps
        each layer's input only and computes the rest again in the backward pass. `more`: tensors
        to add to each skip, and last to the middle (a ControlNet's).
        """
        layer = self.layers(x_t, t, text, text_mask, gradient_checkpointing)
        h, skips = self.way_down(self.conv_in(x_t.to(self.conv_in.weight.dtype)), layer)
        if more is not None:
            *skips, h = (x + y for x, y in zip([*skips, h], more, strict=True))

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = layer(level, i, torch.cat([h, skips.pop()], dim=1))
            if hasattr(level, "upsamplers"):
                # To the size of the skip it meets next: 6×6 → 12×11, not 12×12.
                h = F.interpolate(h, size=skips[-1].shape[2:], mode="nearest")
                h = level.upsamplers[0]["conv"](h)

        return self.conv_out(F.silu(self.conv_norm_out(h)))  # [B, 128, 24, 21]

    def layers(self, x_t: Tensor, t, text: Tensor, text_mask, checkpointing: bool) -> Callable:
        """(level, i, h) → the level's layer i of h; t's embedding and the text are in it."""
        emb = self.time_embedding(torch.as_tensor(t, device=x_t.device).expand(len(x_t)))
        text = text.to(emb.dtype)
        if self.config.text_dim is not None:
            text = self.encoder_hid_proj(text)  # [B, L, 768]
        if text_mask is not None:
            text_mask = text_mask.bool()[:, None, None, :]  # [B, 1 (heads), 1 (pixels), L]

        def layer(level: Level, i: int, h: Tensor) -> Tensor:
            if checkpointing:
                how = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is random
                return checkpoint(level.layer, i, h, emb, text, text_mask, **how)
            return level.layer(i, h, emb, text, text_mask)

        return layer

    def way_down(self, h: Tensor, layer: Callable) -> tuple[Tensor, list[Tensor]]:
        """From conv_in's output [B, 320, 24, 21] to the mid block's [B, 1280, 3, 3], and skips."""
        skips = [h]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = layer(level, i, h)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0]["conv"](h)
                skips.append(h)
        for i in range(2):
            h = layer(self.mid_block, i, h)
        return h, skips

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, as diffusers does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(to_diffusers_config(self.config), indent=2)
        (folder / "config.json").write_text(config + "\n")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        try:
            save_file(state, folder / f"{WEIGHTS}.safetensors", {"format": "pt"})
        except SafetensorError as e:  # the disk is full
            raise OSError(f"{folder}: the weights were not written ({e})") from e

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, **overrides) -> "UNet":
        """Load a U-Net folder of ours or of diffusers, or a hub id such as
        `CompVis/stable-diffusion-v1-4`; `overrides` replace fields of its UNetConfig.

        ValueError if a folder's weights don't fit its own config to the letter. Layers that an
        override changed or added keep their random initialisation, and are printed.
        """
        folder = find_unet_folder(folder_or_hub_id)
        config, state = load_config(folder), load_weights(folder)
        try:
            with torch.device("meta"):
                cls(config).load_state_dict(state, assign=True)
        except (RuntimeError, TypeError) as e:
            message = shorten(str(e), 400)  # of all that is missing or has another shape
            raise ValueError(f"{folder}: the weights don't fit the config: {message}") from e

        model = cls(replace(config, **overrides))
        own = model.state_dict()
        changed = {k for k in own if k not in state or own[k].shape != state[k].shape}
        fresh = {name.rpartition(".")[0] for name in changed}  # a layer is renewed as a whole
        kept = {k: state[k] for k in own if k.rpartition(".")[0] not in fresh}
        model.load_state_dict(kept, strict=False)  # what is missing is exactly what is fresh
        if fresh:
            print(f"{folder}: freshly initialised: {', '.join(sorted(fresh))}")
        return model


# ---- folders, which are diffusers' ---------------------------------------------------------------

WEIGHTS = "diffusion_pytorch_model"
# What Stable Diffusion v1.4 has, and no parameter's shape would tell.
FIXED = {"act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "freq_shift": 0}
FIXED |= {"flip_sin_to_cos": True, "mid_block_scale_factor": 1, "norm_num_groups": 32}
FIXED |= {"mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5}
FIXED |= {"resnet_time_scale_shift": "default", "use_linear_projection": False}


def to_diffusers_config(config: UNetConfig) -> dict:
    """The config.json that makes diffusers' `UNet2DConditionModel` this network."""
    fields = asdict(config) | {"block_out_channels": list(config.block_out_channels)}
    text_dim, heads, attention = (fields.pop(k) for k in ("text_dim", "num_heads", "attention"))
    fields |= {"_class_name": "UNet2DConditionModel", "attention_head_dim": heads}
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]]
    fields |= {"down_block_types": down, "up_block_types": up, "sample_size": [24, 21]}
    projection = None if text_dim is None else "text_proj"
    return fields | {"encoder_hid_dim": text_dim, "encoder_hid_dim_type": projection} | FIXED


def load_config(folder_or_hub_id: str | Path) -> UNetConfig:
    """The architecture of a U-Net folder or hub id. ValueError if it isn't Stable Diffusion v1's:
    all that its config.json says, `to_diffusers_config` has to say as well."""
    path = find_unet_folder(folder_or_hub_id) / "config.json"
    try:
        saved = json.loads(path.read_bytes())
        sizes = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim")
        config = UNetConfig(
            **{name: saved[name] for name in sizes},
            block_out_channels=tuple(saved["block_out_channels"]),
            attention=tuple("CrossAttn" in kind for kind in saved["down_block_types"]),
            num_heads=saved["attention_head_dim"],
            text_dim=saved.get("encoder_hid_dim"),
        )
        for name, value in to_diffusers_config(config).items():
            if name not in ("_class_name", "sample_size") and saved.get(name, value) != value:
                raise ValueError(f"{name} is {saved[name]!r}, expected {value!r}")
        return config
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as e:
        raise ValueError(f"{path}: not the config of a Stable Diffusion v1 U-Net ({e!r})") from e


def find_unet_folder(folder_or_hub_id: str | Path) -> Path:
    """A local U-Net folder, the `unet` inside a local model folder, or a download from the hub."""
    path = Path(folder_or_hub_id)
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            return folder
    if path.exists() or str(path).count("/") != 1:
        raise FileNotFoundError(f"{path}: no U-Net there (config.json and {WEIGHTS}.safetensors)")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    files = ["unet/config.json", f"unet/{WEIGHTS}.safetensors"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=files), "unet")
    except Exception as e:  # the hub's many errors mean one thing to the user
        hub = f"to be had from the Hugging Face hub ({type(e).__name__})"
        raise FileNotFoundError(f"{path}: neither a local folder nor {hub}") from e


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a U-Net folder by name, from its .safetensors or else its .bin file."""
    path = folder / f"{WEIGHTS}.safetensors"
    try:
        if path.is_file():
            return load_file(path)
        return torch.load(path.with_suffix(".bin"), map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such file, nor a .bin in its place") from e
    except Exception as e:  # damaged files raise many
        raise ValueError(f"{path}: the weights can't be read ({shorten(str(e), 200)})") from e
