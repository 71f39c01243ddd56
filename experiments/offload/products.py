"""Time a row times a matrix in float32, bfloat16 and int8 on one core: XLA's library and planes.

    python experiments/offload/products.py            about 20 s
    python experiments/offload/products.py --smoke    small matrices, nothing written

The process is held to one core and its processor time is taken, not the clock's, so that
neighbours disturb little. Matrices are those of the Mixtral of cpu.py; a dozen are multiplied in
one program, more than the second-level cache holds and less than the third-level one, so this is
what computing allows, and memory may allow less.

Expected: by planes 1.3 to 2.5 x in bfloat16 and, where the codes stay in a cache, 4 to 5 x in int8.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, to_json
from jaxsys.models.rows import row_product

RESULTS = Path(__file__).parent / "results"


def plain(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Multiply and sum, which XLA hands to its library or fuses."""
    return (weight.astype(jnp.float32) * x[None]).sum(-1)


def dot(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Multiply as a product."""
    return jax.lax.dot_general(weight, x, (((1,), (0,)), ((), ())))


def seconds(function: Callable[..., Any], *args: Any, rounds: int) -> float:
    """Take the least processor time of a call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        begin_s = time.process_time()
        for _ in range(8):
            found = function(*args)
        jax.block_until_ready(found)
        times.append((time.process_time() - begin_s) / 8)
    return min(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time products of one row.")
    parser.add_argument("--smoke", action="store_true", help="small matrices, nothing written")
    given = parser.parse_args(argv)
    told = machine()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    scale = 8 if given.smoke else 1
    rows = []
    for outputs, inputs in ((1792, 512), (512, 1792), (4096 // scale, 4096 // scale)):
        count = max(2, round(12 * 1792 * 512 / (outputs * inputs)))
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
            rng = np.random.default_rng(0)
            values = rng.integers(-9, 9, (count, outputs, inputs))
            weights = [jnp.asarray(one, dtype) for one in values]
            x = jnp.asarray(rng.normal(size=inputs), jnp.float32)
            forms = {"product": dot} if dtype == jnp.float32 else {"plain": plain}
            if dtype != jnp.float32:
                forms["planes"] = row_product
            found = {}
            for name, form in forms.items():
                run = jax.jit(lambda ws, x, form=form: sum(form(w, x) for w in ws))
                taken = seconds(run, weights, x, rounds=2 if given.smoke else 7)
                found[name] = count * outputs * inputs / taken / 1e9
            first, last = next(iter(found.values())), list(found.values())[-1]
            rows.append({
                "matrix": f"{outputs} x {inputs}", "type": jnp.dtype(dtype).name,
                "library, Gweights/s": f"{first:.1f}",
                "planes, Gweights/s": f"{last:.1f}" if len(found) > 1 else "",
                "times": f"{last / first:.1f}" if len(found) > 1 else "",
                "GB/s of the best": f"{last * jnp.dtype(dtype).itemsize:.1f}",
            })  # fmt: skip
    text = (
        f"# Products of one row on one core\n\n{told}. Processor time, least of 7 rounds of 8 "
        f"calls.\n\n{markdown_table(rows)}"
    )
    print(text)
    if not given.smoke:
        name = f"products_jax{jax.__version__.rpartition('.')[0] or jax.__version__}"
        atomic_write(RESULTS / f"{name}.md", text)
        atomic_write(RESULTS / f"{name}.json", to_json(rows) + "\n")


if __name__ == "__main__":
    main()
