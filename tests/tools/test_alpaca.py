from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.convert import RejectedRows
from tests.tools.conftest import Converter, flat


@pytest.mark.shared
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "identity.json"])
def test_real_rows_keep_every_text(run: Converter, shared: Path, name: str) -> None:
    path = shared / "llamafactory" / name
    rows = json.loads(path.read_text(encoding="utf-8"))
    samples = run("alpaca", path)
    expected = [
        [
            ("user", [(row["instruction"] + ("\n" + row["input"] if row["input"] else "")).strip()]),
            ("assistant", [row["output"].strip()]),
        ]
        for row in rows
    ]
    assert [flat(sample) for sample in samples] == expected
    assert len(samples) > 50


def test_history_and_system_come_first(run: Converter) -> None:
    rows = [{"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}]
    assert flat(run("alpaca", rows)[0]) == [
        ("system", ["s"]),
        ("user", ["a"]),
        ("assistant", ["b"]),
        ("user", ["c"]),
        ("assistant", ["d"]),
    ]


def test_a_row_without_an_answer_is_rejected_by_name(run: Converter) -> None:
    with pytest.raises(RejectedRows, match=r"rows.json\[0\].*no field output.*the row has instruction"):
        run("alpaca", [{"instruction": "c"}, {"instruction": "c", "output": "d"}])
