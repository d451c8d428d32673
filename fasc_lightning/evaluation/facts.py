"""Factual recall: does the true object of a fact outrank the relation's other objects?"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fasc_lightning.data import json_row, open_text
from fasc_lightning.evaluation.perplexity import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIELDS = ("subject", "relation", "template", "object", "kind")
# Continuation tokens of one forward pass: bounds the (tokens, vocabulary) logits to some 100 MB in float32.
_CONTINUATION_TOKENS = 512


@dataclass(frozen=True)
class Fact:
    """One fact in the form of LAMA (Petroni et al. 2019, "Language Models as Knowledge Bases?").

    Attributes:
        subject: What the fact is about.
        relation: Facts of one relation share their candidates.
        template: Sentence with ``[X]`` for the subject and, after it, ``[Y]`` for the object.
        object: The true object.
        kind: Group in the report, for example ``"geographic"``.
    """

    subject: str
    relation: str
    template: str
    object: str
    kind: str

    def __post_init__(self) -> None:
        before, y, _ = self.template.partition("[Y]")
        if not y or "[X]" not in before:
            raise ValueError(f"Expected a template with [X] before [Y], but got {self.template!r}.")

    @property
    def prompt(self) -> str:
        """The text before the object, without the space that belongs to the object."""
        return self.template.partition("[Y]")[0].replace("[X]", self.subject).rstrip()

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class FactsResult:
    """Outcome of :func:`factual_recall`.

    Attributes:
        percent: Facts recalled, in percent.
        chance: What guessing would recall, in percent: the mean of 1 / candidates.
        count: Number of facts.
        by_kind: Percent recalled and number of facts of each kind.
    """

    percent: float
    chance: float
    count: int
    by_kind: dict[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts, lists and numbers."""
        kinds = {kind: {"percent": percent, "count": count} for kind, (percent, count) in self.by_kind.items()}
        return {**asdict(self), "by_kind": kinds}


class FactualRecall(Metric):
    """Percentage of facts recalled, overall and by kind, beside what guessing would give.

    Args:
        kinds: All kinds that may occur. They are fixed beforehand so that the states of several processes
            line up.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    recalled: Tensor
    counts: Tensor
    chance_sum: Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.add_state("recalled", torch.zeros(len(self.kinds), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.kinds), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("chance_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, recalled: Tensor, kinds: Sequence[str], candidates: Tensor) -> None:
        """Add some facts.

        Args:
            recalled: Whether each fact was recalled, bool of shape (facts,).
            kinds: Kind of each fact.
            candidates: Number of candidates each fact was ranked among, of shape (facts,).

        Raises:
            ValueError: If the lengths differ or a kind was not announced.
        """
        if not len(recalled) == len(kinds) == len(candidates):
            raise ValueError(
                f"Expected one entry a fact, but got {len(recalled)} outcomes, {len(kinds)} kinds and "
                f"{len(candidates)} candidate counts."
            )
        if unknown := set(kinds) - set(self.kinds):
            raise ValueError(f"Expected kinds among {list(self.kinds)}, but got {sorted(unknown)}.")
        index = torch.tensor([self.kinds.index(kind) for kind in kinds], device=self.counts.device, dtype=torch.long)
        self.counts.index_add_(0, index, torch.ones_like(index))
        self.recalled.index_add_(0, index, recalled.to(index))
        self.chance_sum += candidates.to(self.chance_sum).reciprocal().sum()

    def compute(self) -> dict[str, Tensor]:
        """Return percentages and counts.

        Returns:
            ``percent``, ``chance`` and ``count``, and ``percent/<kind>`` and ``count/<kind>`` of each kind; a
            percentage of no facts is NaN.
        """
        count = self.counts.sum()
        values = {
            "percent": 100.0 * self.recalled.sum().double() / count,
            "chance": 100.0 * self.chance_sum / count,
            "count": count,
        }
        for kind, recalled, of in zip(self.kinds, self.recalled, self.counts, strict=True):
            values[f"percent/{kind}"] = 100.0 * recalled.double() / of
            values[f"count/{kind}"] = of
        return values


def load_facts(path: str | Path) -> list[Fact]:
    """Read facts from a jsonl file (also ``.xz``), one object a line.

    Each needs the string fields ``subject``, ``relation``, ``template``, ``object`` and ``kind`` (see
    :class:`Fact`); others are ignored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object, a field is missing or a template lacks ``[X]`` or ``[Y]``,
            naming the line; or if there is no fact at all.
    """
    path = Path(path)
    facts = []
    for number, line in enumerate(open_text(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        row = json_row(line, where)
        missing = [field for field in _FIELDS if not isinstance(row.get(field), str) or not row[field].strip()]
        if missing:
            raise ValueError(
                f"{where}: expected the text fields {', '.join(_FIELDS)}, but {', '.join(missing)} is missing."
            )
        try:
            facts.append(Fact(**{field: row[field] for field in _FIELDS}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not facts:
        raise ValueError(f"Expected facts in {path}, one JSON object a line, but it holds none.")
    return facts


def relation_candidates(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """The distinct objects of each relation, in the order of their first fact."""
    candidates: dict[str, dict[str, None]] = {}
    for fact in facts:
        candidates.setdefault(fact.relation, {})[fact.object] = None
    return {relation: list(objects) for relation, objects in candidates.items()}


def factual_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], batch_size: int = 64
) -> FactsResult:
    """Percentage of facts whose object outranks the other objects of its relation.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts; their objects are also each other's candidates.
        batch_size: Prompts a forward pass.

    Returns:
        Percentages, overall and by kind.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no facts.
    """
    recalled = recalled_facts(model, tokenizer, facts, batch_size)
    candidates = relation_candidates(facts)
    kinds = [fact.kind for fact in facts]
    metric = FactualRecall(sorted(set(kinds)))
    metric.update(recalled, kinds, torch.tensor([len(candidates[fact.relation]) for fact in facts]))
    values = {name: value.item() for name, value in metric.compute().items()}
    return FactsResult(
        percent=values["percent"],
        chance=values["chance"],
        count=int(values["count"]),
        by_kind={kind: (values[f"percent/{kind}"], int(values[f"count/{kind}"])) for kind in metric.kinds},
    )


def recalled_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], batch_size: int = 64
) -> Tensor:
    """Which facts are recalled, for paired comparisons of two models.

    A fact is recalled if the log-probability of its whole object, given the prompt, is above that of every
    other candidate; a tie is not a recall.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts; their objects are also each other's candidates.
        batch_size: Prompts a forward pass.

    Returns:
        Bool tensor of shape (facts,), on the CPU.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If there are no facts.
    """
    if not facts:
        raise ValueError("Expected at least one fact, but got none.")
    candidates = relation_candidates(facts)
    scores = candidate_scores(model, tokenizer, facts, candidates, batch_size)
    outcome = []
    for fact, score in zip(facts, scores, strict=True):
        if not score.isfinite().all():
            raise FloatingPointError(
                f"The score of a candidate for {fact.prompt!r} is not finite. The model's weights or activations "
                "overflow: check its dtype and the layers that were replaced."
            )
        true = candidates[fact.relation].index(fact.object)
        outcome.append(bool((score >= score[true]).sum() == 1))
    return torch.tensor(outcome)


def candidate_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    candidates: dict[str, list[str]],
    batch_size: int = 64,
) -> list[Tensor]:
    """Log-probability of every candidate of every fact, given the prompt.

    A prompt is scored once, together with others of its length (so no padding comes before a token). That
    alone gives the first token of all candidates. The other tokens are scored on copies of the prompt's cache,
    one for each distinct beginning of a candidate that is not the beginning of a longer one.

    Args:
        model: Causal language model; its training mode is restored.
        tokenizer: Its tokenizer.
        facts: The facts.
        candidates: Candidates of each relation.
        batch_size: Prompts a forward pass.

    Returns:
        For each fact a float tensor of shape (candidates of its relation,), on the CPU, in nats.
    """
    tries = {
        relation: _CandidateTrie.of([_continuation_ids(tokenizer, text) for text in texts])
        for relation, texts in candidates.items()
    }
    prompts = [_prompt_ids(tokenizer, fact.prompt) for fact in facts]
    scores: list[Tensor] = [torch.empty(0)] * len(facts)
    with evaluating(model), torch.inference_mode():
        for rows in _same_length_batches(prompts, batch_size):
            batch_tries = [tries[facts[i].relation] for i in rows]
            ids = torch.tensor([prompts[i] for i in rows], device=model.device)
            for i, score in zip(rows, _score_batch(model, ids, batch_tries), strict=True):
                scores[i] = score
    return scores


@dataclass(frozen=True)
class _CandidateTrie:
    """Tokens of a relation's candidates, arranged so that shared beginnings are scored once.

    Attributes:
        first: First token of each candidate, shape (candidates,).
        prefixes: Distinct token sequences to feed after the prompt, none a beginning of another.
        edges: Where each further token is predicted, shape (4, edges): candidate, prefix, position in the
            prefix, token.
    """

    first: Tensor
    prefixes: list[tuple[int, ...]]
    edges: Tensor

    @staticmethod
    def of(candidates: list[list[int]]) -> _CandidateTrie:
        fed = sorted({tuple(ids[:-1]) for ids in candidates if len(ids) > 1})
        # Sorted tuples: a beginning of others comes right before the first of them.
        prefixes = [
            prefix for prefix, following in zip(fed, [*fed[1:], ()], strict=False) if following[: len(prefix)] != prefix
        ]
        edges = []
        for candidate, ids in enumerate(candidates):
            if len(ids) == 1:
                continue
            row = next(r for r, prefix in enumerate(prefixes) if prefix[: len(ids) - 1] == tuple(ids[:-1]))
            edges += [(candidate, row, position, token) for position, token in enumerate(ids[1:])]
        return _CandidateTrie(
            first=torch.tensor([ids[0] for ids in candidates]),
            prefixes=prefixes,
            edges=torch.tensor(edges, dtype=torch.long).view(-1, 4).T,
        )


def _score_batch(model: PreTrainedModel, prompts: Tensor, tries: list[_CandidateTrie]) -> list[Tensor]:
    """Candidate scores of prompts of one length, (batch, tokens); see :func:`candidate_scores`."""
    # Only the last position's logits are needed; a vocabulary is wide.
    narrow = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(prompts, use_cache=True, **narrow)
    cache = getattr(output, "past_key_values", None)
    first = output.logits[:, -1].float().log_softmax(-1).cpu()  # (batch, vocabulary)
    scores = [row[trie.first] for row, trie in zip(first, tries, strict=True)]

    work = [(row, number) for row, trie in enumerate(tries) for number in range(len(trie.prefixes))]
    width = max((len(prefix) for trie in tries for prefix in trie.prefixes), default=1)
    step = max(1, _CONTINUATION_TOKENS // width)
    for chunk in (work[start : start + step] for start in range(0, len(work), step)):
        fed = [tries[row].prefixes[number] for row, number in chunk]
        width = max(map(len, fed))
        # Padding comes after the tokens, where a causal model cannot see it; its own outputs are not read.
        ids = torch.tensor([[*prefix, *[0] * (width - len(prefix))] for prefix in fed], device=prompts.device)
        rows = torch.tensor([row for row, _ in chunk], device=prompts.device)
        logits = _continue(model, cache, prompts, rows, ids).float()
        normaliser = logits.logsumexp(-1)  # (chunk, width)
        for i, (row, number) in enumerate(chunk):
            candidate, prefix, position, token = tries[row].edges
            candidate, position, token = (part[prefix == number] for part in (candidate, position, token))
            log_prob = (logits[i, position, token] - normaliser[i, position]).cpu()
            scores[row].index_add_(0, candidate, log_prob)
    return scores


def _continue(model: PreTrainedModel, cache: Any, prompts: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Logits at ``ids`` (chunk, width), each following the prompt of its row; without a cache, all is fed again."""
    if not _is_branchable(cache):
        return model(torch.cat([prompts[rows], ids], dim=1), use_cache=False).logits[:, prompts.shape[1] :]
    branch = copy.deepcopy(cache)
    branch.batch_select_indices(rows)
    return model(ids, past_key_values=branch, use_cache=True).logits


def _is_branchable(cache: Any) -> bool:
    """Whether rows of a cache can be picked: keys and values can; recurrent states have no such operation."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", ())
    return len(layers) > 0 and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _same_length_batches(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of sequences in batches of one length each, shortest first."""
    by_length: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(i)
    for length in sorted(by_length):
        rows = by_length[length]
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of the prompt, after the beginning token if the tokenizer puts one there by itself."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = tokenizer("")["input_ids"][:1]
    return [*start, *ids] if start == [tokenizer.bos_token_id] else ids


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a word after a space, in the middle of a text.

    SentencePiece tokenizers put a space of their own before a text's first word, so " Paris" alone would get
    two; what follows a word does not.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    both = tokenizer(f"a {text}", add_special_tokens=False)["input_ids"]
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
