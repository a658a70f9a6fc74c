"""A widget that takes its time to start is not given up, as on a busy machine."""

from __future__ import annotations

from pathlib import Path

import nbformat
from lab import Lab

PATIENCE = """
from mupkg.explore.scatters import lengthen_patience
lengthen_patience()
"""
SLOW = """
from anywidget import AnyWidget
from traitlets import Unicode

class Slow(AnyWidget):
    _esm = '''
        await new Promise(done => setTimeout(done, 4000));
        const render = ({ model, el }) => {
            const show = () => { el.innerText = model.get('word'); };
            model.on('change:word', show);
            show();
        };
        export default { render };
    '''
    word = Unicode("what it began with").tag(sync=True)

slow = Slow()
slow
"""


def test_what_the_kernel_sends_reaches_a_widget_that_took_four_seconds(lab: Lab, tmp_path: Path):
    """Regression: anywidget drops it for good after two; a scatter then never showed what was chosen."""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLOW)]), tmp_path / "slow.ipynb")
    with lab.open(tmp_path / "slow.ipynb") as notebook:
        notebook.do(PATIENCE)
        notebook.page.wait_for_function("() => `${AbortSignal.timeout}`.includes('120_000')")  # it is in the page
        notebook.run_all()
        notebook.cell(0).get_by_text("what it began with").wait_for(timeout=60_000)
        notebook.do("slow.word = 'what came later'")
        notebook.cell(0).get_by_text("what came later").wait_for(timeout=60_000)
        notebook.check()
