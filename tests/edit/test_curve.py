"""The grid of cells: what is repeated, what is kept, and that a stopped run goes on the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.checkpoint import write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer
from jaxsys.edit.contract import Answering, Editable, Edited, Info, Method, Record, Request
from jaxsys.edit.curve import Chosen, CurveConfig, Grid, abilities, spread
from jaxsys.edit.curve_figure import curve_table, draw_curve
from jaxsys.edit.evaluation import EvaluationConfig
from jaxsys.edit.keep import keep, restore
from jaxsys.evaluate import Choices, Prompt
from jaxsys.evaluate.protocol import from_forward
from jaxsys.evaluate.tasks import Task
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 256, 16, 1, 2, 1, 8, 16, 64)
MODEL = Editable(CONFIG, ByteTokenizer())
PATH = ("model", "layers", "0", "mlp", "down_proj")
RECORDS = [
    Record(Request(f"{name} is", name, "b", "a"), neighbourhood=((f"{name}'s", "c"),))
    for name in ("Ann", "Bob", "Cid", "Dan")
]
TASKS = [
    Task("pick", tuple(Choices.ask(f"Q{i}", ["x", "y"], i % 2) for i in range(4)), "as it is"),
    Task("say", (Prompt("1+1=", "2"),), "as it is", max_tokens=3),
]
HOW = CurveConfig(
    counts=(0, 1, 2, 4), probed=2, evaluation=EvaluationConfig(answer_tokens=3, fluency_tokens=0)
)


@pytest.fixture(scope="module")
def params():
    return lm.init(jax.random.key(0), CONFIG)


class Shift:
    """A method with state, whose edits depend on those before; counts its calls."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def edit(self, model, config, params, requests, stats=None, state=None):
        state = {"seen": jnp.zeros(3), "names": ()} if state is None else state
        self.calls.append(len(requests))
        if self.fail_at is not None and len(state["names"]) >= self.fail_at:
            raise UserError("the change is not finite")
        size = sum(len(r.prompt) for r in requests) / 100
        seen = state["seen"] + size
        part = params
        for name in PATH:
            part = part[name]
        leaf = part["weight"] + jnp.outer(jnp.arange(16.0), jnp.ones(16)) * seen[0] * 0.01
        changed = {"weight": leaf}
        for depth in range(len(PATH) - 1, -1, -1):
            outer = params
            for name in PATH[:depth]:
                outer = outer[name]
            changed = {**outer, PATH[depth]: changed}
        names = (*state["names"], *(r.subject for r in requests))
        return Edited(changed, {"seen": seen, "names": names}, Info({}, {}))

    def chosen(self, name="shift", settings=0):
        return Chosen(name, Method(self.edit, dict), settings)


def figures(cells):
    return [{k: v for k, v in cell.items() if not k.endswith("_s")} for cell in cells]


def grid(params, folder=None, tell=None, how=HOW):
    return Grid(MODEL, params, RECORDS, TASKS, how, folder=folder, tell=tell)


@pytest.fixture(scope="module")
def whole(params):
    return grid(params).run([Shift().chosen()])


def test_cells_say_what_was_measured(whole):
    assert [(c["method"], c["n"]) for c in whole] == [
        ("unedited", 0),
        ("shift", 1),
        ("shift", 2),
        ("shift", 4),
    ]
    last = whole[-1]
    assert last["edit"]["efficacy"]["n"] == 2
    assert set(last["abilities"]) == {"pick", "say"}
    assert 0.5 <= last["abilities"]["pick"]["constant"] <= 1
    assert last["abilities"]["pick"]["chance"] == 0.5
    assert "muted" in last["abilities"]["say"]
    json.dumps(whole)


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_a_stopped_run_goes_on_the_same(stop_at, params, whole, tmp_path):
    class Stop(Exception):
        pass

    def stop(cell):
        if cell["n"] == stop_at:
            raise Stop

    with pytest.raises(Stop):
        grid(params, tmp_path, stop).run([Shift().chosen()])
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"model": "mod')  # cut by the kill
    (tmp_path / "cells.jsonl").write_text((tmp_path / "cells.jsonl").read_text() + "\n")
    again = Shift()
    cells = grid(params, tmp_path).run([again.chosen()])
    assert figures(cells) == figures(whole)
    assert sum(again.calls) == 4 - stop_at  # no edit is made twice
    nothing = Shift()
    assert figures(grid(params, tmp_path).run([nothing.chosen()])) == figures(whole)
    assert nothing.calls == []


def test_other_settings_are_other_cells(params, tmp_path):
    how = CurveConfig(counts=(1,), probed=1, evaluation=HOW.evaluation)
    for settings in (0, 1, 1):
        shift = Shift()
        found = grid(params, tmp_path, how=how).run([shift.chosen(settings=settings)])
        assert [c["n"] for c in found] == [1]
    assert shift.calls == []
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 2


def test_all_at_once_begins_from_the_unedited_model(params):
    shift = Shift()
    how = CurveConfig(counts=(2, 4), batch=0, probed=1, evaluation=HOW.evaluation)
    grid(params, how=how).run([shift.chosen()])
    assert shift.calls == [2, 4]
    shift = Shift()
    how = CurveConfig(counts=(2, 4), batch=3, probed=1, evaluation=HOW.evaluation)
    grid(params, how=how).run([shift.chosen()])
    assert shift.calls == [2, 2]  # a batch ends where the model is looked at


def test_a_method_that_fails_is_written_down_and_left(params, tmp_path):
    for calls in ([1, 1, 1], []):
        shift = Shift(fail_at=2)
        cells = grid(params, tmp_path).run([shift.chosen()])
        assert shift.calls == calls
        assert cells[-1]["failed"] == "the change is not finite"
        assert cells[-1]["n"] == 4
    table = curve_table(cells)
    assert table[-1] == {"method": "shift", "edits": 4, "failed": "the change is not finite"}
    assert table[1]["s per edit"] >= 0
    draw_curve(cells, tmp_path / "curve.png", "tiny")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_a_mute_model_is_seen_to_be_mute():
    spaces = from_forward(lambda p, t: 9 * jax.nn.one_hot(0 * t + 32, 256), {}, 256, 64)
    found = abilities(Answering(spaces), ByteTokenizer(), TASKS)
    assert found["say"]["muted"] == found["say"]["empty"] == 1.0
    assert found["pick"]["constant"] == 1.0
    # What is put before prompts stands before questions too.
    told = Answering(from_forward(lambda p, t: jax.nn.one_hot(t + 1, 256), {}, 256, 64))
    told = told._replace(rewrite=lambda prompt: prompt + "1")
    assert abilities(told, ByteTokenizer(), TASKS)["say"]["value"] == 0.0
    assert abilities(told, ByteTokenizer(), [Task("t", (Prompt("=", "234"),), "", 3)])["t"]["value"]


def test_probed_facts_are_spread_and_end_with_the_newest():
    assert spread(0, 3) == []
    for n, most in ((1, 5), (7, 3), (100, 50)):
        found = spread(n, most)
        assert len(found) == min(n, most)
        assert found[-1] == n - 1


def test_mistakes_are_told(params):
    with pytest.raises(UserError, match="there are 4 records"):
        grid(params, how=CurveConfig(counts=(0, 5)))
    with pytest.raises(UserError, match="batch is -1"):
        CurveConfig(batch=-1)
    with pytest.raises(UserError, match="no cell with edits"):
        draw_curve([], "a.png")


def test_a_kept_state_comes_back(tmp_path):
    base = {"a": {"w": jnp.arange(4.0)}, "b": jnp.ones(2)}
    edited = {"a": {"w": jnp.arange(4.0) * 2}, "b": base["b"]}
    state = {
        "memory": [Request("Rome is in", "Rome", "France"), None],
        3: (np.arange(3), jnp.eye(2), "text", True, 0.5),
    }
    keep(tmp_path, edited, base, state, {"n": 3})
    found = restore(tmp_path, base)
    assert found.notes == {"n": 3}
    assert found.state["memory"] == state["memory"]
    assert isinstance(found.state["memory"][0], Request)
    assert isinstance(found.state[3][0], np.ndarray)
    assert isinstance(found.state[3][1], jax.Array)
    assert found.state[3][2:] == ("text", True, 0.5)
    assert found.params["b"] is base["b"]
    assert (found.params["a"]["w"] == edited["a"]["w"]).all()
    with pytest.raises(UserError, match="not of this model"):
        restore(tmp_path, {"b": base["b"]})


@pytest.mark.parametrize(
    "state",
    [
        {"class": "os:system", "fields": [{"value": "true"}]},
        {"class": "jaxsys.edit.keep:keep", "fields": []},
        {"class": "jaxsys.edit.nothing:None", "fields": []},
        {"array": "nowhere", "on": "host"},
        [],
    ],
)
def test_a_foreign_state_makes_nothing(state, tmp_path):
    arrays = {"empty": np.zeros(1, np.float32)}
    fields = {"state": json.dumps(state), "notes": "{}"}
    write_safetensors(tmp_path, arrays, arrays.get, metadata=fields)
    with pytest.raises(UserError, match="no kept sequence"):
        restore(tmp_path, {})


def test_a_state_that_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds a object"):
        keep(tmp_path, {}, {}, {"a": object()}, {})
