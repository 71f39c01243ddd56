"""`jaxsys moe train` from its options to files."""

import json

from jaxsys.cli import main
from jaxsys.models import lm

SMALL = [
    "--width", "8", "--heads", "2", "--depth", "1", "--hidden", "8", "--experts", "8", "--length",
    "16", "--batch", "1", "--steps", "2", "--forward", "2", "--gate", "gshard", "--json",
]  # fmt: skip


def test_train_writes_log_checkpoint_and_a_model(tmp_path, capfd):
    assert main(["moe", "train", *SMALL, "--out", str(tmp_path)]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["form"] == "mixtral"
    assert len(result["losses"]) == 2
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["valid_loss"] == result["valid_loss"]
    assert lm.load(tmp_path / "model")[1].experts_per_token == 2


def test_a_plan_that_is_not_there_is_one_sentence(tmp_path, capfd):
    assert main(["moe", "train", *SMALL, "--plan", "nowhere.json", "--out", str(tmp_path)]) == 2
    assert "the plan 'nowhere.json' cannot be read" in capfd.readouterr().err
