"""appendix.convert against diffusers and transformers, on files in the formats as published."""

import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file

from appendix import convert
from latents import EncodecCodec
from tests.conftest import Bomb
from unet import UNet, UNetConfig, to_diffusers_config

SMALL = UNetConfig(4, 4, (32, 64, 64, 64), text_dim=None)


def published(unet: UNet) -> dict:
    """With what else is in sd-v1-4.ckpt."""
    names = {name: convert.name_at_compvis(name, unet.config) for name in unet.state_dict()}
    state = {f"model.diffusion_model.{names[k]}": v for k, v in unet.state_dict().items()}
    return state | {"model_ema.decay": torch.tensor(0.9999), "betas": torch.ones(1000)}


@pytest.mark.parametrize("name", ["sd-v1-4.ckpt", "v1-5-pruned-emaonly.safetensors"])
def test_stable_diffusion_s_single_file(name, tmp_path, monkeypatch):
    """The names are those from which diffusers makes ours; the weights arrive as they were."""
    monkeypatch.setattr(convert, "STABLE_DIFFUSION", SMALL)
    unet, path = UNet(SMALL), tmp_path / name
    state = published(unet)
    theirs = convert_ldm_unet_checkpoint(dict(state), to_diffusers_config(SMALL))
    assert theirs.keys() == unet.state_dict().keys()
    assert all(torch.equal(theirs[k], v) for k, v in unet.state_dict().items())
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:  # Lightning's: its callbacks are there by their class
        modules = "pytorch_lightning", "pytorch_lightning.callbacks"
        for module in (*modules, f"{modules[1]}.model_checkpoint"):
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        kind = type("ModelCheckpoint", (), {"__module__": f"{modules[1]}.model_checkpoint"})
        monkeypatch.setattr(sys.modules[kind.__module__], kind.__name__, kind, raising=False)
        about = {"callbacks": {kind: {"best": np.float64(1.5)}}, "global_step": 470_000}
        torch.save(about | {"state_dict": state}, path)
    convert.main(["stable-diffusion", str(path), "--out", str(tmp_path / "unet")])
    ours = UNet.from_pretrained(tmp_path / "unet", in_channels=8, out_channels=8)
    same = (torch.equal(v, ours.state_dict()[k]) for k, v in theirs.items() if "conv_" not in k)
    assert all(same) and ours.config.in_channels == 8


def test_every_parameter_of_stable_diffusion_has_a_name_of_its_own():
    with torch.device("meta"):
        names = UNet(convert.STABLE_DIFFUSION).state_dict()
    theirs = {convert.name_at_compvis(name, convert.STABLE_DIFFUSION) for name in names}
    assert len(theirs) == len(names) == 686
    assert {"output_blocks.5.2.conv.weight", "output_blocks.2.1.conv.bias"} < theirs
    assert "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight" in theirs


@pytest.mark.parametrize("older", [True, False])
def test_encodec_of_transformers(older, tmp_path):
    """Codes of encodec's package, with the converted file, are transformers' codes."""
    torch.manual_seed(0)
    theirs = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    with torch.no_grad():
        for layer in theirs.quantizer.layers:
            layer.codebook.embed.normal_()
    state = theirs.state_dict()
    if older:  # as on the hub
        for i, letter in enumerate("gv"):
            old, new = f"parametrizations.weight.original{i}", f"weight_{letter}"
            state = {name.replace(old, new): value for name, value in state.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    convert.main(["encodec", str(tmp_path), "--out", str(tmp_path / "out")])
    wave = torch.randn(1, 161_280) * 0.3
    with torch.no_grad():
        expected = theirs.encode(wave[:, None], bandwidth=6.0).audio_codes[0]
    assert torch.equal(EncodecCodec(tmp_path / "out").encode(wave).long(), expected)


def test_mistakes_get_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "STABLE_DIFFUSION", SMALL)
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": Bomb(os.mkdir, str(tmp_path / "boom"))}, tmp_path / "bomb.ckpt")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    for what, source, words in (
        ("stable-diffusion", "nowhere.ckpt", "No such file"),
        ("stable-diffusion", "empty.ckpt", "not a checkpoint of Stable Diffusion v1"),
        ("stable-diffusion", "bomb.ckpt", "can be read"),
        ("encodec", "", "has no .* of EnCodec"),
        ("encodec", "nowhere", "neither a folder nor"),
    ):
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{words}[^\n]*$"):
            convert.main([what, str(tmp_path / source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / "boom").exists()
