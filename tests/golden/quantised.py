"""Weights that a quantised layout holds exactly, and that layout: MXFP4 as gpt-oss is published, blocks of FP8 as DeepSeek-V3 is."""

import zlib

import torch

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Value of a four-bit code."""
GROUP = 32
"""Inputs of an output that share an exponent in MXFP4."""
BLOCK = 16
"""Rows and columns of a matrix that share a scale in FP8, counted from the first, so that the last block may be a smaller one; what
is published has 128. (Transformers 5.23 takes the size of a block from the number of scales and reads smaller last blocks wrongly.)"""


def mxfp4(x):
    """[E, in, out] -> blocks u8 [E, out, in / 32, 16], each the codes of two inputs, the first in the low half; scales u8
    [E, out, in / 32], exponents of two plus 127."""
    x = x.float().transpose(1, 2).unflatten(-1, (-1, GROUP))
    exponent = torch.frexp(x.abs().amax(dim=-1)).exponent - 3  # the largest lies in [4, 8) then
    codes = (torch.ldexp(x, -exponent[..., None])[..., None] - FP4).abs().argmin(dim=-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def from_mxfp4(blocks, scales):
    """The inverse: [E, in, out] in float32."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    return torch.ldexp(FP4[codes], scales.int()[..., None] - 127).flatten(-2).transpose(1, 2).contiguous()


def is_mxfp4(name):
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def rounded_to_mxfp4(tensors):
    """Experts' matrices at the nearest values that MXFP4 has; bfloat16 has them too."""
    return {name: from_mxfp4(*mxfp4(x)).to(x.dtype) if is_mxfp4(name) else x for name, x in tensors.items()}


def in_mxfp4(tensors):
    """Experts' matrices as `_blocks` and `_scales`."""
    stored = {name: x for name, x in tensors.items() if not is_mxfp4(name)}
    for name in filter(is_mxfp4, tensors):
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4(tensors[name])
    return stored


def is_fp8(name):
    """Linear layers but routers and the output projection."""
    return "proj" in name and name.endswith(".weight")


def scales(name, shape):
    """f32 [rows / 16, columns / 16], rounded up: drawn by name, with so few digits that a scale times an FP8 number is a bfloat16."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(8, 16, [-(-size // BLOCK) for size in shape], generator=rng) / 2.0**11


def spread(scale, shape):
    """The scale of every entry of a matrix."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def fp8(name, x):
    """(weights in float8_e4m3fn, scales)."""
    scale = scales(name, x.shape)
    return (x.float() / spread(scale, x.shape)).to(torch.float8_e4m3fn), scale


def rounded_to_fp8(tensors):
    """Matrices at the nearest values that FP8 with these scales has; bfloat16 has them too."""
    rounded = dict(tensors)
    for name in filter(is_fp8, tensors):
        weight, scale = fp8(name, tensors[name])
        rounded[name] = (weight.float() * spread(scale, weight.shape)).to(tensors[name].dtype)
    return rounded


def in_fp8(tensors):
    """Matrices as FP8 with their scales beside them under `_scale_inv`."""
    stored = dict(tensors)
    for name in filter(is_fp8, tensors):
        stored[name], stored[f"{name}_scale_inv"] = fp8(name, tensors[name])
    return stored
