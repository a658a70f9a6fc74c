"""The house is in order: pins agree, notebooks are clean, imports go one way, published tables and paths hold."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from importlinter import cli as importlinter_cli
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from real_scans import real_scans

from mupkg.configurations import TABLE_II, configuration

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "mupkg" / "report" / "published"
FOLDERS = {"notebooks", "mupkg", "data", "outputs", "tests", ".ci"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPECTED = (
    "00_prepare_cohort",
    "01_data_exploration",
    "02_stage1_localization",
    "03_stage2_training",
    "04_evaluation",
    "05_visualization",
    "08_explore",
    "09_segment_a_patient",
)
LONGEST_CELL = 14  # lines
TEXT_PER_CODE = 1.3  # cells
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def files_of_the_repository() -> list[Path]:
    """Every file that belongs to it: known to git or not ignored; without git, all that was not made by running."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [Path(name) for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = []
        for folder, inner, names in os.walk(ROOT):
            here = Path(folder).relative_to(ROOT)
            inner[:] = [n for n in inner if n == ".ci" or not re.match(r"\.|__pycache__$|.*\.egg-info$|build$", n)]
            if here.parts[:1] in (("data",), ("outputs",)):
                ours = {Path("data/README.md"), Path("outputs/README.md")}
                names = [n for n in names if here / n in ours or here.parts[:2] == ("data", "demo")]
            paths += [here / name for name in names]
    return [path for path in paths if (ROOT / path).is_file()]


# Pins


def pins(lines: list[str]) -> dict[str, str]:
    """Name to version of requirements that are pinned with == and nothing else."""
    found = {}
    for requirement in map(Requirement, lines):
        specifiers = list(requirement.specifier)
        if len(specifiers) == 1 and specifiers[0].operator == "==":
            found[canonicalize_name(requirement.name)] = specifiers[0].version
    return found


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def environment_pip(environment: dict) -> list[str]:
    return next(entry for entry in environment["dependencies"] if isinstance(entry, dict))["pip"]


def test_constraints_pin_every_line_exactly(constraint_lines):
    assert len(pins(constraint_lines)) == len(constraint_lines)
    assert constraint_lines == sorted(constraint_lines, key=str.lower)


def test_constraints_pin_every_direct_dependency_within_its_bounds(project, constraint_lines):
    pinned = pins(constraint_lines)
    direct = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    wrong = [str(r) for r in direct if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    missing = [r.name for r in direct if canonicalize_name(r.name) not in pinned]
    assert not missing
    assert not wrong


def test_environment_has_the_pins_of_the_constraints(project, constraint_lines, environment_pip):
    listed = [line for line in environment_pip if not line.startswith("-")]
    extra = project["optional-dependencies"]["itkwidgets"]
    direct = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {canonicalize_name(Requirement(line).name) for line in direct}
    pinned = pins(constraint_lines)
    assert pins([line for line in listed if line not in extra]) == {name: pinned[name] for name in names}
    assert {line for line in listed if line in extra} == set(extra)
    assert environment_pip[-1] == "-e ."


def test_environment_has_a_python_that_the_project_allows(project, environment):
    python = next(line for line in environment["dependencies"] if str(line).startswith("python"))
    name, version = python.split("=")  # Binder reads the version only where it is written so
    assert name == "python" and SpecifierSet(project["requires-python"]).contains(version)
    assert environment["name"] == "metricunet"
    assert environment["channels"] == ["conda-forge"]


def test_a_codespace_starts_lab_in_the_environment(environment, tmp_path):
    container = json.loads((ROOT / ".devcontainer.json").read_text(encoding="utf-8"))
    assert container["postCreateCommand"] == "conda env create -f environment.yml"
    assert container["postAttachCommand"] == f"conda run --live-stream -n {environment['name']} make lab"
    # with the environment active, make installs nothing and takes its programs
    (tmp_path / "lib/python3.13/site-packages/mupkg-0.1.0.dist-info").mkdir(parents=True)
    for prefix, programs in {tmp_path: f"{tmp_path}/bin", tmp_path / "base": ".venv/bin"}.items():
        options = {"cwd": ROOT, "env": os.environ | {"CONDA_PREFIX": str(prefix)}, "capture_output": True}
        said = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "lab"], text=True, check=True, **options
        ).stdout.splitlines()
        assert said[-1].startswith(f"{programs}/jupyter lab --LabApp.default_url=/lab/tree/notebooks/START.md ")
        assert prefix != tmp_path or len(said) == 1


def test_torch_is_one_version_everywhere(project, constraint_lines, environment_pip):
    for lines in (project["dependencies"], constraint_lines, environment_pip):
        assert [line for line in lines if re.match(r"torch\b", line)] == ["torch==2.13.0"]


# Notebooks


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_notebooks_are_there():
    assert set(EXPECTED) <= {path.stem for path in NOTEBOOKS}


@each_notebook
def test_notebook_is_stored_without_outputs(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def parameter_faults(code: str) -> list[str]:
    """What keeps a cell from being annotated literals alone, with a comment on every line."""
    faults = []
    for statement in ast.parse(code).body:
        shown = ast.unparse(statement)
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            faults.append(f"not an annotated assignment: {shown}")
            continue
        try:
            ast.literal_eval(statement.value)
        except (ValueError, TypeError):
            faults.append(f"not a literal: {shown}")
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string.strip("# ")}
    for number, line in enumerate(code.splitlines(), start=1):
        if line.strip() and number not in commented:
            faults.append(f"no comment: {line}")
    return faults


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("seed = 1  # of all draws", "not an annotated"),
        ("seed: int = int(1)  # of all draws", "not a literal"),
        ("seed: int  # of all draws", "not a literal"),
        ("seed: int = 1", "no comment"),
        ("seed: int = 1  #", "no comment"),
        ("import torch  # the framework", "not an annotated"),
    ],
)
def test_a_bad_parameters_cell_would_be_seen(code, fault):
    assert parameter_faults("size: str = 'quick'  # of everything\n") == []
    assert any(found.startswith(fault) for found in parameter_faults(code))


@each_notebook
def test_notebook_begins_with_parameters_and_their_check(path):
    first, second, *_ = cells(path, "code")
    assert "parameters" in first["metadata"].get("tags", [])
    assert ast.parse(source(first)).body
    assert parameter_faults(source(first)) == []
    assert ".from_notebook(" in source(second)


@each_notebook
def test_notebook_has_small_cells_and_more_text_than_code(path):
    code, text = cells(path, "code"), cells(path, "markdown")
    # the parameters cell is a list with one line an entry; it may be as long as the list
    long = [source(cell).splitlines()[0] for cell in code[1:] if len(source(cell).splitlines()) > LONGEST_CELL]
    assert not long
    assert len(text) >= TEXT_PER_CODE * len(code)


@each_notebook
def test_notebook_asks_modules_for_what_they_have(path):
    """Also in cells that no test runs, because a package is missing here."""
    tree, imported = ast.parse("\n".join(source(cell) for cell in cells(path, "code"))), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "mupkg":
            for name in node.names:
                home = importlib.import_module(node.module)
                inside = hasattr(home, name.name)
                found = getattr(home, name.name) if inside else importlib.import_module(f"{node.module}.{name.name}")
                imported[name.asname or name.name] = found
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    asked = {(node.value.id, node.attr) for node in asked if node.value.id in imported}
    assert asked
    assert [f"{name}.{attribute}" for name, attribute in asked if not hasattr(imported[name], attribute)] == []


# The repository


def test_only_known_folders_at_the_top():
    files = files_of_the_repository()
    assert Path("pyproject.toml") in files
    assert {path.parts[0] for path in files if len(path.parts) > 1} <= FOLDERS


def test_imports_go_one_way():
    assert importlinter_cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.slow
def test_training_needs_no_library_that_reads_scans_or_draws():
    """So a GPU machine that has PyTorch, NumPy and Accelerate can train on prepared regions."""
    script = f"""
import sys
sys.modules |= dict.fromkeys({["SimpleITK", "monai", "pydantic", "matplotlib", "IPython", "papermill"]!r})
from mupkg.configurations import build
from mupkg.data import PatchSource
from mupkg.stages import predict_volume, train
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_place_on_somebodys_machine():
    names = "|".join(["work", "tmp", "root", "home", "Users"])  # apart, so that this file does not find itself
    place = re.compile(rf"(?<![\w.\-/<>*}}])/(?:{names})(?:/|\b(?![\w.-]))")
    assert place.search("see " + "/" + "work/main") and place.search('"' + "/" + 'root"')
    assert not place.search("data/" + "work/x") and not place.search("the/" + "root")
    found = []
    for path in files_of_the_repository():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path}: {match.group()}" for match in place.finditer(text)]
    assert not found


def test_real_scans_are_in_the_folder_that_is_named_or_nowhere(monkeypatch, tmp_path):
    """Regression: `make test` in a fresh clone exports an empty name, and the current folder was taken for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MUPKG_REALDATA", raising=False)
    assert real_scans() is None
    for nothing in ("", " \t"):
        monkeypatch.setenv("MUPKG_REALDATA", nothing)
        assert real_scans() is None
    (tmp_path / "a blank").mkdir()
    for named in ("a blank", str(tmp_path / "a blank"), "."):
        monkeypatch.setenv("MUPKG_REALDATA", named)
        assert real_scans() == (tmp_path / named).resolve()
    for absent in ("absent", "a blank/absent"):
        monkeypatch.setenv("MUPKG_REALDATA", absent)
        with pytest.raises(NotADirectoryError, match=f"MUPKG_REALDATA names {absent}"):
            real_scans()


def test_no_test_looks_for_real_scans_on_its_own():
    tests = [path for path in files_of_the_repository() if path.parts[0] == "tests" and path.suffix == ".py"]
    tests.remove(Path(__file__).relative_to(ROOT))
    asking = {path for path in tests if re.search(r"environ\b.*MUPKG_REALDATA", (ROOT / path).read_text("utf-8"))}
    assert asking == {Path("tests/real_scans.py")}


# The paper


@pytest.mark.parametrize(
    ("name", "rows"), [("table3.csv", 12), ("table4.csv", 11), ("table5.csv", 4), ("table6.csv", 4)]
)
def test_published_tables_can_be_read_and_every_column_is_explained(name, rows):
    table = pd.read_csv(PUBLISHED / name)
    explained = set(re.findall(r"`(\w+)`", (PUBLISHED / "README.md").read_text(encoding="utf-8")))
    assert len(table) == rows
    assert set(table.columns) <= explained
    assert "note" in table
    measured = table.filter(regex=r"_(mean|std|median|p)$")
    assert measured.shape[1] >= 4
    assert all(pd.api.types.is_numeric_dtype(measured[column]) for column in measured)
    fractions = measured.filter(regex=r"^(DSC|SEN|PPV)_|_p$")
    assert ((fractions > 0) & (fractions < 1) | fractions.isna()).all(axis=None)


def test_published_table3_has_the_configurations_of_table_ii_in_the_order_that_is_printed():
    """Regression: UNet++ stood above R-Sep, as in Table II, so that two of eleven rankings were not the paper's."""
    names = pd.read_csv(PUBLISHED / "table3.csv")["configuration"].tolist()
    assert names[:4] == ["UNet", "MetricUNet-R-Sep", "UNet++", "MetricUNet-R"]
    assert names[3:] == list(TABLE_II)[3:] and {*names} == {*TABLE_II}
    assert configuration("MetricUNet-HCR").name not in names


def test_the_probable_misprint_is_where_the_note_says():
    table = pd.read_csv(PUBLISHED / "table3.csv", index_col="configuration")
    harmonic = 2 * table["SEN_mean"] * table["PPV_mean"] / (table["SEN_mean"] + table["PPV_mean"])
    off = (harmonic - table["DSC_mean"]).abs()
    assert round(off["MetricUNet-H"], 3) == 0.020
    assert off.drop("MetricUNet-H").max() < 0.007
    assert table["DSC_median"].idxmax() == "MetricUNet-H"
    assert table["note"].dropna().index.tolist() == ["MetricUNet-H"]
    assert table.loc["MetricUNet-H", "note"].startswith("probably a misprint: ")


def test_published_tables_agree_with_each_other():
    third = pd.read_csv(PUBLISHED / "table3.csv", index_col="configuration")
    fourth = pd.read_csv(PUBLISHED / "table4.csv", index_col="method")
    fifth = pd.read_csv(PUBLISHED / "table5.csv", index_col="anchors")
    pairs = [(fourth.loc[name], third.loc[name]) for name in ("UNet", "UNet++", "MetricUNet-HCP")]
    pairs.append((fifth.loc[20], third.loc["MetricUNet-R"]))
    for short, long in pairs:
        for column in ("DSC_mean", "ASD_mean", "SEN_mean", "PPV_mean"):
            assert abs(short[column] - long[column]) < 0.01  # two digits, rounded or cut


def readings(text: str) -> dict[str, str]:
    """Each row of METHOD.md's table of readings by its name."""
    return dict(re.findall(r"^\| (R\d+) \| (.+) \|$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", [f"R{number}" for number in range(1, 17)])
def test_every_reading_is_told_and_its_code_is_where_it_says(name):
    row = readings((ROOT / "METHOD.md").read_text(encoding="utf-8"))[name]
    paper, unclear, here, why, where = row.split(" | ")
    assert all((paper, unclear, here, why))
    file, *names = re.findall(r"`([\w./]+)`", where)
    assert names
    code = (ROOT / file).read_text(encoding="utf-8")
    for wanted in names:
        assert re.search(rf"\b(?:def|class) {wanted}\b|^[A-Z_, ]*\b{wanted}\b.* = ", code, re.MULTILINE)


def test_the_readme_begins_with_the_two_commands():
    first_lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:6]
    commands = [line.split("#")[0].strip() for line in first_lines if line.startswith("make ")]
    assert commands == ["make demo", "make test"]


def text_of(page: Path) -> str:
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")


def test_links_in_the_pages_lead_somewhere():
    pages = [path for path in files_of_the_repository() if path.suffix in (".md", ".ipynb")]
    links = [(page, link) for page in pages for link in LINK.findall(text_of(ROOT / page))]
    assert {page.suffix for page, _ in links} == {".md", ".ipynb"}
    assert not [f"{page}: {link}" for page, link in links if not (ROOT / page.parent / link).exists()]


WINGS = ("report", "trials", "explore", "nnunet", "data.phantom", "stages.film", "scans.dicom_rt")
CORE = """
from mupkg.configurations import build
from mupkg.data import Cohort, PatchSource, Preparation, prepare
from mupkg.data.build import write_cohort
from mupkg.parameters import Stage2Settings
from mupkg.stages import Regions, card, locate, segment, train
from mupkg.stages.evaluation import evaluate_run
from mupkg.stages.regions import write_regions
"""


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_does_without_the_wings():
    hidden = [f"mupkg.{wing}" for wing in WINGS]
    run_python(f"import sys\nsys.modules |= dict.fromkeys({hidden})\n{CORE}")
    for name in hidden:  # or the test would hide nothing
        assert importlib.util.find_spec(name)


@pytest.mark.parametrize(("names", "lines"), [("segment", 2700), ("segment, train", 3300)])
def test_what_segmenting_and_training_load_stays_small_enough_to_read(names, lines):
    """And it needs no reader of DICOM, no figures and no notebook."""
    script = f"import sys\nfrom mupkg.stages import {names}\n"
    script += "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'mupkg'), sep='\\n')\n"
    files = run_python(script).splitlines()
    assert files and sum(len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files) <= lines
    run_python(script.replace("\n", "\nsys.modules |= dict.fromkeys(['pydicom', 'matplotlib', 'IPython'])\n", 1))


def functions_longer_than(lines: int, code: str) -> list[str]:
    every = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [n.name for n in every if n.end_lineno - n.lineno >= lines]


def test_no_function_is_longer_than_a_screen():
    assert functions_longer_than(2, "def f():\n    x = 1\n    return x\n\n\ndef g():\n    return 1") == ["f"]
    modules = sorted((ROOT / "mupkg").rglob("*.py"))
    long = {str(path): functions_longer_than(60, path.read_text(encoding="utf-8")) for path in modules}
    assert modules and not {path: names for path, names in long.items() if names}


def test_what_notebooks_may_be_told_stays_small_enough_to_read():
    assert len((ROOT / "mupkg/parameters.py").read_text(encoding="utf-8").splitlines()) <= 500


def test_the_readmes_example_of_an_own_network_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [block for block in blocks if "EmbeddingTap" in block]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    terms = names["terms"]
    assert set(terms.metric) == {"H", "C"}
    assert terms.total.item() > terms.cross_entropy.item() > 0
    assert all(p.grad is not None for p in names["network"].network.upcat_1.parameters())
