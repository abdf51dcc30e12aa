"""The project of the studio on disk: what is uploaded, labeled and saved."""

import contextlib
import json
import os
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from yolo_fewshot.data.support import read_support
from yolo_fewshot.files import AtomicPath
from yolo_fewshot.studio import images
from yolo_fewshot.studio.images import MAX_BYTES, check_image
from yolo_fewshot.studio.project import Project, class_name, display_name

BOX = (0.25, 0.25, 0.5, 0.75)


def file_of(kind="PNG", size=(64, 48), mode="RGB", seed=0, **kwargs):
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 4), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def header_of(width, height):
    """The beginning of a PNG: its header, and an empty chunk of pixels."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    chunks = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def project(tmp_path):
    opened = Project(tmp_path / "project")
    yield opened
    opened.close()


def content_of(folder):
    """Text of all files of a data set by name."""
    names = ["session.json", "data.yaml", "train.txt", *(f"labels/{x.name}" for x in (folder / "labels").iterdir())]
    return {n: (folder / n).read_text() for n in names if (folder / n).exists()}


@pytest.mark.parametrize(
    "data, words",
    [
        (b"not an image at all", "not an image"),
        (b"", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"GIF89a", "not an image|broken"),
        (file_of()[:-300], "broken"),
        (file_of("JPEG")[:300], "broken|not an image"),
        (header_of(20_000, 10_000), "20000 x 10000 pixels.*million"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not an image"),
        (b"\xff\xd8\xff", "broken"),
        (b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0", "16384 x 16384 pixels.*million"),
        (file_of("WEBP")[:200], "broken"),
        (file_of("TIFF")[:20], "broken"),
        (header_of(10_000, 9_000), "10000 x 9000 pixels.*million"),
        (file_of(size=(5, 40)), "5 x 40 pixels"),
    ],
)
def test_what_is_no_proper_image_is_refused_by_name(data, words, project):
    with pytest.raises(ValueError, match=f"photo.jpg.*({words})"):
        project.add(data, "../../photo.jpg")
    assert not project.images and not list((project.folder / "images").iterdir())


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("was decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="million"):
        check_image(header_of(20_000, 10_000), "large.png")


@pytest.mark.parametrize("kwargs", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_the_header_of_every_kind_of_webp_is_understood(kwargs, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(ValueError, match="60 x 40 pixels"):
        check_image(file_of("WEBP", (60, 40), **kwargs), "x.webp")
    monkeypatch.setattr(images, "MAX_PIXELS", 60 * 40)
    assert check_image(file_of("WEBP", (60, 40), **kwargs), "x.webp").size == (60, 40)


@pytest.mark.parametrize("data", [b"text", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x18ftypheic"])
def test_no_package_is_installed_for_an_unknown_format(data, monkeypatch):
    monkeypatch.setattr("ultralytics.utils.checks.check_requirements", lambda *_: pytest.fail("would install"))
    with pytest.raises(ValueError, match=r"photo\.heic"):
        check_image(data, "photo.heic")


def test_bytes_are_counted_first(monkeypatch):
    monkeypatch.setattr(images, "READERS", None)
    with pytest.raises(ValueError, match="MiB"):
        check_image(bytes(MAX_BYTES + 1), "large.png")


@pytest.mark.parametrize(
    "name", ["../../evil.png", "..\\evil.png", "/etc/passwd", "<script>.png", "\x00\n", "", "a" * 500]
)
def test_a_name_is_never_a_path(name, project):
    key = project.add(file_of(), name)
    files = {x.relative_to(project.folder).as_posix() for x in project.folder.rglob("*") if x.is_file()}
    assert files == {"session.json", ".lock", f"images/{key}.png", f"thumbs/{key}.jpg"}
    assert not set("/\\\n\x00") & set(project.images[key].name) and len(project.images[key].name) <= 100


@pytest.mark.parametrize("kind, suffix", [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("BMP", ".bmp")])
def test_the_suffix_is_that_of_the_content(kind, suffix, project):
    data = file_of(kind)
    key = project.add(data, "photo.exe")
    assert (project.folder / f"images/{key}{suffix}").read_bytes() == data


def test_a_rotated_photo_is_stored_upright(project):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    key = project.add(file_of("JPEG", exif=exif), "phone.jpg")
    image = project.images[key]
    assert image.size == (48, 64)
    with Image.open(project.path(image)) as stored:
        assert stored.size == (48, 64) and stored.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("kind, mode", [("PNG", "RGBA"), ("TIFF", "RGB"), ("PNG", "P"), ("JPEG", "CMYK")])
def test_what_browsers_and_opencv_see_differently_is_converted(kind, mode, project):
    key = project.add(file_of(kind, mode=mode), "x")
    with Image.open(project.path(project.images[key])) as stored:
        assert stored.mode == "RGB" and stored.format in {"PNG", "JPEG"}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_image_of_16_bits_has_the_values_that_ultralytics_reads(kind, project):
    values, buffer = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64), BytesIO()
    Image.fromarray(values).save(buffer, kind)
    key = project.add(buffer.getvalue(), "x-ray")
    with Image.open(project.path(project.images[key])) as stored:
        np.testing.assert_array_equal(np.asarray(stored)[..., 0], values // 256)
    with Image.open(project.thumb(key)) as thumb:
        assert abs(np.asarray(thumb).mean() - 127.5) < 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_an_image_of_32_bits_is_refused(dtype, project):
    buffer = BytesIO()
    Image.fromarray(np.full((48, 64), 300, dtype)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match=r"x\.tif has 32 bits"):
        project.add(buffer.getvalue(), "x.tif")


def test_an_image_that_was_removed_can_be_labeled_again(project, tmp_path):
    for _ in range(2):
        key = project.add(file_of(), "a.png")
        project.label(key, "scooter", BOX)
        assert (project.folder / f"labels/{key}.txt").read_text() == "0 0.375000 0.500000 0.250000 0.500000\n"
        project.archive(tmp_path / "labels.zip")
        project.remove(key)
        assert not list((project.folder / "labels").iterdir())


def test_a_full_disk_is_remembered_until_all_is_saved(project, monkeypatch):
    key = project.add(file_of(), "a.png")
    assert not project.unsaved
    with monkeypatch.context() as patch:
        patch.setattr(AtomicPath, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space"):
            project.label(key, "scooter", BOX)
    assert project.unsaved
    project.set_conf("scooter", 0.5)
    assert not project.unsaved and "scooter" in (project.folder / "session.json").read_text()
    assert (project.folder / f"labels/{key}.txt").exists()


def test_the_same_content_is_stored_once(project):
    keys = {project.add(file_of(), name) for name in ("a.png", "b.png")}
    assert len(keys) == len(project.images) == 1


def test_the_labels_are_a_support_set(project):
    first, second, third = (project.add(file_of(seed=i), f"{i}.png") for i in range(3))
    project.label(first, "kick scooter", BOX)
    project.label(first, "7", (0.0, 0.0, 0.2, 0.2))
    project.set_empty(second, True)
    support = read_support(project.data)
    assert support.names == {0: "kick scooter", 1: "7"}
    assert [Path(x["im_file"]).stem for x in support.labels] == [first, second]  # the third was not looked at
    np.testing.assert_allclose(support.labels[0]["bboxes"][0], [0.375, 0.5, 0.25, 0.5], atol=1e-6)
    assert support.labels[0]["cls"].ravel().tolist() == [0, 1] and not len(support.labels[1]["cls"])
    assert third in project.images


def test_classes_can_be_listed_while_images_are_added(project):
    class Adding:
        id, name = 1, "scooter"

        def __init__(self):
            project.images[f"other{len(project.images)}"] = type("Other", (), {"boxes": []})

    for key in "ab":
        project.images[key] = type("Labeled", (), {"boxes": property(lambda _: [Adding()])})()
    assert project.names == ["scooter"] and len(project.images) == 4
    project.images.clear()


def test_indices_follow_when_a_class_goes(project):
    key = project.add(file_of(), "a.png")
    project.label(key, "first", BOX)
    project.label(key, "second", (0.6, 0.6, 0.9, 0.9))
    project.forget("first")
    assert yaml.safe_load(project.data.read_text())["names"] == {0: "second"}
    assert (project.folder / f"labels/{key}.txt").read_text().startswith("0 0.750000 0.750000")
    project.forget("second")
    assert not project.data.exists() and not list((project.folder / "labels").iterdir())


def test_saving_does_not_look_for_the_label_file_of_every_image(project, monkeypatch):
    keys = [project.add(file_of(seed=i), f"{i}.png") for i in range(5)]
    project.label(keys[0], "a", BOX)
    file, looked, exists = project.folder / f"labels/{keys[0]}.txt", [], Path.exists
    assert file.exists()
    monkeypatch.setattr(Path, "exists", lambda self, *a, **kw: looked.append(self) or exists(self, *a, **kw))
    project.unlabel(keys[0], 1)
    assert not looked and not os.path.exists(file)


def test_it_is_opened_again_as_it_was(project):
    first, second = (project.add(file_of(seed=i), f"<b>{i}</b>.png") for i in range(2))
    project.label(first, "<script>", BOX)
    project.reject(second, "<script>", BOX)
    project.set_conf("<script>", 0.4)
    project.close()
    before = content_of(project.folder)
    again = Project(project.folder)
    assert again.images == project.images and again.conf == {"<script>": 0.4}
    assert content_of(project.folder) == before
    assert again.label(second, "b", (0.6, 0.6, 0.9, 0.9)).id not in {1, 2}  # numbers are not used twice
    again.close()


ACTIONS = {
    "label": lambda p, k: p.label(k, "b", (0.6, 0.6, 0.9, 0.9)),
    "reject": lambda p, k: p.reject(k, "a", (0.6, 0.6, 0.9, 0.9)),
    "unlabel": lambda p, k: p.unlabel(k, 1),
    "forget": lambda p, k: p.forget("a"),
    "rename": lambda p, k: p.rename("a", "c"),
    "conf": lambda p, k: p.set_conf("a", 0.7),
    "add": lambda p, k: p.add(file_of(seed=9), "9.png"),
    "remove": lambda p, k: p.remove(k),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_is_on_disk_when_it_returns(action, project):
    key = project.add(file_of(), "a.png")
    project.label(key, "a", BOX)
    before = (project.folder / "session.json").read_text()
    ACTIONS[action](project, key)
    assert (project.folder / "session.json").read_text() != before
    project.close()
    again = Project(project.folder)
    assert again.images == project.images and again.conf == project.conf
    again.close()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_crash_at_any_write_loses_at_most_the_action(action, project, monkeypatch):
    key = project.add(file_of(), "a.png")
    project.label(key, "a", BOX)
    project.close()
    old = Project(project.folder)
    old.close()
    states, write = [], AtomicPath.write_bytes
    for stop in range(6):

        def crash(self, data, left=[stop]):  # noqa: B006  (it counts over calls)
            if not left[0]:
                raise OSError("disk full")
            left[0] -= 1
            return write(self, data)

        work = Project(project.folder)
        with monkeypatch.context() as m:
            m.setattr(AtomicPath, "write_bytes", crash)
            with contextlib.suppress(OSError):
                ACTIONS[action](work, key)
        work.close()
        again = Project(project.folder)
        states.append(again.images)
        if again.names:
            assert {str(x) for x in read_support(again.data).class_names} == set(again.names)
        again.close()
        (project.folder / "session.json").write_text(
            json.dumps({"version": 1, "next": 2, "about": {}, "conf": {}, "images": _stored(old)})
        )
        for image in old.images.values():
            (project.folder / "images" / image.file).write_bytes(file_of())
    assert states


def _stored(project):
    return json.loads(json.dumps([{**vars(p), "boxes": [vars(b) for b in p.boxes]} for p in project.images.values()]))


def test_a_label_replaces_the_rejection_beneath_it(project):
    key = project.add(file_of(), "a.png")
    project.reject(key, "a", BOX)
    project.label(key, "b", BOX)
    assert not project.images[key].rejected


@pytest.mark.parametrize("name", ["", "  ", "a" * 61, "a\x00b", "\u202e"])
def test_an_unusable_class_name_is_refused(name):
    with pytest.raises(ValueError, match="1 to 60 printable"):
        class_name(name)


def test_names_are_kept_as_they_are():
    assert class_name("  kick\n scooter ") == "kick scooter"
    assert class_name("<script>alert(1)</script>") == "<script>alert(1)</script>"
    assert display_name("C:\\photos\\Straße.jpg") == "Straße.jpg"


def test_a_tiny_box_is_refused(project):
    key = project.add(file_of(), "a.png")
    with pytest.raises(ValueError, match="Draw a larger one"):
        project.label(key, "a", (0.5, 0.5, 0.51, 0.9))


def test_a_box_is_brought_into_the_image(project):
    key = project.add(file_of(), "a.png")
    assert project.label(key, "a", (0.9, 0.8, -1, 0.2)).xyxy == (0.0, 0.2, 0.9, 0.8)


def test_background_with_labels_is_refused(project):
    key = project.add(file_of(), "a.png")
    project.label(key, "a", BOX)
    with pytest.raises(ValueError, match="Remove their boxes first"):
        project.set_empty(key, True)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        Project(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_studios_do_not_share_a_folder(project):
    with pytest.raises(ValueError, match="another studio"):
        Project(project.folder)
    project.close()
    Project(project.folder).close()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: "{",
        lambda s: json.dumps({**s, "version": 99}),
        lambda s: json.dumps({**s, "images": [{**s["images"][0], "file": "../../../etc/passwd"}]}),
        lambda s: json.dumps({k: v for k, v in s.items() if k != "images"}),
    ],
)
def test_an_unreadable_session_is_left_alone(change, project):
    project.add(file_of(), "a.png")
    project.close()
    file = project.folder / "session.json"
    file.write_text(change(json.loads(file.read_text())))
    before = file.read_text()
    with pytest.raises(ValueError, match=r"session\.json cannot be read"):
        Project(project.folder)
    assert file.read_text() == before


def test_a_missing_image_is_an_error(project):
    key = project.add(file_of(), "a.png")
    project.close()
    os.remove(project.path(project.images[key]))
    with pytest.raises(FileNotFoundError, match=key):
        Project(project.folder)


def test_the_archive_is_a_data_set(project, tmp_path):
    first, second = (project.add(file_of(seed=i), f"{i}.png") for i in range(2))
    with pytest.raises(ValueError, match="Draw a box"):
        project.archive(tmp_path / "labels.zip")
    project.label(first, "a", BOX)
    project.archive(tmp_path / "labels.zip")
    with zipfile.ZipFile(tmp_path / "labels.zip") as z:
        z.extractall(tmp_path / "out")
    support = read_support(tmp_path / "out" / "data.yaml")
    assert support.class_names == {"a"} and [Path(x["im_file"]).stem for x in support.labels] == [first]
    assert second in project.images
