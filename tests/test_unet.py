"""unet.py against diffusers' UNet2DConditionModel, with the same weights."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from unet import WEIGHTS, Conv3x3, UNet, UNetConfig, attention, load_config, to_diffusers_config

SMALL = UNetConfig(8, 8, (32, 64, 64), (True, True, False), 2, 4, 48, 24)
VARIANTS = {
    "papers' shape": SMALL,
    "no projection": UNetConfig(4, 4, (32, 64), (True, False), 2, 8, 40, None),
    "tiny's shape": UNetConfig(16, 16, (32, 64, 96), (False, True, True), 1, 4, 24, None),
}
STABLE_DIFFUSION = UNetConfig(in_channels=4, out_channels=4, text_dim=None)


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(config).eval()


def inputs(config: UNetConfig, size: tuple[int, int], batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, config.in_channels, *size, generator=generator)
    t = torch.tensor([3, 987])[:batch]
    width = config.text_dim or config.cross_attention_dim
    return x_t, t, torch.randn(batch, 7, width, generator=generator)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "config, number",
    [(STABLE_DIFFUSION, 859_520_964), (UNetConfig(text_dim=None), 860_235_328),
     (UNetConfig(), 861_022_528)],
)  # fmt: skip
def test_parameter_counts(config, number):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == number


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, UNetConfig(), *VARIANTS.values()])
def test_names_and_shapes_are_diffusers(config):
    with torch.device("meta"):
        ours = UNet(config).state_dict()
        theirs = UNet2DConditionModel.from_config(to_diffusers_config(config)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each variant, ours, and diffusers' that has been loaded from what ours saved."""
    pairs = {}
    for i, name in enumerate(VARIANTS):
        ours = random_unet(VARIANTS[name])
        ours.save_pretrained(folder := tmp_path_factory.mktemp(f"unet-{i}"))
        pairs[name] = ours, UNet2DConditionModel.from_pretrained(folder).eval()
    return pairs


@pytest.mark.parametrize(
    "name, size",
    [
        *((name, (24, 21)) for name in VARIANTS),
        ("papers' shape", (13, 9)),
        ("tiny's shape", (8, 8)),
    ],
)
def test_output_is_diffusers(name, size, pairs):
    ours, theirs = pairs[name]
    x_t, t, text = inputs(ours.config, size)
    with torch.no_grad():
        a, b = ours(x_t, t, text), theirs(x_t, t, text).sample
    assert a.shape == x_t.shape and a.std() > 0.05  # it says something
    assert relative_error(a, b) < 1e-5


def test_text_mask_is_diffusers(pairs):
    ours, theirs = pairs["papers' shape"]
    x_t, t, text = inputs(SMALL, (13, 9))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        a = ours(x_t, t, text, mask.bool())
        assert relative_error(a, theirs(x_t, t, text, encoder_attention_mask=mask).sample) < 1e-5
        assert relative_error(a, ours(x_t, t, text)) > 1e-3
        text[mask == 0] = 9  # has no influence at all
        assert torch.equal(a, ours(x_t, t, text, mask))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_round_trip_through_diffusers(suffix, tmp_path):
    ours = random_unet(SMALL)
    ours.save_pretrained(tmp_path / "ours")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=suffix == "safetensors")
    back = UNet.from_pretrained(tmp_path / "theirs")
    assert back.config == SMALL
    for name, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_stable_diffusion_adapted_to_the_latents(tmp_path, capsys):
    """A folder as Stable Diffusion's: 4 channels, no projection. Only what must be is new."""
    four = UNetConfig(4, 4, (32, 64), (True, False), 2, 4, 48, None)
    sd = UNet2DConditionModel.from_config(to_diffusers_config(four))
    sd.save_pretrained(tmp_path / "model" / "unet")
    torch.manual_seed(5)
    unet = UNet.from_pretrained(tmp_path / "model", in_channels=8, out_channels=8, text_dim=24)
    assert "freshly initialised: conv_in, conv_out, encoder_hid_proj" in capsys.readouterr().out
    assert unet.config == UNetConfig(8, 8, (32, 64), (True, False), 2, 4, 48, 24)
    for name, value in unet.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in ("conv_in", "conv_out", "encoder_hid_proj"):
            assert torch.equal(value, sd.state_dict()[name]), name
    assert not torch.equal(unet.conv_in.bias, sd.conv_in.bias)  # layers are renewed as a whole


def test_original_config_of_stable_diffusion(tmp_path):
    """The fields of v1.4's config.json, and no others."""
    config = """{
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": false, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
        "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D"]
    }"""
    (tmp_path / "config.json").write_text(config)
    assert load_config(tmp_path) == STABLE_DIFFUSION


def test_full_width_output_is_diffusers():
    """861M random weights, one step at 24×21 with 50 tokens: the papers' network itself."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(to_diffusers_config(UNetConfig()))
        ours = UNet(UNetConfig())
    theirs.to_empty(device="cpu")
    for p in theirs.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(p, mean=0.5, std=0.2)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # the same memory, not a copy
    x_t, t = torch.randn(1, 128, 24, 21), torch.tensor([500])
    text = torch.randn(1, 50, 1024)
    with torch.no_grad():
        a, b = ours(x_t, t, text), theirs(x_t, t, text).sample
    assert a.shape == (1, 128, 24, 21)
    assert relative_error(a, b) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    unet = random_unet(SMALL)
    x_t, t, text = inputs(SMALL, (13, 9))
    gradients = []
    for checkpointing in (False, True):
        unet.zero_grad()
        unet(x_t, t, text, gradient_checkpointing=checkpointing).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0  # every parameter is used


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()])
def test_attention_is_pytorchs(mask):
    """What runs on CPUs, and what runs on GPUs: output and gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 5, 5))
    mask = None if mask is None else mask[:, None, None]
    outputs = [f(q, k, v, mask) for f in (attention, F.scaled_dot_product_attention)]
    weights = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((z * weights).sum(), (q, k, v)) for z in outputs]
    for ours, theirs in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(3, 3), (6, 7), (24, 21)])
def test_convolutions_of_few_pixels_are_convolutions(stride, height, width):
    """Output and gradients, whichever way it is computed."""
    torch.manual_seed(0)
    conv = Conv3x3(8, 128, stride).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, height, width, dtype=torch.float64, requires_grad=True)
    variables, expected = (x, conv.weight, conv.bias), F.conv2d(x, *conv.parameters(), stride, 1)
    ours, weights = conv(x), torch.randn_like(expected)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad((y * weights).sum(), variables) for y in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_and_integer_timesteps():
    unet = random_unet(SMALL)
    x_t, _, text = inputs(SMALL, (13, 9))
    with torch.no_grad():
        together = unet(x_t, 7, text)
        alone = [unet(x_t[i : i + 1], torch.tensor([7]), text[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_graph_can_be_traced():
    """torch.compile gets one graph, with no break in it."""
    unet = random_unet(VARIANTS["no projection"])
    compiled, batch = (
        torch.compile(unet, backend="eager", fullgraph=True),
        inputs(unet.config, (8, 8)),
    )
    with torch.no_grad():
        assert torch.equal(compiled(*batch), unet(*batch))


# ---- what users get wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, message",
    [("conv_in.weight", None, "Missing.*conv_in.weight"),
     ("stranger.weight", torch.ones(1), "Unexpected.*stranger.weight"),
     ("conv_in.bias", torch.ones(3), r"conv_in.bias.*\[3\].*\[32\]")],
)  # fmt: skip
def test_weights_that_do_not_fit_the_config_are_refused(name, value, message, tmp_path):
    unet = random_unet(SMALL)
    unet.save_pretrained(tmp_path)
    (tmp_path / f"{WEIGHTS}.safetensors").unlink()
    state = {k: v for k, v in (unet.state_dict() | {name: value}).items() if v is not None}
    torch.save(state, tmp_path / f"{WEIGHTS}.bin")
    with pytest.raises(ValueError, match=f"don't fit the config: .*{message}"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"use_linear_projection": True}, {"act_fn": "gelu"}, {"attention_head_dim": [5, 10, 20]},
     {"up_block_types": ["UpBlock2D"] * 3}, {"down_block_types": ["DownBlock2D"]},
     {"attention_head_dim": 0}, {"down_block_types": ["KDownBlock2D"] * 3}, {"in_channels": None},
     {"block_out_channels": [32, 48, 64]}, "[]", "{", "null"],
)  # fmt: skip
def test_other_architectures_are_refused(change, tmp_path):
    if isinstance(change, dict):
        config = to_diffusers_config(SMALL) | change
        change = json.dumps({key: value for key, value in config.items() if value is not None})
    (tmp_path / "config.json").write_text(change)
    with pytest.raises(ValueError, match=r"config.json: not the config of a Stable Diffusion v1"):
        load_config(tmp_path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran code')",))


def test_absent_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no U-Net there"):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a local folder nor"):
        UNet.from_pretrained("nobody/no-such-model")  # HF_HUB_OFFLINE is set: no network
    random_unet(SMALL).save_pretrained(tmp_path)
    weights = tmp_path / f"{WEIGHTS}.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't be read"):
        UNet.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no such file, nor a .bin"):
        UNet.from_pretrained(tmp_path)
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(), 2))
    with pytest.raises(ValueError, match="can't be read"):
        UNet.from_pretrained(tmp_path)
