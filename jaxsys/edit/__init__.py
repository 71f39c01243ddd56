"""Edit facts in language models, and measure what that does to the rest of the model.

>>> from jaxsys.edit import Request, check_requests
>>> check_requests([Request("The Eiffel Tower stands in", "Eiffel Tower", "Rome")])
"""

from jaxsys.edit.contract import (
    Answering,
    Editable,
    Edited,
    Info,
    Method,
    Record,
    Request,
    check_requests,
    find_method,
)
from jaxsys.edit.factors import compose, into_files, undo
from jaxsys.edit.methods import METHODS
from jaxsys.edit.stats import Statistics
from jaxsys.edit.targets import TargetConfig
from jaxsys.edit.trace import Trace, choose_layers
from jaxsys.edit.turns import edit_all, edit_each, settle

__all__ = [
    "METHODS",
    "Answering",
    "Editable",
    "Edited",
    "Info",
    "Method",
    "Record",
    "Request",
    "Statistics",
    "TargetConfig",
    "Trace",
    "check_requests",
    "choose_layers",
    "compose",
    "edit_all",
    "edit_each",
    "find_method",
    "into_files",
    "settle",
    "undo",
]
