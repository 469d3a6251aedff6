"""Memory that a step has freed is used again by the next step, and goes back to the system between stages."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from jaxrec.training.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step(x):  # 40 MB of temporaries
    _, stacked = jax.lax.scan(lambda c, _: (0.5 * c @ x, jnp.tile(c, (640, 1, 1)) * c), x, length=4)
    return stacked.sum(axis=(0, 1))


step = jax.jit(step)
x = jnp.full((64, 64), 0.01)


def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


faults(15)  # until the heap has its size
print(faults(10))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of the GNU C library")
def test_steps_fault_in_no_new_pages() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], check=True, capture_output=True, text=True).stdout)
        for way in ("keep", "as it is")
    }
    assert faults["keep"] < 0.3 * faults["as it is"]


HELD = """
from pathlib import Path
import numpy as np
from jaxrec.training.host_memory import give_back_freed_memory, keep_freed_memory


def resident_mb():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1e3


assert keep_freed_memory()
before = resident_mb()
freed, kept = np.ones(25_000_000), np.ones(1_000_000)  # 200 MB, and 8 MB above them in the heap
del freed
after = resident_mb()
give_back_freed_memory()
print(after - before, resident_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of the GNU C library")
def test_freed_memory_is_given_back_where_that_is_asked() -> None:
    ran = subprocess.run([sys.executable, "-c", HELD], check=True, capture_output=True, text=True)
    kept_mb, left_mb = map(float, ran.stdout.split())
    assert kept_mb > 190
    assert left_mb < 50
