"""Text whose entropy is known: hidden Markov sources in a grid of vocabularies × grammars.

A *domain* is a hidden Markov source. Its vocabulary (factor A) says which tokens each hidden state emits, its
grammar (factor B) which state follows which; all domains use the same tokens and the same number of states, so that
a token alone says little about where it comes from. Four vocabularies and four grammars make sixteen domains,
which two levels of four experts can represent exactly, if what an expert learns composes with what others learn.

The entropy floor of given documents is exact: the forward algorithm gives the probability of each token under the
true source, whoever knows the domain; and under the mixture of all sources for whoever must infer it.

Shapes: N documents, T tokens, D domains, S states, V tokens in the vocabulary.
"""

# ruff: noqa: N803, N806, N815
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from weft.common.sequences import IGNORED, Sequences

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A hidden Markov source."""

    start_S: Float64
    """Probability of each state at the first token."""
    transition_SS: Float64
    """Row: probability of each next state."""
    emission_SV: Float64
    """Row: probability of each token."""

    def sample(self, num_documents: int, length: int, rng: np.random.Generator) -> tuple[Int64, Int64]:
        """Draw documents: tokens and hidden states, [N, T] each."""
        tokens_NT = np.zeros((num_documents, length), np.int64)
        states_NT = np.zeros_like(tokens_NT)
        states_N = _draw(np.broadcast_to(self.start_S, (num_documents, len(self.start_S))), rng)
        for position in range(length):
            states_NT[:, position] = states_N
            tokens_NT[:, position] = _draw(self.emission_SV[states_N], rng)
            states_N = _draw(self.transition_SS[states_N], rng)
        return tokens_NT, states_NT

    def log_probs(self, tokens_NT: Int64) -> Float64:
        """Log p(token t | tokens before it) in nats, [N, T], by the forward algorithm (Rabiner 1989, section III)."""
        belief_NS = np.broadcast_to(self.start_S, (len(tokens_NT), len(self.start_S)))
        log_probs_NT = np.zeros(tokens_NT.shape)
        for position in range(tokens_NT.shape[1]):
            joint_NS = belief_NS * self.emission_SV[:, tokens_NT[:, position]].T
            prob_N = joint_NS.sum(1)
            log_probs_NT[:, position] = np.log(prob_N)
            belief_NS = joint_NS / prob_N[:, None] @ self.transition_SS
        return log_probs_NT


def _draw(probs_NK: Float64, rng: np.random.Generator) -> Int64:
    """One index a row."""
    below_NK = probs_NK.cumsum(1) < rng.random(len(probs_NK))[:, None]
    # Rounding may leave the last cumulated probability a little below 1.
    drawn: Int64 = np.minimum(below_NK.sum(1), probs_NK.shape[1] - 1)
    return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    """What a corpus is a function of."""

    num_vocabularies: int = 4
    """Values of factor A."""
    num_grammars: int = 4
    """Values of factor B; domain = vocabulary · num_grammars + grammar."""
    num_states: int = 24
    """Hidden states of each source."""
    num_tokens: int = 48
    """Size of the vocabulary; a multiple of num_states."""
    skew: float = 1.5
    """Exponent of how unequally popular states are as successors; 0: equally."""
    noise: float = 0.05
    """Share of every distribution that is uniform, so that no token and no transition is impossible."""
    length: int = 96
    """Tokens of a document."""
    prefix: int = 32
    """First tokens of a document, which are read and neither learnt nor counted."""
    documents: int = 400
    """Training documents of the mean domain."""
    share_ratio: float = 3.0
    """Documents of the largest domain over those of the smallest."""
    seed: int = 0
    """Of the sources and of the documents."""

    @property
    def num_domains(self) -> int:
        """Sources."""
        return self.num_vocabularies * self.num_grammars


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents and where they come from."""

    tokens_NT: Int64
    domains_N: Int64

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def select(self, indices_N: Int64) -> Documents:
        """Some of them."""
        return Documents(self.tokens_NT[indices_N], self.domains_N[indices_N])

    def sequences(self, prefix: int) -> Sequences:
        """One window a document; labels are the next tokens, those of the prefix ignored."""
        tokens_NT = self.tokens_NT.astype(np.int32)
        labels_NT = tokens_NT[:, 1:].copy()
        labels_NT[:, : prefix - 1] = IGNORED
        num_documents, length = labels_NT.shape
        return Sequences(
            tokens=np.ascontiguousarray(tokens_NT[:, :-1]),
            labels=labels_NT,
            lengths=np.full(num_documents, length, np.int32),
            num_bytes=np.zeros(num_documents, np.int64),
            num_tokens=tokens_NT.size,
        )


class Corpus:
    """The sources of a corpus and the documents drawn from them."""

    def __init__(self, settings: CorpusSettings) -> None:
        self.settings = settings
        rng = np.random.default_rng([settings.seed, 0])
        emissions = [_emission(settings, rng) for _ in range(settings.num_vocabularies)]
        transitions = [_transition(settings, rng) for _ in range(settings.num_grammars)]
        start_S = np.full(settings.num_states, 1 / settings.num_states)
        self.sources = tuple(
            Source(start_S=start_S, transition_SS=transition_SS, emission_SV=emission_SV)
            for emission_SV in emissions
            for transition_SS in transitions
        )
        # Geometric from 1 to share_ratio, in an order of its own: size is to say nothing about either factor.
        shares_D = np.geomspace(1, settings.share_ratio, settings.num_domains)
        self.shares_D: Float64 = rng.permutation(shares_D / shares_D.sum())

    @cached_property
    def train(self) -> Documents:
        """Documents to learn from, domain by domain, as many of each as its share says."""
        total = self.settings.documents * self.settings.num_domains
        return self._draw(np.maximum(1, (self.shares_D * total).round().astype(np.int64)), stream=1)

    def heldout(self, documents: int) -> Documents:
        """As many documents of each domain, never trained on: all domains count the same."""
        return self._draw(np.full(self.settings.num_domains, documents), stream=2)

    def reserved(self, documents: int) -> Documents:
        """As many documents of each domain for whoever fits a router, in neither of the others."""
        return self._draw(np.full(self.settings.num_domains, documents), stream=4)

    def drifting(self, documents: int, change: float) -> Documents:
        """Documents whose domain is drawn anew with probability ``change`` after each token beyond the prefix.

        ``domains_N`` is the domain of the prefix. A document without a change is one of ``heldout``'s kind.
        """
        rng, settings = np.random.default_rng([self.settings.seed, 3]), self.settings
        first, rest = self._drifting_source(0.0), self._drifting_source(change)
        prefix_NT, states_NT = first.sample(documents, settings.prefix, rng)
        following_N = _draw(rest.transition_SS[states_NT[:, -1]], rng)
        tokens = [prefix_NT]
        for _ in range(settings.length - settings.prefix):
            tokens.append(_draw(rest.emission_SV[following_N], rng)[:, None])
            following_N = _draw(rest.transition_SS[following_N], rng)
        return Documents(np.hstack(tokens), states_NT[:, 0] // settings.num_states)

    def drifting_floor(self, documents: Documents, change: float) -> float:
        """Entropy floor of drifting documents, in nats a counted token, for who must infer the domain.

        The prefix is taken as it is for the source that also drifts there: the belief about the domain at its end
        differs little, and by nothing where the domain was certain.
        """
        log_probs_NT = self._drifting_source(change).log_probs(documents.tokens_NT)
        return float(-log_probs_NT[:, self.settings.prefix :].mean())

    def log_probs(self, documents: Documents) -> Float64:
        """Log p(token | tokens before it, domain) under every source, [D, N, T]."""
        return np.stack([source.log_probs(documents.tokens_NT) for source in self.sources])

    def floors(self, documents: Documents) -> tuple[float, float]:
        """Entropy floor of these documents in nats a counted token: knowing the domain, and inferring it.

        Whoever infers has the domains' prior (equal) and what came before in the document, prefix included:
        log p(x_t | x_<t) = log Σ_d p_d(x_≤t) − log Σ_d p_d(x_<t).
        """
        prefix = self.settings.prefix
        log_probs_DNT = self.log_probs(documents)
        known_NT = log_probs_DNT[documents.domains_N, np.arange(len(documents))]
        evidence_NT = np.logaddexp.reduce(log_probs_DNT.cumsum(2), axis=0)
        inferred_NT = np.diff(evidence_NT, axis=1)[:, prefix - 1 :]
        return float(-known_NT[:, prefix:].mean()), float(-inferred_NT.mean())

    def identified(self, documents: Documents) -> float:
        """Share of documents whose domain is the likeliest given the prefix alone."""
        log_probs_DNT = self.log_probs(documents)[:, :, : self.settings.prefix]
        return float((log_probs_DNT.sum(2).argmax(0) == documents.domains_N).mean())

    def _draw(self, counts_D: Int64, *, stream: int) -> Documents:
        rng = np.random.default_rng([self.settings.seed, stream])
        drawn = [
            source.sample(int(count), self.settings.length, rng)[0]
            for source, count in zip(self.sources, counts_D, strict=True)
        ]
        return Documents(np.concatenate(drawn), np.repeat(np.arange(len(counts_D)), counts_D))

    def _drifting_source(self, change: float) -> Source:
        """All domains as one source of D·S states: with probability ``change`` the next domain is drawn anew."""
        num_domains, num_states = self.settings.num_domains, self.settings.num_states
        total = num_domains * num_states
        transition_SS = np.full((total, total), change / total)
        for domain, source in enumerate(self.sources):
            block = slice(domain * num_states, (domain + 1) * num_states)
            transition_SS[block, block] += (1 - change) * source.transition_SS
        return Source(
            start_S=np.full(total, 1 / total),
            transition_SS=transition_SS,
            emission_SV=np.concatenate([source.emission_SV for source in self.sources]),
        )


def _emission(settings: CorpusSettings, rng: np.random.Generator) -> Float64:
    """[S, V]: each state has tokens of its own, the first of them the most frequent, and all others now and then."""
    each = settings.num_tokens // settings.num_states
    weights = 0.5 ** np.arange(each)
    emission_SV = np.full((settings.num_states, settings.num_tokens), settings.noise / settings.num_tokens)
    owned_SE = rng.permutation(settings.num_tokens)[: settings.num_states * each].reshape(-1, each)
    emission_SV[np.arange(settings.num_states)[:, None], owned_SE] += (
        (1 - settings.noise) * weights / weights.sum()
    )
    return emission_SV


def _transition(settings: CorpusSettings, rng: np.random.Generator) -> Float64:
    """[S, S]: each state has one likely and one less likely successor, and all others now and then.

    Some states are more popular successors than others, so that grammars differ in how often states occur.
    """
    num_states = settings.num_states
    popularity_S = rng.permutation((1.0 + np.arange(num_states)) ** -settings.skew)
    popularity_S /= popularity_S.sum()
    transition_SS = np.full((num_states, num_states), settings.noise / num_states)
    successors_S2 = np.array(
        [rng.choice(num_states, 2, replace=False, p=popularity_S) for _ in range(num_states)]
    )
    transition_SS[np.arange(num_states)[:, None], successors_S2] += (1 - settings.noise) * np.array(
        [0.75, 0.25]
    )
    return transition_SS
