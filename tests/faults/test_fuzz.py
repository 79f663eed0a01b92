"""Untrusted input from the fuzzer; for longer runs, see tests/faults/fuzz.py."""

import pytest
from fuzz import Targets, check


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return Targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("override", 150), ("recipe_json", 150), ("image", 400), ("npz", 100),
        ("safetensors", 150), ("huggingface", 150), ("checkpoint", 40), ("metrics", 300),
        ("report_run", 60), ("report_result", 60), ("report_metrics", 40),
    ],
)  # fmt: skip
def test_any_input_gives_a_value_or_a_one_line_error(targets, name, examples):
    ends = check(targets, name, examples)
    assert ends["value"] and ends["refused"]  # both outcomes are tested
