"""A notebook in a real JupyterLab in a real browser, without a network.

    with Lab(folder) as lab:
        with lab.open("08_latent_space.ipynb") as notebook:
            notebook.run_all()
            notebook.slider("slice", 12)
            assert notebook.ask("view.slice") == 12

The server and the browser are this machine's own (`pip install jupyterlab playwright`, Debian's chromium). WebGL is
drawn in software, so that no graphics card is needed. Nothing outside can be reached; what was asked for there is
listed in `lab.outside`.
"""

from __future__ import annotations

import ast
import atexit
import io
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import nbformat
import numpy as np
import psutil
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from playwright.sync_api import Locator, Page, Playwright, Route, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# All cells are in the page at any time, and no notice lies over them.
LAB_SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}
BROKEN_WIDGET = re.compile(
    "Error displaying widget|Failed to load model|Loading widget|Click to show javascript error"
)

# What ended in an error, and what should be a widget but is shown as text since the widget could not be made.
FAILED_OUTPUTS = """() => jupyterapp.shell.currentWidget.content.widgets
    .filter(cell => cell.model.type === 'code')
    .flatMap(cell => {
        const shown = cell.outputArea.node.querySelectorAll(':scope > .jp-OutputArea-child > .jp-OutputArea-output');
        return cell.model.outputs.toJSON().map((output, i) => {
            if (output.output_type === 'error') return `${output.ename}: ${output.evalue}`;
            const widget = output.data && 'application/vnd.jupyter.widget-view+json' in output.data;
            const failed = widget && shown[i]?.dataset.mimeType === 'text/plain';
            return failed ? `widget not shown: ${shown[i].innerText}` : null;
        });
    })
    .filter(text => text !== null)"""


# What a mouse in the middle of an element would meet: the element, or a layer of the same widget.
IN_SIGHT = """element => {
    const box = element.getBoundingClientRect();
    const met = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return element === met || element.parentElement.contains(met);
}"""


def find_chromium() -> str | None:
    """The browser's path: that of the environment variable MUPKG_CHROMIUM, or the first installed, or None."""
    return os.environ.get("MUPKG_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


PATIENCE = 180  # seconds: a machine with two cores may be busy, and software draws what a GPU would


def wait_for(holds: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """The first true value of `holds()`; TimeoutError naming `what` after so many seconds."""
    end = time.monotonic() + timeout
    while not (value := holds()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(0.1)
    return value


@cache
def playwright() -> Playwright:
    """Playwright, started once: another one beside it would find the first one's event loop running, and refuse."""
    started = sync_playwright().start()
    atexit.register(started.stop)
    return started


class Lab:
    """A JupyterLab server over the folder `root` and a headless browser; both end with the `with` block.

    Args:
        options: more of the server's options, of its command line.

    Attributes:
        outside: addresses asked for that are not the server's own, in order; none of them was reached.
    """

    def __init__(self, root: Path, *options: str):
        self.root, self.options = root, options
        self.outside: list[str] = []

    def __enter__(self) -> Lab:
        self._state = tempfile.TemporaryDirectory(prefix="lab", ignore_cleanup_errors=True)
        self._browser = self._server = None
        try:
            self._start_server(Path(self._state.name))
            self._browser = playwright().chromium.launch(
                executable_path=find_chromium(), headless=True, args=CHROMIUM_FLAGS
            )
            self._context = self._browser.new_context(viewport={"width": 1400, "height": 1000})
            self._context.on("request", lambda request: self._note(request.url))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_server(self, state: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        for name, settings in LAB_SETTINGS.items():
            path = state / "settings" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings), encoding="utf-8")
        self.token, self._log = secrets.token_hex(16), state / "server.log"
        folders = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
                    *(f"--port={urlsplit(self.address).port}", "--ServerApp.port_retries=0"),
                    *(f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}"),
                    *("--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"),
                    *("--LabApp.news_url=None", "--ServerApp.iopub_data_rate_limit=1e10"),
                    "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
                    *self.options,
                ],
                env=os.environ
                | {f"JUPYTER_{name}_DIR": str(state / folder) for name, folder in folders.items()}
                | {"JUPYTERLAB_SETTINGS_DIR": str(state / "settings"), "IPYTHONDIR": str(state / "ipython")}
                | {"JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces")},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(self._answers, "JupyterLab answers")

    def _answers(self) -> bool:
        if self._server.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {self._server.returncode}:\n{self._log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{self.address}/api/status?token={self.token}", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _note(self, url: str) -> None:
        if url.startswith(("http", "ws")) and urlsplit(url).netloc != urlsplit(self.address).netloc:
            self.outside.append(url)

    def serve(self, copy_of: Callable[[str], Path | None]) -> None:
        """Answers from local copies what is asked for outside; what has no copy stays out of reach."""

        def answer(route: Route) -> None:
            if path := copy_of(route.request.url):
                route.fulfill(path=path, headers={"Access-Control-Allow-Origin": "*"})
            else:
                route.abort()

        self._context.route(re.compile("^https:"), answer)

    def open(self, path: Path | str, parameters: dict | None = None) -> Notebook:
        """A copy of a notebook, opened in a page of its own, with a kernel that is ready; no cell has run.

        Args:
            path: the notebook; it is copied into `root` and not changed.
            parameters: values for its parameters cell, as papermill would set them.
        """
        notebook = load_notebook_node(str(path))
        # without a kernelspec Lab asks which kernel to take; papermill looks at its language
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook.metadata.setdefault("kernelspec", kernelspec)
        if parameters:
            notebook = parameterize_notebook(notebook, parameters)
        copy = self.root / f"{Path(path).stem}_{secrets.token_hex(3)}.ipynb"
        nbformat.write(notebook, copy)
        return Notebook(self, copy)

    def __exit__(self, *_: object) -> None:
        if self._browser:
            self._browser.close()
        if self._server:
            # kernels are in sessions of their own: ending the server's group would leave them
            server = psutil.Process(self._server.pid) if self._server.poll() is None else None
            family = [*server.children(recursive=True), server] if server else []
            self._server.terminate()
            _, left = psutil.wait_procs(family, timeout=10)
            for process in left:
                process.kill()
            self._server.wait()
        self._state.cleanup()


class Notebook:
    """A notebook in a page of the browser; its kernel ends with the `with` block.

    Attributes:
        page: Playwright's page, for whatever is not wrapped here.
        page_errors: JavaScript errors that nothing in the page caught.
    """

    def __init__(self, lab: Lab, path: Path):
        self.lab, self.path = lab, path
        self.page: Page = lab._context.new_page()
        self.page_errors: list[str] = []
        self.page.on("pageerror", lambda error: self.page_errors.append(str(error)))
        self.page.on("websocket", lambda connection: lab._note(connection.url))
        name = quote(str(path.relative_to(lab.root)))
        address = f"{lab.address}/lab/workspaces/{path.stem}/tree/{name}?reset&token={lab.token}"
        self.page.goto(address, wait_until="domcontentloaded")
        for ready in (
            "() => window.jupyterapp?.shell?.currentWidget?.content?.widgets",
            "() => jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'",
        ):
            self.page.wait_for_function(ready, timeout=1000 * PATIENCE)
        if self.page.locator("#jp-left-stack").is_visible():
            self.page.evaluate("() => jupyterapp.commands.execute('application:toggle-left-area')")

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()

    # Running

    def run_all(self, timeout: float = 2 * PATIENCE) -> None:
        """Runs all cells and waits for the last; AssertionError where one failed or a widget did not appear."""
        self.page.evaluate(
            "() => { window.finished = false;"
            " jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.finished = true }) }"
        )
        self.page.wait_for_function("() => window.finished", timeout=1000 * timeout)
        self.settle()
        self.check()

    def settle(self, timeout: float = PATIENCE) -> None:
        """Waits until no cell runs and the page shows the widgets of all cells."""
        running = self.page.locator(".jp-InputPrompt", has_text="[*]")
        wait_for(lambda: not running.count(), "no cell runs", timeout)
        wait_for(lambda: "Loading widget" not in self.outputs_text(), "widgets are loaded", timeout)

    def check(self) -> None:
        """AssertionError with the texts of error outputs, of widgets that could not be shown, of page errors."""
        failed = self.page.evaluate(FAILED_OUTPUTS) + self.page_errors
        shown = self.outputs_text()
        failed += [shown[max(0, m.start() - 100) : m.end() + 300] for m in BROKEN_WIDGET.finditer(shown)]
        assert not failed, "\n".join(failed)

    # Looking

    def cell(self, index: int) -> Locator:
        """The code cell of that number, from 0; -1 is the last."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def outputs_text(self) -> str:
        """The text of all outputs as it can be read in the page."""
        return "\n".join(self.page.locator(".jp-Notebook .jp-Cell-outputArea").all_inner_texts())

    def bring(self, element: Locator) -> None:
        """Scrolls to an element, and waits until it is what lies in its place, not clipped and nothing over it."""
        element.scroll_into_view_if_needed()
        wait_for(lambda: element.evaluate(IN_SIGHT), f"to be seen: {element}", timeout=20)

    def pixels(self, element: Locator) -> np.ndarray:
        """What is to be seen of an element, a canvas for one, as (height, width, 3) bytes."""
        self.bring(element)
        return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB"))

    def wait_for_change(self, element: Locator, before: np.ndarray, timeout: float = PATIENCE) -> np.ndarray:
        """The element's pixels as soon as they differ from `before`."""

        def changed() -> list[np.ndarray]:
            now = self.pixels(element)
            return [] if np.array_equal(now, before) else [now]

        return wait_for(changed, "the picture changes", timeout)[0]

    def screenshot(self, path: Path) -> None:
        """The whole notebook, all cells one above the other, as a PNG."""
        inner, size = self.page.locator(".jp-WindowedPanel-inner"), self.page.viewport_size
        # a page as high as the notebook: what is scrolled out of sight is not drawn
        self.page.set_viewport_size(size | {"height": int(inner.bounding_box()["height"]) + 300})
        inner.screenshot(path=path)
        self.page.set_viewport_size(size)

    # Doing: positions in an element are fractions of its width and height, from its upper left corner

    def _at(self, element: Locator, place: Sequence[float]) -> tuple[float, float]:
        box = element.bounding_box()
        return box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"]

    def click_at(self, element: Locator, x: float, y: float, button: str = "left") -> None:
        """A click at a place of an element."""
        self.bring(element)
        self.page.mouse.click(*self._at(element, (x, y)), button=button)

    def drag(self, element: Locator, *places: Sequence[float], steps: int = 8) -> None:
        """A drag through places (x, y) of an element, from the first to the last, in `steps` moves each.

        Two places make a line or the diagonal of a box, more a lasso.
        """
        self.bring(element)
        corners = np.array([self._at(element, place) for place in places])
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        # a first short move: a lasso begins where the pressed mouse is first moved to, not where it was pressed
        self.page.mouse.move(*(corners[0] + np.sign(corners[1] - corners[0])))
        for start, end in itertools.pairwise(corners):
            for step in range(1, steps + 1):
                self.page.wait_for_timeout(20)  # as a hand does: lassos leave out moves that come within 10 ms
                self.page.mouse.move(*(start + (end - start) * step / steps))
        self.page.mouse.up()

    def slider(self, label: str, value: float, within: Locator | None = None) -> None:
        """Sets the ipywidgets slider of that description (of a cell, say) by typing the value into its readout."""
        row = (within or self.page).locator(".widget-slider").filter(has=self.page.get_by_text(label, exact=True))
        readout = row.locator(".widget-readout")

        def typed() -> bool:
            readout.click()
            readout.press("ControlOrMeta+a")
            self.page.keyboard.type(f"{value:g}")
            self.page.keyboard.press("Enter")
            return abs(float(readout.inner_text()) - value) < 1e-6

        wait_for(typed, f"{label} at {value:g}")  # a busy page may draw the readout anew under the hand

    def press(self, text: str, within: Locator | None = None) -> None:
        """Clicks the ipywidgets button of that text (of a cell, say)."""
        buttons = (within or self.page).locator("button.jupyter-button")
        buttons.filter(has_text=re.compile(rf"^\s*{re.escape(text)}\s*$")).click()

    # Asking the kernel: over the page's own connection, so after all that the page has sent before

    def ask(self, expression: str) -> Any:
        """The value of a Python expression in the notebook's kernel; arrays as lists, other objects as their text."""
        plain = "lambda o: o.tolist() if hasattr(o, 'tolist') else str(o)"
        encoded = f"__import__('json').dumps({expression}, default={plain})"
        answer = self._execute("", {"answer": encoded})["answer"]
        if answer["status"] != "ok":
            raise RuntimeError(f"{expression}: {answer['ename']}: {answer['evalue']}")
        return json.loads(ast.literal_eval(answer["data"]["text/plain"]))

    def wait_until(self, expression: str, timeout: float = PATIENCE) -> Any:
        """The value of a Python expression in the kernel once it is true: for what a widget sends with delay."""
        return wait_for(lambda: self.ask(expression), expression, timeout)

    def do(self, code: str) -> None:
        """Runs Python in the notebook's kernel; RuntimeError where it fails."""
        self._execute(code, {})

    def _execute(self, code: str, expressions: dict[str, str]) -> dict:
        content = self.page.evaluate(
            "async ([code, user_expressions]) => (await jupyterapp.shell.currentWidget.sessionContext.session.kernel"
            ".requestExecute({code, user_expressions, store_history: false}).done).content",
            [code, expressions],
        )
        if content["status"] != "ok":
            raise RuntimeError(f"{code}: {content['ename']}: {content['evalue']}")
        return content["user_expressions"]
