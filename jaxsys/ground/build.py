"""Make a grounder of a few choices, fitted to the widths of the task it is for."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.ground import views
from jaxsys.ground.caption import SMALL, Captioner, gpt2_captioner
from jaxsys.ground.contract import Grounder
from jaxsys.ground.da4lg import Da4lgConfig, Domain, da4lg
from jaxsys.ground.lagor import LagorConfig, lagor
from jaxsys.ground.magic import MagicConfig, magic
from jaxsys.ground.match import MatchConfig, match, zero_shot
from jaxsys.ground.questions import Questions

Name = Literal["zero-shot", "match", "lagor", "magic", "da4lg"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Choose a grounder and its parts.

    Attributes:
      grounder: zero-shot (nothing is trained), match, lagor, magic or da4lg.
      pooling: Of views: max, mean, one (random: the single-view setting) or two.
      hidden: Widths of the score head's hidden layers (match, lagor, da4lg).
      dropout: Rate in the heads.
      domain: What da4lg's second encoder is: lora, full (fine-tuned), frozen, none, or residual (an
        MLP beside features that are fixed; a variant of ours).
      rank: Of da4lg's adapters.
      alpha: Of da4lg's adapters.
      weighting: Da4lg's re-weighting of views: softmax, sigmoid or none.
      temperature: Of the re-weighting.
      objective: Da4lg's grounding loss: bce (the paper's) or ce (smoothed, SNARE's).
      contrast: Weight of da4lg's contrastive task; 0 leaves it out.
      caption: Weight of da4lg's captioning task; 0 leaves it out. Above 0 it needs a captioner.
      captioner: none, or small: four layers of our own, trained along. (A frozen GPT-2 of
        your own goes in through `ground.da4lg.da4lg`.)

    Raises:
        UserError: for a name that is unknown, or captioning without a captioner.

    >>> Choice(grounder="match").pooling
    'max'
    """

    grounder: Name = "da4lg"
    pooling: views.Pooling = "max"
    hidden: tuple[int, ...] = (512, 256)
    dropout: float = 0.1
    domain: Domain = "lora"
    rank: int = 8
    alpha: float = 16.0
    weighting: views.Weighting = "softmax"
    temperature: float = 0.1
    objective: Literal["bce", "ce"] = "bce"
    contrast: float = 0.1
    caption: float = 0.0
    captioner: Literal["none", "small"] = "none"

    def __post_init__(self) -> None:
        if self.grounder not in get_args(Name):
            raise UserError(
                f"grounder is {self.grounder!r}; expected one of {', '.join(get_args(Name))}; "
                "correct the name"
            )
        if self.grounder == "da4lg" and self.caption > 0 and self.captioner == "none":
            raise UserError(
                f"caption is {self.caption} and there is no captioner; expected one to write the "
                "descriptions; choose captioner small, or caption 0"
            )

    @property
    def draws_views(self) -> bool:
        """Say whether scores depend on random views, so that several passes are pooled."""
        return self.grounder == "lagor" or self.pooling in ("one", "two")

    @property
    def views_seen(self) -> int | None:
        """Count the views of an object that are looked at; None means all of them."""
        if self.grounder == "lagor":
            return 2
        return {"one": 1, "two": 2}.get(self.pooling)

    @property
    def adapts(self) -> bool:
        """Say whether a vision encoder is run in every step."""
        return self.grounder == "da4lg" and self.domain in ("lora", "full")


def make_grounder(choice: Choice, questions: Questions) -> tuple[Grounder, dict[str, Any]]:
    """Make a grounder for a task.

    Args:
        choice: what it is.
        questions: whose widths it takes, and whose encoder it adapts.

    Returns:
        The grounder and its frozen parameters.

    Raises:
        UserError: for a task that lacks what the grounder reads: words, pixels, features, tokens.

    >>> from jaxsys.ground.toys import toy_questions
    >>> task = toy_questions(n_views=1, size=8, width=8)
    >>> grounder, frozen = make_grounder(Choice(grounder="match", hidden=(4,)), task)
    >>> frozen
    {}
    """
    tables = questions.tables
    if tables.views is None:
        raise UserError(
            "the task has no features of views; expected f_v of every view; compute them once "
            "with the vision encoder"
        )
    if choice.grounder == "da4lg":
        return _da4lg(choice, questions)
    width, text_width = np.shape(tables.views)[-1], np.shape(tables.text)[-1]
    sizes: dict[str, Any] = {"width": width, "dropout": choice.dropout}
    heads = sizes | {"text_width": text_width, "hidden": choice.hidden}
    if choice.grounder == "zero-shot":
        return zero_shot(choice.pooling), {}
    if choice.grounder == "match":
        return match(MatchConfig(pooling=choice.pooling, **heads)), {}
    if choice.grounder == "lagor":
        return lagor(LagorConfig(views=np.shape(tables.mask)[1], **heads)), {}
    if tables.words is None:
        raise UserError(
            "the task has no features of words, which magic reads; expected a text encoder's "
            "states of every word; give CLIP's weights (--clip), or choose another grounder"
        )
    return magic(MagicConfig(word_width=np.shape(tables.words)[-1], **sizes)), {}


def _da4lg(choice: Choice, questions: Questions) -> tuple[Grounder, dict[str, Any]]:
    tables = questions.tables
    if choice.adapts and (questions.encode is None or tables.pixels is None):
        raise UserError(
            f"domain is {choice.domain!r} and the task has features only; expected pictures and a "
            "vision encoder to adapt; give them, or choose domain residual, frozen or none"
        )
    if choice.caption > 0 and tables.tokens is None:
        raise UserError(
            "the task has no tokens, which captioning learns to write; expected those of every "
            "text; make them (features.caption_tokens), or choose caption 0"
        )
    frozen = {"vision": questions.vision} if choice.adapts else {}
    model = da4lg(_config(choice, questions), questions.encode, captioner_of(choice))
    return model, frozen


def captioner_of(choice: Choice) -> Captioner | None:
    """Give the captioner that a choice trains along, if it captions.

    >>> captioner_of(Choice(grounder="da4lg", caption=0.0)) is None
    True
    """
    return gpt2_captioner(SMALL, frozen=False) if choice.caption > 0 else None


def _config(choice: Choice, questions: Questions) -> Da4lgConfig:
    tables = questions.tables
    return Da4lgConfig(
        width=np.shape(tables.views)[-1],
        text_width=np.shape(tables.text)[-1],
        domain=choice.domain,
        rank=choice.rank,
        alpha=choice.alpha,
        patterns=questions.patterns or Da4lgConfig.patterns,
        weighting=choice.weighting,
        temperature=choice.temperature,
        pooling=choice.pooling,
        hidden=choice.hidden,
        dropout=choice.dropout,
        grounding=choice.objective,
        contrast=choice.contrast,
        caption=choice.caption,
    )


def da4lg_config(choice: Choice, questions: Questions) -> Da4lgConfig:
    """Give DA4LG's configuration as `make_grounder` makes it, for what looks inside.

    >>> from jaxsys.ground.toys import toy_questions
    >>> da4lg_config(Choice(domain="residual"), toy_questions(n_views=1, size=8, width=8)).width
    8
    """
    return _config(choice, questions)
