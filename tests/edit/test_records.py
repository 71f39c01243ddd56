"""Files of facts: every layout read, every mistake told with file and record."""

import json
import os
from pathlib import Path

import pytest

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import check_requests
from jaxsys.edit.records import load_records

DATA = Path(os.environ.get("JAXSYS_DATA", "no-data")) / "edit"
with_data = pytest.mark.skipif(not DATA.is_dir(), reason="JAXSYS_DATA has no folder edit")

ORIGINAL = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "One hears Danielle Darrieux speak"],
    "neighborhood_prompts": [
        "The mother tongue of Léon Blum is",
        "Sartre spoke",
    ],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
    "attribute_prompts": [],
}
FLAT = {
    "case_id": 0,
    "prompt": "Lyon lies in",
    "target_new": "Spain",
    "subject": "Lyon",
    "ground_truth": "France",
    "rephrase_prompt": "Find Lyon in",
    "locality_prompt": "Nice lies in",
    "locality_ground_truth": "France",
}
ZSRE = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "rephrase": "When has WEFS been established?",
    "alt": "1997",
    "answers": ["1987"],
    "loc": "nq question: who voiced gaston",
    "loc_ans": "Richard White",
}
RELATION = {
    "name": "capital",
    "prompt_templates": ["{} lies in", "One finds {} in"],
    "prompt_templates_zs": ["{} lies in", "Where is {}? In"],
    "samples": [
        {"subject": "Lyon", "object": "France"},
        {"subject": "Nice", "object": "France"},
        {"subject": "Turin", "object": "Italy"},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="facts.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return file

    return write


def test_original_counterfact(write):
    found = load_records(write([ORIGINAL]))
    assert found.layout == "counterfact"
    record = found.records[0]
    assert record.request == (
        "The mother tongue of Danielle Darrieux is",
        "Danielle Darrieux",
        "English",
        "French",
    )
    assert len(record.paraphrases) == 2
    assert record.neighbourhood[1] == ("Sartre spoke", "French")
    assert record.generation == ("Danielle Darrieux's mother tongue is",)


def test_flat_counterfact_with_and_without_portability(write):
    more = {
        **FLAT,
        "portability_prompt": "Lyon obeys",
        "portability_ground_truth": "Madrid",
    }
    first, second = load_records(write([FLAT, more])).records
    assert first.neighbourhood == (("Nice lies in", "France"),)
    assert first.portability == ()
    assert second.portability == (("Lyon obeys", "Madrid"),)


def test_zsre_leaves_out_and_counts_empty_answers(write):
    found = load_records(write([{**ZSRE, "alt": " "}, ZSRE, ZSRE, ZSRE]), limit=2)
    assert (found.layout, len(found.records), found.left_out) == ("zsre", 2, 1)
    assert found.records[0].request.truth == "1987"
    assert found.records[0].neighbourhood == (("nq question: who voiced gaston?", "Richard White"),)


def test_relations_get_other_answers_and_neighbours(write):
    records = load_records(write(RELATION)).records
    assert [r.request.target for r in records] == ["Italy", "Italy", "France"]
    assert records[0].paraphrases == ("One finds Lyon in", "Where is Lyon? In")
    assert records[0].neighbourhood == (("Nice lies in", "France"), ("Turin lies in", "Italy"))
    whole = load_records(write(RELATION).parent, limit=2)
    assert whole.records == records[:2]


def test_own_lines(write):
    row = {
        "prompt": "{} plays the",
        "subject": "Coltrane",
        "target": " tuba",
        "neighbourhood": [["Monk plays the", "piano"]],
    }
    text = "\n".join(json.dumps(r) for r in (row, {**row, "prompt": "Coltrane chose the "}))
    records = load_records(write(text + "\n", "a.jsonl")).records
    assert records[0].request == ("Coltrane plays the", "Coltrane", "tuba", None)
    assert records[0].neighbourhood == (("Monk plays the", "piano"),)
    assert records[1].request.prompt == "Coltrane chose the"
    assert load_records(write([row])).records == records[:1]


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("{", "a.json", "a.json is not JSON"),
        ("[]", "a.json", "a.json is in no known layout"),
        ('{"prompt": "x"}\n{', "a.jsonl", "record 1 of .*a.jsonl is not JSON"),
        ('[{"a": 1}]', "a.json", "has the fields a;"),
        (json.dumps([FLAT, {**FLAT, "target_new": " "}]), "a.json", "record 1 of .*target_new"),
        (json.dumps([{**FLAT, "subject": "Oslo"}]), "a.json", "record 0 .*not name its subject"),
        (json.dumps([{**FLAT, "prompt": 3}]), "a.json", "record 0 of .* has 3 as prompt"),
        (json.dumps([{**ZSRE, "alt": ""}]), "a.json", "each has an empty new answer"),
        (json.dumps([{**ORIGINAL, "paraphrase_prompts": "x"}]), "a.json", "expected a list"),
        (json.dumps({**RELATION, "prompt_templates": ["no slot"]}), "a.json", "'no slot'"),
        (json.dumps({**RELATION, "samples": RELATION["samples"][:2]}), "a.json", "no other answer"),
        (
            '{"prompt": "a b", "subject": "a", "target": "c", "paraphrase": ["d"]}',
            "a.jsonl",
            "field 'paraphrase'",
        ),
        (
            '{"prompt": "a b", "subject": "a", "target": "c", "portability": ["d"]}',
            "a.jsonl",
            r"pairs \[prompt, answer\]",
        ),
    ],
)
def test_mistakes_name_file_and_record(write, content, name, told):
    with pytest.raises(UserError, match=told):
        load_records(write(content, name))


def test_mistaken_calls(write, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_records(tmp_path / "absent.json")
    with pytest.raises(UserError, match="limit is 0"):
        load_records(write([FLAT]), limit=0)
    with pytest.raises(UserError, match="layout is 'zres'"):
        load_records(write([FLAT]), layout="zres")
    with pytest.raises(UserError, match="expected relation files"):
        load_records(tmp_path / "..", layout="zsre")


@with_data
def test_real_files():
    facts = load_records(DATA / "counterfact.json")
    assert (facts.layout, len(facts.records), facts.left_out) == ("counterfact_flat", 10_000, 0)
    zsre = load_records(DATA / "zsre_1k.json")
    assert (zsre.layout, len(zsre.records), zsre.left_out) == ("zsre", 998, 2)
    relations = load_records(DATA / "relations")
    assert len(relations.records) > 5_000
    assert all(r.request.target != r.request.truth for r in relations.records)
    for record in (*facts.records[:100], *zsre.records[:100], *relations.records[::50]):
        check_requests([record.request])
