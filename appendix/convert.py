"""Weights as others publish them, in the form that the core reads. Nothing loaded can run code.

Stable Diffusion v1's U-Net out of its single file (sd-v1-4.ckpt, v1-5-pruned-emaonly.safetensors),
which has CompVis's names (their input_blocks and output_blocks count through all levels), and
EnCodec 24 kHz as transformers has it (the hub's facebook/encodec_24khz):

    python -m appendix.convert stable-diffusion sd-v1-4.ckpt --out sd14     train.py --init sd14
    python -m appendix.convert encodec facebook/encodec_24khz --out encodec
                                                        latents.py encode --encodec-weights encodec
"""

import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from appendix import make_parser
from latents import EncodecCodec, one_line_errors, write_aside
from unet import UNet, UNetConfig

STABLE_DIFFUSION = UNetConfig(in_channels=4, out_channels=4, text_dim=None)
# The rest of a name, within a residual block
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
ENDS |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}


def name_at_compvis(name: str, c: UNetConfig) -> str:
    """A parameter of `UNet` -> the same one's name in a checkpoint of CompVis."""
    for ours, theirs in ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    part, kind, i, rest = re.fullmatch(
        r"(\w+_blocks?\.?\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    ).groups()
    part, _, level = part.partition(".")
    depth, i = c.layers_per_block, int(i)
    if kind == "resnets":
        layer, _, end = rest.rpartition(".")
        rest = f"{RESNET[layer]}.{end}"
    if part == "mid_block":  # residual block, transformer, residual block
        return f"middle_block.{1 if kind == 'attentions' else 2 * i}.{rest}"
    if part == "down_blocks":
        first = 1 + int(level) * (depth + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + depth}.0.{rest.replace('conv', 'op', 1)}"
        return f"input_blocks.{first + i}.{int(kind == 'attentions')}.{rest}"
    first = int(level) * (depth + 1)
    if kind == "upsamplers":  # behind the last residual block and its transformer, if any
        return f"output_blocks.{first + depth}.{1 + c.attention[::-1][int(level)]}.{rest}"
    return f"output_blocks.{first + i}.{int(kind == 'attentions')}.{rest}"


def names_at_transformers(name: str) -> tuple[str, str]:
    """A parameter of encodec's model -> its names in transformers' files, older and newer ones."""
    name = name.replace("quantizer.vq.", "quantizer.").replace("._codebook.", ".codebook.")
    name = re.sub(r"(en|de)coder\.model\.", r"\1coder.layers.", name)
    name = name.replace("convtr.convtr.", "conv.").replace("conv.conv.", "conv.")
    newer = name.replace("weight_g", "parametrizations.weight.original0")
    return name, newer.replace("weight_v", "parametrizations.weight.original1")


class Stub:
    """In the place of a class that a checkpoint mentions and nobody here needs."""


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a single file, by name. ValueError for a file that holds none."""
    known = [np.dtype, np.dtypes.Float64DType, np.dtypes.Int64DType]
    scalar = np._core.multiarray.scalar
    known += [scalar, (scalar, "numpy.core.multiarray.scalar")]  # NumPy 1's name
    known += [(Stub, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(known):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state.get("state_dict", state)
    except FileNotFoundError:
        raise
    except Exception as e:  # of many types: a damaged byte leads the unpickler anywhere
        raise ValueError(
            f"{path}: no checkpoint that can be read ({str(e).splitlines()[0]:.200})"
        ) from e


def convert_stable_diffusion(path: Path, out: Path) -> None:
    """A U-Net folder of the checkpoint's own weights; those averaged beside them are left out."""
    state, config = load_checkpoint(path), STABLE_DIFFUSION
    with torch.device("meta"):
        unet = UNet(config)
    found = {}
    for name, parameter in unet.state_dict().items():
        theirs = "model.diffusion_model." + name_at_compvis(name, config)
        tensor = state.get(theirs)
        if tensor is None or tensor.shape != parameter.shape:
            shape = "nothing" if tensor is None else [*tensor.shape]
            raise ValueError(f"{path}: {theirs} is {shape}, expected {[*parameter.shape]}: "
                             "not a checkpoint of Stable Diffusion v1")  # fmt: skip
        found[name] = tensor.float()
    unet.load_state_dict(found, assign=True)
    unet.save_pretrained(out)


def convert_encodec(source: str, out: Path) -> None:
    """encodec's own file in the folder `out`, from a folder or hub id of transformers'."""
    from encodec import EncodecModel
    from huggingface_hub import hf_hub_download

    path = Path(source, "model.safetensors")
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, path.name))
        except Exception as e:  # the hub's many errors mean one thing to the user
            hub = f"to be had from the Hugging Face hub ({type(e).__name__})"
            raise FileNotFoundError(f"{source}: neither a folder nor {hub}") from e
    state = load_checkpoint(path)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # old weight_norm
        model = EncodecModel.encodec_model_24khz(pretrained=False)
    found = {}
    for name, parameter in model.state_dict().items():
        names = [x for x in names_at_transformers(name) if x in state]
        if not names or state[names[0]].shape != parameter.shape:
            raise ValueError(f"{path}: has no {name} of EnCodec's 24 kHz model")
        found[name] = state[names[0]]
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / Path(EncodecCodec.url).name, partial(torch.save, found))


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=("stable-diffusion", "encodec"))
    parser.add_argument("source", help=".ckpt or .safetensors file; encodec: a folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args(arguments)
    with one_line_errors():
        if args.what == "encodec":
            convert_encodec(args.source, args.out)
        else:
            convert_stable_diffusion(Path(args.source), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
