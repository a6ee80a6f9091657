"""Texts of programs: small ones compiled here for CPU, and lines as the TPU compiler writes them."""

import jax
import jax.numpy as jnp

from moejax.plan import hlo

ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compiled(function, *arguments):
    """A function compiled for CPU, parsed."""
    return hlo.Module(jax.jit(function).lower(*arguments).compile().as_text())


def written(*lines, others=""):
    """A program whose entry has these lines, beside other computations."""
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.Module(f"HloModule written\n\n{ADD}\n{others}\n\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n")
