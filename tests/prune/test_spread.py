"""Two processes prune a checkpoint together, after a run that was stopped, as one does alone."""

import sys

import numpy as np
import pytest

from jaxsys.cluster import launch
from jaxsys.core.checkpoint import read_safetensors
from jaxsys.data import load_tokenizer, python_docs
from jaxsys.models import lm
from jaxsys.prune import Pattern, calibration, find_method, prune_checkpoint


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_stopped(tmp_path):
    path = lm.find_model("tiny")
    tokens = calibration(load_tokenizer(path), python_docs(), 2, 32, seed=0)
    method, pattern = find_method("sparsegpt"), Pattern(0.5)
    whole = prune_checkpoint(path, tmp_path / "whole", tokens, method, pattern)

    def stop(i, n, found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(path, tmp_path / "part", tokens, method, pattern, on_block=stop)
    lines = []
    command = [sys.executable, "-m", "jaxsys", "prune", "run", "tiny", "--metric", "sparsegpt"]
    command += ["--sequences", "2", "--length", "32", "--out", str(tmp_path / "part"), "--json"]
    report = launch(command, 2, on_line=lambda i, line: lines.append(line))
    assert report.exit_code == 0, "\n".join(lines[-20:])
    one, two = (read_safetensors(tmp_path / name) for name in ("whole", "part"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert sum('"sparsity": 0.5' in line for line in lines) == 1
    assert whole is not None
    assert whole.sparsity == 0.5
