"""Log-probabilities of continuations given prompts, which facts, pairs and choices share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasc_lightning._utils import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Continuation tokens per forward pass; bounds the (tokens, vocabulary) logits to some 100 MB in float32.
_CONTINUATION_TOKENS = 512


@dataclass(frozen=True)
class ContinuationTrie:
    """Tokens of a prompt's continuations, arranged so that a shared beginning is scored once.

    Attributes:
        first: First token of each continuation, shape (continuations,).
        prefixes: Distinct token sequences to feed after the prompt; none is the beginning of another.
        edges: The place that predicts each further token, shape (4, edges): continuation, prefix, position in the
            prefix, token.
    """

    first: Tensor
    prefixes: list[tuple[int, ...]]
    edges: Tensor

    @staticmethod
    def of(continuations: Sequence[Sequence[int]]) -> ContinuationTrie:
        """Arrange continuations of at least one token each.

        Raises:
            ValueError: If a continuation is empty, or there is none.
        """
        if not continuations or not all(continuations):
            raise ValueError(f"Expected continuations of at least one token each, but got {list(continuations)}.")
        fed = sorted({tuple(ids[:-1]) for ids in continuations if len(ids) > 1})
        # In sorted order the beginning of other tuples comes right before the first of them.
        prefixes = [
            prefix for prefix, following in zip(fed, [*fed[1:], ()], strict=False) if following[: len(prefix)] != prefix
        ]
        edges = []
        for continuation, ids in enumerate(continuations):
            if len(ids) == 1:
                continue
            row = next(r for r, prefix in enumerate(prefixes) if prefix[: len(ids) - 1] == tuple(ids[:-1]))
            edges += [(continuation, row, position, token) for position, token in enumerate(ids[1:])]
        return ContinuationTrie(
            first=torch.tensor([ids[0] for ids in continuations]),
            prefixes=prefixes,
            edges=torch.tensor(edges, dtype=torch.long).view(-1, 4).T,
        )

    def prefixes_of(self, continuations: Sequence[int]) -> list[int]:
        """Return the indices of the prefixes that predict further tokens of these continuations."""
        wanted = torch.isin(self.edges[0], torch.tensor(continuations, dtype=torch.long))
        return self.edges[1][wanted].unique().tolist()

    @property
    def width(self) -> int:
        """Return the number of tokens of the longest sequence to feed."""
        return max(map(len, self.prefixes), default=0)


def continuation_scores(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tries: Sequence[ContinuationTrie],
    batch_size: int = 64,
    alike: Sequence[Hashable] | None = None,
    true: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return the log-probability of every continuation of every prompt, given the prompt.

    A prompt is read once, together with others of its length (so no padding comes before a token). This scores the
    first token of all continuations. The other tokens are scored on copies of the prompt's cache. There is one copy for
    each distinct beginning of a continuation that is not the beginning of a longer one.

    Args:
        model: Causal language model; its training mode is restored.
        prompts: Token ids of the prompts, at least one each.
        tries: Continuations of each prompt.
        batch_size: Prompts per forward pass.
        alike: A key for each prompt. Prompts of one key share the reading of their common beginning, such as the
            examples before a question. None reads every prompt by itself.
        true: Index of the true continuation of each prompt, if only its rank is needed. A continuation whose first
            token is less likely than the whole true one is not read to its end, because more tokens can only lower its
            score.

    Returns:
        For each prompt a float32 tensor of shape (continuations,), on the CPU, in nats. With ``true``, continuations
        that were not read get upper bounds below the true one's score. Scores that are not finite are returned
        unchanged; see :func:`check_finite`.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(alike if alike is not None else [None] * len(prompts)):
        groups.setdefault(key, []).append(i)
    scores: list[Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model), torch.inference_mode():
        for members in groups.values():
            common = 0 if alike is None or len(members) == 1 else _common_length([prompts[i] for i in members])
            read = _Reading.of(model, [prompts[members[0]][:common]])[1] if common else None
            for batch in _same_length_batches(members, prompts, tries, batch_size):
                rest = [prompts[i][common:] for i in batch]
                last, reading = _Reading.of(model, rest) if read is None else read.follow([0] * len(rest), rest, keep=1)
                found = _score_batch(
                    last, reading, [tries[i] for i in batch], None if true is None else [true[i] for i in batch]
                )
                for i, score in zip(batch, found, strict=True):
                    scores[i] = score
    return scores


def check_finite(scores: Tensor, item: str) -> None:
    """Refuse scores of a broken model.

    Raises:
        FloatingPointError: If a score is not finite; the message names the item.
    """
    if not scores.isfinite().all():
        raise FloatingPointError(
            f"{item} is not finite. The model's weights or activations overflow: check its dtype and the layers that "
            "were replaced."
        )


def ranks_first(scores: Tensor, true: int) -> bool:
    """Return whether the true entry is above every other one; a tie gives False."""
    return bool((scores >= scores[true]).sum() == 1)


def each_ranks_first(scores: Iterable[Tensor], true: Sequence[int], items: Sequence[str]) -> Tensor:
    """Return whether each item's true entry is above every other entry.

    Args:
        scores: Scores of each item's entries.
        true: Index of each item's true entry.
        items: Names of the items, for errors.

    Returns:
        Bool tensor of shape (items,).

    Raises:
        FloatingPointError: If a score is not finite; the message names the item.
    """
    outcome = []
    for score, entry, item in zip(scores, true, items, strict=True):
        check_finite(score, item)
        outcome.append(ranks_first(score, entry))
    return torch.tensor(outcome)


@dataclass(frozen=True)
class _Reading:
    """Rows of tokens that a model has read, all with one length.

    Attributes:
        model: The model.
        ids: The tokens, (rows, tokens).
        cache: The model's keys and values for them; None if its cache cannot be branched.
    """

    model: PreTrainedModel
    ids: Tensor
    cache: Any

    @staticmethod
    def of(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, _Reading]:
        """Read rows from their beginning; also return the logits of the last position, (rows, 1, vocabulary)."""
        ids = torch.tensor(rows, device=model.device)
        output = model(ids, use_cache=True, **last_logits_only(model, 1))
        cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1:], _Reading(model, ids, cache if is_key_value_cache(cache) else None)

    def follow(
        self, rows: Sequence[int], more: Sequence[Sequence[int]], keep: int | None = None
    ) -> tuple[Tensor, _Reading]:
        """Read each of ``more`` after the row that ``rows`` names; without a cache, the whole rows are read again.

        Returns:
            Logits of the last ``keep`` positions (all of ``more`` if None), and the longer rows.
        """
        index = torch.tensor(rows, device=self.ids.device)
        following = torch.tensor(more, device=self.ids.device)
        ids = torch.cat([self.ids[index], following], dim=1)
        keep = keep or following.shape[1]
        narrow = last_logits_only(self.model, keep)
        if self.cache is None:
            branch = None
            output = self.model(ids, use_cache=False, **narrow)
        else:
            branch = copy.deepcopy(self.cache)
            branch.batch_select_indices(index)
            output = self.model(following, past_key_values=branch, use_cache=True, **narrow)
        return output.logits[:, -keep:], _Reading(self.model, ids, branch)


def _score_batch(
    last: Tensor, reading: _Reading, tries: list[ContinuationTrie], true: list[int] | None
) -> list[Tensor]:
    """Score the continuations of prompts with one length; see :func:`continuation_scores`.

    Args:
        last: Logits after each prompt, (prompts, 1, vocabulary).
        reading: The prompts.
        tries: Continuations of each.
        true: Index of the true continuation of each, or None.
    """
    first = last[:, -1].float().log_softmax(-1).cpu()  # (prompts, vocabulary)
    scores = [row[trie.first] for row, trie in zip(first, tries, strict=True)]
    everything = {(row, number) for row, trie in enumerate(tries) for number in range(len(trie.prefixes))}
    if true is None:
        _add_further_tokens(scores, reading, tries, sorted(everything))
        return scores
    wanted = {
        (row, number)
        for row, (trie, entry) in enumerate(zip(tries, true, strict=True))
        for number in trie.prefixes_of([entry])
    }
    _add_further_tokens(scores, reading, tries, sorted(wanted))
    rivals = {
        (row, number)
        for row, (trie, entry) in enumerate(zip(tries, true, strict=True))
        # NaN compares false, so it counts as a rival here and is reported in the end.
        for number in trie.prefixes_of((~(scores[row] < scores[row][entry])).nonzero().flatten().tolist())
    }
    _add_further_tokens(scores, reading, tries, sorted(rivals - wanted))
    return scores


def _add_further_tokens(
    scores: list[Tensor], reading: _Reading, tries: list[ContinuationTrie], work: list[tuple[int, int]]
) -> None:
    """Add the log-probabilities of continuations' further tokens to the scores of their first tokens.

    Args:
        scores: Scores of each prompt's continuations; changed in place.
        reading: The prompts.
        tries: Continuations of each.
        work: The prefixes to read: prompt, index of the prefix.
    """
    step = max(1, _CONTINUATION_TOKENS // max(1, *(trie.width for trie in tries)))
    for chunk in (work[start : start + step] for start in range(0, len(work), step)):
        fed = [tries[row].prefixes[number] for row, number in chunk]
        width = max(map(len, fed))
        # Padding comes after the tokens, where a causal model cannot see it; outputs at the padding are not used.
        padded = [[*prefix, *[0] * (width - len(prefix))] for prefix in fed]
        logits = reading.follow([row for row, _ in chunk], padded)[0].float()
        normaliser = logits.logsumexp(-1)  # (chunk, width)
        for i, (row, number) in enumerate(chunk):
            continuation, prefix, position, token = tries[row].edges
            continuation, position, token = (part[prefix == number] for part in (continuation, position, token))
            log_prob = (logits[i, position, token] - normaliser[i, position]).cpu()
            scores[row].index_add_(0, continuation, log_prob)


def last_logits_only(model: PreTrainedModel, positions: int) -> dict[str, int]:
    """Return the argument that limits logits to the last positions, if the model has one, to save memory."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions} if takes else {}


def is_key_value_cache(cache: Any) -> bool:
    """Return whether rows of a cache can be selected, as in keys and values; recurrent states cannot."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", ())
    return len(layers) > 0 and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all sequences begin with; each keeps at least one token of its own."""
    first, last = min(sequences, key=list), max(sequences, key=list)
    limit = min(map(len, sequences)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(0, limit))


def _same_length_batches(
    members: Sequence[int], prompts: Sequence[Sequence[int]], tries: Sequence[ContinuationTrie], batch_size: int
) -> Iterator[list[int]]:
    """Yield the indices of prompts in batches with one length each, shortest first."""
    by_length: dict[int, list[int]] = {}
    for i in members:
        by_length.setdefault(len(prompts[i]), []).append(i)
    for length in sorted(by_length):
        # Continuations with similar lengths need little padding.
        rows = sorted(by_length[length], key=lambda i: tries[i].width)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
