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

__all__ = [
    "Answering",
    "Editable",
    "Edited",
    "Info",
    "Method",
    "Record",
    "Request",
    "check_requests",
    "find_method",
]
