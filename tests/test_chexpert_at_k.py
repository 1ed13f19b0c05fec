"CheXpert@k against naive implementations, with and without ties."
import numpy as np
import pandas as pd
import pytest
import torch

from cxr_nb.text_encoder import bags_of_words, chance, chexpert_at_k, dot_product, fit_tfidf_svd, intersection_over_union, retrieval_scores


def as_in_the_paper(embeddings, labels, k):
    "The formula of section 2.4 as printed, one report at a time, the report itself left out."
    similarities, scores = embeddings @ embeddings.T, []
    for i in range(len(labels)):
        nearest = [j for j in np.argsort(similarities[i]) if j != i][-k:]
        scores.append(100 * np.mean(labels[nearest] == labels[i]))
    return np.array(scores)


def averaged_over_orders(similarities, labels, k, orders, rng):
    "Mean score over random orders among equally similar reports."
    total = np.zeros(len(labels))
    for _ in range(orders):
        shuffle = rng.random(similarities.shape)
        np.fill_diagonal(shuffle, -1)
        ranked = np.lexsort((shuffle, np.where(np.eye(len(labels), dtype=bool), -np.inf, similarities)))[:, ::-1]
        total += (labels[ranked[:, :k]] == labels[:, None]).mean(1)
    return 100 * total / orders


@pytest.mark.parametrize("k", [1, 10, 118])
def test_without_ties_it_is_the_printed_formula(k):
    rng = np.random.default_rng(k)
    embeddings, labels = rng.normal(size=(119, 8)), rng.integers(4, size=119)
    np.testing.assert_allclose(chexpert_at_k(embeddings, labels, k), as_in_the_paper(embeddings.astype(np.float32), labels, k))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_ties_count_by_expectation(k):
    rng = np.random.default_rng(k)
    embeddings, labels = rng.integers(0, 2, size=(30, 3)).astype(float), rng.integers(3, size=30)
    expected = averaged_over_orders(embeddings @ embeddings.T, labels, k, 20_000, rng)
    np.testing.assert_allclose(chexpert_at_k(embeddings, labels, k), expected, atol=1.5)


def test_order_of_reports_does_not_matter():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.integers(0, 3, size=(200, 2)).astype(float), np.repeat(np.arange(4), 50)
    order = rng.permutation(200)
    np.testing.assert_allclose(chexpert_at_k(embeddings, labels)[order], chexpert_at_k(embeddings[order], labels[order]))


@pytest.mark.parametrize("tile", [7, 50, 4096])
def test_tiles_do_not_matter(tile):
    rng = np.random.default_rng(1)
    embeddings, labels = torch.from_numpy(rng.integers(0, 3, size=(120, 4))).float(), rng.integers(3, size=120)
    scores = retrieval_scores(dot_product(embeddings), labels, 5, tile=tile)
    np.testing.assert_allclose(scores, retrieval_scores(dot_product(embeddings), labels, 5))


@pytest.mark.parametrize("seed", range(8))
def test_similarities_that_cancel_give_scores_all_the_same(seed):
    "A report at a right angle to all others: its similarities are rounding, which differs between products of other shapes."
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    embeddings = np.zeros((300, 64))
    embeddings[1:, 1:] = rng.normal(size=(50, 63))[rng.integers(0, 50, 299)]
    embeddings[0, 0] = 100
    embeddings[-1] = -embeddings[0]
    labels = np.arange(300) % 3
    for tile in (16, 37, 4096):
        scores = retrieval_scores(dot_product((embeddings @ rotation).astype(np.float32)), labels, 10, tile=tile)
        assert ((0 <= scores) & (scores <= 100)).all(), scores[~((0 <= scores) & (scores <= 100))]


def test_labels_may_be_categories_and_embeddings_any_array():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(3, size=60)
    expected = chexpert_at_k(torch.from_numpy(embeddings), labels)
    np.testing.assert_array_equal(chexpert_at_k(embeddings, pd.Categorical(labels, categories=range(9))), expected)
    np.testing.assert_array_equal(chexpert_at_k(embeddings[::-1], labels[::-1])[::-1], expected)
    np.testing.assert_array_equal(chexpert_at_k(embeddings.tolist(), list(labels)), expected)


@pytest.mark.parametrize("embeddings, k, message", [
    (np.ones(6), 1, r"embeddings have the shape \(6,\); it is \(n, width\)"), (np.ones((6, 2, 2)), 1, "have the shape"),
    (np.eye(6), 2.5, "k is 2.5; it is a whole number"), (1e30 * np.ones((6, 2)), 1, "a similarity of report 0 is not finite"),
])
def test_embeddings_that_cannot_be_compared_are_refused(embeddings, k, message):
    with pytest.raises(ValueError, match=message): chexpert_at_k(embeddings, list("aabbcc"), k)


def test_the_mean_over_random_embeddings_is_chance_in_every_class():
    rng = np.random.default_rng(2)
    labels = np.repeat(["a", "b", "c"], [20, 40, 140])
    runs = [chexpert_at_k(rng.normal(size=(200, 32)), labels, 5, "cosine") for _ in range(60)]
    for label, expected in chance(labels).items():
        result = np.array([run[labels == label].mean() for run in runs])
        assert abs(result.mean() - expected) < 4 * result.std() / 60**0.5 + 0.1


def test_intersection_over_union_is_that_of_sets():
    texts = ["small left effusion", "Small effusion, left.", "no acute disease", "no effusion", "edema edema edema"]
    sets = [set(t.lower().replace(",", "").replace(".", "").split()) for t in texts]
    expected = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    rows = intersection_over_union(bags_of_words(texts))
    np.testing.assert_allclose(torch.cat([rows(slice(0, 2), slice(None)), rows(np.arange(2, 5), slice(None))]), expected, atol=1e-6)


def test_tfidf_svd_puts_like_reports_together():
    topics = {"effusion": "pleural effusion left base", "device": "catheter tip in the vena cava"}
    texts = [f"{text} {i % 7} {word}" for word in ("seen", "noted") for text in topics.values() for i in range(20)]
    labels = np.array([name for _ in range(2) for name in topics for _ in range(20)])
    embeddings = fit_tfidf_svd(texts, 5).transform(texts)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    assert chexpert_at_k(embeddings, labels).mean() > 95
    with pytest.raises(ValueError, match="100 components need more than 80 texts"): fit_tfidf_svd(texts)


@pytest.mark.parametrize("k, labels, message", [
    (0, "aabb", "k must lie between 1 and 3"), (4, "aabb", "k must lie between 1 and 3, for there are 4 reports"),
    (1, "aaab", "class 'b' has a single report"), (1, [None, "a", "a", "a"], "report 0 has no label"), (1, "", "there are 0 reports; it takes two or more"),
])
def test_what_cannot_be_scored_is_refused(k, labels, message):
    with pytest.raises(ValueError, match=message): chexpert_at_k(torch.eye(len(labels)), list(labels), k)
