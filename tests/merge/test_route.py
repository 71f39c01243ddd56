"""From checkpoints to a folder that answers, through the command line."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.core.tree import flatten, unflatten
from jaxsys.merge.artefact import load_artefact
from jaxsys.merge.route import Route
from jaxsys.models import lm

TEXTS = {"up": "abcabdabeabf " * 60, "down": "zyxzywzyvzyu " * 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from jaxsys.data import LMTokenizer, save_tokenizer, train_bpe

    root = tmp_path_factory.mktemp("family")
    tokenizer = LMTokenizer(train_bpe("the cat sat on the mat", 256).tokenizer)
    config = lm.LMConfig("llama", 256, 16, 2, 2, 1, 8, 24, 64, tied=True)
    base = lm.init(jax.random.key(0), config)
    lm.save(root / "base", base, config)
    save_tokenizer(root / "base", tokenizer)
    for i, name in enumerate(TEXTS):
        rng = np.random.default_rng(i)
        moved = {p: x + 0.02 * rng.normal(size=x.shape) for p, x in flatten(base).items()}
        lm.save(root / name, unflatten({p: np.float32(x) for p, x in moved.items()}), config)
        (root / f"{name}.txt").write_text(TEXTS[name])
    return root


def run(capsys, *arguments) -> dict:
    assert main(["merge", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_build_answers_from_the_expert_of_the_prompts_task(folder, capsys):
    models = [folder / name for name in TEXTS]
    found = run(
        capsys, "route", "--base", folder / "base", "--models", *models, "--out", folder / "built",
        "--texts", *(folder / f"{name}.txt" for name in TEXTS), "--layers", "topk", "--value", 1,
        "--density", 0.5,
    )  # fmt: skip
    assert len(found["layers"]) == 1
    assert 1 < found["cost"]["ratio"] < 2
    files = {file.name for file in (folder / "built").iterdir()}
    assert {"config.json", "model.safetensors", "routed.json", "tokenizer.json"} <= files
    assert not [file for file in files if file.endswith((".pkl", ".pt", ".npy"))]
    for name, text in TEXTS.items():
        told = run(capsys, "route", folder / "built", "--prompt", text[:30], "--max-tokens", 2)
        assert max(told["weights"], key=told["weights"].get) == name
        assert told["weights"][name] == 1.0


def test_a_folder_serves_the_weights_that_are_asked_for(folder):
    from jaxsys.merge.mediator import LayerChoice, MediatorConfig
    from jaxsys.merge.route import RouterPlan, build_route

    config = MediatorConfig(choice=LayerChoice("absolute", -1.0), density=1.0, bits=32)
    models = [folder / name for name in TEXTS]
    plan = RouterPlan("entropy", tuple(folder / f"{name}.txt" for name in TEXTS), prompts=8)
    build_route(folder / "base", models, folder / "whole", config, plan)
    route = Route(folder / "whole")
    assert load_artefact(folder / "whole").router is None
    for i, model in enumerate(models):
        served = flatten(route.server.serve(weights=np.eye(2)[i]).params)
        for path, leaf in flatten(lm.load(model)[0]).items():
            np.testing.assert_allclose(served[path], leaf, atol=1e-6)
    told = route.answer("abcabd", max_tokens=1)
    assert sum(told.weights.values()) == pytest.approx(1.0)


def test_an_expert_with_other_positions_is_refused(folder, tmp_path):
    from jaxsys.core.errors import UserError
    from jaxsys.merge.route import RouterPlan, build_route

    params, config = lm.load(folder / "up")
    lm.save(tmp_path / "odd", params, replace(config, rope=lm.Rope(theta=500.0)))
    models = [folder / "down", tmp_path / "odd"]
    with pytest.raises(UserError, match="odd is configured otherwise"):
        build_route(folder / "base", models, tmp_path / "out", plan=RouterPlan("entropy"))


def test_conflicts_are_told_and_written(folder, capsys):
    out = folder / "report"
    models = [folder / name for name in TEXTS]
    found = run(capsys, "conflicts", "--base", folder / "base", "--models", *models, "--out", out)
    assert list(found["layers"]) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
    ]
    # Independent draws agree in sign as often as not.
    for layer in ("model.layers.0", "model.layers.1"):
        assert found["layers"][layer]["pairwise_sign"] == pytest.approx(0.5, abs=0.2)
    assert sorted(f.name for f in out.iterdir()) == [
        "conflicts.json",
        "conflicts.md",
        "conflicts.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["route"], "neither a build nor a question"),
        (["route", "nowhere"], "nothing to answer"),
        (["route", "nowhere", "--prompt", "a"], "holds no routed merge"),
        (["route", "--base", "{base}", "--models", "{up}", "{down}", "--out", "{out}"], "0 texts"),
        (["conflicts", "--base", "{base}", "--models", "{up}"], "takes two"),
        (["conflicts", "--base", "{base}", "--models", "{up}", "nowhere"], "nowhere is neither"),
    ],
)
def test_mistakes_are_told_in_one_sentence(folder, capsys, arguments, told):
    places = {name: folder / name for name in ("base", "up", "down", "out")}
    status = main(["merge", *(a.format(**places) for a in arguments)])
    error = capsys.readouterr().err
    assert status == 2
    assert told in error
    assert len(error.strip().splitlines()) == 1
