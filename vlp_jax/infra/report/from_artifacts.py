"""Sections made of artefacts: tables, galleries and curves that evaluators left."""

import math
from pathlib import Path

from vlp_jax.infra import artifacts, charts
from vlp_jax.infra.charts import Series
from vlp_jax.infra.report.views import Section, card_view, table_view
from vlp_jax.infra.report.words import as_anchor, as_title


def artifact_sections(workdir: Path, problems: list[str]) -> list[Section]:
    """A section for each artefact of a run, galleries first.

    Args:
        workdir: of the run.
        problems: gets a line for each artefact that is damaged and left out.
    """
    root = workdir / artifacts.ARTIFACTS_FOLDER
    sections = []
    for path in sorted(root.rglob(artifacts.ARTIFACT_FILE)):
        name = path.parent.relative_to(root).as_posix()
        try:
            artifact = artifacts.load(path.parent)
        except ValueError as error:
            problems.append(f"The artefact {name} is left out: {error}.")
            continue
        sections.append(_artifact(f"artifact-{as_anchor(name)}", artifact))
    # Pictures say most at a glance.
    return sorted(sections, key=lambda section: not section.cards)


def _artifact(anchor: str, artifact: artifacts.Artifact) -> Section:
    made = f"Step {artifact.step:,}." if artifact.step else ""
    notes = tuple(filter(None, (f"{artifact.note} {made}".strip(),)))
    if isinstance(artifact, artifacts.Gallery):
        cards = tuple(map(card_view, artifact.cards))
        return Section(anchor, artifact.title, notes=notes, cards=cards)
    if isinstance(artifact, artifacts.Table):
        table = table_view("", artifact.columns, artifact.rows, artifact.highlight)
        return Section(anchor, artifact.title, notes=notes, tables=(table,))
    series = []
    for colour, (label, points) in enumerate(artifact.series.items()):
        drawable = [(x, y) for x, y in points if math.isfinite(x)]
        if any(math.isfinite(y) for _, y in drawable):
            series.append(Series(label, drawable, colour))
    if not series:
        return Section(anchor, artifact.title, notes=(*notes, "This plot has no points."))
    chart = charts.line_chart(
        as_title(artifact.y_label), artifact.y_label, series, artifact.x_label
    )
    return Section(anchor, artifact.title, notes=notes, charts=(chart,))
