"""Files: every form reads back, is smaller, resumes; sparse products; hostile parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.cli.prune import CompareCommand
from jaxsys.core.checkpoint import read_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.models import lm
from jaxsys.prune import (
    METHODS,
    Method,
    Pattern,
    lm_blocks,
    load_pruned,
    prune_checkpoint,
    sequential,
    sparse_weight,
)
from jaxsys.prune.masks import nm_mask, row_mask
from jaxsys.prune.run import PARTS
from jaxsys.prune.storage import decode, encode, pack_bits, unpack_bits

CONFIG = lm.LMConfig("llama", 31, 16, 2, 2, 1, 8, 24, 32)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)
RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    lm.save(folder, lm.init(jax.random.key(0), CONFIG), CONFIG)
    return folder


@pytest.fixture(scope="module")
def expected(model):
    """What pruning in memory gives."""
    params, _ = lm.load(model)
    flat = flatten(params)
    tree, masks = dict(flat), {}
    for found in sequential(lm_blocks(CONFIG), flat, TOKENS, Method(), Pattern(nm=(2, 4))):
        tree, masks = tree | found.tensors, masks | found.masks
    return tree, masks


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bits_pack_and_unpack(bits):
    values = RNG.integers(0, 2**bits, 37)
    np.testing.assert_array_equal(unpack_bits(pack_bits(values, bits), bits, 37), values)


@pytest.mark.parametrize("form", ["mask", (2, 4), (4, 8), (1, 3), (1, 16)])
def test_matrices_come_back_and_are_smaller(form):
    weight = RNG.standard_normal((5, 48)).astype(np.float32)
    nm = None if form == "mask" else form
    permutation = RNG.permutation(48) if nm == (2, 4) else None
    scores = jnp.asarray(np.abs(weight) if permutation is None else np.abs(weight)[:, permutation])
    mask = np.asarray(row_mask(scores, 0.5) if nm is None else nm_mask(scores, *nm))
    if permutation is not None:
        mask = mask[:, np.argsort(permutation)]
    parts = encode(np.where(mask, weight, 0), mask, nm, permutation)
    dense, found = decode(parts, weight.shape, nm)
    np.testing.assert_array_equal(dense, np.where(mask, weight, 0))
    np.testing.assert_array_equal(found, mask)
    kept = mask.mean()
    size = sum(part.nbytes for suffix, part in parts.items() if suffix != "permutation")
    assert size <= weight.nbytes * (kept + 4 * kept / 32 + 1 / 32) + 8


def test_parts_that_do_not_fit_are_refused():
    weight, mask = np.ones((2, 8), np.float32), np.tile([True, False, True, False], (2, 2))
    good = encode(weight, mask, (2, 4))
    bad = [
        good | {"values": good["values"][:1]},
        good | {"index": good["index"][:1]},
        good | {"index": np.zeros_like(good["index"])},
        good | {"permutation": np.zeros(8, np.int32)},
    ]
    for parts in bad:
        with pytest.raises(UserError, match="do not fit together"):
            decode(parts, (2, 8), (2, 4))
    plain = encode(weight, mask)
    with pytest.raises(UserError, match="do not fit together"):
        decode(plain | {"values": plain["values"][:-1]}, (2, 8))
    with pytest.raises(UserError, match="does not keep 1 of every 4"):
        encode(weight, mask, (1, 4))


def test_a_sparse_weight_multiplies_like_a_dense_one():
    weight = RNG.standard_normal((6, 10)).astype(np.float32)
    mask = RNG.random((6, 10)) < 0.4
    mask[2] = False
    sparse = sparse_weight(weight, mask)
    x = RNG.standard_normal((3, 4, 10)).astype(np.float32)
    found = jax.jit(lambda w, x: lm.linear({"weight": w}, x))(sparse, x)
    np.testing.assert_allclose(found, x @ np.where(mask, weight, 0).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sparse.dense(), np.where(mask, weight, 0))


@pytest.mark.parametrize("form", ["dense", "packed", "nm"])
def test_from_disk_to_disk_is_as_in_memory(form, model, expected, tmp_path):
    tree, masks = expected
    done = prune_checkpoint(model, tmp_path, TOKENS, Method(), Pattern(nm=(2, 4)), form=form)
    assert done.sparsity == 0.5
    if form == "dense":
        found, config = lm.load(tmp_path)
    else:
        found, read, config = load_pruned(tmp_path)
        assert read.keys() == masks.keys()
        for name, mask in masks.items():
            np.testing.assert_array_equal(read[name], mask)
        assert done.bytes < done.dense_bytes  # most of so small a file is its header
    assert config == CONFIG
    for name, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, tree[name])
    assert not (tmp_path / PARTS).exists()
    assert len(json.loads((tmp_path / "prune.json").read_text())["rows"]) == 14


def test_a_killed_run_goes_on_and_another_is_refused(model, expected, tmp_path):
    class Killed(Exception):
        pass

    def kill(i, n, found):
        raise Killed

    arguments = (model, tmp_path, TOKENS, Method(), Pattern(nm=(2, 4)))
    with pytest.raises(Killed):
        prune_checkpoint(*arguments, on_block=kill)
    with pytest.raises(UserError, match="another pattern"):
        prune_checkpoint(model, tmp_path, TOKENS, Method(), Pattern(0.5))
    told = []
    prune_checkpoint(*arguments, on_block=lambda i, n, found: told.append(found is None))
    assert told == [True, False]
    for name, leaf in read_safetensors(tmp_path).items():
        np.testing.assert_array_equal(leaf, expected[0][name])


def test_the_command_prunes_and_compares(tmp_path, capsys):
    out = tmp_path / "pruned"
    common = ["tiny", "--sequences", "2", "--length", "16", "--json"]
    arguments = ["prune", "run", *common, "--out", str(out), "--metric", "W*sqrt(X)"]
    assert main([*arguments, "--sparsity", "0.6", "--form", "packed", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert 0.58 < found["sparsity"] <= 0.6
    assert found["bytes"] < found["dense_bytes"]
    assert "on the device" in said.err
    tree, _, config = load_pruned(out)
    assert np.isfinite(lm.apply(tree, config, TOKENS[:1]).logits.astype(jnp.float32)).all()

    table = ["prune", "compare", *common, "--out", str(tmp_path / "table"), "--windows", "1"]
    table += ["--methods", "dense", "magnitude", "dsnot", "--patterns", "2:4", "16x16"]
    assert main(table) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "magnitude", "dsnot", "magnitude"]
    assert all(np.isfinite(row["perplexity"]) for row in rows)
    assert main(table) == 0  # every row is known
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert (tmp_path / "table" / "compare.png").exists()
    assert main([*table, "--windows", "2"]) == 2  # those rows are of other windows
    assert "for windows it has 1 and this one 2" in capsys.readouterr().err


def test_all_methods_are_compared_unless_told_otherwise():
    assert set(CompareCommand(model="tiny").methods) == {"dense", *METHODS}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--metric", "W*Y"], "'Y' at position 3"),
        (["--sparsity", "1.5"], "lies in [0, 1)"),
        (["--pattern", "2:7"], "divide the 192 inputs of model.layers.0.self_attn.q_proj"),
        (["--length", "9999999"], "which is 0 windows"),
        (["--metric", "exp(exp(exp(W+9)))"], "are not finite numbers"),
        (["--form", "nm"], "choose a pattern such as 2:4"),
        (["--layers", "nothing*"], "matches no layer"),
    ],
)
def test_mistakes_are_one_sentence(more, told, tmp_path, capsys):
    base = ["prune", "run", "tiny", "--out", str(tmp_path), "--sequences", "1", "--length", "8"]
    assert main([*base, *more]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_a_model_in_memory_is_left_as_it_was(model):
    params, _ = lm.load(model)
    before = {name: np.array(leaf) for name, leaf in flatten(params).items()}
    list(sequential(lm_blocks(CONFIG), flatten(params), TOKENS, Method(), Pattern(0.5)))
    for name, leaf in flatten(unflatten(flatten(params))).items():
        np.testing.assert_array_equal(leaf, before[name])
