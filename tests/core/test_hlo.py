"""Compiled text read back: fusions, loops, products and what each weighs."""

import jax
import jax.numpy as jnp
import pytest

from jaxsys.core import hlo
from jaxsys.core.errors import UserError

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[]}

%fused (p.0: f32[4,8]) -> f32[4,4] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %mul.1 = f32[4,8]{1,0} multiply(%p.0, %p.0), metadata={op_name="jit(step)/jvp(mlp)/mul" line=3}
  ROOT %dot.1 = f32[4,4]{1,0} dot(%mul.1, %p.0), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (t: (s32[], /*index=1*/f32[4,8])) -> (s32[], f32[4,8]) {
  ROOT %t = (s32[], /*index=1*/f32[4,8]{1,0:T(8,128)}) parameter(0)
}

ENTRY %main.3 (x: f32[4,8]) -> f32[] {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="x \\"y\\""}
  %loop = (s32[], f32[4,8]{1,0}) while(%x), condition=%cond, body=%body
  %flags = (pred[3]{0}, bf16[5]{0}, token[]) custom-call(%x), custom_call_target="f"
  %one = f32[4,4]{1,0} conditional(%x), branch_computations={%fused, %body}
  ROOT %call = f32[4,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
}
"""


def test_reads_names_shapes_calls_and_paths():
    module = hlo.parse(TEXT)
    found = module.instructions
    assert (module.name, module.entry) == ("jit_step", "main.3")
    assert list(module.computations) == ["fused", "body", "main.3"]
    assert found["mul.1"].op_name == "jit(step)/jvp(mlp)/mul"
    assert found["dot.1"].operands == ("mul.1", "p.0")
    assert found["t"].shapes == ((), (4, 8))
    assert found["loop"].called == ("cond", "body")
    assert found["one"].called == ("fused", "body")
    assert found["flags"].n_bytes == 3 + 10
    assert found["x"].op_name == 'x \\"y\\"'


def test_a_fusion_weighs_what_is_in_it():
    module = hlo.parse(TEXT)
    found = module.instructions
    assert hlo.work(module, found["dot.1"]) == 2 * 4 * 4 * 8
    assert hlo.work(module, found["call"]) == 2 * 4 * 4 * 8 + 4 * 8
    assert hlo.work(module, found["x"]) == 0


def test_a_real_program_has_the_product_that_was_written():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 16)), jnp.ones((3, 16, 16))
    module = hlo.parse(jax.jit(f).lower(x, w).compile().as_text())
    dots = [i for i in module.instructions.values() if i.op_name.endswith("dot_general")]
    assert max(hlo.work(module, i) for i in dots) >= 2 * 8 * 16 * 16
    loops = [i for i in module.instructions.values() if i.opcode == "while"]
    assert all(name in module.computations for i in loops for name in i.called)


@pytest.mark.parametrize("text", ["", "hello {", "HloModule jit_f"])
def test_refuses_what_is_no_program(text):
    with pytest.raises(UserError, match="no compiled program"):
        hlo.parse(text)
