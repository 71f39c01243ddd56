"""What a run asks, whatever it is made of: tables, folds, groups of rows, an encoder, pictures."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.ground.evaluation import Condition
from jaxsys.ground.tables import Rows, Tables


class Questions(NamedTuple):
    """Hold a whole task.

    Attributes:
        tables: of N objects and M texts.
        folds: such as ``train``, ``valid`` and ``test``.
        groups: fold to group to [R] bool, such as visual and blind, or pairs with one noun.
        names: N, what an object is called in reports.
        texts: M.
        vision: the vision encoder's parameters, where there is one to adapt.
        encode: (vision, [n, ...] of `tables.pixels`) -> [n, D].
        patterns: globs over the encoder's matrices that adapters change.
        pictures: object -> its views as uint8 images, for reports; an absent view is None.
        harder: fold -> conditions that only this task knows, such as another light.
        resident: whether the tables fit on a device.
        rows: fold -> the rows as their file has them, where a leaderboard wants them.

    >>> import numpy as np
    >>> Questions(Tables(np.ones((2, 8), bool), np.eye(2), np.arange(2)), {}, {}).resident
    True
    """

    tables: Tables
    folds: Mapping[str, Rows]
    groups: Mapping[str, Mapping[str, Any]]
    names: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    vision: Any = None
    encode: Callable[[Any, Any], Any] | None = None
    patterns: tuple[str, ...] = ()
    pictures: Callable[[int], list[Any]] | None = None
    harder: Callable[[str], list[Condition]] | None = None
    resident: bool = True
    rows: Mapping[str, Any] = {}

    def fold(self, name: str) -> Rows:
        """Give the rows of a fold.

        Raises:
            UserError: for a fold that is not there.
        """
        if name not in self.folds:
            raise UserError(
                f"fold {name!r} is not there; expected one of {', '.join(self.folds)}; choose one "
                "or add its file"
            )
        return self.folds[name]
