"""The contract refuses what makes no sense, and plans survive being written."""

import pytest

from jaxsys.core.errors import UserError
from jaxsys.moe import Axes, Capacity, Dims, LayerPlan, MoEPlan


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Dims(0, 4, 4), "width is 0"),
        (lambda: Dims(4, 4, 0), "experts is 0"),
        (lambda: Capacity(0), "leaves no slot"),
        (lambda: Capacity(-1.0), "leaves no slot"),
        (lambda: Capacity(float("nan")), "leaves no slot"),
        (lambda: Capacity(1.0, "random"), "drop policy is 'random'"),
        (lambda: LayerPlan(0, 1), "degrees are 0 and 1"),
        (lambda: LayerPlan(1, 1, -1), "gradient_bytes"),
        (lambda: MoEPlan.from_json("[]"), "no plan of MoE layers"),
        (lambda: MoEPlan.from_json("{"), "no plan of MoE layers"),
        (lambda: MoEPlan.from_json('{"layers": [{"forwards": 2}]}'), "forwards"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(make, word):
    with pytest.raises(UserError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_plans_are_hashable_and_come_back_from_json():
    plan = MoEPlan((LayerPlan(2, 8, 4096, 0.25), LayerPlan()), 0.5)
    assert {plan: 1}[MoEPlan.from_json(plan.to_json())] == 1


def test_tokens_are_sharded_over_every_named_axis():
    assert Axes().tokens == ()
    assert Axes("data", ("node", "local"), "tensor").tokens == ("data", "node", "local", "tensor")
