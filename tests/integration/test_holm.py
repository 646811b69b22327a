"""Three pairwise tests at once: p-values are corrected, and the corrected ones decide."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_of, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from jobs.report import comparison
from jobs.results import Difference
from jobs.runs import RunFolder
from jobs.statistics import holm

P_VALUES = st.lists(st.floats(0, 1), max_size=8)


def test_the_smallest_counts_as_often_as_there_are_tests() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02]) == [0.02] and holm([]) == []


@given(P_VALUES)
def test_it_lies_between_no_correction_and_bonferronis(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p_value, other in zip(p_values, corrected, strict=True):
        assert p_value <= other <= min(1, len(p_values) * p_value)
    assert sorted(corrected) == [c for _, c in sorted(zip(p_values, corrected, strict=True))]


def test_a_difference_that_would_pass_alone_is_not_called_one_among_three(
    compared: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p_values = iter([0.02, 0.03, 0.9])

    def difference(*_: Any) -> Difference:
        return Difference(difference=0.1, low=0.01, high=0.2, p_value=next(p_values))

    monkeypatch.setattr(comparison, "_difference", difference)
    once = tiny_config(runtime={"seeds": [0, 1]}, optim={"epochs": 1})
    comparison.compare(copy_of(compared, tmp_path), once)
    tmp_path /= compared.run_id
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [pair["p_value"] for pair in written["pairs"]] == [0.02, 0.03, 0.9]
    assert [pair["p_value_holm"] for pair in written["pairs"]] == pytest.approx([0.06, 0.06, 0.9])
    assert all("cannot be told apart" in sentence for sentence in written["sentences"][1:])
    assert "p = 0.06" in written["sentences"][1]
