"""Train a MEND editor on facts (section 3.3), resumable.

    L = c_e · −log p_edited(target | paraphrase) + c_loc · KL(p_base ‖ p_edited) on other facts

The model is frozen and its blocks below the edited ones see every text once, before training: a
step then costs the last few blocks only. Reconstruction: where a fact has no paraphrase, its own
prompt takes that place, and the two are weighed equally where it has one; the locality text is the
fact's neighbourhood, where the authors take unrelated questions.

Reference: arXiv 2110.11309.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.data.stream import shuffled
from jaxsys.edit.contract import Editable, Record, Request
from jaxsys.edit.editable import Encoded, encode
from jaxsys.edit.mend import gradient_pairs
from jaxsys.edit.mend_editor import Editor, edited_paths, init_editor, shape_name, transform
from jaxsys.edit.rows import Answers, log_probs, mean_nll, rows_of
from jaxsys.models import lora
from jaxsys.models.lm.families import layout_of
from jaxsys.train.loop import check_finite, iterate


@dataclass(frozen=True)
class MENDTraining:
    """Set the training of an editor; the authors' values, whose runs take up to 100,000 steps.

    Attributes:
      steps: of the whole run.
      batch: facts a step, whose gradients for the editor are averaged.
      lr: of Adam for the networks.
      lr_rates: of Adam for α.
      clip: bound on the global norm of the gradient.
      c_edit: c_e.
      c_loc: c_loc.
      rank: r of the networks.
      blocks: how many of the last blocks are edited.
      seed: of the start and of the order.
      save_every: steps between checkpoints.

    Raises:
      UserError: for numbers that are not positive.

    >>> MENDTraining(steps=100).batch
    10
    """

    steps: int = 100_000
    batch: int = 10
    lr: float = 1e-6
    lr_rates: float = 1e-4
    clip: float = 100.0
    c_edit: float = 0.1
    c_loc: float = 1.0
    rank: int = 1920
    blocks: int = 3
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        values = (self.steps, self.batch, self.lr, self.lr_rates, self.clip, self.rank, self.blocks)
        if min(values) <= 0:
            raise UserError(f"{self} has a number that is not positive; correct it")


class Prepared(NamedTuple):
    """Hold facts before the first edited block: the edit, its paraphrase and its neighbour.

    Attributes:
      streams: [3, N, T, D] residual streams.
      answers: with leaves [3, N, M].
      has: [3, N] 1.0 where a fact has such a text.

    >>> Prepared(np.zeros((3, 1, 8, 4)), None, np.ones((3, 1))).has.sum()
    np.float64(3.0)
    """

    streams: Any
    answers: Any
    has: Any


def prepare(
    model: Editable,
    params: Any,
    records: Sequence[Record],
    blocks: int = 3,
    *,
    tokens: int = 32,
    rows_per_call: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Run the blocks below the edited ones over all texts, once.

    Args:
      model: configuration and tokenizer.
      params: of the model.
      records: facts; those with a text of more than ``tokens`` tokens are left out.
      blocks: how many of the last blocks are edited.
      tokens: of a row, T.
      rows_per_call: rows of one program.
      progress: called with (rows done, rows in all).

    Raises:
      UserError: if no fact is left.

    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 256, 8, 1, 2, 2, 4, 12, 64)
    >>> model, params = Editable(config, ByteTokenizer()), lm.init(jax.random.key(0), config)
    >>> fact = Record(Request("Rome is", "Rome", "big"))
    >>> prepare(model, params, [fact], 1, tokens=16, rows_per_call=1).has.tolist()
    [[1.0], [0.0], [0.0]]
    """
    layer = model.config.layers - blocks
    texts, has = [], []
    for record in records:
        three, present = _texts(model, record)
        if max(len(row.ids) - 1 for row in three) <= tokens:
            texts.append(three)
            has.append(present)
    if not texts:
        raise UserError(
            f"no fact is left of {len(records)} whose texts have at most {tokens} tokens; give "
            "more facts, or raise tokens"
        )
    rows = [text for part in zip(*texts, strict=True) for text in part]
    width = max(len(row.ids) - row.split for row in rows)
    streams, answers = [], []
    for start in range(0, len(rows), rows_per_call):
        part = rows[start : start + rows_per_call]
        # A last, smaller part is filled up, so that one program serves all.
        full = part + part[:1] * (rows_per_call - len(part))
        laid = rows_of(model, params, full, layer, at_least=(tokens, width))
        streams.append(np.asarray(laid.x)[: len(part)])
        kept: list[Any] = [np.asarray(a)[: len(part)] for a in laid.answers]
        answers.append(Answers(*kept))
        if progress is not None:
            progress(start + len(part), len(rows))

    def by_kind(*parts: np.ndarray) -> np.ndarray:
        whole = np.concatenate(parts)
        return whole.reshape(3, len(texts), *whole.shape[1:])

    return Prepared(
        by_kind(*streams), jax.tree.map(by_kind, *answers), np.asarray(has, np.float32).T
    )


def _texts(model: Editable, record: Record) -> tuple[list[Encoded], list[float]]:
    request = record.request
    edit = encode(model, request)
    three, present = [edit], [1.0]
    if record.paraphrases:
        prompt = record.paraphrases[0]
        three.append(encode(model, Request(prompt, prompt.strip(), request.target)))
    if record.neighbourhood:
        prompt, answer = record.neighbourhood[0]
        near = encode(model, Request(prompt, prompt.strip(), answer))
    present += [float(bool(record.paraphrases)), float(bool(record.neighbourhood))]
    three += [edit] * (2 - len(three))
    return [*three, near if record.neighbourhood else edit], present


class Trained(NamedTuple):
    """Hold what training gave.

    Attributes:
      editor: the networks.
      rows: what each step of this call said: ``loss``, ``edit`` (nats per token), ``kl`` (nats),
        ``before`` (nats per token of the unedited model).

    >>> Trained(None, ()).rows
    ()
    """

    editor: Any
    rows: tuple[dict[str, float], ...]


def train_editor(
    model: Editable,
    params: Any,
    prepared: Prepared,
    training: MENDTraining,
    *,
    store: RunStore | None = None,
    on_step: Callable[[int, dict[str, float]], bool | None] | None = None,
    meta: dict[str, Any] | None = None,
) -> Trained:
    """Train an editor, from the newest checkpoint of a store if it has one.

    Args:
      model: configuration.
      params: of the model; frozen.
      prepared: from `prepare`, with the same blocks.
      training: see `MENDTraining`.
      store: where to save and resume.
      on_step: called with each step's number and figures; True ends the run early, after the next
        checkpoint is written.
      meta: what else identifies the run, as JSON; a checkpoint of another is refused.

    Raises:
      UserError: if the checkpoint is of another run.
      NonFiniteError: if the loss stops being a number.

    >>> ready = prepare(model, params, records, blocks=3)  # doctest: +SKIP
    >>> trained = train_editor(model, params, ready, MENDTraining(steps=1000))  # doctest: +SKIP
    >>> save_editor("editor", trained.editor)  # doctest: +SKIP
    """
    config = model.config
    editor = init_editor(jax.random.key(training.seed), config, training.rank, training.blocks)
    paths = edited_paths(config, training.blocks)
    names = {path: shape_name(params, config, path) for path in paths}
    optimizer = _optimizer(training.lr, training.lr_rates, training.clip)
    state = {"editor": editor, "optimizer": optimizer.init(_learned(editor))}
    identity = {"training": {**asdict(training), "steps": 0}, "meta": meta or {}}
    start = 0
    if store is not None and (latest := store.latest()) is not None:
        state, found = store.restore(latest, state)
        if found != identity:
            raise UserError(
                f"{store.directory} holds the training of another editor; expected the same "
                "settings and data; choose another directory"
            )
        start = latest + 1
    fixed = (optimizer.update, config, config.layers - training.blocks, tuple(paths.items()))
    # Facts stay on the host: a step moves a batch, not all.
    weights = (training.c_edit, training.c_loc)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return _step(fixed, tuple(names.items()), weights, state, params, batch)

    def batch_at(i: int) -> Any:
        n = prepared.has.shape[1]
        chosen = shuffled(n, i * training.batch, training.batch, training.seed)
        return jax.tree.map(lambda a: jnp.asarray(np.swapaxes(a[:, chosen], 0, 1)), prepared)

    rows = []
    run = iterate(
        step,
        state,
        batch_at,
        start=start,
        steps=training.steps,
        save_every=training.save_every,
        store=store,
        meta=identity,
        guard=lambda i, info: check_finite(i, info["loss"]),
    )
    stop = False
    for i, after, info in run:
        state = after
        rows.append({name: float(value) for name, value in info.items()})
        stop = stop or bool(on_step and on_step(i, rows[-1]))
        if stop and (i + 1) % training.save_every == 0:
            break
    return Trained(state["editor"], tuple(rows))


def _learned(editor: Editor) -> Any:
    return {"nets": editor.nets, "modes": editor.modes, "rates": editor.rates}


@lru_cache(maxsize=16)
def _optimizer(lr: float, lr_rates: float, clip: float) -> optax.GradientTransformation:
    # One object for one setting: its function is a static argument of a compiled step.
    kinds = {"nets": "nets", "modes": "nets", "rates": "rates"}
    adam: dict[Hashable, optax.GradientTransformation]
    adam = {"nets": optax.adam(lr), "rates": optax.adam(lr_rates)}
    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(adam, kinds))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(fixed, names, weights, state, params, batch):
    update, config, layer, paths = fixed
    streams, answers, has = batch  # [B, 3, …]

    def pairs_of(x, answer):
        pairs, losses = gradient_pairs(
            params,
            config,
            x[:1],
            jax.tree.map(lambda a: a[:1], answer),
            layer=layer,
            paths=dict(paths),
        )
        return pairs, losses[0]

    pairs, before = jax.vmap(pairs_of)(streams, answers)
    editor = state["editor"]
    moments = dict(editor.moments)
    for path, name in names:
        moments[name] = _seen(moments[name], pairs[path])
    editor = editor._replace(moments=moments)

    def objective(learned):
        now = editor._replace(**learned)

        def one(pairs, x, answer, has):
            return _losses(now, names, params, config, layer, pairs, x, answer, has)

        edit, kl = jax.vmap(one)(pairs, streams, answers, has)
        loss = weights[0] * edit.mean() + weights[1] * kl.mean()
        return loss, {"loss": loss, "edit": edit.mean(), "kl": kl.mean(), "before": before.mean()}

    grads, info = jax.grad(objective, has_aux=True)(_learned(editor))
    updates, memory = update(grads, state["optimizer"], _learned(editor))
    learned: Any = optax.apply_updates(_learned(editor), updates)
    return {"editor": editor._replace(**learned), "optimizer": memory}, info


def _losses(editor, names, params, config, layer, pairs, x, answers: Answers, has):
    """Compare one edited model with the base on the fact's three texts."""
    flip, adapters = layout_of(config).in_out, {}
    for path, name in names:
        low = transform(editor, path, name, pairs[path])
        adapters[path] = lora.Adapter(low.x, low.delta.T, 1.0)
    edited = lora.apply(params, adapters, in_out=flip)
    log_p, _ = log_probs(edited, config, x, answers.at, layer=layer)
    nll = mean_nll(log_p, answers.ids, answers.mask)
    edit = (nll[0] + has[1] * nll[1]) / (1 + has[1])
    base, _ = log_probs(params, config, x[2:], answers.at[2:], layer=layer)
    kl = (jnp.exp(base) * (base - log_p[2:])).sum(axis=-1)[0]
    mask = answers.mask[2]
    return edit, has[2] * (kl * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def _seen(moments: dict[str, Array], pairs: Any) -> dict[str, Float[Array, "..."]]:
    """Add a batch's pairs to running moments (Chan's rule), tokens without gradient left out."""
    z = jnp.concatenate([pairs.x, pairs.delta], axis=-1).reshape(-1, moments["mean"].size)
    delta = pairs.delta.reshape(z.shape[0], -1)
    live = jnp.any(delta != 0, axis=1).astype(jnp.float32)
    n_new = live.sum()
    mean_new = (live[:, None] * z).sum(axis=0) / jnp.maximum(n_new, 1.0)
    m2_new = (live[:, None] * jnp.square(z - mean_new[None])).sum(axis=0)
    n = moments["n"] + n_new
    gap = mean_new - moments["mean"]
    share = n_new / jnp.maximum(n, 1.0)
    return {
        "n": n,
        "mean": moments["mean"] + gap * share,
        "m2": moments["m2"] + m2_new + jnp.square(gap) * moments["n"] * share,
    }
