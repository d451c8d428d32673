from __future__ import annotations

import json
import lzma
import os
import resource
import sys
import time
import zlib
from pathlib import Path

import pytest
from tiny import byte_tokenizer

from fasc_lightning.data import _text_files as text_files
from fasc_lightning.data import calibration_windows, file_windows, finetune_data, open_text, read_text, text_windows
from fasc_lightning.data._finetune_records import read_records
from fasc_lightning.data._sources import hub_rows
from fasc_lightning.data._text_files import MAX_LINE, MAX_TEXT, json_rows
from fasc_lightning.evaluation import load_facts

TEXT = "Viele Grüße, 世界!\nA second line.\r\nA third\n\n" * 5


@pytest.mark.parametrize("ending", [".txt", ".txt.xz"])
def test_a_text_is_read_as_python_reads_it(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(TEXT.encode() if ending == ".txt" else lzma.compress(TEXT.encode()))
    expected = TEXT.replace("\r\n", "\n")
    assert read_text(path) == expected
    assert list(open_text(path)) == expected.splitlines(keepends=True)
    assert [read_text(path, n) for n in (0, 5, 10**6)] == [expected[:0], expected[:5], expected]


def test_streams_and_padding_of_xz_follow_each_other(tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one ") + b"\0" * 8 + lzma.compress(b"two") + b"\0" * 4)
    assert read_text(path) == "one two"


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c[:40], lambda c: b"", lambda c: c + b"garbage", lambda c: b"\0" + c]
)
def test_damaged_xz_is_refused_by_name(tmp_path, change):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(change(lzma.compress(TEXT.encode())))
    with pytest.raises(ValueError, match=r"a whole \.xz file but .*a\.txt\.xz is damaged"):
        read_text(path)


def test_other_encodings_are_refused_by_name(tmp_path):
    for name, content in (("a.txt", "Grüße".encode("latin-1")), ("b.txt", TEXT.encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"a text file in UTF-8 but .*{name} is none"):
            read_text(tmp_path / name)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl is none"):
        list(json_rows(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "one nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"text": "\\ud800"}', "surrogates not allowed"),
        ('{"text": 3', "expected one JSON object a line"),
        ("[1]", "a JSON object, but got a list"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    for read in (read_text, lambda p: list(read_records(str(p)))):
        with pytest.raises(ValueError, match=rf"^rows\.jsonl, line 3: .*{message}"):
            read(path)


def test_a_few_windows_of_a_text_without_end_are_read_alone(tmp_path):
    sentence = "The sea is wide and blue. "
    path = tmp_path / "long.txt"
    with path.open("w") as file:
        for _ in range(80):  # 83 million characters
            file.write(sentence * 40_000)
    tokenizer = byte_tokenizer()
    expected = text_windows(sentence * 100, tokenizer, 3, 16)
    began = time.process_time()
    assert file_windows(path, tokenizer, 3, 16).equal(expected)
    assert calibration_windows([str(path)], tokenizer, windows=3, window=16, seed=0).shape == (3, 16)
    found = finetune_data([str(path)], tokenizer, window=16, tokens=160, cache=False)
    assert found.summary.examples == 10
    assert time.process_time() - began < 30  # all of it would be minutes
    with pytest.raises(ValueError, match=r"at most 67,108,864 characters to read as a whole but .*long\.txt has more"):
        read_text(path)


def test_the_same_windows_come_from_a_file_as_from_its_text(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"Line {i} of a longer text, with ümlauts.\n" for i in range(900))
    path.write_text(text, encoding="utf-8")
    tokenizer = byte_tokenizer()
    for windows, window in ((1, 2), (7, 33), (100, 100), (None, 50)):
        assert file_windows(path, tokenizer, windows, window).equal(text_windows(text, tokenizer, windows, window))
    with pytest.raises(ValueError, match=r"Expected 10000 windows of 50 tokens, but the text of .*a\.txt has"):
        file_windows(path, tokenizer, 10_000, 50)


def bounded(read, megabytes: int = 1000) -> str:
    """Call something in a child process that may take so much more memory; return what was wrong."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
        try:
            read()
            said = "read"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(sending, said[:1000].encode())
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
READERS = [read_text, lambda path: list(json_rows(path)), load_facts, lambda path: list(read_records(str(path)))]


@linux
@pytest.mark.parametrize("byte", [b"\n", b"\0", b"a", b" ", b'{"text": ""}\n'])
def test_gigabytes_in_a_small_file_are_refused(tmp_path, byte, monkeypatch):
    if byte.startswith(b"{"):  # rows take their time, within any bound
        monkeypatch.setattr(text_files, "FREE_BYTES", 2**20)
        monkeypatch.setattr(text_files, "MAX_RATIO", 5)
    path = tmp_path / "bomb.jsonl.xz"
    path.write_bytes(lzma.compress(byte * (2**24 // len(byte)), preset=6) * 128)  # 2 GB
    assert path.stat().st_size < 2**20
    for read in READERS[:1] if byte.startswith(b"{") else READERS[:3]:
        said = bounded(lambda read=read: read(path))
        assert said.startswith("ValueError")
        assert "bomb.jsonl" in said


@linux
def test_a_line_of_a_hundred_megabytes_is_refused(tmp_path):
    path = tmp_path / "line.jsonl"
    with path.open("w") as file:
        file.write('{"text": "')
        for _ in range(100):
            file.write("word " * 200_000)
        file.write('"}\n')
    for read in READERS:
        said = bounded(lambda read=read: read(path), 400)
        assert said.startswith(f"ValueError: Expected lines of at most {MAX_LINE:,} characters in {path} but line 1")


def test_a_dictionary_of_gigabytes_is_not_allocated(tmp_path):
    path = tmp_path / "a.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**20}]
    content = bytearray(lzma.compress(b"text", format=lzma.FORMAT_XZ, filters=filters))
    # LZMA2's one byte of properties, in the block's header after its size, flags, filter and length of properties.
    at = content.index(b"\x21\x01", 12) + 2
    content[at] = 40  # 4 GB
    head = content[12 : 12 + (content[12] + 1) * 4 - 4]
    content[12 + len(head) : 16 + len(head)] = zlib.crc32(bytes(head)).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.txt\.xz is damaged \(Memory usage limit exceeded\)"):
        read_text(path)


def test_limits_are_far_above_what_texts_need():
    # A line is a document, a text what is tokenised at once: both are larger than any model's context.
    assert MAX_LINE >= 10**7
    assert MAX_TEXT > MAX_LINE


def test_evaluation_files_are_bounded_too(tmp_path, monkeypatch):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 100}) + "\n")
    monkeypatch.setattr(text_files, "MAX_LINE", 50)
    with pytest.raises(ValueError, match=r"at most 50 characters in .*facts\.jsonl but line 1 is longer"):
        load_facts(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.parquet", b"PAR1garbage"),
        ("train.jsonl", b"{[\n"),
        ("train.csv", b"a,b\n1,2,3,4\n\xff\xfe"),
        ("train.json", b"[" * 9999),
    ],
)
def test_damaged_data_sets_of_a_folder_are_refused_by_name(tmp_path, name, content, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=tmp_path.name):
        list(hub_rows(str(tmp_path)))
