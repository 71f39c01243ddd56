"""A step's time over parts: every part is found in both passes, and nothing is counted twice."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxsys.bench import dissect, modules
from jaxsys.bench.ablation import ablate
from jaxsys.bench.step import Task, build
from jaxsys.bench.techniques import Technique
from jaxsys.core import hlo, profiler
from jaxsys.core.errors import UserError
from jaxsys.core.stages import cut_scopes
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
TASK = Task(batch=2, tokens=16)


def _compiled(technique):
    built = build(CONFIG, technique, TASK)
    return built.step.lower(built.state, built.batch).compile()


def test_every_part_is_in_the_text_forward_and_backward():
    compiled = _compiled(Technique())
    shares = modules.attribute(hlo.parse(compiled.as_text()))
    found = {key for share in shares.values() for key in share}
    for part in modules.PARTS:
        assert (part, "forward") in found, part
        assert (part, "backward") in found, part
    assert ("optimizer", "optimizer") in found
    assert all(abs(sum(share.values()) - 1) < 1e-9 for share in shares.values())


def test_what_is_computed_again_is_a_phase_of_its_own():
    compiled = _compiled(Technique(recompute="full", layers="scan"))
    shares = modules.attribute(hlo.parse(compiled.as_text()))
    found = {key for share in shares.values() for key in share}
    assert {("mlp", "forward"), ("mlp", "recompute"), ("mlp", "backward")} <= found
    assert ("head", "recompute") not in found


def test_a_fusion_of_two_parts_is_shared_by_their_work():
    text = """HloModule jit_f
%fused (p: f32[4,8]) -> f32[4,4] {
  %p = f32[4,8]{1,0} parameter(0)
  %a = f32[4,8]{1,0} multiply(%p, %p), metadata={op_name="jit(f)/jvp(norm)/mul"}
  %c = f32[4,8]{1,0} negate(%a)
  ROOT %d = f32[4,4]{1,0} dot(%c, %p), lhs_contracting_dims={1}, metadata={op_name="jit(f)/mlp/d"}
}
ENTRY %main (x: f32[4,8]) -> f32[4,4] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %both = f32[4,4]{1,0} fusion(%x), calls=%fused, metadata={op_name="jit(f)/mlp/d"}
}
"""
    share = modules.attribute(hlo.parse(text))["both"]
    total = 32 + 32 + 256  # c has no path and goes with d, which reads it
    assert share == pytest.approx({("norm", "forward"): 32 / total, ("mlp", "other"): 288 / total})


def test_what_the_compiler_put_in_goes_with_its_reader_or_else_with_what_it_reads():
    text = """HloModule jit_f
ENTRY %main (x: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0} parameter(0), metadata={op_name="x"}
  %narrow = bf16[4]{0} convert(%x)
  %again = f32[4]{0} convert(%narrow)
  %add = f32[4]{0} add(%again, %x), metadata={op_name="jit(f)/jvp(mlp)/add"}
  %late = f32[4]{0} add(%again, %x), metadata={op_name="jit(f)/jvp(norm)/add"}
  %copy = f32[4]{0} copy(%late)
  ROOT %out = (f32[4], f32[4]) tuple(%add, %copy)
}
"""
    shares = modules.attribute(hlo.parse(text))
    mlp, norm = {("mlp", "forward"): 1.0}, {("norm", "forward"): 1.0}
    assert shares["narrow"] == shares["again"] == mlp
    assert shares["copy"] == norm


def test_loops_are_not_counted_beside_what_runs_in_them():
    text = """HloModule jit_f
%body (t: f32[4]) -> f32[4] {
  %t = f32[4]{0} parameter(0)
  ROOT %add = f32[4]{0} add(%t, %t), metadata={op_name="jit(f)/jvp(mlp)/add"}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %loop = f32[4]{0} while(%x), condition=%c, body=%body
}
"""
    module = hlo.parse(text)
    event = profiler.Event
    events = [
        event("loop", "jit_f", "0", 0.0, 4.0),
        event("add", "jit_f", "0", 1.0, 2.0),
        event("add", "jit_f", "1", 1.0, 2.0),  # of another device
        event("add", "jit_g", "0", 2.0, 3.0),  # of another program
    ]
    kept = modules._of_program(events, module, modules.attribute(module))
    assert [(e.op, e.device, e.start_s) for e in kept] == [("add", "0", 1.0)]


def test_parts_alone_are_those_of_the_loss_and_equal_layers_share_programs():
    params, tokens = lm.shapes(CONFIG), jax.ShapeDtypeStruct((2, 17), "int32")
    staged, labels = cut_scopes(
        lambda p, x: lm.loss(p, CONFIG, x),
        _nested(params),
        (tokens,),
        {part: part for part in modules.PARTS},
    )
    assert set(labels) == set(modules.PARTS)
    assert labels.count("mlp") == CONFIG.layers
    assert len({id(s.forward) for s in staged.stages}) < len(staged.stages)


def _nested(params):
    from jaxsys.core.tree import unflatten

    return unflatten(params) if any("." in name for name in params) else params


def test_a_part_that_is_run_n_times_counts_n_times():
    def loss(p, x):
        for _ in range(4):
            with jax.named_scope("mlp"):
                x = jnp.tanh(x @ p)
            with jax.named_scope("norm"):
                x = x / 2.0
        return jnp.sum(x)

    p, x = jnp.eye(4), jnp.ones((2, 4))
    found = ablate(loss, p, (x,), step=lambda: None, rounds=1, warmup=0)
    assert found.programs <= 2 * 4  # the last norm also sums
    assert set(found.seconds) == {
        (part, phase) for part in ("mlp", "norm") for phase in ("forward", "backward")
    }


@pytest.mark.slow
def test_a_row_has_both_ways_and_their_sums():
    row = dissect.measure(CONFIG, Technique(), TASK, {"model": "test"}, rounds=2)
    assert row["status"] == "ok"
    for part in modules.PARTS:
        for phase in ("forward", "backward"):
            assert row["parts"][f"{part} {phase}"]["alone"]["median_s"] > 0
    assert row["parts"]["optimizer"]["alone"]["runs"] == 2
    assert 0 < row["profiled_total"]["median"] < 2
    assert row["alone_total"]["median"] > 0
    assert row["groups"]["attention backward"]["alone"]["median_s"] > 0
    assert row["groups"]["mlp forward"]["profiled_s"] == pytest.approx(
        row["parts"]["mlp forward"]["profiled"]["median_s"]
    )
    assert row["flags"] == {"model": "test"}


def test_what_cannot_be_taken_apart_says_so():
    row = dissect.measure(CONFIG, Technique(attention="cudnn"), TASK, {})
    assert row["status"] == "not here"
    assert "cuDNN" in row["why"]
    with pytest.raises(UserError, match="one device"):
        dissect.measure(CONFIG, dataclasses.replace(Technique(), zero=2), TASK, {})
