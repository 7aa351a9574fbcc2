"""The corpus of the quality campaign: its entropy floor against brute force, and what checks rely on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from benchmarks.quality.corpus import Corpus, CorpusSettings, Documents, Source

from weft.common.sequences import IGNORED

TINY = CorpusSettings(num_vocabularies=2, num_grammars=2, num_states=2, num_tokens=4, length=5, prefix=2)


def brute_force(source: Source, tokens: tuple[int, ...]) -> float:
    """p(tokens): the sum over every sequence of hidden states."""
    total = 0.0
    for states in itertools.product(range(len(source.start_S)), repeat=len(tokens)):
        prob = source.start_S[states[0]] * source.emission_SV[states[0], tokens[0]]
        for before, state, token in zip(states, states[1:], tokens[1:], strict=False):
            prob *= source.transition_SS[before, state] * source.emission_SV[state, token]
        total += prob
    return total


def test_forward_algorithm_equals_enumeration_of_states() -> None:
    source = Corpus(TINY).sources[2]
    tokens_NT = np.array(list(itertools.product(range(4), repeat=3)))
    log_probs_NT = source.log_probs(tokens_NT)
    expected = [np.log(brute_force(source, tuple(tokens))) for tokens in tokens_NT.tolist()]
    np.testing.assert_allclose(log_probs_NT.sum(1), expected, rtol=1e-12)
    assert np.exp(log_probs_NT.sum(1)).sum() == pytest.approx(1, abs=1e-12)


def test_floors_equal_enumeration_of_states() -> None:
    corpus = Corpus(TINY)
    documents = corpus.heldout(3)
    known, inferred = [], []
    for tokens, domain in zip(documents.tokens_NT.tolist(), documents.domains_N, strict=True):
        for position in range(2, 5):
            before, upto = tuple(tokens[:position]), tuple(tokens[: position + 1])
            source = corpus.sources[domain]
            known.append(-np.log(brute_force(source, upto) / brute_force(source, before)))
            sums = [sum(brute_force(each, part) for each in corpus.sources) for part in (upto, before)]
            inferred.append(-np.log(sums[0] / sums[1]))
    assert corpus.floors(documents) == pytest.approx((np.mean(known), np.mean(inferred)), rel=1e-12)


def test_floor_is_below_any_other_source() -> None:
    corpus = Corpus(CorpusSettings())
    documents = corpus.heldout(20)
    known, inferred = corpus.floors(documents)
    others = [-log_probs_NT[:, 32:].mean() for log_probs_NT in corpus.log_probs(documents)]
    assert known <= inferred < min(others)
    assert inferred - known < 0.01, "32 tokens tell the domain, so that inferring it costs next to nothing"


def test_domain_is_identified_by_the_prefix() -> None:
    for seed in range(5):
        corpus = Corpus(CorpusSettings(seed=seed))
        assert corpus.identified(corpus.heldout(20)) > 0.98


def test_samples_follow_the_source() -> None:
    corpus = Corpus(CorpusSettings(num_states=12, num_tokens=24, skew=0))
    tokens_NT, states_NT = corpus.sources[5].sample(4000, 12, np.random.default_rng(1))
    counts_SV = np.zeros((12, 24))
    np.add.at(counts_SV, (states_NT.ravel(), tokens_NT.ravel()), 1)
    np.testing.assert_allclose(
        counts_SV / counts_SV.sum(1, keepdims=True), corpus.sources[5].emission_SV, atol=0.04
    )
    moves_SS = np.zeros((12, 12))
    np.add.at(moves_SS, (states_NT[:, :-1].ravel(), states_NT[:, 1:].ravel()), 1)
    np.testing.assert_allclose(
        moves_SS / moves_SS.sum(1, keepdims=True), corpus.sources[5].transition_SS, atol=0.04
    )


def test_same_seed_same_documents_and_splits_differ() -> None:
    settings = CorpusSettings(seed=3)
    one, other = Corpus(settings), Corpus(settings)
    np.testing.assert_array_equal(one.train.tokens_NT, other.train.tokens_NT)
    np.testing.assert_array_equal(one.heldout(5).tokens_NT, other.heldout(5).tokens_NT)
    assert not np.array_equal(one.train.tokens_NT[:5], one.heldout(5).tokens_NT[:5])
    assert not np.array_equal(one.train.tokens_NT, Corpus(CorpusSettings(seed=4)).train.tokens_NT)


def test_domains_share_the_factors() -> None:
    sources = Corpus(CorpusSettings()).sources
    np.testing.assert_array_equal(sources[4].emission_SV, sources[7].emission_SV)
    np.testing.assert_array_equal(sources[1].transition_SS, sources[13].transition_SS)
    assert not np.array_equal(sources[1].transition_SS, sources[2].transition_SS)


def test_shares_of_domains() -> None:
    corpus = Corpus(CorpusSettings(documents=100))
    counts = np.bincount(corpus.train.domains_N, minlength=16)
    assert counts.max() / counts.min() == pytest.approx(3, abs=0.1)
    assert len(corpus.train) == pytest.approx(1600, abs=16)


def test_sequences_count_all_but_the_prefix() -> None:
    documents = Documents(np.arange(12).reshape(2, 6), np.zeros(2, np.int64))
    sequences = documents.sequences(prefix=2)
    np.testing.assert_array_equal(sequences.tokens, [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]])
    np.testing.assert_array_equal(sequences.labels[0], [IGNORED, 2, 3, 4, 5])


def test_drifting_documents_change_domain_behind_the_prefix_only() -> None:
    corpus = Corpus(CorpusSettings())
    documents = corpus.drifting(200, 1 / 32)
    log_probs_DNT = corpus.log_probs(documents)
    own_NT = log_probs_DNT[documents.domains_N, np.arange(200)]
    assert own_NT[:, :32].mean() > own_NT[:, 64:].mean() + 0.3
    assert -own_NT[:, 32:].mean() > corpus.drifting_floor(documents, 1 / 32)
    unchanged = corpus.drifting(200, 0.0)
    assert corpus.drifting_floor(unchanged, 0.0) == pytest.approx(corpus.floors(unchanged)[1], rel=1e-9)
