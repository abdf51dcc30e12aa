"""The page of the studio: a thin skin over `Live`, of NiceGUI, which brings all that the browser needs.

NiceGUI is chosen since its `interactive_image` has mouse events and an overlay, its pages are Python, and its wheel
holds all scripts and fonts, so that the page works offline.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from nicegui import events, run, ui
from ultralytics.data.utils import VID_FORMATS

from yolo_fewshot.studio import overlay
from yolo_fewshot.studio.found import Found
from yolo_fewshot.studio.images import MAX_BYTES
from yolo_fewshot.studio.live import Live
from yolo_fewshot.studio.project import Box
from yolo_fewshot.studio.server import MAX_UPLOAD
from yolo_fewshot.studio.style import DROP, STYLE

SHOWN = 120  # images in the list
CLICK = 0.008  # movement up to which a drag is a click, in longer sides of the image
RESULTS = {
    "checkpoint": ("model.pt", "Checkpoint", "The detector with your classes, for YOLO() and every yolo command"),
    "onnx": ("model.onnx", "ONNX", "The same for other runtimes, as yolo export writes it"),
    "trained": ("trained.pt", "Trained checkpoint", "The model of the last training"),
    "trained-onnx": ("trained.onnx", "Trained ONNX", "The same for other runtimes"),
    "labels": ("labels.zip", "Labels", "A YOLO data set: data.yaml, images and labels"),
}


class Page:
    """One open page. All pages show the same studio.

    Attributes:
        live (Live): The studio.
        key (str): Image that is open; empty for none.
        name (str): Class that is drawn.
    """

    def __init__(self, live: Live, root: str):
        """Build the page.

        Args:
            live (Live): The studio.
            root (str): Path of the server.
        """
        self.live, self.studio, self.root = live, live.studio, root
        self.key, self.name = "", ""
        self.trained, self.known = False, True
        self._start: tuple[float, float] | None = None
        self._buttons: list[overlay.Button] = []
        self._selected: Found | Box | None = None
        self._seen: tuple[Any, ...] = ()
        self._told = len(live.messages)
        self._cards: list[tuple[ui.html, str]] = []
        self._rows: dict[str, dict[str, Any]] = {}
        names = self.studio.project.names
        self.name = names[0] if names else ""
        self._build()
        self.sync()
        ui.timer(0.15, self.sync)

    # Layout

    def _build(self) -> None:
        """Build the elements."""
        ui.colors(primary="#4f46e5")
        ui.add_css(STYLE)
        ui.add_head_html(DROP)
        self._bar()
        with ui.row().classes("body w-full no-wrap gap-0"):
            with ui.column().classes("side no-wrap p-3 gap-2").style("width: 330px; border-right: 1px solid #e2e8f0"):
                self._images()
            with ui.column().classes("no-wrap p-4 gap-3 items-center").style("flex: 1; min-width: 0; height: 100%"):
                self._center()
            with ui.column().classes("side no-wrap p-4 gap-3").style("width: 340px; border-left: 1px solid #e2e8f0"):
                self._classes()
                ui.separator()
                self._training()
        ui.keyboard(self._typed, repeating=False)

    def _bar(self) -> None:
        """Build the bar on top."""
        with ui.row().classes("bar w-full items-center px-4 no-wrap gap-3"):
            ui.icon("center_focus_strong", color="primary").classes("text-2xl")
            ui.label("Few-shot Studio").classes("text-base font-semibold")
            about = f"{Path(self.studio.project.about['model']).name}  ·  {self.studio.project.folder}"
            ui.label(about).classes("muted ellipsis").style("flex: 1")
            self.spinner = ui.spinner(size="18px")
            self.status = ui.label().classes("muted").props('role="status"')
            ui.button("Save", icon="download", on_click=self._open_results).props("unelevated no-caps").mark("save")
        with ui.dialog() as self.results, ui.card().classes("w-[520px] gap-1 p-5"):
            ui.label("Take it with you").classes("text-lg font-semibold")
            ui.label(f"Everything is kept in {self.studio.project.folder} and saved after every action.").classes(
                "muted"
            )
            self._result_rows = {kind: self._result(kind) for kind in RESULTS}

    def _result(self, kind: str) -> tuple[ui.row, ui.label, ui.button, ui.button]:
        """Build the row of a result."""
        file, title, text = RESULTS[kind]
        with ui.row().classes("w-full items-center no-wrap py-2 gap-2") as row:
            with ui.column().classes("gap-0").style("flex: 1; min-width: 0"):
                ui.label(title).classes("head")
                note = ui.label(text).classes("muted")
            make = (
                ui.button("Make", on_click=lambda: self.live.export(kind))
                .props("outline no-caps dense")
                .classes("px-3")
            )
            path = f"/exports/{file}"
            get = ui.button("Download", on_click=lambda: ui.download(path, file)).props("unelevated no-caps dense")
            get.classes("px-3")
        make.props(f'data-make="{kind}"')
        get.props(f'data-get="{kind}"')
        return row, note, make, get

    def _images(self) -> None:
        """Build the list of images."""
        upload = ui.upload(
            multiple=True,
            auto_upload=True,
            max_file_size=MAX_UPLOAD,
            on_upload=self._uploaded,
            on_multi_upload=lambda e: e.sender.reset(),
            on_rejected=lambda: ui.notify(f"A file has more than {MAX_UPLOAD >> 20} MiB.", type="negative"),
            label="Drop images or a video",
        ).classes("drop")
        upload.props("flat hide-upload-btn")
        ui.timer(
            0.1,
            lambda: ui.run_javascript(
                f"window.addToStudio = files => getElement({upload.id}).$refs.qRef.addFiles(files)"
            ),
            once=True,
        )
        with ui.row().classes("w-full items-center no-wrap gap-2").style("flex: none"):
            self.count = ui.label().classes("muted").style("flex: 1")
            self.frames = ui.number("Frames of a video", value=20, min=1, max=1000, precision=0)
            self.frames.props("dense borderless").style("width: 104px")
        self.list = ui.element("div").classes("list")

    def _center(self) -> None:
        """Build the image that is open."""
        with ui.row().classes("w-full items-center no-wrap gap-2") as self.tools:
            ui.button(icon="chevron_left", on_click=lambda: self._step(-1)).props("flat round dense").tooltip(
                "Previous (←)"
            )
            ui.button(icon="chevron_right", on_click=lambda: self._step(1)).props("flat round dense").tooltip(
                "Next (→)"
            )
            self.title = ui.label().classes("head ellipsis").style("flex: 1; min-width: 0")
            self.which = ui.toggle({False: "Instant", True: "Trained"}, value=False, on_change=self._switch)
            self.which.props("no-caps padding='2px 10px' unelevated toggle-color=primary").mark("which")
            ui.checkbox("Detector's own classes", value=True, on_change=self._show_known).classes("text-xs").props(
                "dense"
            )
            self.empty = (
                ui.checkbox("Nothing of mine here", on_change=self._set_empty).classes("text-xs").props("dense")
            )
            self.empty.tooltip("None of your classes is in this image: everything in it is a negative")
            ui.button(icon="delete_outline", on_click=self._remove_image).props("flat round dense").tooltip(
                "Remove the image"
            )
        self.frame = ui.element("div").classes("w-full")
        with self.frame:
            self.image = ui.interactive_image(
                "", on_mouse=self._mouse, events=["mousedown", "mousemove", "mouseup"], cross="#ffffff88"
            ).classes("canvas w-full")
            self.band = self.image.add_layer()
        self.hint = ui.label().classes("muted")
        with (
            ui.column().classes("items-center justify-center gap-3").style("flex: 1; max-width: 520px") as self.welcome
        ):
            ui.icon("add_photo_alternate", color="primary").style("font-size: 64px; opacity: .7")
            ui.label("Drop a few photos anywhere").classes("text-xl font-semibold")
            ui.label(
                "What the detector already knows is drawn at once. Then draw a box around something new, give it a "
                "name, and watch it being found in the other images."
            ).classes("muted text-center text-sm")

    def _classes(self) -> None:
        """Build the panel of the classes."""
        ui.label("Classes").classes("head")
        known = sorted({*self.studio.project.names, *self.studio.own})
        self.input = ui.input("Class to draw", value=self.name, autocomplete=known).classes("w-full")
        self.input.props('outlined dense maxlength=60 clearable data-role="name"')
        self.input.on_value_change(lambda e: self._choose(e.value or "", False))
        self.none = ui.label("No class yet. Type a name, and draw a box around an object.").classes("muted")
        self.rows = ui.column().classes("w-full gap-2")
        with ui.dialog() as self.ask, ui.card().classes("p-5"):
            ui.label("What is it?").classes("text-lg font-semibold")
            self.asked = ui.input("Class name", autocomplete=known).props(
                'outlined dense autofocus maxlength=60 data-role="ask"'
            )
            self.asked.on("keydown.enter", lambda: self.ask.submit(self.asked.value))
            ui.button("Label it", on_click=lambda: self.ask.submit(self.asked.value)).props("unelevated no-caps")

    def _class(self, name: str) -> dict[str, Any]:
        """Build the row of a class."""
        with self.rows, ui.column().classes("cls") as box:
            with ui.row().classes("w-full items-center no-wrap gap-2"):
                dot = ui.element("div").classes("dot")
                title = ui.label(name).classes("head ellipsis cursor-pointer").style("flex: 1; min-width: 0")
                shots = ui.label().classes("badge")
                button = ui.button(icon="edit", on_click=lambda: self._rename(name)).props("flat round dense size=xs")
                button.tooltip("Rename the class")
                button = ui.button(icon="close", on_click=lambda: self._forget(name)).props("flat round dense size=xs")
                button.tooltip("Remove all labels of the class")
            with ui.row().classes("w-full items-center no-wrap gap-3"):
                slider = ui.slider(min=0.01, max=0.99, step=0.01).props("dense").style("flex: 1")
                conf = ui.label().classes("text-sm font-semibold").style("width: 38px; text-align: right")
            with ui.row().classes("w-full items-center no-wrap gap-1"):
                figures = ui.label().classes("muted").style("flex: 1")
                reset = ui.button(on_click=lambda: self._set_conf(name, None)).props("flat dense no-caps size=sm")
        title.on("click", lambda: self._choose(name))
        dot.on("click", lambda: self._choose(name))
        slider.on("update:model-value", lambda e: self._set_conf(name, float(e.args)), throttle=0.1)
        row = {
            "box": box,
            "dot": dot,
            "shots": shots,
            "slider": slider,
            "conf": conf,
            "figures": figures,
            "reset": reset,
        }
        return row

    def _training(self) -> None:
        """Build the panel of the training."""
        ui.label("Train some minutes").classes("head")
        ui.label(
            "For more accuracy than learning at once. The classes of the detector are kept, and so is what you have: "
            "the trained model is beside it."
        ).classes("muted")
        with ui.row().classes("w-full items-center no-wrap gap-2"):
            self.minutes = (
                ui.number("Minutes", value=5, min=0.1, max=600)
                .props('outlined dense data-role="minutes"')
                .style("width: 96px")
            )
            self.train = ui.button("Train", icon="bolt", on_click=self._train).props("unelevated no-caps").mark("train")
            self.cancel = (
                ui.button("Cancel", on_click=self.live.cancel).props("outline no-caps color=negative").mark("cancel")
            )
            self.compare = ui.button("Compare", on_click=self._compare).props("outline no-caps").mark("compare")
        self.bar = ui.linear_progress(0, show_value=False, size="6px").props("rounded")
        self.chart = ui.echart(_chart((), (), ())).style("height: 150px; width: 100%")
        self.comparison = ui.dialog()
        with self.comparison:
            card = ui.card().style("max-width: 94vw; width: 1200px").classes("p-5")
        with card, ui.row().classes("w-full no-wrap gap-4"):
            self.before, self.after = (self._side(x) for x in ("Before: learned at once", "After: trained"))

    def _side(self, title: str) -> ui.html:
        """Build one side of the comparison."""
        with ui.column().classes("gap-2").style("flex: 1; min-width: 0"):
            ui.label(title).classes("head")
            return ui.html("", sanitize=False).classes("both w-full")

    # What is shown

    def sync(self) -> None:
        """Show what has changed, in this page or in another one."""
        live, studio = self.live, self.studio
        for text in live.messages[self._told :]:
            ui.notify(text, type="negative", multi_line=True, timeout=8000, position="top")
        self._told = len(live.messages)
        state = (
            studio.version,
            live.busy,
            studio.project.unsaved,
            self.key,
            self.name,
            self.trained,
            self.known,
            id(self._selected),
        )
        if state == self._seen:
            return
        self._seen = state
        order = studio.order()
        if self.key not in studio.project.images:
            self._open(order[0] if order else "")
        busy = live.busy
        self.spinner.set_visibility(bool(busy))
        self.status.set_text(f"{busy} …" if busy else "Not saved" if studio.project.unsaved else "Saved")
        self._sync_list(order)
        self._sync_image()
        self._sync_classes()
        self._sync_training()
        self._sync_results()

    def _sync_list(self, order: list[str]) -> None:
        """Show the list of images."""
        images = self.studio.project.images  # labeled ones come last, and stay within reach
        last = (k for k in order[SHOWN:] if k == self.key or (k in images and images[k].labeled))
        shown = [*order[:SHOWN], *last]
        more = f" of {len(order)}" if len(order) > len(shown) else ""
        self.count.set_text(f"{len(shown)}{more} images, most useful first" if len(order) > 1 else "")
        while len(self._cards) < len(shown):
            with self.list:
                card, place = ui.html("", sanitize=False).classes("w-full"), len(self._cards)
                card.on("click", lambda p=place: self._open(self._cards[p][1]))
            self._cards.append((card, ""))
        for i, (card, _) in enumerate(self._cards):
            card.set_visibility(i < len(shown))
            key = shown[i] if i < len(shown) else ""
            self._cards[i] = (card, key)
            if key:
                content = self._card(key)
                if card.content != content:
                    card.set_content(content)

    def _card(self, key: str) -> str:
        """Return an image of the list as HTML."""
        image, found = self.studio.project.images[key], self.studio.shown(key, self.trained)
        useful = self.studio.usefulness(key)
        if useful >= 3:
            badge = '<span class="badge bad">check the label</span>'
        elif image.boxes:
            badge = f'<span class="badge ok">{len(image.boxes)} labeled</span>'
        elif image.empty:
            badge = '<span class="badge">nothing here</span>'
        else:
            n, kind = sum(not x.known for x in found), "new" if useful > 1.5 else ""
            badge = f'<span class="badge {kind}">{f"{n} found" if n else "uncertain"}</span>' if n or kind else ""
        kinds = "card" + " on" * (key == self.key) + " suspect" * (useful >= 3)
        name = escape(image.name)
        return (
            f'<div class="{kinds}" data-key="{key}"><div class="ph">{self._figure(key, False)}</div>'
            f'<div class="cap"><span title="{name}">{name}</span>{badge}</div></div>'
        )

    def _figure(self, key: str, large: bool, trained: bool | None = None) -> str:
        """Return an image with its boxes as HTML."""
        image = self.studio.project.images[key]
        marks = overlay.marks_of(self.studio, key, self.trained if trained is None else trained, large, trained is None)
        svg = overlay.svg_of([m for m in marks if m.kind != "rejected"], image, texts=large)
        source = f"{self.root}/{'image' if large else 'thumb'}/{key}"
        size = f"{image.size[0]} {image.size[1]}"
        return f'<img src="{source}" loading="lazy" alt=""><svg viewBox="0 0 {size}">{svg}</svg>'

    def _sync_image(self) -> None:
        """Show the image that is open."""
        for element in (self.tools, self.frame, self.hint):
            element.set_visibility(bool(self.key))
        self.welcome.set_visibility(not self.key)
        if not self.key:
            return
        image = self.studio.project.images[self.key]
        marks = overlay.marks_of(self.studio, self.key, self.trained, self.known)
        self._buttons = overlay.buttons_of(marks, image)
        self.image.set_content(overlay.svg_of(marks, image, self._buttons))
        self.title.set_text(image.name)
        self.empty.set_value(image.empty)
        self.empty.set_enabled(not image.boxes)
        self.which.set_visibility(bool(self.studio.trained))
        width, height = image.size
        self.frame.style(f"max-width: calc((100vh - 190px) * {width / height:.4f})")
        found = sum(m.kind == "found" for m in marks)
        self.hint.set_text(
            f"{found} found: ✓ is one, ✗ is none.  Drag to draw a box, click a gray box to label it."
            if found
            else "Drag to draw a box around an object, or click a gray box to label it."
        )

    def _sync_classes(self) -> None:
        """Show the classes."""
        studio = self.studio
        names = studio.project.names
        images = list(studio.project.images.values())  # uploads add to them
        counts = Counter(box.name for image in images for box in image.boxes)
        self.none.set_visibility(not names)
        for name in [n for n in self._rows if n not in names]:
            self._rows.pop(name)["box"].delete()
        for name in names:
            row = self._rows.get(name) or self._rows.setdefault(name, self._class(name))
            row["dot"].style(f"background: {overlay.color_of(name, names)}")
            row["box"].classes(add="on" if name == self.name else "", remove="" if name == self.name else "on")
            row["shots"].set_text(f"{counts[name]} shot{'s' * (counts[name] != 1)}")
            own = name in studio.own
            for part in ("slider", "conf", "reset"):
                row[part].set_visibility(not own)
            if own:
                row["figures"].set_text("The detector knows and keeps this class; here its objects are background.")
                continue
            conf, figures = studio.threshold(name), studio.figures.get(name)
            if abs((row["slider"].value or 0) - conf) > 0.004:
                row["slider"].set_value(round(conf, 3))
            row["conf"].set_text(f"{conf:.2f}")
            row["figures"].set_text(self._about(name, conf))
            suggested = None if figures is None else figures.suggested
            row["reset"].set_visibility(name in studio.project.conf and suggested is not None)
            if suggested is not None:
                row["reset"].set_text(f"Suggested {suggested:.2f}")

    def _about(self, name: str, conf: float) -> str:
        """Return the figures of a class as text."""
        learned, figures = self.studio.learned, self.studio.figures.get(name)
        if learned is not None and name in learned.lost:
            return "Too small to learn at this image size: start with a larger imgsz=, or draw larger objects."
        if figures is None:
            return "Learning …" if self.live.busy else ""
        precision, recall = figures.at(conf)
        parts = [f"precision {precision:.0%}"] if precision is not None else []
        parts += [f"recall {recall:.0%}"] if recall is not None else ["shots in more images give figures"]
        if figures.likeness is not None:
            parts.append(f"likeness {figures.likeness:.2f}")
        return " · ".join(parts)

    def _sync_training(self) -> None:
        """Show the training."""
        running, progress = self.live.training is not None, self.live.progress
        self.train.set_visibility(not running)
        self.minutes.set_enabled(not running)
        self.cancel.set_visibility(running)
        self.compare.set_visibility(bool(self.studio.trained) and not running)
        self.bar.set_visibility(running)
        self.bar.set_value(progress.done)
        self.chart.set_visibility(running or bool(progress.epochs))
        options = _chart(progress.epochs, progress.loss, progress.ap)
        if self.chart.options["series"] != options["series"]:
            self.chart.options.update(options)
            self.chart.update()

    def _sync_results(self) -> None:
        """Show the results that were made."""
        for kind, (row, note, make, get) in self._result_rows.items():
            file, _, text = RESULTS[kind]
            state = self.live.exported.get(file, "")
            row.set_visibility(not kind.startswith("trained") or self.studio.trained_file.exists())
            make.set_enabled(state != "busy")
            make.set_text("Making …" if state == "busy" else "Make again" if state == "done" else "Make")
            get.set_visibility(state == "done")
            note.set_text(
                {"": text, "busy": text, "done": f"{self.live.exports.name}/{file} in the folder of the project"}.get(
                    state, state
                )
            )

    # What the user does

    def _open(self, key: str) -> None:
        """Open an image."""
        self.key, self._selected, self._start = key, None, None
        if key:
            self.band.set_content("")
            self.image.set_source(f"/image/{key}")
        self.sync()

    def _step(self, by: int) -> None:
        """Open the next image of the list, or the one before."""
        keys = [k for _, k in self._cards if k]
        if keys:
            at = keys.index(self.key) if self.key in keys else 0
            self._open(keys[(at + by) % len(keys)])

    def _choose(self, name: str, typed: bool = True) -> None:
        """Choose the class to draw."""
        self.name = " ".join(name.split())
        if typed:
            self.input.set_value(self.name)
        self.sync()

    def _do(self, action: Callable[[], Any]) -> bool:
        """Do something, show what comes of it, and say why if it is not possible."""
        try:
            action()
        except OSError as e:
            ui.notify(f"Not saved: {e}", type="negative", multi_line=True, timeout=8000)
            return False
        except (KeyError, ValueError) as e:
            text = str(e) if isinstance(e, ValueError) else "The image was removed in another page."
            ui.notify(text, type="warning", multi_line=True)
            return False
        finally:
            self.sync()
        return True

    async def _mouse(self, e: events.MouseEventArguments) -> None:
        """Draw a box, or click one."""
        image = self.studio.project.images.get(self.key)
        if image is None:
            return
        (w, h), x, y = image.size, e.image_x, e.image_y
        if e.type == "mousedown" and e.button == 0:
            self._start = x, y
        elif e.type == "mousemove" and self._start:
            if not e.buttons & 1:  # released outside of the image
                self._start = None
                self.band.set_content("")
                return
            (x1, y1), line = self._start, max(w, h) * 0.003
            color = overlay.color_of(self.name, [*self.studio.project.names, self.name])
            self.band.set_content(
                f'<rect x="{min(x, x1):.1f}" y="{min(y, y1):.1f}" width="{abs(x - x1):.1f}" height="{abs(y - y1):.1f}" '
                f'stroke="{color}" stroke-width="{line:.2f}" fill="{color}" fill-opacity="0.15"/>'
            )
        elif e.type == "mouseup" and self._start:
            (x1, y1), self._start = self._start, None
            self.band.set_content("")
            if max(abs(x - x1), abs(y - y1)) <= CLICK * max(w, h):
                await self._clicked(x, y, w, h)
            else:
                await self._label((x1 / w, y1 / h, x / w, y / h), True)

    async def _clicked(self, x: float, y: float, w: int, h: int) -> None:
        """Press the button at a place, or label what is proposed there."""
        button = overlay.hit(x, y, self._buttons)
        if button is None:
            proposal = self.studio.proposal_at(self.key, self.name, x / w, y / h)
            if proposal is None:
                ui.notify("Nothing is proposed here. Drag to draw a box.")
            elif self.name or proposal.known:
                await self._label(proposal.xyxy, False)
            return
        source = button.mark.source
        if isinstance(source, Box):
            self._do(lambda: self.live.unlabel(self.key, source.id))
        elif button.action == "no":
            self._do(lambda: self.live.reject(self.key, source))
        else:
            self._do(lambda: self.live.label(self.key, source.name, source.xyxy, snap=False))

    async def _label(self, xyxy: tuple[float, float, float, float], snap: bool) -> None:
        """Label an object with the class to draw, asking for one if there is none."""
        key, name = self.key, self.name
        if not name:
            self.asked.set_value("")
            name = await self.ask or ""
            if not name:
                return
        if self._do(lambda: self.live.label(key, name, xyxy, snap)):
            self._choose(name)
            if self.name in self.studio.own:
                ui.notify(f"{self.name} is a class of the detector, which keeps what it knows of it.", type="info")

    def _typed(self, e: events.KeyEventArguments) -> None:
        """Take keys for the next image."""
        if e.action.keydown and e.key in {"ArrowRight", "ArrowLeft"}:
            self._step(1 if e.key == "ArrowRight" else -1)

    def _switch(self, e: events.ValueChangeEventArguments) -> None:
        """Show what the trained model finds, or what was learned at once."""
        self.trained = bool(e.value)
        self.sync()

    def _show_known(self, e: events.ValueChangeEventArguments) -> None:
        """Show or hide the detector's own classes."""
        self.known = bool(e.value)
        self.sync()

    def _set_empty(self, e: events.ValueChangeEventArguments) -> None:
        """Say whether the image shows none of the classes."""
        image = self.studio.project.images.get(self.key)
        if image is not None and image.empty != e.value:
            self._do(lambda: self.live.set_empty(self.key, bool(e.value)))

    async def _remove_image(self) -> None:
        """Remove the image that is open, after a question if it has labels."""
        image = self.studio.project.images.get(self.key)
        if image is None:
            return
        if image.boxes and not await _confirm(f"Remove the image and its {len(image.boxes)} labels?"):
            return
        self._do(lambda: self.live.remove(image.key))

    async def _rename(self, name: str) -> None:
        """Rename a class, or make it one with another."""
        with ui.dialog() as dialog, ui.card().classes("p-5"):
            ui.label(f"Rename {name}").classes("text-lg font-semibold")
            field = ui.input("New name", value=name).props('outlined dense autofocus maxlength=60 data-role="rename"')
            field.on("keydown.enter", lambda: dialog.submit(field.value))
            ui.button("Rename", on_click=lambda: dialog.submit(field.value)).props("unelevated no-caps")
        new = await dialog
        dialog.delete()
        if new is not None and new != name and self._do(lambda: self.live.rename(name, new)) and self.name == name:
            self._choose(new)

    async def _forget(self, name: str) -> None:
        """Remove all labels of a class, after a question."""
        if await _confirm(f"Remove all labels of {name}?"):
            self._do(lambda: self.live.forget(name))

    def _set_conf(self, name: str, conf: float | None) -> None:
        """Set the threshold of a class."""
        self._do(lambda: self.live.set_conf(name, conf))

    def _train(self) -> None:
        """Start a training."""
        self._do(lambda: self.live.train(float(self.minutes.value or 0) or 5.0))

    def _compare(self) -> None:
        """Show the image before and after the training."""
        if self.key:
            self.before.set_content(self._figure(self.key, True, False))
            self.after.set_content(self._figure(self.key, True, True))
            self.comparison.open()

    def _open_results(self) -> None:
        """Show what can be saved."""
        self._sync_results()
        self.results.open()

    async def _uploaded(self, e: events.UploadEventArguments) -> None:
        """Take an uploaded file."""
        name = e.file.name
        try:
            if name.rpartition(".")[2].lower() in VID_FORMATS:
                with tempfile.NamedTemporaryFile(dir=self.studio.project.folder, prefix=".video", delete=False) as file:
                    path = Path(file.name)
                await e.file.save(path)
                self.live.add_video(path, name, int(self.frames.value or 20))
            elif e.file.size() > MAX_BYTES:
                raise ValueError(f"{name} has more than {MAX_BYTES >> 20} MiB.")
            else:
                data = await e.file.read()
                await run.io_bound(self.live.add, data, name)
        except (OSError, ValueError) as error:
            ui.notify(str(error), type="negative", multi_line=True, timeout=8000, position="top")
        self.sync()


async def _confirm(question: str) -> bool:
    """Ask a question."""
    with ui.dialog() as dialog, ui.card().classes("p-5"):
        ui.label(question)
        with ui.row().classes("w-full justify-end gap-2"):
            ui.button("Keep", on_click=lambda: dialog.submit(False)).props("flat no-caps")
            ui.button("Remove", on_click=lambda: dialog.submit(True)).props("unelevated no-caps color=negative")
    answer = bool(await dialog)
    dialog.delete()
    return answer


def _chart(epochs: tuple[int, ...], loss: tuple[float, ...], ap: tuple[float | None, ...]) -> dict[str, Any]:
    """Return loss and AP as a chart."""
    axis = {"splitLine": {"show": False}, "axisLabel": {"fontSize": 10}, "nameTextStyle": {"fontSize": 10}}
    line = {"type": "line", "symbol": "none", "smooth": True}
    return {
        "animation": False,
        "grid": {"left": 36, "right": 36, "top": 26, "bottom": 20},
        "legend": {"top": 0, "itemHeight": 8, "textStyle": {"fontSize": 11}},
        "xAxis": {"type": "category", "data": list(epochs), "axisLabel": {"fontSize": 10}},
        "yAxis": [{"type": "value", **axis}, {"type": "value", "min": 0, "max": 1, **axis}],
        "series": [
            {**line, "name": "loss", "data": [round(x, 4) for x in loss], "color": "#64748b"},
            {**line, "name": "AP50 on your images", "yAxisIndex": 1, "data": list(ap), "color": "#4f46e5"},
        ],
    }
