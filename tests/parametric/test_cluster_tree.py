"""Hierarchical k-means: planted clusters are found, descent is greedy, no cluster takes all."""

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from kit.parametric import cluster_tree


def planted(each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """16 clusters in 4 groups of 4: far groups, near clusters, little noise."""
    rng = np.random.default_rng(seed)
    groups = rng.normal(size=(4, 1, 8)) * 20
    centres = (groups + rng.normal(size=(4, 4, 8)) * 3).reshape(16, 8)
    labels = np.repeat(np.arange(16), each)
    return (centres[labels] + rng.normal(size=(len(labels), 8)) * 0.2).astype(np.float32), labels


def test_a_planted_hierarchy_is_found():
    vectors, labels = planted(50)
    paths = cluster_tree.fit(vectors, 4, 2).assign(vectors)
    for mine, theirs, count in ((paths[:, 0], labels // 4, 4), (paths[:, 1], labels, 16)):
        assert len(set(zip(mine, theirs, strict=True))) == count, "the same parts, whatever names"
    assert (paths[:, 1] // 4 == paths[:, 0]).all(), "a node of the next level is a child"


def test_descent_is_greedy_by_distance():
    """Against a loop over vectors and levels."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 6)).astype(np.float32)
    tree = cluster_tree.fit(vectors, 3, 3)
    found = tree.assign(vectors)
    for vector, path in zip(vectors, found, strict=True):
        node = 0
        for level, centroids in enumerate(tree.levels):
            gaps = ((centroids[node] - vector) ** 2).sum(1)
            node = node * 3 + int(gaps.argmin())
            assert path[level] == node


def test_a_level_is_about_as_tight_as_the_best_of_scipy():
    vectors, _ = planted(100, seed=2)
    ours = cluster_tree.fit(vectors, 16, 1)
    tight = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        centroids, labels = kmeans2(vectors, 16, iter=50, minit="++", rng=rng)
        tight.append(((vectors - centroids[labels]) ** 2).sum())
    gaps = ((vectors - ours.levels[0][0][ours.assign(vectors)[:, 0]]) ** 2).sum()
    assert gaps < 1.05 * min(tight)


def test_no_cluster_of_a_step_takes_more_than_the_cap_of_the_paper(monkeypatch):
    """16 clusters hold 0.094 of the mass each at most (arXiv 2510.02375, section 3.2), here
    where nine of ten vectors lie in one blob: of 1,600 vectors 150, and some clusters are full."""
    sizes, balanced = [], cluster_tree._balanced

    def counted(scores, most):
        labels = balanced(scores, most)
        sizes.append(np.bincount(labels, minlength=16).max())
        return labels

    monkeypatch.setattr(cluster_tree, "_balanced", counted)
    rng = np.random.default_rng(3)
    far = 15 * np.eye(4)[rng.integers(4, size=160)]
    vectors = np.concatenate([rng.normal(size=(1440, 4)), rng.normal(size=(160, 4)) + far])
    cluster_tree.fit(vectors, 16, 1, steps=3)
    assert len(sizes) == 3 and max(sizes) == 150 == round(0.094 * 1600)


def test_no_cluster_takes_much_more_than_its_share():
    """Nine of ten vectors in one blob: plain k-means leaves them there, the cap parts them."""
    rng = np.random.default_rng(3)
    far = 15 * np.eye(4)[rng.integers(4, size=200)]
    vectors = np.concatenate([rng.normal(size=(1800, 4)), rng.normal(size=(200, 4)) + far])
    vectors = vectors.astype(np.float32)
    shares = np.bincount(cluster_tree.fit(vectors, 8, 1).assign(vectors)[:, 0], minlength=8) / 2000
    assert shares.max() < 1.2 * 1.5 / 8


def test_rows_beyond_the_cap_go_to_their_next_best():
    scores = np.array([[5.0, 1], [4, 3], [3, 0], [2, 1.5]])
    assert cluster_tree._balanced(scores, 2).tolist() == [0, 0, 1, 1]
    assert cluster_tree._balanced(scores, 4).tolist() == [0, 0, 0, 0]


def test_equal_seeds_give_equal_trees_and_a_file_keeps_them(tmp_path):
    vectors, _ = planted(20)
    one, two, other = (cluster_tree.fit(vectors, 4, 2, seed=seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one.levels, two.levels, strict=True))
    assert any((a != b).any() for a, b in zip(one.levels, other.levels, strict=True))
    one.save(tmp_path / "tree.npz")
    read = cluster_tree.load(tmp_path / "tree.npz")
    assert (read.assign(vectors) == one.assign(vectors)).all()


def test_few_vectors_empty_nodes_and_one_cluster_still_make_a_tree():
    vectors = np.eye(4, dtype=np.float32)
    tree = cluster_tree.fit(vectors, 4, 3)
    assert len({tuple(path) for path in tree.assign(vectors)}) == 4
    assert tree.assign(np.zeros((0, 4), dtype=np.float32)).shape == (0, 3)
    assert (cluster_tree.fit(vectors, 1, 1).assign(vectors) == 0).all()


def test_wrong_input_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="branching is 0, levels 2, and there are 4 vectors"):
        cluster_tree.fit(np.eye(4), 0, 2)
    tree = cluster_tree.fit(np.eye(4), 2, 1)
    with pytest.raises(ValueError, match=r"The vectors are \[2, 3\], the tree has 4 dimensions"):
        tree.assign(np.zeros((2, 3)))
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.npz is no tree of clusters"):
        cluster_tree.load(tmp_path / "bad.npz")
