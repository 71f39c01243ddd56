"""Writers: the same rows arrive everywhere; a missing package is one sentence."""

import json
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.train import logs

ROWS = [
    {"step": 0, "loss": np.float32(2.5), "gamma": [1.0, 2.0], "strategy": "local", "none": None},
    {"step": 7, "loss": jnp.float32(1.5), "bytes": {"sent": 10}, "done": True},
]
NUMBERS = {
    ("loss", 0, 2.5),
    ("gamma/0", 0, 1.0),
    ("gamma/1", 0, 2.0),
    ("loss", 7, 1.5),
    ("bytes/sent", 7, 10.0),
}


def test_json_lines_survive_without_closing_and_append(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    for row in ROWS:
        logs.JsonLines(path).write(row)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["loss"] for r in read] == [2.5, 1.5]
    assert read[0]["gamma"] == [1.0, 2.0]


def test_tensorboard_events_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    writer = logs.TensorBoard(tmp_path)
    for row in ROWS:
        writer.write(row)
    writer.close()
    found = set()
    for path in tmp_path.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # records: length, its checksum, payload, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(v.tag, event.step, v.simple_value) for v in event.summary.value}
            at += 16 + size
    assert found == NUMBERS


def test_weights_and_biases_gets_numbers_at_their_steps(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.extend((n, step, v) for n, v in numbers.items()),
        finish=lambda: calls.append("finished"),
    )
    module = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    writer = logs.WeightsAndBiases("jaxsys", {"lr": 0.1}, tmp_path)
    for row in ROWS:
        writer.write(row)
    writer.close()
    assert calls[0] == {"project": "jaxsys", "config": {"lr": 0.1}, "dir": tmp_path}
    assert set(calls[1:-1]) == NUMBERS
    assert calls[-1] == "finished"


def test_tee_writes_and_closes_all():
    class Memory:
        def __init__(self):
            self.rows = []

        def write(self, row):
            self.rows.append(row)

        def close(self):
            self.rows.append("closed")

    one, two = Memory(), Memory()
    tee = logs.Tee(one, two)
    tee.write({"step": 1})
    tee.close()
    assert one.rows == two.rows == [{"step": 1}, "closed"]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboardX", lambda folder: logs.TensorBoard(folder)),
        ("wandb", lambda folder: logs.WeightsAndBiases("p", {}, folder)),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch, tmp_path, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install"):
        make(tmp_path)
