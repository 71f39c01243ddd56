"""Judge a trained run: accuracies of its seeds, harder conditions, examples, other runs.

Axes: ``S`` seeds, ``P`` passes, ``R`` rows, ``K`` candidates, ``V`` views.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.ground import metrics
from jaxsys.ground.build import captioner_of, da4lg_config
from jaxsys.ground.da4lg import view_weights
from jaxsys.ground.evaluation import Condition, group_figures, keep_views, robustness, score
from jaxsys.ground.questions import Questions
from jaxsys.ground.report import Example, view_scores
from jaxsys.ground.runs import Run
from jaxsys.ground.tables import gather, take_rows
from jaxsys.ground.train import Progress

_NONE: Progress = lambda done, total: None  # noqa: E731


def evaluate_run(
    run: Run, fold: str = "valid", *, passes: int | None = None, progress: Progress = _NONE
) -> dict[str, Any]:
    """Score a fold with every seed.

    Args:
        run: from `load_run`.
        fold: with answers, or without for a leaderboard.
        passes: P; by default 8, as SNARE's protocol has it, where views are drawn, else 1.
        progress: called with batches done and their number, for each seed anew.

    Returns:
        ``scores`` [S][P, R, K]; where answers are known also ``groups``, name to ``of_seeds``
        accuracies, their ``mean`` and ``deviation``, and ``asked`` rows.

    Raises:
        UserError: for a fold that is not there.

    >>> from jaxsys.ground.build import Choice
    >>> from jaxsys.ground.match import zero_shot
    >>> from jaxsys.ground.runs import Job
    >>> from jaxsys.ground.toys import toy_questions
    >>> job = Job(Choice(grounder="zero-shot"))
    >>> found = evaluate_run(Run(job, toy_questions(n_views=1, size=8), zero_shot(), {}, [{}]))
    >>> list(found["groups"])
    ['all', 'same noun', 'one word differs']
    """
    choice, rows = run.job.choice, run.questions.fold(fold)
    if passes is None:
        passes = metrics.PASSES if choice.draws_views else 1
    scores = [_scores(run, params, rows, passes, progress) for params in run.params]
    result: dict[str, Any] = {"fold": fold, "passes": passes, "scores": scores}
    answer = np.asarray(rows.answer)
    if (answer < 0).any():
        return result
    groups = run.questions.groups.get(fold, {})
    shares = [group_figures(one, answer, groups) for one in scores]
    result["groups"] = {
        name: {
            "of_seeds": [one[name].accuracy for one in shares],
            **metrics.spread([one[name].accuracy for one in shares])._asdict(),
            "asked": shares[0][name].asked // passes,
        }
        for name in shares[0]
    }
    return result


def _scores(run: Run, params: Any, rows: Any, passes: int, progress: Progress) -> np.ndarray:
    return score(
        run.grounder,
        params,
        run.frozen,
        run.questions.tables,
        rows,
        passes=passes,
        first_views=run.job.choice.grounder == "lagor",
        resident=run.questions.resident,
        progress=progress,
    )


def robust_run(run: Run, fold: str = "valid", *, keep: Sequence[int] = (4, 2, 1)) -> list[dict]:
    """Score a fold under harder conditions with the first seed: views left out, and what the task
    knows (occlusion, elevation, light).

    Args:
        run: from `load_run`.
        fold: with answers.
        keep: numbers of views that are left.

    Raises:
        UserError: for a fold that is not there.

    >>> from jaxsys.ground.build import Choice
    >>> from jaxsys.ground.match import zero_shot
    >>> from jaxsys.ground.runs import Job
    >>> from jaxsys.ground.toys import toy_questions
    >>> job = Job(Choice(grounder="zero-shot"))
    >>> run = Run(job, toy_questions(n_views=1, size=8), zero_shot(), {}, [{}])
    >>> [row["condition"] for row in robust_run(run)][:2]
    ['plain', 'a quarter occluded']
    """
    questions = run.questions
    n_views = np.shape(questions.tables.mask)[1]
    harder = [
        Condition(f"{n} of {n_views} views", change=keep_views(n)) for n in keep if n < n_views
    ]
    harder += questions.harder(fold) if questions.harder is not None else []
    options: dict[str, Any] = {"resident": questions.resident}
    if run.job.choice.draws_views or any(one.change for one in harder):
        options["passes"] = metrics.PASSES
    rows = questions.fold(fold)
    return robustness(
        run.grounder, run.params[0], run.frozen, questions.tables, rows, harder, **options
    )


def examples_of(run: Run, fold: str, places: Sequence[int]) -> tuple[list[Example], str]:
    """Show some rows of a fold with the first seed.

    Args:
        run: from `load_run`.
        fold: its rows.
        places: of the rows.

    Returns:
        The examples, and what the numbers at their views are: DA4LG's weights of views, or else
        the score that an object has by that view alone.

    Raises:
        UserError: for a place outside of the fold.

    >>> from jaxsys.ground.build import Choice
    >>> from jaxsys.ground.match import zero_shot
    >>> from jaxsys.ground.runs import Job
    >>> from jaxsys.ground.toys import toy_questions
    >>> job = Job(Choice(grounder="zero-shot"))
    >>> run = Run(job, toy_questions(n_views=1, size=8), zero_shot(), {}, [{}])
    >>> examples_of(run, "test", [0])[0][0].weights.shape
    (2, 1)
    """
    questions, rows = run.questions, run.questions.fold(fold)
    outside = [i for i in places if not 0 <= i < len(rows.text)]
    if outside:
        raise UserError(
            f"row {outside[0]} is not in the fold {fold}; expected 0 to {len(rows.text) - 1}; "
            "choose others"
        )
    asked = take_rows(rows, np.asarray(places))
    params, choice, key = run.params[0], run.job.choice, jax.random.key(0)
    scores = score(
        run.grounder, params, run.frozen, questions.tables, asked, resident=questions.resident
    )[0]
    batch = jax.tree.map(jnp.asarray, gather(questions.tables, asked))
    if choice.grounder == "da4lg" and choice.domain != "none" and not choice.draws_views:
        config = da4lg_config(choice, questions)
        weigh = lambda b: view_weights(config, questions.encode, params, run.frozen, b,  # noqa: E731
                                       captioner_of(choice))  # fmt: skip
        weights, note = np.asarray(jax.jit(weigh)(batch)), "Numbers below views are their weights."
    else:
        weights = view_scores(run.grounder, params, run.frozen, batch, key=key)
        note = "Numbers below views are the candidate's score by that view alone."
    found = []
    for i in range(len(places)):
        objects = np.asarray(asked.objects[i]).tolist()
        answer, text = int(asked.answer[i]), questions.texts[int(asked.text[i])]
        shown = [_pictures(questions, o) for o in objects]
        names = [questions.names[o] for o in objects]
        found.append(Example(text, names, shown, scores[i], weights[i],
                             answer if answer >= 0 else None))  # fmt: skip
    return found, note


def _pictures(questions: Questions, number: int) -> list[Any]:
    if questions.pictures is None:
        return [None] * np.shape(questions.tables.mask)[1]
    return questions.pictures(number)


def compare_runs(
    found: Mapping[str, Mapping[str, Sequence[float]]], group: str = "all"
) -> list[metrics.Comparison]:
    """Compare runs over their seeds, as SNARE's authors do: Welch's test with Bonferroni.

    Args:
        found: run to group to accuracies of its seeds.
        group: which group.

    Raises:
        UserError: for a run with fewer than two seeds.

    >>> compare_runs({"a": {"all": [0.8, 0.9]}, "b": {"all": [0.1, 0.2]}})[0].difference
    0.7...
    """
    return metrics.compare({name: groups[group] for name, groups in found.items()})
