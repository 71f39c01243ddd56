"""`jaxsys pipeline`: plans, tables, files, one sentence for a mistake; and the experiments."""

import json

import pytest

from jaxsys.cli import main
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.fleets import even_fleet
from jaxsys.pipeline.plan import Plan

TINY = ("--blocks", "2", "--width", "16", "--heads", "2", "--length", "8", "--batch", "4")


@pytest.fixture
def fleet(tmp_path):
    """A file of three unequal devices."""
    path = tmp_path / "fleet.json"
    even_fleet([3e9, 1e9, 2e9], memory_bytes=1e9).save(path)
    return str(path)


def test_plan_over_a_file(fleet, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--fleet", fleet, "--method", "exact", "--codec", "adatopk", "--ratio", "8")
    assert main(["pipeline", "plan", *TINY, *options, "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = Plan.from_json((out / "plan.json").read_text())
    assert plan == Plan.from_json(json.dumps(found["plan"]))
    assert plan.codec == "topk"
    assert len(found["stages"]) == plan.n_stages == 3
    assert found["source"] == "modelled"
    assert {(row["method"], row["codec"]) for row in found["rows"]} >= {
        ("equal-number", "dense"), ("exact", "adatopk")
    }  # fmt: skip
    assert Fleet.load(out / "fleet.json") == Fleet.load(fleet)
    assert (out / "plan.png").read_bytes()[1:4] == b"PNG"


def test_a_function_of_ones_own(fleet, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "import jax.numpy as jnp, numpy as np\n"
        "def model(batch, seed):\n"
        "    loss = lambda p, x: jnp.mean((jnp.tanh(x @ p['a']) @ p['b'] @ p['c']) ** 2)\n"
        "    init = lambda key: {k: jnp.eye(4) for k in 'abc'}\n"
        "    return loss, init, lambda step: (np.ones((batch, 4), np.float32),)\n"
    )
    options = ("--model", f"{tmp_path / 'own.py'}:model", "--fleet", fleet)
    assert main(["pipeline", "plan", *options, "--out", str(tmp_path)]) == 0
    assert "seconds of a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "options", "sentence"),
    [
        ("plan", ("--fleet", "nowhere.json"), "cannot be read"),
        ("plan", ("--model", "resnet19"), "model 'resnet19' is not known"),
        ("plan", ("--model", "nomodule:f"), "cannot be had"),
        ("plan", ("--fleet", "paper", "--micro-batches", "3"), "dealt out evenly"),
        ("plan", ("--fleet", "paper", "--method", "op-fence"), "needs a node"),
        ("plan", ("--clusters", "a,b"), "device numbers"),
        ("plan", ("--clusters", "0", "1"), "without the rates"),
        ("plan", ("--cores", "0.5"), "expected one for each"),
        ("plan", ("--devices", "0"), "at least one"),
        ("train", ("--standby", "2"), "2 of 2 devices stand by"),
        ("train", ("--steps", "0", "--fleet", "FLEET", "--devices", "3"), "steps is 0"),
        ("train", ("--fleet", "FLEET"), "each needs a process"),
        ("train", ("--fleet", "FLEET", "--devices", "3", "--plan", "no.json"), "cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(verb, options, sentence, fleet, tmp_path, capsys):
    given = [fleet if option == "FLEET" else option for option in options]
    own = () if "--model" in options else TINY
    assert main(["pipeline", verb, *own, *given, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in said


@pytest.mark.slow
def test_train_measures_plans_and_trains(tmp_path, capsys):
    options = ("--devices", "2", "--steps", "4", "--save-every", "2", "--micro-batches", "2")
    common = ("--method", "exact", "--threshold", "0", "--json", "--out", str(tmp_path))
    assert main(["pipeline", "train", *TINY, *options, *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["losses"]) == 4
    assert found["incidents"] == []
    assert found["stages"] == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_steps(load_experiment, tmp_path):
    """kill -9 in the middle of a step: the standby's run equals an uninterrupted one to the bit."""
    faults = load_experiment("pipeline/faults.py")
    plain, _, _ = faults.run(str(tmp_path / "plain"), 2, steps=9)
    struck = faults.run(str(tmp_path / "struck"), 2, victim=1, spares=(2,), steps=9)
    row = faults.row_of("worker 1", struck, plain.losses)
    assert row["named"] == "device 1"
    assert struck[0].losses == plain.losses
    assert row["steps made again"] <= faults.SAVE_EVERY
    assert row["noticed after, s"] < 10
