"""The page of the studio in a browser: the whole way from a few images to a saved model, and what may go wrong on it.

python tests/studio/test_page.py model.pt folder    serves a studio whose training is a stand-in
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("nicegui", reason="the page needs NiceGUI: pip install 'yolo-fewshot[studio]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by Selenium")

from selenium.common.exceptions import (  # noqa: E402  (after importorskip)
    StaleElementReferenceException,
    TimeoutException,
    WebDriverException,
)
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402  (after importorskip)
from selenium.webdriver.common.by import By  # noqa: E402  (after importorskip)
from selenium.webdriver.common.keys import Keys  # noqa: E402  (after importorskip)
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402  (after importorskip)

from yolo_fewshot.data.demo import BASE  # noqa: E402  (after importorskip)
from yolo_fewshot.data.support import read_support  # noqa: E402  (after importorskip)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.studio,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="no chromium and chromedriver (Debian: chromium-driver)"
    ),
]
SIZE, WAIT = 160, 90
SHOTS = Path(os.environ.get("STUDIO_SHOTS", "studio_shots"))  # where images of the page are written, if it exists


def standin(model, data, folder, minutes, imgsz, device, report):
    """Enroll in place of training; of more than a minute, go on until it is cancelled."""
    from yolo_fewshot import FewShotYOLO

    for i in range(12):
        report(done=i / 12)
        report(epoch=i + 1, loss=3 / (i + 1), ap=1 - 1 / (i + 2))
    while minutes > 1:
        time.sleep(0.05)
        report(done=0.5)
    yolo = FewShotYOLO(model)
    yolo.enroll(data, imgsz=imgsz)
    yolo.save(Path(folder) / "best.pt")
    return Path(folder) / "best.pt"


class Browser:
    """A browser without a window that sees this machine alone."""

    def __init__(self, url):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1440,1020",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
        self.url = url
        self.driver.get(url)

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css):
        self.until(lambda: self.all(css), css)
        return self.all(css)[0]

    def until(self, condition, what="", timeout=WAIT):
        """Wait for a condition, and return its value."""
        wait = WebDriverWait(self.driver, timeout, 0.1, (StaleElementReferenceException, StopIteration))
        try:
            return wait.until(lambda _: condition())
        except TimeoutException:
            self.shoot("timeout")
            pytest.fail(f"waited for {what or condition}; the page says: {self.text[-800:]} {self.errors()}")

    @property
    def text(self):
        return self.driver.find_element(By.TAG_NAME, "body").text

    def says(self, text):
        self.until(lambda: text in self.text, text)

    def settled(self):
        """Wait until the studio has nothing to do."""
        self.until(lambda: self.one('[role="status"]').text == "Saved", "Saved")

    def button(self, text):
        return self.until(lambda: next(b for b in self.all("button") if b.is_displayed() and text in b.text), text)

    def push(self, text):
        """Click at a button, which may be drawn anew meanwhile."""
        self.until(lambda: self.button(text).click() or True, text)

    def upload(self, *files):
        self.one("input[type=file]").send_keys("\n".join(map(str, files)))

    def open(self, key):
        self.until(lambda: self.one(f'.card[data-key="{key}"]').click() or True, key)
        self.until(lambda: key in self.one(".canvas img").get_attribute("src"), f"image {key}")
        self.until(
            lambda: self.driver.execute_script("return document.querySelector('.canvas img').naturalWidth > 0"), "image"
        )

    def place(self, x, y):
        """Move to a place of the image that is open, in 0..1."""
        image = self.one(".canvas img")
        w, h = image.size["width"], image.size["height"]
        return ActionChains(self.driver, 10).move_to_element_with_offset(image, (x - 0.5) * w, (y - 0.5) * h)

    def draw(self, box):
        x1, y1, x2, y2 = box
        self.place(x1, y1).click_and_hold().perform()
        self.place((x1 + x2) / 2, (y1 + y2) / 2).perform()
        self.place(x2, y2).release().perform()

    def press(self, css):
        """Click at a button that is drawn over the image, the one on top."""
        width, height = self.driver.execute_script(
            "const i = document.querySelector('.canvas img'); return [i.naturalWidth, i.naturalHeight]"
        )
        self.one(f".canvas circle.{css}")
        x, y = self.until(
            lambda: [float(self.all(f".canvas circle.{css}")[-1].get_attribute(k)) for k in ("cx", "cy")], css
        )
        self.place(x / width, y / height).click().perform()

    def name(self, text):
        field = self.one('[data-role="name"]')
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text, Keys.TAB)
        self.until(lambda: field.get_attribute("value") == text)

    def shoot(self, name):
        if SHOTS.is_dir():
            self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def requested(self):
        """Hosts that were asked for something."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                urls.append(message["params"]["url"])
        return {re.sub(r"^\w+://([^/:]*).*", r"\1", u) for u in urls if not u.startswith(("data:", "blob:"))}

    def errors(self):
        return [x["message"] for x in self.driver.get_log("browser") if x["level"] == "SEVERE"]


@contextmanager
def serving(model, folder):
    """A studio in a process of its own, and its URL."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(Path(__file__).parent), str(root / "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(model), str(folder)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = []
    try:
        for line in process.stdout:
            log.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", line)
            if found:
                break
        else:
            pytest.fail("".join(log))
        threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
        yield found[0], log, process
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def shots(demo):
    """Images of the demo data, and their objects of new classes: name, and corners in 0..1."""
    support = read_support("fewshot-demo-novel.yaml", dict(enumerate(BASE)))
    images = []
    for x in support.labels:
        c, half = x["bboxes"][:, :2], x["bboxes"][:, 2:] / 2
        corners = np.concatenate([c - half, c + half], 1).tolist()
        boxes = [(support.names[int(i)], tuple(b)) for i, b in zip(x["cls"].flat, corners) if i >= len(BASE)]
        images.append((Path(x["im_file"]), boxes))
    return images


@pytest.fixture
def studio(trained, tmp_path):
    """A studio on a new project: URL, log and process."""
    with serving(trained[1].best, tmp_path / "project") as (url, log, process):
        yield url, log, process


@pytest.fixture
def browse(studio):
    """A function that opens the page in a new browser."""
    opened = []

    def browse(url=None):
        opened.append(Browser(url or studio[0]))
        return opened[-1]

    yield browse
    for x in opened:
        x.driver.quit()


def session(tmp_path):
    return json.loads((tmp_path / "project" / "session.json").read_text())


def keys_of(tmp_path):
    """Keys of the images by name."""
    return {x["name"]: x["file"][:64] for x in session(tmp_path)["images"]}


def boxes_of(tmp_path, key, kind="boxes"):
    return next(x[kind] for x in session(tmp_path)["images"] if x["file"].startswith(key))


def test_the_whole_way(browse, shots, demo, tmp_path):
    """1. images, 2. a box, 3. what is found, 4. thresholds, 5. training, 6. saving; then it is opened again."""
    page = browse()
    page.says("Drop a few photos anywhere")
    page.shoot("1-start")
    (tmp_path / "old").mkdir()
    old = [shutil.copy(demo / f"images/val/{i:04}.jpg", tmp_path / f"old/old{i}.jpg") for i in (6, 11)]
    page.upload(*old, *(f for f, _ in shots))
    page.until(lambda: len([c for c in page.all(".card") if c.is_displayed()]) == len(shots) + 2, "cards")
    page.settled()
    keys = keys_of(tmp_path)
    name = max((n for _, b in shots for n, _ in b), key=lambda n: sum(n == x for _, b in shots for x, _ in b))
    showing = [(f, dict(b)[name]) for f, b in shots if name in dict(b)]
    page.open(keys["old11.jpg"])
    page.until(lambda: page.all(".canvas rect.known"), "the detector's own classes")
    page.shoot("2-known")

    page.name(name)
    for i, (file, box) in enumerate(showing[:-1]):
        key = keys[file.name]
        page.open(key)
        page.draw(box)
        page.until(lambda k=key: boxes_of(tmp_path, k), "the box on disk")
        page.until(lambda: page.all(".canvas rect.label"), "the box")
        (saved,) = boxes_of(tmp_path, key)
        assert saved["name"] == name and _iou(saved["xyxy"], box) > 0.6
        if i == 0:
            page.settled()
            page.shoot("3-one-box")
    page.settled()
    page.says(f"{len(showing) - 1} shots")
    page.says("recall")
    page.shoot("4-learned")

    # A threshold below everything, so that there are detections to judge.
    slider = page.one(".cls .q-slider [tabindex]")
    slider.send_keys(Keys.ARROW_LEFT * 30)
    page.until(lambda: session(tmp_path)["conf"].get(name) == 0.01, "the threshold on disk")
    page.until(lambda: page.all(".card svg rect.found"), "detections in other images")
    key = page.until(
        lambda: next(
            c.get_attribute("data-key")
            for c in page.all(".card")
            if c.find_elements(By.CSS_SELECTOR, "rect.found") and not c.find_elements(By.CSS_SELECTOR, "rect.label")
        )
    )
    page.open(key)
    page.until(lambda: page.all(".canvas circle.no"), "buttons")
    page.shoot("5-found")
    page.press("no")
    page.until(lambda: boxes_of(tmp_path, key, "rejected"), "the rejection on disk")
    page.until(lambda: page.all(".canvas rect.rejected"), "the rejection")
    page.settled()
    if page.all(".canvas circle.yes"):
        page.press("yes")
        page.until(lambda: boxes_of(tmp_path, key), "the new shot on disk")
        page.until(lambda: page.all(".canvas rect.label"), "the new shot")
        page.press("remove")
        page.until(lambda: not boxes_of(tmp_path, key), "the end of the new shot on disk")
        page.settled()
    page.push("Suggested")
    page.until(lambda: name not in session(tmp_path)["conf"], "the suggested threshold")

    minutes = page.one('[data-role="minutes"]')
    _fill(minutes, "100")
    page.push("Train")
    page.until(lambda: (tmp_path / "project" / ".train" / "progress.jsonl").exists(), "training")
    page.until(lambda: page.all("canvas"), "the chart")
    before = session(tmp_path)
    time.sleep(1)
    page.shoot("6-training")
    page.push("Cancel")
    page.button("Train")
    page.until(lambda: not (tmp_path / "project" / ".train").exists(), "the end of the training")
    assert session(tmp_path) == before and not (tmp_path / "project" / "trained.pt").exists()
    assert not list((tmp_path / "project").glob(".train*"))

    _fill(minutes, "0.5")
    page.push("Train")
    page.until(lambda: (tmp_path / "project" / "trained.pt").exists(), "the trained model")
    page.open(keys[showing[0][0].name])
    page.push("Compare")
    page.says("Before: learned at once")
    page.until(lambda: len(page.all(".both img")) == 2, "before and after")
    time.sleep(1)
    page.shoot("7-compare")
    page.one("body").send_keys(Keys.ESCAPE)
    page.until(lambda: not any(x.is_displayed() for x in page.all(".both")), "the end of the comparison")

    page.push("Save")
    page.says("Take it with you")
    for kind, file in (
        ("checkpoint", "model.pt"),
        ("onnx", "model.onnx"),
        ("trained", "trained.pt"),
        ("labels", "labels.zip"),
    ):
        page.one(f'[data-make="{kind}"]').click()
        page.until(lambda k=kind: page.one(f'[data-get="{k}"]').is_displayed(), f"{kind} to be made")
        assert (tmp_path / "project" / "exports" / file).stat().st_size > 100
    page.shoot("8-save")
    page.one("body").send_keys(Keys.ESCAPE)
    from yolo_fewshot import FewShotYOLO

    assert name in FewShotYOLO(tmp_path / "project" / "exports" / "model.pt").names.values()
    assert read_support(tmp_path / "project" / "data.yaml").class_names == {name}

    page.settled()
    state, labels = session(tmp_path), page.all(".badge.ok")
    page.driver.refresh()
    page.until(lambda: len(page.all(".badge.ok")) == len(labels), "the same page after a reload")
    assert session(tmp_path) == state
    assert page.requested() == {"127.0.0.1"}
    assert page.errors() == []


def test_two_tabs_show_the_same(browse, shots, tmp_path):
    first, second = browse(), browse()
    (file, ((name, box), *_)) = shots[0]
    first.upload(file)
    for page in (first, second):
        page.until(lambda p=page: p.all(".card"), "the image")
    first.settled()
    first.name(name)
    first.draw(box)
    second.until(lambda: second.all(".canvas rect.label"), "the label of the other page")
    second.press("remove")
    first.until(lambda: not first.all(".canvas rect.label"), "the removal of the other page")
    assert not boxes_of(tmp_path, keys_of(tmp_path)[file.name])


def test_a_name_is_asked_for_and_shown_as_it_is(browse, shots, tmp_path):
    page = browse()
    (file, ((_, box), *_)) = shots[0]
    page.upload(file)
    page.until(lambda: page.all(".card"), "the image")
    page.settled()
    page.draw(box)
    page.says("What is it?")
    name = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    field = page.one('[data-role="ask"]')
    page.until(field.is_displayed)
    field.send_keys(name, Keys.ENTER)
    page.until(lambda: page.all(".canvas rect.label"), "the label")
    page.settled()
    assert boxes_of(tmp_path, keys_of(tmp_path)[file.name])[0]["name"] == name
    assert name in [x.text for x in page.all(".canvas text")] and name in page.text
    assert not page.all(".canvas script, .cls script, img[src='x']")
    with pytest.raises(WebDriverException):
        page.driver.switch_to.alert.accept()
    page.shoot("9-escaped")
    next(b for b in page.all(".cls button") if b.text == "edit").click()
    field = page.one('[data-role="rename"]')
    page.until(field.is_displayed)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("flag pole", Keys.ENTER)
    page.until(
        lambda: boxes_of(tmp_path, keys_of(tmp_path)[file.name])[0]["name"] == "flag pole", "the new name on disk"
    )
    page.until(lambda: "flag pole" in [x.text for x in page.all(".canvas text")], "the new name")
    assert page.one('[data-role="name"]').get_attribute("value") == "flag pole"


def test_files_that_are_no_images_do_no_harm(browse, shots, tmp_path):
    page = browse()
    folder = tmp_path / "bad"
    folder.mkdir()
    good = shots[0][0].read_bytes()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", b"")]
    data = b"".join(struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in chunks)
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    (folder / "broken.jpg").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("<script>alert(1)</script>")
    (folder / "film.mp4").write_text("not a film")
    (folder / "<img src=x onerror=alert(1)>.jpg").write_bytes(good)
    outside = {x for x in tmp_path.rglob("*") if "project" not in x.parts}
    for name, words in (
        ("huge.png", "20000 x 10000 pixels"),
        ("broken.jpg", "is broken"),
        ("text.jpg", "is not an image"),
        ("film.mp4", "is not a video"),
    ):
        page.upload(folder / name)
        page.says(f"{name} {words}" if name != "huge.png" else words)
    page.shoot("10-refused")
    page.upload(folder / "<img src=x onerror=alert(1)>.jpg")
    page.until(lambda: page.all(".card"), "the image")
    page.settled()
    assert list(keys_of(tmp_path)) == ["<img src=x onerror=alert(1)>.jpg"] and not page.all("img[src='x']")
    assert {x for x in tmp_path.rglob("*") if "project" not in x.parts} == outside
    kinds = {x.relative_to(tmp_path / "project").parts[0] for x in (tmp_path / "project").rglob("*") if x.is_file()}
    assert kinds == {".lock", "session.json", "images", "thumbs"}


def test_what_cannot_be_saved_is_not_called_saved(browse, shots, tmp_path):
    page, file = browse(), tmp_path / "project/session.json"
    (image, ((name, box), *_)) = shots[0]
    page.upload(image)
    page.until(lambda: page.all(".card"), "the image")
    page.settled()
    file.rename(tmp_path / "aside.json")
    file.mkdir()  # which cannot be replaced by a file
    page.name(name)
    page.draw(box)
    page.says("Not saved: ")
    page.until(lambda: page.one('[role="status"]').text == "Not saved", "the status")
    file.rmdir()
    page.draw((0.02, 0.02, 0.12, 0.12))
    page.settled()
    assert len(boxes_of(tmp_path, keys_of(tmp_path)[image.name])) == 2


def test_files_are_dropped_anywhere(browse, shots, tmp_path):
    page = browse()
    page.says("Drop a few photos anywhere")
    page.until(lambda: page.driver.execute_script("return !!window.addToStudio"), "the uploader")
    page.driver.execute_script(
        """
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(arguments[0])], "../../dropped.jpg"));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        """,
        list(shots[0][0].read_bytes()),
    )
    page.until(lambda: page.all(".card"), "the image")
    assert list(keys_of(tmp_path)) == ["dropped.jpg"]


def test_nothing_is_lost_in_a_crash(browse, shots, studio, trained, tmp_path):
    page = browse()
    (file, ((name, box), *_)) = shots[0]
    page.upload(file)
    page.until(lambda: page.all(".card"), "the image")
    page.settled()
    page.name(name)
    page.draw(box)
    key = keys_of(tmp_path)[file.name]
    page.until(lambda: boxes_of(tmp_path, key), "the box on disk")
    studio[2].kill()
    studio[2].wait(30)
    with serving(trained[1].best, tmp_path / "project") as (url, *_):
        again = browse(url)
        again.until(lambda: again.all(".canvas rect.label"), "the label")
        again.says("1 shot")


def status(url, data=None, method=None, headers=None):
    request = urllib.request.Request(url, data, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code


def test_only_who_knows_the_token_is_answered(studio, tmp_path):
    url = studio[0]
    root = re.sub(r"/[\w-]+/$", "", url)
    assert status(url) == 200
    for path in ("/", "/wrong/", "/_nicegui/", f"/{'x' * 32}/", f"/{url[-33:-2]}/", "//", "/%2e%2e/"):
        assert status(root + path) == 403, path
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{root}/_nicegui_ws/socket.io/?EIO=4&transport=polling", timeout=30)
    for path in ("image/../../session.json", "image/%2e%2e%2fsession.json", "image/..%2F..%2Fetc%2Fpasswd", "thumb/x",
                 "exports/..%2fsession.json", "exports/session.json", "session.json", "image/" + "0" * 64):  # fmt: skip
        assert status(url + path) in {404, 405}, path


def test_a_websocket_without_the_token_is_refused(studio):
    """By hand: a handshake is answered with 403 before the connection is accepted."""
    import socket

    root = re.sub(r"/[\w-]+/$", "", studio[0])
    host, port = root.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as s:
        s.sendall(
            b"GET /_nicegui_ws/socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert s.recv(100).startswith(b"HTTP/1.1 403")


def _fill(field, text):
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text, Keys.TAB)


def _iou(a, b):
    from yolo_fewshot.studio.project import iou

    return iou(tuple(a), tuple(b))


if __name__ == "__main__":
    from yolo_fewshot.studio.app import serve
    from yolo_fewshot.studio.engine import Studio
    from yolo_fewshot.studio.live import Live

    cv2.setNumThreads(1)
    live = Live(Studio(sys.argv[1], sys.argv[2], imgsz=SIZE, device="cpu"), trainer="test_page:standin")
    try:
        serve(live, show=False)
    finally:
        live.close()
