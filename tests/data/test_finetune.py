from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import byte_tokenizer, causal_model
from torch.nn import functional as F

from fasc_lightning import CausalLMModule
from fasc_lightning.batches import silent
from fasc_lightning.data import calibration_windows, check_data_options, finetune_data, text_windows
from fasc_lightning.data._finetune_encoding import encode_instruction, fit_example, prompt_texts
from fasc_lightning.data._finetune_examples import IGNORED, Example
from fasc_lightning.data._finetune_records import Instruction
from fasc_lightning.data._overlap import shares_passage
from fasc_lightning.data._sampling import sample_windows

# The form of many: turns between marks, a default turn of the system, an opened turn to generate.
CHAT = (
    "{% if messages[0]['role'] != 'system' %}[system]Be kind.{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ADD = Instruction("Add.", "1 and 2", "3", "a.jsonl, line 1")


@pytest.fixture
def plain():
    return byte_tokenizer()


@pytest.fixture
def chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def example(*ids, given=1):
    ids = torch.tensor(ids)
    return Example(ids, ids.masked_fill(torch.arange(len(ids)) < given, IGNORED))


def learnt_text(tokenizer, found):
    return tokenizer.decode(found.labels[found.labels != IGNORED])


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def instructions(tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}" * (1 + i % 7)} for i in range(40)]
    return write(tmp_path / "data.jsonl", rows)


def rows_of(loader):
    return [row[mask.bool()].tolist() for batch in loader for row, mask in zip(*list(batch.values())[:2], strict=True)]


# One instruction.


def test_the_answer_alone_is_learnt_with_what_ends_it(chat):
    found = encode_instruction(ADD, chat)
    assert chat.decode(found.ids) == "[system]Be kind.[user]Add.\n\n1 and 2</s>[assistant]3</s>"
    assert learnt_text(chat, found) == "3</s>"
    assert torch.equal(found.labels[found.labels != IGNORED], found.ids[-2:])
    assert learnt_text(chat, encode_instruction(ADD, chat, answers_only=False)) == chat.decode(found.ids[1:])


def test_without_a_chat_template_there_are_headings(plain):
    found = encode_instruction(ADD, plain)
    expected = "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3</s>"
    assert plain.decode(found.ids) == expected
    assert learnt_text(plain, found) == "3</s>"
    assert "Input" not in prompt_texts(Instruction("Wait.", "", "No.", ""), plain)[0]


def test_a_beginning_token_stands_where_the_tokenizer_puts_one(plain):
    from tokenizers.processors import TemplateProcessing

    plain.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = encode_instruction(ADD, plain).ids.tolist()
    assert ids[0] == plain.bos_token_id
    assert ids.count(plain.bos_token_id) == 1


def test_a_token_across_the_border_is_learnt():
    """Pairs of letters are merged: alone, the prompt ends in another token than it does before an answer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("abcd")}
    inner = Tokenizer(models.BPE({**letters, "ab": 4, "cd": 5}, [("a", "b"), ("c", "d")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = encode_instruction(Instruction("cdc", "", "dab", ""), tokenizer)
    assert found.ids.tolist() == [5, 5, 4]
    assert found.labels.tolist() == [IGNORED, 5, 4]


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_not_learnt(chat):
    chat.chat_template = CHAT.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    found = encode_instruction(ADD, chat)
    assert learnt_text(chat, found) == "3</s>"


TURNS = "{% for m in messages %}<{{ m['role'] }}>CONTENT END{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"


def template(content="{{ m['content'] }}", end="</s>\n", opened="<assistant>", before=""):
    return before + TURNS.replace("CONTENT", content).replace(" END", end).replace("OPEN", opened)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that has learned pairs of bytes, so that most tokens are several letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(
        ["Add one and two. The answer is three, as everyone knows.\n\n### Response:"] * 9, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("answer", ["three", " three\n", "\nThe answer is three", "Add one and two."])
@pytest.mark.parametrize(
    ("chat_template", "end"),
    [
        (template(), "</s>\n"),
        (template(before="<s>System: Be kind.\n"), "</s>\n"),  # a default turn of the system
        (template(content="{{ m['content'] | trim }}"), "</s>\n"),
        (template(end=""), ""),  # nothing says that the turn is over
        (template(end="\n\n"), "\n\n"),
        (template(opened=""), "</s>\n"),  # generation is not prompted for
        (None, "</s>"),
    ],
    ids=["plain", "system", "strips", "no end", "end of blank lines", "no generation prompt", "no template"],
)
def test_learnt_are_the_tokens_that_reach_into_the_answer(merging, chat_template, end, answer):
    """Against the places of tokens in the text, of which a reader finds the answer's."""
    merging.chat_template = chat_template
    found = encode_instruction(Instruction("Add one and two.", "", answer, ""), merging)
    text = merging.decode(found.ids)
    mark = "### Response:\n" if chat_template is None else "<assistant>"
    begin = text.index(mark) + len(mark)
    if chat_template is not None and "trim" in chat_template:
        answer = answer.strip()
    if chat_template is not None and "<assistant>{% endif %}" not in chat_template:
        begin -= len(mark)  # of which nothing was given
        answer = mark + answer
    assert text[begin:] == answer + end
    offsets = merging(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == len(found.ids)
    reached = [stop > begin for _, stop in offsets]
    assert 0 < sum(reached) < len(reached)
    expected = [token if inside else IGNORED for token, inside in zip(found.ids.tolist(), reached, strict=True)]
    assert found.labels.tolist() == expected


def test_a_template_that_leaves_the_answer_out_is_refused(chat):
    chat.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected a chat template that writes the answer"):
        encode_instruction(ADD, chat)


def test_a_template_that_rewrites_the_question_is_refused(chat):
    chat.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected a chat template that puts"):
        encode_instruction(ADD, chat)


@pytest.mark.parametrize(("overlong", "expected"), [("cut", [1, 2, 3]), ("skip", None)])
def test_an_example_longer_than_the_window(overlong, expected):
    found = fit_example(example(1, 2, 3, 4), 3, overlong, "")
    assert (found if found is None else found.ids.tolist()) == expected
    short = example(1, 2, 3)
    assert fit_example(short, 3, overlong, "") is short
    # Of an answer that begins behind the window nothing is left to learn.
    assert fit_example(example(1, 2, 3, 4, given=3), 3, overlong, "") is None


def test_an_example_longer_than_the_window_can_be_an_error():
    with pytest.raises(ValueError, match=r"a, line 2: expected at most 3 tokens but got 4\. Use a longer window"):
        fit_example(example(1, 2, 3, 4), 3, "error", "a, line 2")


# The whole.


def test_all_sources_are_looked_for_before_one_is_read(plain, tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken")
    with pytest.raises(FileNotFoundError, match=r"data file at missing\.jsonl"):
        finetune_data([str(tmp_path / "a.jsonl"), "missing.jsonl"], plain, window=32)


def test_the_loss_of_a_batch_is_that_of_the_answers(chat, instructions):
    """Against the losses of single tokens, of the tokens that a reader would underline."""
    data = finetune_data([instructions], chat, window=128, batch_size=3, heldout=0.0, pack=False)
    model = causal_model(vocab_size=len(chat), max_position_embeddings=128).eval()
    batch = next(iter(data.train))
    module = CausalLMModule(model)
    losses = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[mask.bool()]
        text = chat.decode(ids)
        answer = len(text[text.index("[assistant]") + len("[assistant]") :].replace("</s>", "!"))
        logits = model(ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none")[-answer:])
    expected = torch.cat(losses)
    with silent(module):
        loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert module.loss_terms(batch) == len(expected)


def test_every_example_comes_once_on_one_side(chat, instructions):
    data = finetune_data([instructions], chat, window=128, pack=False, heldout=0.25)
    train, held = rows_of(data.train), rows_of(data.heldout)
    expected = sorted(
        encode_instruction(Instruction(f"Say {i}.", "", f"{i}" * (1 + i % 7), ""), chat).ids.tolist() for i in range(40)
    )
    assert sorted(train + held) == expected
    assert (data.summary.examples, data.summary.heldout, data.summary.windows) == (40, 10, 30)
    assert data.summary.tokens == sum(map(len, expected))
    assert train == rows_of(data.train)  # the same in every epoch
    again = finetune_data([instructions], chat, window=128, pack=False, heldout=0.25)
    assert train == rows_of(again.train)
    other = finetune_data([instructions], chat, window=128, pack=False, heldout=0.25, seed=1)
    assert train != rows_of(other.train)


def test_packed_rows_hold_the_same_tokens(chat, instructions):
    data = finetune_data([instructions], chat, window=256)
    assert data.summary.windows < 20
    assert max(map(len, rows_of(data.train))) <= 256
    learnt = sum(int((b["labels"] != IGNORED).sum()) for loader in (data.train, data.heldout) for b in loader)
    assert learnt == data.summary.learnt < data.summary.tokens
    total = sum(int(b["attention_mask"].sum()) for loader in (data.train, data.heldout) for b in loader)
    assert total == data.summary.tokens


def test_text_becomes_the_windows_of_calibration(tmp_path, plain):
    text = "".join(f"The number {i} is followed by {i + 1}. " for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    data = finetune_data([str(tmp_path / "a.txt")], plain, window=64, tokens=640, heldout=0.2)
    windows = text_windows(text, plain, 10, 64)
    assert sorted(rows_of(data.train) + rows_of(data.heldout)) == sorted(windows.tolist())
    batch = next(iter(data.train))
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
    assert data.summary.tokens == 640


def test_windows_that_were_calibrated_on_are_held_out_last_and_counted(tmp_path, plain):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"The number {i} is followed by {i + 1}. " for i in range(60)))
    calibrated = calibration_windows([str(path)], plain, windows=6, window=64, seed=5)
    known = {tuple(row) for row in calibrated.tolist()}
    options = {"window": 64, "tokens": 640, "calibrated": calibrated}
    data = finetune_data([str(path)], plain, heldout=0.4, **options)
    assert [tuple(row) in known for row in rows_of(data.heldout)] == [False] * 4
    assert data.summary.calibrated == 0
    data = finetune_data([str(path)], plain, heldout=0.5, **options)
    assert sum(tuple(row) in known for row in rows_of(data.heldout)) == 1
    assert data.summary.calibrated == 1
    assert str(data.summary).endswith("; 1 of those held out were calibrated on")


def test_documents_are_joined_by_blank_lines(tmp_path, plain):
    path = write(tmp_path / "a.jsonl", [{"text": f"Text {i}."} for i in range(9)])
    data = finetune_data([path], plain, window=32, heldout=0.0, pack=False)
    rows = sorted(rows_of(data.train), key=lambda row: plain.decode(row))
    joined = "".join(f"Text {i}.\n\n" for i in range(9))
    assert sorted(map(plain.decode, rows)) == sorted(joined[i : i + 32] for i in range(0, len(joined), 32))


def test_tokens_are_shared_out_over_sources(tmp_path, plain, instructions):
    (tmp_path / "a.txt").write_text("All happy families are alike. " * 100)
    data = finetune_data([str(tmp_path / "a.txt"), instructions], plain, window=64, tokens=1000, heldout=0.0)
    # Text to the token, instructions to the example.
    assert 1000 <= data.summary.tokens < 1064
    text = "".join(plain.decode(row) for row in rows_of(data.train) if b"happy" in plain.decode(row).encode())
    assert 400 < len(text) < 700


def test_a_stream_without_end_is_read_for_as_long_as_it_takes(monkeypatch, plain):
    import datasets

    def rows():
        while True:
            yield {"instruction": "Go.", "output": "on"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    assert 500 <= finetune_data(["some/set"], plain, window=64, tokens=500, heldout=0.0).summary.tokens < 600


def test_text_sampled_from_the_model(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("FASC_CACHE", str(tmp_path))
    model = causal_model(vocab_size=len(plain))
    data = finetune_data(["self"], plain, window=16, tokens=100, model=model, seed=3, heldout=0.2)
    expected = sample_windows(model, plain, windows=7, window=16, seed=3)
    assert sorted(rows_of(data.train) + rows_of(data.heldout)) == sorted(expected.tolist())
    assert data.summary.heldout == 1
    with pytest.raises(ValueError, match="`model=` and `tokens=` for the source 'self'"):
        finetune_data(["self"], plain, window=16, tokens=100)


def test_what_does_not_fit_is_counted_and_said(tmp_path, chat):
    rows = [{"instruction": "Say.", "output": "x" * n} for n in (3, 200, 300)]
    rows.append({"instruction": "?" * 100, "output": "x"})
    path = write(tmp_path / "a.jsonl", rows)
    options = {"window": 64, "heldout": 0.0}
    data = finetune_data([path], chat, **options)
    assert (data.summary.examples, data.summary.cut, data.summary.skipped) == (3, 2, 1)
    assert str(data.summary).endswith(
        "2 answers were cut at the end of the window; 1 examples were left out, as they do not fit into the window"
    )
    assert data.heldout is None
    summary = finetune_data([path], chat, overlong="skip", **options).summary
    assert (summary.examples, summary.cut, summary.skipped) == (1, 0, 3)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected at most 64 tokens"):
        finetune_data([path], chat, overlong="error", **options)
    with pytest.raises(ValueError, match="none was left: 1 are too long, 0 have an empty answer"):
        finetune_data([write(tmp_path / "b.jsonl", rows[3:])], chat, **options)


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_empty_answers_are_refused_or_left_out_and_counted(tmp_path, chat, answer):
    rows = [{"instruction": f"Say {i}.", "output": answer if i == 1 else "x"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: expected an answer but it is empty\. Leave .* \(--empty skip\)"
    ):
        finetune_data([path], chat, window=64)
    summary = finetune_data([path], chat, window=64, empty="skip").summary
    assert (summary.examples, summary.empty) == (3, 1)
    assert str(summary).endswith("1 examples were left out, as their answer is empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "at least 2 tokens but got 1"),
        ({"window": 65}, "at most 64 tokens, the model's context, but got 65"),
        ({"tokens": 0}, "at least 1 token but got tokens=0"),
        ({"heldout": 1.0}, r"a share in \[0, 1\) but got 1.0"),
        ({"batch_size": 0}, "at least 1 row a batch but got batch_size=0"),
        ({"overlong": "wrap"}, r"one of \('cut', 'skip', 'error'\) but got 'wrap'"),
        ({"empty": "keep"}, r"one of \('error', 'skip'\) but got 'keep'"),
        ({"sources": []}, r"one or more distinct sources but got \[\]"),
        ({"sources": ["a", "a"]}, "distinct sources"),
        ({"sources": "data.jsonl"}, "a list of one or more"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(plain, options, message):
    options = {"sources": ["missing.jsonl"], "window": 32, "model": causal_model(), **options}
    with pytest.raises(ValueError, match=message):
        finetune_data(tokenizer=plain, **options)


def test_passages_are_found_wherever_they_stand():
    draw = torch.Generator().manual_seed(0)
    windows = torch.randint(1000, (3, 64), generator=draw)
    apart = torch.randint(1000, (50,), generator=draw)
    for start, place in ((0, 0), (17, 5), (32, 18)):
        example = apart.clone()
        example[place : place + 32] = windows[1, start : start + 32]
        assert shares_passage([example, apart], [windows[:1], windows[1:]]) == [True, False]
        example[place + 16] += 1
        assert shares_passage([example], [windows]) == [False]
    assert shares_passage([apart[:5]], [windows]) == shares_passage([apart], [windows[:, :8]]) == [False]
    assert shares_passage([apart], []) == [False]


@pytest.mark.parametrize(("weights", "tokens"), [([1], 10), ([1, 0], 10), ([1, math.nan], 10), ([1, 2], None)])
def test_wrong_weights_are_refused(weights, tokens):
    with pytest.raises(ValueError, match="weight"):
        check_data_options(["a", "b"], tokens, 0.1, weights=weights)
