"""The one exception that means "the person who called made a mistake that they can mend"."""


class UserError(ValueError):
    """Report a mistake of the caller in one sentence: what was got, what was expected, what to do.

    The command line prints the sentence and exits with status 2; in a notebook it is an ordinary
    ``ValueError``.

    >>> raise UserError("period is 0; it must be at least 1; pass --period 1 or more")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: period is 0; it must be at least 1; pass --period 1 or more
    """
