"""Models for the evaluation's tests: a random one, and one that knows what it is asked."""

from __future__ import annotations

import torch
from tiny import byte_tokenizer, causal_model

from fasc_lightning.evaluation._multiple_choice import ChoiceQuestion

#: What the fixture ``knowing_model`` has read. The pairs stand after a beginning token, as they are scored.
HOMES = {"ada": "rome", "bob": "oslo", "cid": "bern", "dan": "riga", "eve": "rome"}
NUMBERS = (("cats have", "four", "legs."), ("birds have", "two", "legs."), ("feet have", "five", "toes."))
PAIRS = (("the cat sleeps.", "the cat sleep."), ("the cats sleep.", "the cats sleeps."), ("he is.", "he are."))
QUESTIONS = (
    ChoiceQuestion("sky_lore", "Colour?", ("red", "blue", "green"), 1),
    ChoiceQuestion("sky_lore", "Height?", ("high", "low"), 0),
    ChoiceQuestion("sea", "Taste?", ("salt", "sour", "sweet as honey"), 2),
)
SHORT = (("Q: who?\nA:", "the king"), ("Q: where?\nA:", "oslo"), ("Q: when?\nA:", "may 3"))
_HEAD = "The following are questions (with answers) about {}.\n\n"


def read_texts() -> list[tuple[bool, str]]:
    """Texts, and whether a beginning token stands before them."""
    texts = [(False, f"{name} lives in {home} .") for name, home in HOMES.items()]
    texts += [(False, f"{before} {number} {after}") for before, number, after in NUMBERS]
    texts += [(True, good) for good, _ in PAIRS]
    texts += [(False, _HEAD.format(q.subject.replace("_", " ")) + q.solved("answer")) for q in QUESTIONS]
    return texts + [(False, f"{prompt} {answer}\n") for prompt, answer in SHORT]


def random_model(family="llama", **settings):
    """A random model of bytes, in float64, with likes and dislikes strong enough to tell apart."""
    ranges = {} if family == "opt" else {"initializer_range": 0.5}
    sizes = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    return causal_model(family, vocab_size=259, **{**sizes, **ranges, **settings}).double().eval()


def learned_model():
    """A model that has learned :func:`read_texts` by heart."""
    with torch.random.fork_rng():
        model = causal_model("llama", vocab_size=259, hidden_size=48, max_position_embeddings=256).train()
        tokenizer = byte_tokenizer()
        rows = [[1] * begins + tokenizer(text)["input_ids"] for begins, text in read_texts()]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(ids == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(120):
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()
