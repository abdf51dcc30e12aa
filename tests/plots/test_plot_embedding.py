import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from yolo_fewshot.plots import embedding as module
from yolo_fewshot.plots.embedding import by_similarity, plot_embedding, project


def test_the_map_is_that_of_the_principal_components():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=g) * torch.tensor([9.0, 5, 1, 1, 1, 1, 1, 1]) + 3
    places = project(rows)
    centered = (rows - rows.mean(0)).double().numpy()
    _, _, axes = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ axes[:2].T
    for i in range(2):  # the sign of an axis means nothing
        assert abs(np.corrcoef(places[:, i], expected[:, i])[0, 1]) == pytest.approx(1, abs=1e-3)
    torch.manual_seed(5)
    assert np.array_equal(project(rows), places) and project(torch.randn(3, 1)).shape == (3, 2)


def test_umap_takes_the_place_of_the_components_where_it_is_installed(monkeypatch):
    class UMAP:
        def __init__(self, n_neighbors, metric, random_state):
            assert n_neighbors == 4 and metric == "cosine" and random_state == 0

        def fit_transform(self, rows):
            return rows[:, :2] + 1

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    monkeypatch.setattr(module, "find_spec", lambda name: name == "umap")
    assert np.array_equal(project(torch.zeros(5, 3)), np.ones((5, 2)))


def test_neighbors_are_similar():
    angle = torch.tensor([0.0, 100, 10, 90, 20, 110]).deg2rad()
    rows = torch.stack([angle.cos(), angle.sin()], 1)
    assert by_similarity(rows @ rows.T) in ([0, 2, 4, 3, 1, 5], [5, 1, 3, 4, 2, 0])
    assert by_similarity(torch.ones(1, 1)) == [0] and sorted(by_similarity(torch.ones(4, 4))) == [0, 1, 2, 3]


@pytest.mark.parametrize(("n", "novel"), [(3, {"c2"}), (70, set())])
def test_objects_lie_at_their_prototype_and_the_matrix_has_their_similarities(tmp_path, monkeypatch, n, novel):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(module, "NAMED", 60)
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    g = torch.Generator().manual_seed(0)
    prototypes = torch.randn(n, 16, generator=g)
    prototypes[:, 3:] /= 20  # so that two dimensions show nearly all
    cls = torch.arange(n).repeat(4)
    embeds = F.normalize(prototypes[cls] + 0.001 * torch.randn(4 * n, 16, generator=g), dim=1)
    plot_embedding(embeds, cls, prototypes, {i: f"c{i}" for i in range(n)}, novel, tmp_path / "embedding.png")
    assert [x.name for x in tmp_path.iterdir()] == ["embedding.png"]
    image = cv2.imread(str(tmp_path / "embedding.png"))
    assert image.shape[1] > image.shape[0] > 400
    assert (image == (0, 0, 255)).all(2).any() == bool(novel)  # the red edges of stars

    left, right, *_ = figures[0].axes
    dots, stars = ([x.get_offsets() for x in left.collections[i::2]] for i in (0, 1))
    for c, points in enumerate(dots):
        distances = [np.linalg.norm(points - star, axis=1) for star in stars]
        assert len(points) == 4 and (distances[c] == np.min(distances, 0)).all()
    cosine = F.cosine_similarity(prototypes[:, None], prototypes[None], dim=2)
    shown = right.images[0].get_array()
    if n <= module.NAMED:
        order = [int(x.get_text()[1:]) for x in right.get_yticklabels()]
        assert order == [int(x.get_text()[1:]) for x in right.get_xticklabels()] and sorted(order) == list(range(n))
        np.testing.assert_allclose(shown, cosine[order][:, order], atol=1e-6)
        assert {x.get_text() for x in right.get_yticklabels() if x.get_color() == "red"} == novel
    else:
        np.testing.assert_allclose(np.sort(shown, None), np.sort(cosine.numpy(), None), atol=1e-6)
        assert not len(right.get_xticks()) and not len(right.get_yticks())  # places are no class numbers
    assert {x.get_text() for x in left.texts} == ({f"c{i}" for i in range(n)} if n <= module.NAMED else set())
