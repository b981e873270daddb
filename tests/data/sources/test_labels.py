"""Labels of arrays and of one's own Dataset, in the forms that people have."""

import numpy as np
import pytest

from data.sources.arrays import PythonImages
from data.sources.specs import open_data, open_labelled
from errors import UserError

IMAGES = np.zeros((4, 5, 6, 3), np.uint8)
IDS = np.array([2, 0, 1, 2])
FORMS = {
    "float": IDS.astype(np.float32),
    "column": IDS[:, None],
    "bytes": np.array([b"c", b"a", b"b", b"c"]),
    "text": np.array(["c", "a", "b", "c"]),
    "one-hot": np.eye(3)[IDS],
    "one-hot bool": np.eye(3, dtype=bool)[IDS],
}


class Own(list):
    pass


@pytest.mark.parametrize("form", FORMS)
def test_labels_in_any_form_are_classes(form, tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=FORMS[form])
    dataset = Own(IMAGES)
    dataset.targets = FORMS[form].tolist()
    for data in (open_data(f"{tmp_path}/x.npz?size=3"), PythonImages(dataset, "own", size=3)):
        assert data.labels.tolist() == [2, 0, 1] and data.labels.dtype == np.int64


@pytest.mark.parametrize(("labels", "words"), [
    (IDS[:3], "3 for the labels of 4 images"),
    (np.concatenate([IDS, IDS]), "8 for the labels of 4 images"),
    (np.int64(3), "one value for the labels of 4 images"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_one_sentence(labels, words, tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=labels)
    with pytest.raises(UserError, match=words) as caught:
        open_data(f"{tmp_path}/x.npz")
    assert "x.npz" in str(caught.value)


@pytest.mark.parametrize("labels", [IDS + 0.5, [1.0, np.nan, 0, 1], np.ones((4, 7)), 1j * IDS])
def test_labels_that_are_no_classes_are_said_where_they_are_needed(labels, tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=labels)
    spec = f"{tmp_path}/x.npz"
    assert open_data(spec).labels is None
    with pytest.raises(UserError, match="passed over"):
        open_labelled(spec, spec)


@pytest.mark.parametrize("images", [
    np.float32(3), np.array([IMAGES[0], IMAGES[1][:2]], dtype=object), np.zeros(7), np.zeros((2, 2))
])  # fmt: skip
def test_arrays_that_are_no_images_are_one_sentence(images, tmp_path):
    np.savez(tmp_path / "x.npz", images=images, labels=IDS)
    with pytest.raises(UserError, match="x.npz"):
        open_data(f"{tmp_path}/x.npz")


@pytest.mark.parametrize("item", [
    {"image": IMAGES[0], "y": 1}, [IMAGES[0], 1], (IMAGES[0], 1, "name"), IMAGES[0]
])  # fmt: skip
def test_items_may_be_dictionaries_and_lists(item):
    assert PythonImages(Own([item]), "own").image(0).shape == (3, 5, 6)


@pytest.mark.parametrize("item", [{"picture": IMAGES[0], "y": 1}, [1, IMAGES[0]], None, "x.png"])
def test_an_item_without_an_image_is_named(item):
    with pytest.raises(UserError, match="own/0 is a"):
        PythonImages(Own([item]), "own").image(0)


@pytest.mark.parametrize(("name", "advice"), [
    ("multi", "array called labels"), ("none", "array called labels"), ("list", "columns file"),
])  # fmt: skip
def test_advice_on_labels_fits_the_kind(name, advice, tmp_path):
    np.savez(tmp_path / "multi.npz", images=IMAGES, labels=np.ones((4, 3), int))
    np.savez(tmp_path / "none.npz", images=IMAGES)
    (tmp_path / "list.txt").write_text("a.png\n")
    spec = f"{tmp_path}/{name}.{'txt' if name == 'list' else 'npz'}"
    with pytest.raises(UserError, match=advice):
        open_labelled(spec, spec)
