"""The strict switchboard of all tests.

Eight fake CPU devices, run-time checks of shapes and types in every function of moejax, no silent rank promotion.
Batteries of moe/ and kernels/ add strict dtype promotion with `pytestmark = pytest.mark.usefixtures("strict_dtypes")`;
it cannot be global, because optax and flax do not survive it. Warnings are errors by pytest's settings.
Devices are asked for through jax.config and not XLA_FLAGS, so that processes started by tests see one device.
"""

import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jaxtyping

assert "moejax" not in sys.modules, "moejax was imported before the hook that checks its annotations"
jaxtyping.install_import_hook("moejax", "typecheck.functions_only")

import jax
import numpy as np
import pytest

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """One folder of compiled programs for all processes that the tests of all workers start."""
    if "MOEJAX_TEST_PROGRAMS" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="moejax-programs-")
        config.add_cleanup(folder.cleanup)
        os.environ["MOEJAX_TEST_PROGRAMS"] = folder.name


@pytest.fixture(scope="session")
def mesh_of():
    """mesh_of(data=2, expert=4): a Mesh over as many of the eight devices as that takes."""
    from moejax import config, mesh

    def make(**sizes: int) -> jax.sharding.Mesh:
        wanted = config.Mesh(**sizes)
        return mesh.make(wanted, jax.devices()[: int(np.prod(mesh.shape(wanted)))])

    return make


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between array types, in the library and in the test."""
    with jax.numpy_dtype_promotion("strict"):
        yield


MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 40_000
"""Linux gives a process 65,530; every compiled program holds some, and past the last one the compiler aborts."""


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """After a module, forgets compiled programs if there are too many: they are shared between modules until then."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text().count("\n") > MOST_MAPPINGS:
        for name, held in (("harness", "_COMPILED"), ("train.small", "_build")):
            if name in sys.modules:
                cache = getattr(sys.modules[name], held)
                getattr(cache, "cache_clear", getattr(cache, "clear", None))()
        jax.clear_caches()
