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

    python -c "from unet import *; print(sum(p.numel() for p in UNet(UNetConfig()).parameters()))"
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHTS = "diffusion_pytorch_model"
# What Stable Diffusion v1.4 has and no parameter's shape would tell us: a folder that differs in
# one of these is another network, and is refused.
FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "default",
    "use_linear_projection": False,
}


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
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} levels, block_out_channels has "
                f"{len(self.block_out_channels)}: give one value for each level"
            )
        sizes = [self.in_channels, self.out_channels, self.layers_per_block, self.num_heads]
        sizes += [*self.block_out_channels, self.cross_attention_dim]
        sizes += [] if self.text_dim is None else [self.text_dim]
        if not all(type(n) is int and 0 < n < 2**20 for n in sizes) or not self.attention:
            raise ValueError(f"sizes must be whole numbers of 1 to a million, not {sizes}")
        if self.layers_per_block > 99:
            raise ValueError(f"{self.layers_per_block} layers_per_block: expected 1 to 99")
        for width in self.block_out_channels:
            if width % 32 or width % self.num_heads:
                raise ValueError(
                    f"a level of {width} channels can't be split into 32 groups and "
                    f"{self.num_heads} heads: choose a multiple of both"
                )


class TimeEmbedding(nn.Module):
    """t → [cos(t·ω), sin(t·ω)] → two linear layers; ω from 1 down to 1/10,000."""

    def __init__(self, channels: int, time_dim: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
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
        step = self.stride[0]
        pixels = len(x) * math.prod(1 + (n - 1) // step for n in x.shape[2:])  # of the output
        if x.device.type != "cpu" or 2 * pixels > self.out_channels:
            return super().forward(x)
        x_padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        patches = x_padded.unfold(1, 3, step).unfold(2, 3, step)  # [B, H', W', in_channels, 3, 3]
        patches = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)  # [B, H', W', 9 · in_channels]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [out_channels, 9 · in_channels]
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, time_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(32, out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


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
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, d]

        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        # On CPUs, the gradient of PyTorch's kernel takes several times as long as ours.
        attend = F.scaled_dot_product_attention if x.is_cuda else attention
        z = attend(q, k, v, mask)
        return self.to_out[0](z.transpose(1, 2).flatten(2))  # [B, N, width]


class GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # The Identity is Stable Diffusion's dropout of 0: it keeps the numbering of the names.
        self.net = nn.ModuleList([GEGLU(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


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
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, num_heads, text_dim)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        size = x.shape[2:]
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # [B, H·W, width]: a pixel is a token
        h = self.transformer_blocks[0](h, text, text_mask)
        h = h.transpose(1, 2).unflatten(2, size)  # [B, width, H, W]
        return x + self.proj_out(h)


class Resample(nn.Module):
    """The convolution that halves (stride 2, odd sizes round up) or follows an upsampling."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.conv = Conv3x3(width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """One resolution on the way down or up, or the mid block: a residual block for each entry of
    `in_channels`, a spatial transformer after each of the first `num_attentions` of them."""

    def __init__(self, in_channels: list[int], width: int, num_attentions: int, c: UNetConfig):
        super().__init__()
        time_dim = 4 * c.block_out_channels[0]
        self.resnets = nn.ModuleList([ResnetBlock(n, width, time_dim) for n in in_channels])
        if num_attentions:
            self.attentions = nn.ModuleList(
                SpatialTransformer(width, c.num_heads, c.cross_attention_dim)
                for _ in range(num_attentions)
            )

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Tensor, text_mask: Tensor | None):
        x = self.resnets[i](x, emb)
        if hasattr(self, "attentions") and i < len(self.attentions):
            x = self.attentions[i](x, text, text_mask)
        return x


class UNet(nn.Module):
    """ε_θ (or v_θ: what it predicts is for the model folder to say)."""

    more_config = {}  # what else config.json says

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths, depth = config.block_out_channels, config.layers_per_block
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        if config.text_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.text_dim, config.cross_attention_dim)

        # Every residual block and every halving on the way down leaves a skip for the way up.
        self.down_blocks, skips, channels = nn.ModuleList(), [widths[0]], widths[0]
        for i, width in enumerate(widths):
            level = Level(
                [channels] + [width] * (depth - 1), width, depth * config.attention[i], config
            )
            if i < last:
                level.downsamplers = nn.ModuleList([Resample(width, stride=2)])
            self.down_blocks.append(level)
            skips += [width] * (depth + (i < last))
            channels = width

        self.mid_block = Level([channels, channels], channels, 1, config)

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            inputs = []
            for _ in range(depth + 1):
                inputs.append(channels + skips.pop())
                channels = width
            level = Level(inputs, width, (depth + 1) * config.attention[i], config)
            if i > 0:
                level.upsamplers = nn.ModuleList([Resample(width, stride=1)])
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(32, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | int,
        text: Tensor,
        text_mask: Tensor | None = None,
        gradient_checkpointing: bool = False,
        control: list[Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise in `x_t`.

        x_t [B, in_channels, H, W] with H, W ≥ 8 (any size: 24×21 → 12×11 → 6×6 → 3×3), t [B] or one
        number, text [B, L, text_dim], text_mask [B, L] (True or 1: attend) or None: attend to all.
        `gradient_checkpointing` keeps each layer's input only and computes the rest again in the
        backward pass. `control`: what a ControlNet adds. Returns [B, out_channels, H, W].
        """
        h, skips, run = self.way_down(x_t, t, text, text_mask, gradient_checkpointing)
        if control is not None:
            *more, middle = control
            skips, h = [s + m for s, m in zip(skips, more, strict=True)], h + middle

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = run(level, i, torch.cat([h, skips.pop()], dim=1))
            if hasattr(level, "upsamplers"):
                # To the size of the skip it meets next: 6×6 → 12×11, not 12×12.
                h = F.interpolate(h, size=skips[-1].shape[2:], mode="nearest")
                h = level.upsamplers[0](h)

        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def way_down(self, x_t, t, text, text_mask, gradient_checkpointing, picture=None):
        """What the mid block gives, the skips, and how to run a layer on the way up."""
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        emb = self.time_embedding(t)  # [B, 1280]
        if self.config.text_dim is not None:
            text = self.encoder_hid_proj(text)  # [B, L, 768]
        if text_mask is not None:
            text_mask = text_mask.bool()[:, None, None, :]  # [B, 1 (heads), 1 (pixels), L]

        def run(level: Level, i: int, h: Tensor) -> Tensor:
            if gradient_checkpointing:
                return checkpoint(level.layer, i, h, emb, text, text_mask, use_reentrant=False)
            return level.layer(i, h, emb, text, text_mask)

        h = self.conv_in(x_t) if picture is None else self.conv_in(x_t) + picture
        skips = [h]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = run(level, i, h)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                skips.append(h)

        h = run(self.mid_block, 0, h)
        return run(self.mid_block, 1, h), skips, run

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, as diffusers does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(to_diffusers_config(self.config) | self.more_config, indent=2)
        (folder / "config.json").write_text(config + "\n")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        try:
            save_file(state, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        except SafetensorError as e:  # the disk is full
            raise OSError(f"{folder}: the weights were not written ({e})") from e

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, **overrides) -> "UNet":
        """Load a U-Net folder of ours or of diffusers, or a hub id such as
        `CompVis/stable-diffusion-v1-4`; `overrides` replace fields of its UNetConfig.

        The file must fit its own config to the letter (ValueError names what doesn't). Layers that
        an override changed or added keep their random initialisation, and are printed:
        `from_pretrained(sd, in_channels=128, out_channels=128, text_dim=1024)` renews conv_in,
        conv_out and encoder_hid_proj.
        """
        folder = find_unet_folder(folder_or_hub_id)
        saved_config = load_config(folder)
        state = load_weights(folder)
        with torch.device("meta"):
            expected = cls(saved_config).state_dict()
        check_state(state, expected, folder)

        model = cls(replace(saved_config, **overrides))
        own = model.state_dict()
        changed = {k for k in own if k not in state or own[k].shape != state[k].shape}
        fresh = {name.rpartition(".")[0] for name in changed}  # a layer is renewed as a whole
        kept = {k: state[k] for k in own if k.rpartition(".")[0] not in fresh}
        model.load_state_dict(kept, strict=False)  # what is missing is exactly what is fresh
        if fresh:
            print(f"{folder}: freshly initialised: {', '.join(sorted(fresh))}")
        return model


class ControlNet(UNet):
    """A copy of a U-Net's way down that learns to make it follow a picture (Zhang et al., 2023).

    Returns what is to be added to each of the U-Net's skips and to its middle. All of that comes
    out of convolutions that begin as zeros: at first, it changes nothing. Names and folders are
    those of diffusers' `ControlNetModel` (which leaves the text projection to its caller).
    """

    more_config = {
        "_class_name": "ControlNetModel",
        "conditioning_channels": 1,
        "conditioning_embedding_out_channels": [16],
    }

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        del self.up_blocks, self.conv_norm_out, self.conv_out

        def zero(in_channels: int, out_channels: int, size: int = 1) -> nn.Conv2d:
            conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
            return conv

        widths = config.block_out_channels
        skips = [widths[0]]
        for width, level in zip(widths, self.down_blocks, strict=True):
            skips += [width] * (len(level.resnets) + hasattr(level, "downsamplers"))
        convs = {"conv_in": nn.Conv2d(1, 16, 3, padding=1), "conv_out": zero(16, widths[0], 3)}
        self.controlnet_cond_embedding = nn.ModuleDict(convs)
        self.controlnet_down_blocks = nn.ModuleList([zero(width, width) for width in skips])
        self.controlnet_mid_block = zero(widths[-1], widths[-1])

    @classmethod
    def copy_of(cls, unet: UNet) -> "ControlNet":
        controlnet = cls(unet.config)
        controlnet.load_state_dict(unet.state_dict(), strict=False)
        return controlnet

    def forward(
        self, picture: Tensor, x_t, t, text, text_mask=None, gradient_checkpointing=False
    ) -> list[Tensor]:
        """picture [B, 1, H, W]; the rest as for the U-Net."""
        embedding = self.controlnet_cond_embedding
        picture = embedding["conv_out"](F.silu(embedding["conv_in"](picture)))
        h, skips, _ = self.way_down(x_t, t, text, text_mask, gradient_checkpointing, picture)
        more = [conv(s) for conv, s in zip(self.controlnet_down_blocks, skips, strict=True)]
        return [*more, self.controlnet_mid_block(h)]


def to_diffusers_config(config: UNetConfig) -> dict:
    """The config.json that makes diffusers' `UNet2DConditionModel` this network."""
    fields = asdict(config)
    text_dim, heads, attention = (fields.pop(k) for k in ("text_dim", "num_heads", "attention"))
    return {
        "_class_name": "UNet2DConditionModel",
        **fields,
        "attention_head_dim": heads,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        "encoder_hid_dim": text_dim,
        "encoder_hid_dim_type": None if text_dim is None else "text_proj",
        "sample_size": [24, 21],
        **FIXED,
    }


def from_diffusers_config(saved: dict) -> UNetConfig:
    """The inverse; ValueError for a network that isn't Stable Diffusion v1's."""
    for name, value in FIXED.items():
        if saved.get(name, value) != value:
            raise ValueError(
                f"{name} = {saved[name]!r}, but this is the Stable Diffusion v1 U-Net "
                f"and knows {value!r} only"
            )
    try:
        down = saved["down_block_types"]
        attention = tuple({"CrossAttnDownBlock2D": True, "DownBlock2D": False}[d] for d in down)
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]]
        heads = saved.get("num_attention_heads") or saved["attention_head_dim"]
        if list(saved["up_block_types"]) != up or not isinstance(heads, int):
            raise KeyError("up_block_types or attention_head_dim")
        return UNetConfig(
            in_channels=saved["in_channels"],
            out_channels=saved["out_channels"],
            block_out_channels=tuple(saved["block_out_channels"]),
            attention=attention,
            layers_per_block=saved["layers_per_block"],
            num_heads=heads,
            cross_attention_dim=saved["cross_attention_dim"],
            text_dim=saved.get("encoder_hid_dim"),
        )
    except (KeyError, TypeError) as e:
        raise ValueError(f"not the config of a Stable Diffusion v1 U-Net: see {e}") from e


def load_config(folder_or_hub_id: str | Path) -> UNetConfig:
    """The architecture of a U-Net folder or hub id."""
    path = find_unet_folder(folder_or_hub_id) / "config.json"
    try:
        return from_diffusers_config(dict(json.loads(path.read_text())))
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: {e}") from e


def find_unet_folder(folder_or_hub_id: str | Path) -> Path:
    """A local U-Net folder, the `unet` inside a local model folder, or a download from the hub."""
    path = Path(folder_or_hub_id)
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            return folder
    if path.exists() or str(folder_or_hub_id).count("/") != 1:
        raise FileNotFoundError(
            f"{path}: no U-Net there (config.json and {WEIGHTS}.safetensors, or unet/ with both)"
        )
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        for suffix in ("safetensors", "bin"):  # the second only where there is no first
            patterns = ["unet/config.json", f"unet/{WEIGHTS}.{suffix}"]
            folder = (
                Path(snapshot_download(str(folder_or_hub_id), allow_patterns=patterns)) / "unet"
            )
            if (folder / f"{WEIGHTS}.{suffix}").is_file():
                break
        return folder
    except Exception as e:  # the hub's many errors mean one thing to the user
        raise FileNotFoundError(
            f"{folder_or_hub_id}: neither a local folder nor to be had from the Hugging Face hub "
            f"({type(e).__name__}): download its unet folder and give the path"
        ) from e


def load_weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / f"{WEIGHTS}.safetensors").is_file():
            return load_file(folder / f"{WEIGHTS}.safetensors")
        if (folder / f"{WEIGHTS}.bin").is_file():
            state = torch.load(folder / f"{WEIGHTS}.bin", map_location="cpu", weights_only=True)
            if isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values()):
                return state
            raise ValueError("no tensors by name")
    except Exception as e:
        raise ValueError(f"{folder}: the weights can't be read ({e})".splitlines()[0]) from e
    raise FileNotFoundError(f"{folder}: no {WEIGHTS}.safetensors (or .bin) beside config.json")


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], source: Path) -> None:
    """ValueError if names or shapes differ: nothing is loaded by halves."""
    problems = [f"{k} is missing" for k in expected if k not in state]
    problems += [f"{k} is unexpected" for k in state if k not in expected]
    problems += [
        f"{k} is {list(state[k].shape)}, not {list(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{source}: the weights don't fit the config: {problems[0]}{more}")
