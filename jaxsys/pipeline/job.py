"""What a pipeline trains, and a whole run as every worker reads it."""

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.pipeline.plan import Plan
from jaxsys.train import optimizers

MODELS = ("gpt2", "resnet18", "resnet50", "resnet101")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what, the same for every plan.

    Attributes:
      model: ``gpt2`` (on bytes of text), ``resnet18``, ``resnet50`` or ``resnet101`` (on the digits
        that scikit-learn carries), or ``module:function`` or ``file.py:function`` of your own: the
        function takes ``batch`` and ``seed`` and returns ``(loss_fn, init, data)`` as in `Setup`.
      blocks: transformer blocks of ``gpt2``.
      width: their width.
      heads: their attention heads.
      length: tokens in a sequence.
      image: rows and columns that images are brought to.
      text: file to train ``gpt2`` on; the documentation that ships with Python by default.
      batch: examples in one step, all micro-batches together.
      optimizer: name of an optimiser preset; each leaf is updated where it lives.
      lr: its learning rate.

    >>> Task("resnet18").batch
    8
    """

    model: str = "gpt2"
    blocks: int = 4
    width: int = 128
    heads: int = 4
    length: int = 64
    image: int = 32
    text: str | None = None
    batch: int = 8
    optimizer: str = "adamw"
    lr: float = 5e-4


class Setup(NamedTuple):
    """A task made concrete.

    Attributes:
      loss_fn: ``loss_fn(params, *data) -> scalar``, a mean over the examples.
      init: ``init(key) -> params``; its shapes are found without running it.
      data: ``data(step) -> (arrays…)``, the examples of a step along the first axis of each.

    >>> setup = Setup(lambda w, x: (w * x).mean(), lambda key: np.ones(()), lambda i: (np.ones(4),))
    >>> float(setup.loss_fn(setup.init(None), *setup.data(0)))
    1.0
    """

    loss_fn: Callable[..., Any]
    init: Callable[[Any], Any]
    data: Callable[[int], tuple[Any, ...]]

    def shapes(self) -> Any:
        """Give the parameters' shapes and types, without making any.

        >>> Setup(lambda w: w, lambda key: jax.numpy.ones(3), lambda i: ()).shapes().shape
        (3,)
        """
        return jax.eval_shape(self.init, jax.random.key(0))

    def micro_batch(self, micro_batches: int) -> tuple[Any, ...]:
        """Give shapes and types of the data of one micro-batch.

        Args:
          micro_batches: parts that a step's examples are dealt out to.

        Raises:
          UserError: the examples of a step cannot be dealt out evenly.

        >>> setup = Setup(lambda w, x: w, lambda key: 0.0, lambda i: (np.ones((4, 3)),))
        >>> setup.micro_batch(2)[0].shape
        (2, 3)
        """
        arrays = self.data(0)
        for x in jax.tree.leaves(arrays):
            if x.ndim == 0 or x.shape[0] % micro_batches:
                raise UserError(
                    f"a step has {x.shape[0] if x.ndim else 'no axis of'} examples and "
                    f"{micro_batches} micro-batches; they must be dealt out evenly; change one"
                )
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // micro_batches, *x.shape[1:]), x.dtype),
            arrays,
        )


def set_up(task: Task, seed: int = 0) -> Setup:
    """Read the data and build the model, making no parameters yet.

    Args:
      task: what to train.
      seed: of the order of the data.

    Returns:
      The task's functions.

    Raises:
      UserError: a setting that cannot be, a text that is too short, a package that is missing, or a
        user's function that cannot be found or gives something else.

    >>> setup = set_up(Task(blocks=1, width=8, heads=2, length=4, batch=2))
    >>> setup.data(0)[0].shape, setup.shapes()["wpe"]["weight"].shape
    ((2, 5), (4, 8))
    """
    _check(task)
    if task.model == "gpt2":
        return _gpt2(task, seed)
    if task.model in MODELS:
        return _resnet(task, seed)
    return _own(task, seed)


def _check(task: Task) -> None:
    """Refuse what cannot be trained."""
    if task.model not in MODELS and ":" not in task.model:
        raise UserError(
            f"model {task.model!r} is not known; expected one of {', '.join(MODELS)} or a "
            "function of your own as module:function or file.py:function; choose one"
        )
    for name in ("blocks", "width", "heads", "length", "image", "batch"):
        if getattr(task, name) < 1:
            raise UserError(f"{name} is {getattr(task, name)}; a task needs at least 1; raise it")
    if task.width % task.heads:
        raise UserError(
            f"width {task.width} is no multiple of {task.heads} heads; every head needs the "
            "same part of it; change one of the two"
        )
    if task.optimizer not in optimizers.PRESETS:
        raise UserError(
            f"optimizer {task.optimizer!r} is not known; expected one of "
            f"{', '.join(optimizers.PRESETS)}; choose one"
        )


def _gpt2(task: Task, seed: int) -> Setup:
    from jaxsys.data import ByteTokenizer, TokenStream, python_docs, read_text, train_valid_split
    from jaxsys.models import gpt2

    text = python_docs() if task.text is None else read_text(task.text)
    tokenizer = ByteTokenizer()
    config = gpt2.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=task.length,
        n_embd=task.width,
        n_layer=task.blocks,
        n_head=task.heads,
    )
    train, _ = train_valid_split(tokenizer.encode(text))
    stream = TokenStream(train, batch=task.batch, length=task.length, seed=seed)
    return Setup(
        lambda params, tokens: gpt2.loss(params, config, tokens),
        lambda key: gpt2.init(key, config),
        lambda step: (stream.batch_at(step),),
    )


def _resnet(task: Task, seed: int) -> Setup:
    from jaxsys.data.images import digits, train_valid
    from jaxsys.models import resnet

    graphdef, init = resnet.named(
        task.model, n_channels=1, n_classes=10, small_images=task.image <= 64
    )
    images, _ = train_valid(digits(), seed=seed)
    times = -(-task.image // images.images.shape[1])

    def data(step: int) -> tuple[Any, ...]:
        chosen = np.random.default_rng((seed, step)).integers(len(images.labels), size=task.batch)
        pixels = images.images[chosen].repeat(times, 1).repeat(times, 2)
        return pixels[:, : task.image, : task.image], images.labels[chosen]

    return Setup(lambda params, *batch: resnet.loss(graphdef, params, batch), init, data)


def _own(task: Task, seed: int) -> Setup:
    """Call the user's function, found as module:function or file.py:function."""
    place, _, name = task.model.rpartition(":")
    help_text = (
        "expected module:function or file.py:function, a function of batch and seed that returns "
        "(loss_fn, init, data); correct it"
    )
    try:
        function = getattr(_load(place), name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise UserError(f"model {task.model!r} cannot be had ({error}); {help_text}") from error
    found = function(batch=task.batch, seed=seed)
    if not (isinstance(found, tuple) and len(found) == 3 and all(map(callable, found))):
        raise UserError(f"model {task.model!r} returned {type(found).__name__}; {help_text}")
    return Setup(*found)


def _load(place: str) -> Any:
    if not place.endswith(".py"):
        here = os.getcwd()
        if here not in sys.path:
            sys.path.insert(0, here)
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Job:
    """A whole run, as every worker reads it.

    Attributes:
      task: what is trained.
      plan: which stage runs where.
      steps: of the whole run, those before a resumption included.
      seed: of the parameters and the data order.
      out: folder of checkpoints, which all processes see.
      save_every: steps between checkpoints; 0 saves the last step only.
      remat: keep a stage's inputs only, and run it forward again before its backward.
      error_feedback: add to a gradient what compression took from earlier ones.
      clip_norm: bound on the norm of the whole gradient, over all stages; none by default.
      transport: ``sockets`` or ``engine``.
      silence_s: silence after which a process counts as lost, in seconds.

    >>> job = Job(Task(), Plan(4, (2,), (0, 1)), steps=10)
    >>> Job.from_json(job.to_json()) == job
    True
    """

    task: Task
    plan: Plan
    steps: int
    seed: int = 0
    out: str = "runs/pipeline"
    save_every: int = 0
    remat: bool = False
    error_feedback: bool = False
    clip_norm: float | int | None = None
    transport: str = "sockets"
    silence_s: float | int = 10.0

    def __post_init__(self):
        """Refuse numbers that cannot be."""
        if self.steps < 1 or self.save_every < 0 or self.silence_s <= 0:
            raise UserError(
                f"steps is {self.steps}, save_every {self.save_every} and silence_s "
                f"{self.silence_s}; a run needs at least 1, 0 and more than 0; correct them"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(
                f"clip_norm is {self.clip_norm}; a bound is above 0; raise it or leave it out"
            )

    def to_json(self) -> str:
        """Write the job for its workers."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plan = json.loads(self.plan.to_json())
        return json.dumps(found | {"task": dataclasses.asdict(self.task), "plan": plan})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read what `to_json` wrote."""
        found = json.loads(text)
        plan = Plan.from_json(json.dumps(found.pop("plan")))
        return cls(Task(**found.pop("task")), plan, **found)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The device of each process: the workers of the first chain, then of the replicas.

        >>> Job(Task(), Plan(4, (2,), (3, 1), replicas=((0, 2),)), 1).ranks
        (3, 1, 0, 2)
        """
        return tuple(device for chain in self.plan.chains for device in dict.fromkeys(chain))
