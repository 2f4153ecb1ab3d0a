"""One self-contained page about a run: `report.html`.

The page is made from what lies in the workdir and needs nothing else: no network, no server, no
plotting library. It knows nothing of the field. Metrics are grouped by the parts of their names
(``train/``, ``speed/``, ``memory/``, ``compile/``; any other first part is an evaluator), and the
last word that tells what is measured (loss, accuracy, gap, ...) decides which lines share a chart.

Files it reads, each of them optional as long as one of the first three is there:

- ``config.json``: the configuration, a nested dict.
- ``metrics.jsonl``: see `vlp_jax.infra.metrics`.
- ``run.json``: facts of the run. The keys ``name``, ``status``, ``step``, ``total_steps``,
  ``start``, ``end`` (ISO 8601), ``device``, ``device_count``, ``command`` and ``versions`` have
  their place on the page; any other scalar is listed, any other dict or list of rows becomes a
  table under its key.
- ``artifacts/``: tables, galleries and curves, see `vlp_jax.infra.artifacts`.

`page` reads them and fills ``page.html``; `from_metrics`, `from_artifacts` and `from_facts` make
its sections, out of what `views` defines; `words` writes names for people. `write_page` writes
other pages of such sections.
"""

from vlp_jax.infra.report.page import (
    CONFIG_FILE,
    REPORT_FILE,
    RUN_FILE,
    write_page,
    write_report,
)

__all__ = ["CONFIG_FILE", "REPORT_FILE", "RUN_FILE", "write_page", "write_report"]
