"""The embedded prompts, and reading the user's files: what goes in comes out, what is broken is named."""

from __future__ import annotations

import json
import socket
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tokenworks.core.data import KINDS, Prompt, load_prompts, load_records, prompts
from tokenworks.core.errors import InputError

ROWS = [{"id": "a", "prompt": "Zwölf Äpfel, bitte."}, {"id": "b", "prompt": 'He said: "no",\nand left.'}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- embedded prompts ----------------------------------------------------------------------------------------


def test_each_kind_has_14_to_test_and_2_to_calibrate() -> None:
    counts = Counter((prompt.kind, prompt.split) for prompt in prompts())
    assert counts == {(kind, split): n for kind in KINDS for split, n in (("calibration", 2), ("test", 14))}


def test_ids_and_texts_are_unique_and_clean() -> None:
    every = prompts()
    assert len({prompt.id for prompt in every}) == len(every) == 96
    assert len({" ".join(prompt.text.lower().split()) for prompt in every}) == 96
    assert all(prompt.id.startswith(prompt.kind.replace("_", "-")) for prompt in every)
    assert all(prompt.text.lstrip() == prompt.text and "\ufffd" not in prompt.text for prompt in every)
    # A prompt and an answer of 100 tokens have to fit the smallest contexts in use.
    assert all(10 < len(prompt.text) < 1200 for prompt in every)


def test_summarising_prompts_hold_a_passage() -> None:
    for prompt in prompts("summarising"):
        assert 80 <= len(prompt.text.split("\n\n", 1)[1].split()) <= 150


def test_filters_and_a_limit_that_takes_turns() -> None:
    assert {prompt.split for prompt in prompts(split="calibration")} == {"calibration"}
    assert [prompt.kind for prompt in prompts(limit=8)] == [*KINDS, *KINDS[:2]]
    assert prompts(limit=13) == prompts()[:13]
    assert [prompt.id for prompt in prompts("code", "test", 2)] == ["code-03", "code-04"]
    assert len(prompts(limit=1000)) == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "poems"}, "kind: .*chat, code"),
        ({"split": "train"}, "split: .*calibration"),
        ({"limit": 0}, "limit: 0"),
    ],
)
def test_bad_filters_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompts(**arguments)


# ---- files ---------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    quoted = 'id,prompt\na,"Zwölf Äpfel, bitte."\nb,"He said: ""no"",\nand left."\n'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    sources = [
        write(tmp_path, "rows.json", json.dumps(ROWS)),
        write(tmp_path, "rows.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n \n"),
        write(tmp_path, "rows.csv", quoted),
        write(tmp_path, "mark.csv", b"\xef\xbb\xbf" + quoted.encode()),
        write(tmp_path, "UPPER.CSV", quoted + "\n,\n"),
        tmp_path / "rows.parquet",
    ]
    for source in sources:
        assert load_records(source) == ROWS, source
        assert load_records(str(source)) == ROWS, source
        assert [prompt.text for prompt in load_prompts(source)] == [row["prompt"] for row in ROWS]


def test_txt_has_a_record_per_line_without_blank_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.txt", "one\r\n\r\n  two \n   \nthree\u2028still three")
    assert load_records(path) == [{"text": "one"}, {"text": "  two "}, {"text": "three\u2028still three"}]


def test_jsonl_may_hold_a_unicode_line_separator(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"text": "a\u2028b"}')
    assert load_records(path) == [{"text": "a\u2028b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", "", "holds no record"),
        ("e.txt", " \n\n", "holds no record"),
        ("e.jsonl", "", "holds no record"),
        ("e.json", "", "holds no record"),
        ("e.json", "[]", "holds no record"),
        ("e.csv", "", "holds no record"),
        ("e.csv", "id,prompt\n", "holds no record"),
        ("e.parquet", "", "holds no record"),
        ("b.jsonl", '{"a": 1}\n\n{"a": \n', "line 3: broken JSON at column"),
        ("b.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: an object is needed, not list"),
        ("b.jsonl", '{"a": ' + "[" * 200_000, "line 1: "),
        ("b.jsonl", '{"a": ' + "1" * 10_000 + "}", "line 1: "),
        ("b.json", '[{"a": 1},\n {"a" 2}]', "line 2: broken JSON"),
        ("b.json", '{"a": 1}', "list of objects"),
        ("b.json", '[{"a": 1}, 3]', "item 2: an object is needed, not int"),
        ("b.csv", "a,b\n1,2\n1,2,3\n", "line 3: its number of columns"),
        ("b.csv", "a,b\n1\n", "line 2: its number of columns"),
        ("b.csv", "a,a\n1,2\n", "two columns have the same name"),
        ("b.csv", 'a,b\n1,"2\n', "broken CSV"),
        ("b.parquet", "PAR1 is not enough", "not a Parquet file"),
        ("b.tsv", "a\tb\n", "not one of the formats.*csv"),
        ("noname", "text", "not one of the formats.*csv"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        load_records(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.json", "b.csv"])
def test_an_invalid_byte_names_file_and_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=rf"{name} is not UTF-8: byte 0xe9 on line 2"):
        load_records(path, skip_bad=True)


def test_skip_bad_keeps_the_rest_and_warns(tmp_path: Path) -> None:
    lines = write(tmp_path, "rows.jsonl", '{"a": 1}\nnonsense\n{"a": 2}\n7\n')
    with pytest.warns(UserWarning, match=r"left out 2 broken of 4 records \(line 2, line 4\)"):
        assert load_records(lines, skip_bad=True) == [{"a": 1}, {"a": 2}]
    table = write(tmp_path, "rows.csv", "a,b\n1,2\n3\n4,5\n")
    with pytest.warns(UserWarning, match="line 3"):
        assert load_records(table, skip_bad=True) == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    hopeless = write(tmp_path, "bad.jsonl", "nonsense\n")
    with pytest.warns(UserWarning, match="left out 1"), pytest.raises(InputError, match="holds no usable record"):
        load_records(hopeless, skip_bad=True)


@pytest.mark.parametrize("name", ["absent.csv", "folder/absent.jsonl", "/no/such/place", "absent.docx", "../up"])
def test_an_absent_file_is_no_data_set(name: str) -> None:
    with pytest.raises(InputError, match="source: there is no file"):
        load_records(name)


def test_a_path_never_goes_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_records(Path("some/name"))
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    with pytest.raises(InputError, match="there is no file"):
        load_records(folder)


# ---- prompts from the user's files ---------------------------------------------------------------------------


def test_load_prompts_knows_four_fields_and_keeps_ids(tmp_path: Path) -> None:
    rows = [
        {"question": "q"},
        {"instruction": "i", "id": 7},
        {"text": "t"},
        {"prompt": " ", "text": "u", "id": None},
    ]
    path = write(tmp_path, "rows.json", json.dumps(rows))
    assert load_prompts(path) == [
        Prompt("user-0001", "user", "q", "test"),
        Prompt("7", "user", "i", "test"),
        Prompt("user-0003", "user", "t", "test"),
        Prompt("user-0004", "user", "u", "test"),
    ]


def test_load_prompts_names_the_keys_it_found(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"text": "fine"}\n{"body": "x", "prompt": ["y"]}\n')
    with pytest.raises(InputError, match=r"record 2 .* no text under prompt, .*keys are: body, prompt"):
        load_prompts(path)


# ---- the Hub, without a network ------------------------------------------------------------------------------


def test_a_name_without_a_file_is_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_records("someone/data-v1.1", split="test") == ROWS
    assert asked == [("someone/data-v1.1", "test")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), "could not be reached .*network.* file"),
        (socket.gaierror("name resolution"), "could not be reached"),
        (datasets.exceptions.DatasetNotFoundError("it is gated"), "no open data set 'x'.*it is gated.*log in"),
        (ValueError('Unknown split "train"'), "cannot load split 'train' of 'x'"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer"),
        (datasets.exceptions.DatasetGenerationError("broken file"), "broken file"),
    ],
)
def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(name: str, split: str) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=message):
        load_records("x")
