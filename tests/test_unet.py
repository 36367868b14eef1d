"""unet.py against diffusers' UNet2DConditionModel, with the same weights."""

import json
import os

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.conftest import Bomb
from unet import WEIGHTS, UNet, UNetConfig, load_config, to_diffusers_config

SMALL = UNetConfig(8, 8, (32, 64, 64), (True, True, False), 2, 4, 48, 24)
VARIANTS = {
    "papers' shape": SMALL,
    "no projection": UNetConfig(4, 4, (32, 64), (True, False), 2, 8, 40, None),
    "tiny's shape": UNetConfig(16, 16, (32, 64, 96), (False, True, True), 1, 4, 24, None),
}
STABLE_DIFFUSION = UNetConfig(in_channels=4, out_channels=4, text_dim=None)


def random_unet(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    return UNet(config).eval().to(memory_format=torch.channels_last)  # as in sample.py


def inputs(config: UNetConfig, height: int, width: int):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, config.in_channels, height, width, generator=generator)
    text = torch.randn(2, 7, config.text_dim or config.cross_attention_dim, generator=generator)
    return x_t, torch.tensor([3, 987]), text


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "config, number",
    [(STABLE_DIFFUSION, 859_520_964), (UNetConfig(), 861_022_528),
     *((config, None) for config in VARIANTS.values())],
)  # fmt: skip
def test_names_and_shapes_are_diffusers(config, number):
    with torch.device("meta"):
        ours = UNet(config).state_dict()
        theirs = UNet2DConditionModel.from_config(to_diffusers_config(config)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert number in (None, sum(p.numel() for p in ours.values()))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each variant, ours, and diffusers' that has been loaded from what ours saved."""
    pairs = {}
    for name, config in VARIANTS.items():
        ours, folder = random_unet(config), tmp_path_factory.mktemp("unet")
        ours.save_pretrained(folder)
        pairs[name] = ours, UNet2DConditionModel.from_pretrained(folder).eval()
    return pairs


@pytest.mark.parametrize("size", [(24, 21), (13, 9)])
@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_diffusers(pairs, name, size):
    ours, theirs = pairs[name]
    x_t, t, text = inputs(ours.config, *size)
    with torch.no_grad():
        a, b = ours(x_t, t, text), theirs(x_t, t, text).sample
        assert a.shape == x_t.shape and a.std() > 0.05  # it says something
        assert relative_error(a, b) < 1e-5
        assert relative_error(ours(x_t[1:], 987, text[1:]), a[1:]) < 1e-5  # in any batch


def test_text_mask_is_diffusers(pairs):
    ours, theirs = pairs["papers' shape"]
    x_t, t, text = inputs(SMALL, 13, 9)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        a = ours(x_t, t, text, mask.bool())
        assert relative_error(a, theirs(x_t, t, text, encoder_attention_mask=mask).sample) < 1e-5
        assert relative_error(a, ours(x_t, t, text)) > 1e-3
        text[mask == 0] = 9  # has no influence at all
        assert torch.equal(a, ours(x_t, t, text, mask))


def test_full_width_output_is_diffusers():
    """861M random weights, one step at 24×21 with 50 tokens: the papers' network itself."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(to_diffusers_config(UNetConfig()))
        ours = UNet(UNetConfig())
    pool, state = torch.empty(30_000_000).uniform_(-1, 1), {}
    for name, p in ours.state_dict().items():  # as many of the pool's numbers, of variance 1/n
        value = pool[: p.numel()].view(p.shape) * (3 / p[0].numel()) ** 0.5
        state[name] = value if p.ndim > 1 else value.abs()
    for unet in (ours, theirs):
        unet.load_state_dict(state, assign=True)  # the same memory, not a copy
    x_t, t, text = torch.randn(1, 128, 24, 21), torch.tensor([500]), torch.randn(1, 50, 1024)
    with torch.no_grad():
        a, b = ours(x_t, t, text), theirs(x_t, t, text).sample
    assert a.shape == (1, 128, 24, 21) and relative_error(a, b) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    unet, gradients = random_unet(SMALL), []
    for checkpointing in (False, True):
        y = unet(*inputs(SMALL, 13, 9), gradient_checkpointing=checkpointing)
        gradients.append(torch.autograd.grad(y.square().mean(), [*unet.parameters()]))
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])  # every parameter is used


def test_one_unmasked_token_makes_cross_attention_rank_1():
    """P2 appendix C: with n tokens left, softmax(QKᵀ)V has rank n or less."""
    attention = random_unet(SMALL).down_blocks[0].attentions[0].transformer_blocks[0].attn2
    pixels, text = torch.randn(1, 504, 32).double(), torch.randn(1, 7, 48).double()
    attention.double().to_out[0] = torch.nn.Identity()  # look at Z itself

    def rank(tokens: int) -> int:
        mask = (torch.arange(7) < tokens)[None, None, None]
        heads = attention(pixels, text, mask).detach()[0].unflatten(1, (4, 8)).transpose(0, 1)
        return torch.linalg.matrix_rank(heads).max().item()

    assert [rank(n) for n in (1, 2, 3, 7)] == [1, 2, 3, 7]


@pytest.mark.parametrize("safe", [True, False])
def test_round_trip_through_diffusers(pairs, safe, tmp_path):
    ours, theirs = pairs["papers' shape"]
    theirs.save_pretrained(tmp_path, safe_serialization=safe)  # else as a .bin file
    back = UNet.from_pretrained(tmp_path)
    assert back.config == SMALL
    torch.testing.assert_close(back.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_stable_diffusion_adapted_to_the_latents(tmp_path, capsys):
    """A folder as Stable Diffusion's: 4 channels, no projection. Only what must be is new."""
    four = UNetConfig(4, 4, (32, 64), (True, False), 2, 4, 48, None)
    sd = UNet2DConditionModel.from_config(to_diffusers_config(four))
    sd.save_pretrained(tmp_path / "model" / "unet")
    unet = UNet.from_pretrained(tmp_path / "model", in_channels=8, out_channels=8, text_dim=24)
    assert "freshly initialised: conv_in, conv_out, encoder_hid_proj" in capsys.readouterr().out
    assert unet.config == UNetConfig(8, 8, (32, 64), (True, False), 2, 4, 48, 24)
    for name, value in unet.state_dict().items():
        if not name.startswith(("conv_in.", "conv_out.", "encoder_hid_proj.")):
            assert torch.equal(value, sd.state_dict()[name]), name
    assert not torch.equal(unet.conv_in.bias, sd.conv_in.bias)  # layers are renewed as a whole


def test_original_config_of_stable_diffusion(tmp_path):
    """The fields of v1.4's config.json, and no others."""
    config = """{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2",
        "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": false, "cross_attention_dim": 768, "down_block_types":
        ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64, "up_block_types":
        ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"""
    (tmp_path / "config.json").write_text(config)
    assert load_config(tmp_path) == STABLE_DIFFUSION


@pytest.mark.parametrize(
    "name, value",
    [("use_linear_projection", True), ("act_fn", "gelu"), ("attention_head_dim", [5, 10, 20]),
     ("up_block_types", ["UpBlock2D"] * 3), ("block_out_channels", [32, 48, 64])],
)  # fmt: skip
def test_other_architectures_are_refused(name, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_diffusers_config(SMALL) | {name: value}))
    with pytest.raises(ValueError, match=r"config.json: not the config of a Stable Diffusion v1"):
        load_config(tmp_path)


def test_absent_damaged_and_foreign_weights_are_refused(tmp_path):
    def refused(error, match):
        with pytest.raises(error, match=match):
            UNet.from_pretrained(tmp_path)

    with pytest.raises(FileNotFoundError, match="neither a local folder nor"):
        UNet.from_pretrained("nobody/no-such-model")  # HF_HUB_OFFLINE is set: no network
    refused(FileNotFoundError, "no U-Net there")
    unet = random_unet(SMALL)
    unet.save_pretrained(tmp_path)
    weights = tmp_path / f"{WEIGHTS}.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(ValueError, "can't be read")
    weights.unlink()
    refused(FileNotFoundError, "no such file, nor a .bin")

    weights, state = weights.with_suffix(".bin"), unet.state_dict()
    torch.save(Bomb(os.mkdir, str(tmp_path / "exploded")), weights)
    refused(ValueError, "can't be read")
    assert not (tmp_path / "exploded").exists()
    for name, value, message in (
        ("conv_in.weight", None, "Missing.*conv_in.weight"),
        ("stranger.weight", torch.ones(1), "Unexpected.*stranger.weight"),
        ("conv_in.bias", torch.ones(3), r"conv_in.bias.*\[3\].*\[32\]"),
    ):
        torch.save({k: v for k, v in (state | {name: value}).items() if v is not None}, weights)
        refused(ValueError, f"don't fit the config: .*{message}")
