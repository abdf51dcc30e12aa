"""What is drawn over an image, and what a click on it means; and who is let through by the server."""

import asyncio
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from yolo_fewshot.studio import overlay
from yolo_fewshot.studio.found import Found
from yolo_fewshot.studio.overlay import Mark, buttons_of, color_of, hit, marks_of, svg_of
from yolo_fewshot.studio.project import Box, LabeledImage
from yolo_fewshot.studio.server import HEADERS, MAX_UPLOAD, Guard

EVIL = "<script>alert('\"&')</script>"
IMAGE = LabeledImage("0" * 64 + ".png", EVIL, (400, 200))


def studio_of(boxes=(), rejected=(), found=(), known=(), suspects=()):
    """What the marks are made of."""
    image = LabeledImage(IMAGE.file, "a", IMAGE.size, list(boxes), list(rejected))
    project = SimpleNamespace(images={"a": image}, names=list(dict.fromkeys(b.name for b in boxes)))

    def shown(*_, **__):
        return list(found)

    return SimpleNamespace(project=project, known={"a": list(known)}, suspects=set(suspects), shown=shown)


def marks(**kwargs):
    return marks_of(studio_of(**kwargs), "a")


def test_names_are_text_whatever_they_are():
    box = (0.1, 0.3, 0.6, 0.9)
    all_marks = marks(
        boxes=[Box(1, EVIL, box)], rejected=[Box(2, EVIL, (0.7, 0.7, 0.8, 0.8))],
        found=[Found(EVIL, 0.5, (0.0, 0.0, 0.1, 0.1), False)], known=[Found(EVIL + "x", 0.5, (0.5, 0, 1, 0.2), True)],
    )  # fmt: skip
    svg = ElementTree.fromstring(f"<svg>{svg_of(all_marks, IMAGE, buttons_of(all_marks, IMAGE))}</svg>")
    assert {x.tag for x in svg.iter()} == {"svg", "rect", "text", "circle", "path"}
    texts = [x.text for x in svg.iter("text")]
    assert texts == [f"{EVIL}x 50%", f"not {EVIL}", f"{EVIL} 50%", EVIL]


def test_boxes_are_in_pixels_of_the_image():
    svg = ElementTree.fromstring(f"<svg>{svg_of(marks(boxes=[Box(1, 'a', (0.25, 0.5, 0.75, 1.0))]), IMAGE)}</svg>")
    rect = next(x for x in svg.iter("rect") if x.get("class") == "label")
    assert [float(rect.get(k)) for k in ("x", "y", "width", "height")] == [100, 100, 200, 100]


def test_a_suspect_shot_is_framed():
    kinds = [m.kind for m in marks(boxes=[Box(1, "a", (0, 0, 0.5, 0.5)), Box(2, "a", (0.5, 0.5, 1, 1))], suspects=[2])]
    assert kinds == ["label", "suspect"]


def test_what_the_detector_knows_is_hidden_beneath_a_label_and_below_its_threshold():
    known = [
        Found("star", c, b, True)
        for c, b in ((0.9, (0, 0, 0.5, 0.5)), (0.9, (0.6, 0.6, 1, 1)), (0.1, (0, 0.5, 0.5, 1)))
    ]
    drawn = marks(boxes=[Box(1, "a", (0, 0, 0.5, 0.5))], known=known)
    assert [(m.kind, m.source) for m in drawn] == [("known", known[1]), ("label", Box(1, "a", (0, 0, 0.5, 0.5)))]
    assert not marks_of(studio_of(known=known), "a", known=False)


@pytest.mark.parametrize(
    "kind, actions",
    [("found", ["no", "yes"]), ("label", ["remove"]), ("suspect", ["remove"]), ("rejected", ["remove"]), ("known", [])],
)
@pytest.mark.parametrize("xyxy", [(0.2, 0.3, 0.5, 0.6), (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.01, 0.02)])
def test_every_button_can_be_hit(kind, actions, xyxy):
    mark = Mark(kind, "a", "red", xyxy, None)
    buttons = buttons_of([mark], IMAGE)
    assert [b.action for b in buttons] == actions
    for b in buttons:
        assert 0 <= b.x <= 400 and 0 <= b.y <= 200
        assert hit(b.x, b.y, [b]) is b and hit(b.x + 2 * b.radius, b.y, [b]) is None
    if len(buttons) == 2 and xyxy[2] > 0.1:
        assert hit(buttons[0].x, buttons[0].y, buttons).action == "no"


def test_the_button_on_top_is_hit():
    below, above = (Mark("label", n, "red", (0, 0.2, 0.5, 0.5), None) for n in "ab")
    buttons = buttons_of([below, above], IMAGE)
    assert hit(buttons[0].x, buttons[0].y, buttons).mark is above


def test_classes_have_colors_of_their_own():
    names = [str(i) for i in range(12)]
    colors = [color_of(n, names) for n in names]
    assert len(set(colors[:10])) == 10 and colors[10:] == colors[:2] and color_of("x", names) == overlay.GRAY


TOKEN = "t" * 32


def ask(path, method="GET", headers=(), kind="http", guard=None):
    """What the guard answers, or 'app' if the application behind it was asked."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        sent.append("app")

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": list(headers)}
    guard = guard or Guard(app, TOKEN)
    guard.app = app
    asyncio.run(guard(scope, receive, send))
    return sent


PATHS = ["", "/", "//", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/", f"//{TOKEN}/", f"/x/{TOKEN}/", "/\u00fc/", "/_nicegui/x"]


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_answered(path):
    sent = ask(path)
    assert "app" not in sent and sent[0]["status"] == 403
    sent = ask(path, kind="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_another_path_leads_to_the_page_once():
    guard = Guard(None, TOKEN, "o" * 32)
    assert ask("/" + "o" * 31, guard=guard)[0]["status"] == 403
    assert ask("/" + "o" * 32, kind="websocket", guard=guard) == [{"type": "websocket.close", "code": 1008}]
    sent = ask("/" + "o" * 32, guard=guard)
    assert sent[0]["status"] == 303 and (b"location", f"/{TOKEN}/".encode()) in sent[0]["headers"] and "app" not in sent
    assert ask("/" + "o" * 32, guard=guard)[0]["status"] == 403 and "app" in ask(f"/{TOKEN}/", guard=guard)
    assert ask("/", guard=Guard(None, TOKEN))[0]["status"] == 403


def test_with_the_token_the_application_answers_with_headers():
    sent = ask(f"/{TOKEN}/image/x")
    assert "app" in sent and set(HEADERS.items()) < set(sent[0]["headers"]) and (b"x", b"y") in sent[0]["headers"]
    assert "app" in ask(f"/{TOKEN}/_nicegui_ws/", kind="websocket")
    policy = HEADERS[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy


@pytest.mark.parametrize(
    "headers, status",
    [
        ([], 411),
        ([(b"transfer-encoding", b"chunked")], 411),
        ([(b"content-length", b"-1")], 411),
        ([(b"content-length", str(MAX_UPLOAD + 1).encode())], 413),
        ([(b"content-length", str(MAX_UPLOAD).encode())], 200),
    ],
)
def test_uploads_are_limited_before_they_are_read(headers, status):
    sent = ask(f"/{TOKEN}/upload", "POST", headers)
    assert sent[0]["status"] == status and ("app" in sent) == (status == 200)
