"""A finished search for units to skip, as other tools read it: what it chose, and its network.

    run = read_search(WORKDIR)
    with restored(run) as (setup, state):
        ...

The network is that of the run's last checkpoint, with its units gated and its tunables trained; of
a checkpoint of tunables alone, together with its base.
"""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vlp_jax.infra.checkpoint import restore_step
from vlp_jax.infra.report import CONFIG_FILE, RUN_FILE
from vlp_jax.objectives import learns_from
from vlp_jax.train.checks import completed
from vlp_jax.train.initial import CHECKPOINT_FOLDER
from vlp_jax.train.search import Search
from vlp_jax.train.searching import SEARCH_FILE
from vlp_jax.train.setup import TOKENIZER_FILE, Setup, prepare
from vlp_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class SearchRun:
    """What a search has left.

    Attributes:
        workdir: of the run.
        config: of the run, as JSON holds it.
        facts: ``run.json``.
        found: ``search.json``, see ``train.searching``.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    facts: dict[str, Any]
    found: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates of the search."""
        return int(self.found["step"])


def read_search(workdir: pathlib.Path) -> SearchRun:
    """Read what a search has left.

    Args:
        workdir: of the run.

    Raises:
        ValueError: there is no run, it has not searched, or it has not finished.
    """
    for name in (RUN_FILE, CONFIG_FILE):
        if not (workdir / name).is_file():
            raise ValueError(f"{workdir} holds no run: {name} is absent; give a workdir")
    facts = json.loads((workdir / RUN_FILE).read_text())
    config = json.loads((workdir / CONFIG_FILE).read_text())
    if not config.get("search", {}).get("method"):
        raise ValueError(
            f"{workdir} has not searched (config.search.method is empty); give the workdir of a "
            "run with the method das"
        )
    if facts.get("status") != "finished":
        raise ValueError(
            f"{workdir} has not finished ({RUN_FILE} says {facts.get('status')!r}); start it again"
        )
    if not (workdir / SEARCH_FILE).is_file():
        raise ValueError(
            f"{workdir / SEARCH_FILE} is absent, though the run has finished; bring it back, or "
            "search anew in another workdir"
        )
    return SearchRun(workdir, config, facts, json.loads((workdir / SEARCH_FILE).read_text()))


@contextlib.contextmanager
def restored(run: SearchRun, base: str = "") -> Iterator[tuple[Setup, TrainState]]:
    """The run as it was prepared, and its last state, on one device; its workdir is not written to.

    Args:
        run: of ``read_search``.
        base: of a run of tunables: where their base lies, if no longer where it was.

    Raises:
        ConfigError, ValueError, OSError: data, base or checkpoint are absent or other ones.
        DamagedCheckpointError: the last checkpoint is damaged.
    """
    config = ConfigDict(completed(run.config))
    config.tokenizer.path = str(run.workdir / TOKENIZER_FILE)
    config.init_from = ""  # its geometry is in the config, its parameters are in the checkpoint
    config.init_base = base or config.init_base
    config.debug = True  # on one device, which batches of any size fit
    if not any(learns_from(config.objectives).values()) and not config.mixture.metrics:
        config.checkpoint.best_metric = ""
        config.evals = ConfigDict()
    with tempfile.TemporaryDirectory() as scratch:
        setup = prepare(config, pathlib.Path(scratch))
        if list(search_of(setup).choice.units) != run.found["units"]:
            raise ValueError(
                f"{run.workdir / SEARCH_FILE} is about {', '.join(run.found['units'])}, which are "
                f"not the units of {CONFIG_FILE} beside it; give a workdir with both of one run"
            )
        folder = epath.Path(run.workdir) / CHECKPOINT_FOLDER
        elsewhere = setup.tunables.elsewhere
        state = restore_step(folder, run.step, setup.program.state_spec, elsewhere).state
        yield setup, state


def search_of(setup: Setup) -> Search:
    """The search of a run that has one."""
    assert setup.program.search is not None
    return setup.program.search
