import csv
import json
import math
import re
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cases import message_of
from knapsack_rl.offline.tables import column, identities, numbers, read_columns
from strategies import no_deadline

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)


def written(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


# -- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_values_stay_strings(tmp_path):
    path = written(tmp_path / "a.csv", 'prompt_id,success_rate\n007,0.50\n"x, ""y""",\n')
    assert read_columns(path) == {"prompt_id": ["007", 'x, "y"'], "success_rate": ["0.50", ""]}
    assert read_columns(str(path)) == read_columns(path)


@no_deadline
@given(
    names=st.lists(TEXT.filter(bool), min_size=2, max_size=4, unique=True),
    data=st.data(),
)
def test_csv_round_trip(names, data, tmp_path_factory):
    rows = data.draw(st.lists(st.lists(TEXT, min_size=len(names), max_size=len(names)), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    assert read_columns(path) == {name: [row[k] for row in rows] for k, name in enumerate(names)}


def test_csv_line_ends_and_blank_lines_do_not_matter(tmp_path):
    path = written(tmp_path / "a.csv", "a,b\r\n1,2\r\n\r\n3,4")
    assert read_columns(path) == {"a": ["1", "3"], "b": ["2", "4"]}


@pytest.mark.parametrize("row", ["1", "1,2,3"])
def test_a_ragged_csv_row_is_refused(tmp_path, row):
    path = written(tmp_path / "a.csv", f"a,b\n5,6\n{row}\n")
    with pytest.raises(ValueError, match=rf"a\.csv: a row has {row.count(',') + 1} values, the header names 2: {row}$"):
        read_columns(path)


def test_a_long_ragged_row_is_quoted_in_part(tmp_path):
    path = written(tmp_path / "a.csv", f"a,b\n{'z' * 500}\n")
    with pytest.raises(ValueError, match=r": z{80}$"):
        read_columns(path)


def test_repeated_csv_column_names_are_refused(tmp_path):
    path = written(tmp_path / "a.csv", "a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match=r"a\.csv: column names repeat: a, b, a"):
        read_columns(path)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    # Spreadsheets write one.
    table = read_columns(written(tmp_path / "a.csv", "\ufeffprompt_id,reward\nx,1\n"))
    assert list(table) == ["prompt_id", "reward"]
    lines = read_columns(written(tmp_path / "a.jsonl", '\ufeff{"prompt_id": "x"}\n'))
    assert lines == {"prompt_id": ["x"]}


def test_a_csv_value_may_be_longer_than_pythons_own_limit(tmp_path):
    text = "1" * 131_073
    assert read_columns(written(tmp_path / "a.csv", f"prompt_id,completion\nx,{text}\n"))["completion"] == [text]


# -- JSON lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_keys_may_differ_between_lines(tmp_path, suffix):
    path = written(tmp_path / f"a.{suffix}", '{"a": 1, "b": "x"}\n\n  \n{"b": null, "c": [1.5]}\n')
    assert read_columns(path) == {"a": [1, None], "b": ["x", None], "c": [None, [1.5]]}


@no_deadline
@given(
    rows=st.lists(
        st.fixed_dictionaries({"id": TEXT, "n": st.integers(), "x": st.floats(allow_nan=False) | st.none()}),
        min_size=1,
        max_size=5,
    ),
    ascii_only=st.booleans(),
)
def test_json_lines_round_trip(rows, ascii_only, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "table.jsonl"
    written(path, "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows))
    assert read_columns(path) == {name: [row[name] for row in rows] for name in ("id", "n", "x")}


def test_a_malformed_json_line_is_named(tmp_path):
    for line, message in (
        ('{"a": 1', "is not valid JSON"),
        ("a,b", "is not valid JSON"),
        ("[1, 2]", "must be a JSON object, got list"),
        ("3", "must be a JSON object, got int"),
        ("null", "must be a JSON object, got NoneType"),
    ):
        path = written(tmp_path / "a.jsonl", f'{{"a": 0}}\n\n{line}\n')
        found = message_of(ValueError, read_columns, path)
        assert f"a.jsonl, line 3 {message}" in found, (line, found)


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_round_trip(tmp_path):
    table = {"prompt_id": ["a", "b"], "n": [1, 2**62], "rate": [0.25, None]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read_columns(tmp_path / "a.parquet") == table


def test_a_broken_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    for content in (b"", b"PAR1 but nothing more", b"a,b\n1,2\n"):
        path.write_bytes(content)
        assert "a.parquet is not a readable parquet file" in message_of(ValueError, read_columns, path), content


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "knapsack-rl\[data\]"$'):
        read_columns(tmp_path / "a.parquet")


# -- Any file ---------------------------------------------------------------------------------------------------------


def test_a_file_without_rows_is_refused(tmp_path):
    parquet.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    files = [tmp_path / "a.parquet"]
    for k, (suffix, text) in enumerate((("csv", ""), ("csv", "a,b\n"), ("jsonl", ""), ("json", "\n\n"))):
        files.append(written(tmp_path / f"{k}.{suffix}", text))
    for path in files:
        assert message_of(ValueError, read_columns, path) == f"{path} holds no rows"


def test_an_unknown_kind_is_refused_and_the_known_ones_named(tmp_path):
    for name in ("a.txt", "a", "csv", "a.txt.gz", "a.gz"):
        found = message_of(ValueError, read_columns, written(tmp_path / name, "a\n1\n"))
        assert "must end in .csv, .jsonl, .json, .parquet" in found, name


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        expected = f"there is no file {tmp_path / name}"
        assert message_of(FileNotFoundError, read_columns, tmp_path / name) == expected
        (tmp_path / name).mkdir()
        assert message_of(FileNotFoundError, read_columns, tmp_path / name) == expected


def test_text_in_another_encoding_is_refused(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes('{"id": "é"}\n'.encode("latin-1"))
        assert "utf-8" in message_of(ValueError, read_columns, tmp_path / name), name


# -- Columns ----------------------------------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_those_there_are():
    table = {"id": ["a"], "score": [1]}
    assert column(table, "score", "a.csv") == [1]
    with pytest.raises(ValueError, match=r"^a\.csv has no column 'reward'; its columns are id, score$"):
        column(table, "reward", "a.csv")


def test_numbers_take_what_people_write():
    found = numbers(["1", " 2.5 ", "-3e-1", 4, 0.5, True, "inf", "True", "false"], "reward")
    assert found.dtype == np.float64
    assert found.tolist() == [1.0, 2.5, -0.3, 4.0, 0.5, 1.0, math.inf, 1.0, 0.0]


def test_missing_numbers_are_nan():
    assert np.isnan(numbers(["", None, "nan", "NaN", "None", "null", math.nan], "reward")).all()
    assert numbers([], "reward").shape == (0,)


def test_a_value_that_is_not_a_number_is_named_with_its_row():
    for value in ("x", "1,5", "0x10", [1], {"a": 1}, " ", 10**400):
        found = message_of(ValueError, numbers, [1, None, value], "reward")
        assert found == f"column 'reward', row 3: {value!r} is not a number"


def test_identities_keep_strings_and_whole_numbers_apart():
    assert identities(["7", 7, "é", 0, -1, " "], "id") == ["7", 7, "é", 0, -1, " "]


def test_messages_are_identified_by_their_content_and_not_by_the_order_of_keys():
    one, other = {"role": "user", "content": "é?"}, {"content": "é?", "role": "user"}
    first, second, third = identities([[one], [other], [{**one, "role": "system"}]], "prompt")
    assert first == second != third
    assert json.loads(first) == [one]


def test_a_value_that_cannot_be_an_identity_is_named_with_its_row():
    for value, reason in (
        *[(empty, "is empty; every row needs a prompt id") for empty in ("", None)],
        *[(bad, "is .*; a prompt id is a string or a whole number") for bad in (1.0, True, math.nan)],
        *[(empty, "is empty; every row needs a prompt id") for empty in ([], {})],
        (b"a", "is b'a' .*: decode it"),
        (10**400, "is a number of more than 300 digits"),
    ):
        found = message_of(ValueError, identities, ["a", value], "id")
        assert re.match(f"column 'id', row 2 {reason}", found), (value, found)
