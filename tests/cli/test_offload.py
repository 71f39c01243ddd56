"""`jaxsys offload`: a plan that can be read before anything is loaded, text alone on stdout."""

import json

import jax
import pytest

from jaxsys.cli import main
from jaxsys.data import python_docs, train_bpe
from jaxsys.data.tokenizer import LMTokenizer, save_tokenizer
from jaxsys.models import lm
from jaxsys.offload.types import Machine, Plan, Processor

CONFIG = lm.LMConfig("mixtral", 300, 32, 1, 4, 2, 8, 16, 64, experts=4, experts_per_token=2,
                     expert_width=16, eos_ids=(0,))  # fmt: skip
# A slow CPU and link, so that every resource has something to do.
MACHINE = Machine(
    Processor(1e6, 1e9, 2**30), Processor(1e8, 1e10, 2**30), link_bytes_per_s=1e6, name="invented"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    fresh = lm.init(jax.random.key(0), CONFIG)
    lm.save(path, jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, fresh), CONFIG)
    bpe = train_bpe(python_docs()[:20_000], 300).tokenizer
    save_tokenizer(path, LMTokenizer(bpe, bos_id=0, eos_id=0))
    (path / "machine.json").write_text(MACHINE.to_json())
    return path


def _run(capfd, folder, *argv):
    capfd.readouterr()
    machine = str(folder / "machine.json")
    status = main(["offload", argv[0], str(folder), *argv[1:], "--machine", machine])
    return status, capfd.readouterr()


def test_plan_then_generate(folder, capfd, tmp_path):
    common = ("--accelerator", "virtual", "--budget", "40%")
    status, told = _run(capfd, folder, "plan", *common, "--out", str(tmp_path), "--context", "24")
    assert status == 0
    assert "| expert" in told.out
    assert "invented" in told.out
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    assert 0 < plan.accelerator_bytes <= plan.budget_bytes
    own = Machine.from_json((tmp_path / "machine.json").read_text())
    assert own == MACHINE

    asked = ("--prompt", "The module", "--max-tokens", "5", *common)
    status, told = _run(capfd, folder, "generate", *asked, "--plan", str(tmp_path / "plan.json"))
    assert status == 0
    assert "a step, one task at a time: CPU" in told.err
    assert "found them resident" in told.err
    # The same text as the whole program's, alone on standard output.
    assert main(["lm", "generate", str(folder), *asked[:4]]) == 0
    assert capfd.readouterr().out == told.out
    status, again = _run(capfd, folder, "generate", *asked, "--cache", "lru", "--early")
    assert status == 0
    assert again.out == told.out


@pytest.mark.slow
def test_a_report_is_one_object(folder, capfd):
    asked = ("--prompt", "The module", "A list", "--max-tokens", "5", "--batch", "2")
    more = ("--accelerator", "virtual", "--budget", "40%", "--json")
    status, told = _run(capfd, folder, "generate", *asked, *more)
    found = json.loads(told.out)
    assert status == 0
    assert len(found["texts"]) == len(found["ended"]) == 2
    assert found["step"]["cpu_s"] > 0
    assert found["resident_bytes"] > 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("plan", "--accelerator", "virtual", "--budget", "3XB"), "'3XB' is no amount of memory"),
        (("plan", "--accelerator", "virtual", "--budget", "100B"), "more; raise the budget"),
        (("generate", "--prompt", "x", "--plan", "no.json"), "no.json cannot be read"),
        (("generate", "--prompt", "x", "--max-tokens", "99"), "is longer than the cache can be"),
        (
            ("generate", "--prompt", "x", "--max-tokens", "2", "--cache", "lru"),
            "has no accelerator",
        ),
    ],
)
def test_mistakes(folder, capfd, argv, words):
    status, told = _run(capfd, folder, *argv)
    assert status == 2
    assert words in told.err
    assert "Traceback" not in told.err
