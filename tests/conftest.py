"""What every test runs under: one thread, and the method's signatures checked at run time."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)  # results do not depend on the machine's cores, and parallel test runs do not fight

# Shapes and types of the method's signatures are checked at every call. The hook works on modules imported after
# it, so it must come before the first import of mupkg. An int is a good float, as everywhere in Python.
jaxtyping.install_import_hook(
    [f"mupkg.{module}" for module in ("models", "samplers", "losses", "configurations", "metrics")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the signature checks, as users run it: for tests of what the code itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
