"""The package's metadata and dependencies. Tools are configured in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.*)"', (here / "moejax" / "__init__.py").read_text()).group(1)

plot = ["matplotlib"]
quant = ["qwix"]
text = ["tokenizers"]
notebooks = ["nbformat", "nbclient", "ipykernel"]
tests = ["pytest", "pytest-xdist", "jaxtyping", "beartype", "safetensors"]

setup(
    name="moejax",
    version=version,
    description="Sparse models (mixture of experts) in JAX whose answers do not depend on the mesh",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["moejax", "moejax.*"]),
    package_data={"moejax.kernels": ["tuned.json"], "moejax.data": ["languages/*.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorstore",
        "ml-collections",
        "grain",
        "array-record",
        "ml-dtypes",
        "absl-py",
        "etils[epath]",
        "jaxtyping",
        "numpy",
        "pyyaml",
        "tensorboardX",
        "rich",
    ],
    extras_require={
        "plot": plot,
        "quant": quant,
        "text": text,
        "notebooks": [*plot, *notebooks],
        "profile": ["xprof", "tensorboard"],
        "tpu": ["jax[tpu]"],
        "docs": ["sphinx", "myst-parser", "furo"],
        "dev": [*plot, *quant, *text, *notebooks, *tests, "ruff", "pyright"],
    },
)
