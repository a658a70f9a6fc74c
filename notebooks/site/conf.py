"""How Sphinx makes the site of `make site`: the repository's own pages, and its notebooks as they were executed.

Sphinx reads the repository's root. Where `outputs/pages` holds an executed copy of a notebook (of a lesson: of its
solution), the copy's text is taken in place of the committed one's.
"""

import json
from importlib.util import find_spec
from pathlib import Path

from docutils.nodes import document, reference
from sphinx.application import Sphinx
from sphinx.util.matching import patfilter

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "outputs/pages"
CONTENTS = (Path(__file__).parent / "contents.md").read_text(encoding="utf-8")
# one file, so that formulas need neither the internet nor fonts beside it
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg-full.js"
NOT_RUN = "> Not run for the site: text and code, without results. Studies run here are listed on the left."


def shows_phantoms_only(study: Path) -> bool:
    """Whether all runs of a study were trained on phantoms: other scans may not be published."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in study.glob("*-seed*/run.json")]
    return bool(records) and all(record.get("data", {}).get("source") == "phantoms" for record in records)


project = "MetricUNet in notebooks"
extensions = ["myst_nb", "sphinx.ext.githubpages"]
root_doc = "README"
include_patterns = [
    "*.md",
    "data/README.md",
    "outputs/README.md",
    "outputs/reference/**.md",
    "notebooks/**.md",
    "notebooks/*.ipynb",
    "notebooks/lessons/*.ipynb",
    "mupkg/**/README.md",
    # notebooks whose results hold no voxel of a scan, whatever they were run on; and those that show phantoms
    *(f"outputs/*/report/**{number}_*.ipynb" for number in ("04", "06", "07", "10", "11")),
    *(f"outputs/{study.name}/**0[2358]_*.ipynb" for study in filter(shows_phantoms_only, ROOT.glob("outputs/*"))),
]
exclude_patterns = [".*", "**/.*", "**.failed.ipynb", "**.running.ipynb", "outputs/pages", "outputs/site"]
exclude_patterns += ["notebooks/site", "notebooks/07_*", "notebooks/11_*"]  # these two where they were run
suppress_warnings = ["myst.xref_missing", "myst.header", "toc.not_included", "misc.highlighting_failure"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "navbar_persistent": []}
html_static_path, mathjax_path = [str(MATHJAX), "site.css"], MATHJAX.name
html_css_files = ["site.css"]
html_extra_path = ["index.html"]
html_show_search_summary = False  # a page from a file:// path cannot fetch the texts
html_copy_source = False


def read_executed(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the executed notebook's text in place of the committed one's; the first page gets the site's contents."""
    if docname == root_doc:
        matched = [line for line in CONTENTS.splitlines() if "*" not in line or patfilter(app.project.docnames, line)]
        source[0] += "\n".join(["", *matched])
    if app.env.doc2path(docname).suffix != ".ipynb":
        return
    executed = PAGES / f"{docname}.ipynb"
    if executed.exists():  # a lesson's solution lies, and links, one folder deeper than its page
        source[0] = executed.read_text(encoding="utf-8").replace("](../../../", "](../../")
    notebook = json.loads(source[0])
    if docname.startswith("outputs/"):  # whose it is, into the title
        _, study, folder, *_ = docname.split("/")
        whose = study if folder == "report" else f"{study}, {folder}"
        title, *rest = "".join(notebook["cells"][0]["source"]).split("\n")
        notebook["cells"][0]["source"] = "\n".join([f"{title} ({whose})", *rest])
    for cell in notebook["cells"]:
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"].setdefault("tags", []).append("hide-input")
        for output in cell.get("outputs", []):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
    if not any(cell.get("outputs") for cell in notebook["cells"]):
        note = {"cell_type": "markdown", "id": "not-run", "metadata": {}, "source": NOT_RUN}
        notebook["cells"].insert(1, note)
    source[0] = json.dumps(notebook)


def drop_dead_links(app: Sphinx, doctree: document, docname: str) -> None:
    """Leave the text alone of a link to what is no page of the site, a folder say."""
    for link in list(doctree.findall(reference)):
        if link.get("refid", "") not in {"", *doctree.ids}:
            link.replace_self(link.children)


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_executed)
    app.connect("doctree-resolved", drop_dead_links)
