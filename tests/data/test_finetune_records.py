from __future__ import annotations

import json
import lzma

import pytest

from fasc_lightning.data._finetune_records import Document, Instruction, parse_row, read_records

ADD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"One.\n\nTwo.\n"))
    for name in ("a.txt", "b.txt.xz"):
        path = str(tmp_path / name)
        assert list(read_records(path)) == [Document("One.\n\nTwo.\n", path)]


def test_rows_are_instructions_or_documents(tmp_path):
    rows = [
        ADD,
        {"instruction": "Wait.", "input": "", "output": "Yes.", "text": "what some data sets add: both, written out"},
        {"prompt": "2 + 2 is", "completion": "4"},
        {"question": "Why?", "answer": "Because.", "id": 3},
        "",
        {"instruction": "Sum up.", "context": "A tale.", "response": "It ends."},
        {"text": "A document."},
        {"text": " \n"},
    ]
    found = list(read_records(write(tmp_path / "a.jsonl", *rows)))
    assert found == [
        Instruction("Add.", "1 and 2", "3", "a.jsonl, line 1"),
        Instruction("Wait.", "", "Yes.", "a.jsonl, line 2"),
        Instruction("2 + 2 is", "", "4", "a.jsonl, line 3"),
        Instruction("Why?", "", "Because.", "a.jsonl, line 4"),
        Instruction("Sum up.", "A tale.", "It ends.", "a.jsonl, line 6"),
        Document("A document.", "a.jsonl, line 7"),
    ]
    assert [record.request for record in found[:2]] == ["Add.\n\n1 and 2", "Wait."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "3"}, "line 2: expected a text in 'instruction' but it is empty"),
        ({"instruction": "Add."}, r"line 2: expected the field 'output' but got only \['instruction'\]"),
        ({"prompt": "Add.", "chosen": "3"}, "line 2: expected the field 'completion'"),
        ({"instruction": "Add.", "output": 3}, "line 2: expected a text in 'output' but got a int"),
        ({"instruction": None, "output": "3"}, "line 2: expected a text in 'instruction' but got a NoneType"),
        ({"instruction": "Add.", "input": ["1"], "output": "3"}, "line 2: expected a text in 'input' but got a list"),
        ({"text": 3}, "line 2: expected a text in 'text' but got a int"),
        ({"messages": []}, r"line 2: expected the fields text, or instruction/output/response, .* got \['messages'\]"),
        ("{broken", "line 2: expected one JSON object a line"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        list(read_records(write(tmp_path / "a.jsonl", ADD, row)))


def test_a_missing_file_is_told_from_a_hub_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a data file at"):
        read_records(str(tmp_path / "missing.jsonl"))
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"ending in \.txt, \.jsonl"):
        read_records(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("streaming", [True, False])
def test_data_sets_come_through_datasets(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder / "train.json", *[{**ADD, "output": str(i)} for i in range(5)])
    write(folder / "test.json", ADD)
    found = list(read_records(str(folder), streaming))
    assert [record.answer for record in found] == ["0", "1", "2", "3", "4"]
    assert found[4].where == f"{folder}, row 4"
    assert [record.answer for record in read_records(f"{folder}::test", streaming)] == ["3"]


def test_a_stream_is_read_no_further_than_needed(monkeypatch):
    import datasets

    def rows():
        yield ADD
        raise AssertionError("read on")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    assert next(read_records("some/set")) == Instruction("Add.", "1 and 2", "3", "some/set, row 0")


def test_a_row_of_text_and_of_instructions_is_an_instruction():
    assert isinstance(parse_row({**ADD, "text": "x"}, "a"), Instruction)
