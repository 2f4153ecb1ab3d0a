"""The page: reads what the run has left, has it turned into views, and fills the template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from vlp_jax.infra import charts, metrics, units
from vlp_jax.infra.files import write_text
from vlp_jax.infra.report.from_artifacts import artifact_sections
from vlp_jax.infra.report.from_facts import as_pairs, command_line, facts_section, flat_config
from vlp_jax.infra.report.from_metrics import (
    History,
    compression_section,
    evaluator_sections,
    headlines,
    speed_section,
    training_section,
)
from vlp_jax.infra.report.views import Headline, Section

REPORT_FILE = "report.html"
CONFIG_FILE = "config.json"
RUN_FILE = "run.json"


def write_report(workdir: Path) -> Path:
    """Writes ``workdir/report.html`` from what the run has left so far.

    A piece that is missing or damaged leaves a short note on the page in its place.

    Args:
        workdir: folder of a run, finished or not.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: ``workdir`` holds no run.
    """
    names = (CONFIG_FILE, metrics.METRICS_FILE, RUN_FILE)
    if not any((workdir / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{workdir} is no run: it holds none of {', '.join(names)}; "
            "give the folder that was passed to the trainer as --workdir"
        )
    problems: list[str] = []
    run = _read_json(workdir / RUN_FILE, problems)
    config = _read_json(workdir / CONFIG_FILE, problems)
    history = _read_history(workdir, problems)
    sections = [
        training_section(history),
        *filter(None, [compression_section(history)]),
        *evaluator_sections(history),
        *artifact_sections(workdir, problems),
        speed_section(history),
        facts_section(run),
    ]
    return write_page(
        workdir / REPORT_FILE,
        str(run.get("name") or workdir.resolve().name),
        sections,
        status=str(run.get("status") or ""),
        subtitle=_subtitle(run, history),
        problems=problems,
        headlines=headlines(history),
        config=flat_config(config),
        command=command_line(run),
        versions=as_pairs(run.get("versions")),
    )


def write_page(
    path: Path,
    name: str,
    sections: Sequence[Section],
    *,
    status: str = "",
    subtitle: Sequence[str] = (),
    problems: Sequence[str] = (),
    headlines: Sequence[Headline] = (),
    config: Sequence[tuple[str, str]] = (),
    command: str = "",
    versions: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes a self-contained page; what is empty is left out of it.

    Args:
        path: of the page; whatever is there is replaced at once.
        name: its heading.
        sections: in this order.
        status: beside the heading, such as ``finished``.
        subtitle: a few words each.
        problems: sentences that warn.
        headlines: numbers of the first screen.
        config: keys and values.
        command: that has led to the page.
        versions: names and versions of what computed it.

    Returns:
        The path.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        name=name,
        status=status,
        subtitle=subtitle,
        problems=problems,
        headlines=headlines,
        sections=sections,
        config=config,
        command=command,
        versions=versions,
        extent=charts.EXTENT,
        style=markupsafe.Markup((here / "page.css").read_text(encoding="utf-8")),
        script=markupsafe.Markup((here / "page.js").read_text(encoding="utf-8")),
    )
    write_text(path, page)
    return path


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in ``path``; empty, with a line in ``problems``, if there is none."""
    if not path.is_file():
        problems.append(f"{path.name} is missing, so what it tells is left out.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} is damaged ({error}), so what it tells is left out.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no object, so what it tells is left out.")
        return {}
    return content


def _read_history(workdir: Path, problems: list[str]) -> History:
    """The points (step, value) of every metric, in the order in which they first appear."""
    try:
        records = metrics.read_metrics(workdir)
    except ValueError as error:
        problems.append(f"The curves are left out: {error}.")
        return {}
    values: dict[str, dict[float, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                values.setdefault(name, {})[record["step"]] = value
    return {name: sorted(points.items()) for name, points in values.items()}


def _subtitle(run: Mapping[str, Any], history: History) -> tuple[str, ...]:
    parts = []
    device = run.get("device") or run.get("device_kind")
    if device:
        count = run.get("device_count") or 1
        parts.append(f"{count} × {device}" if count != 1 else str(device))
    last_steps = [points[-1][0] for points in history.values()]
    if isinstance(run.get("step"), int):
        last_steps.append(run["step"])
    if last_steps:
        total = run.get("total_steps")
        of_total = f" of {total:,}" if isinstance(total, int) else ""
        parts.append(f"step {max(last_steps):,}{of_total}")
    start, end = _time(run.get("start")), _time(run.get("end"))
    if start and end and (start.tzinfo is None) == (end.tzinfo is None):
        parts.append(units.format_seconds((end - start).total_seconds()))
    moment = end or start
    if moment:
        parts.append(f"{'ended' if end else 'started'} {moment:%-d %B %Y, %H:%M}")
    return tuple(parts)


def _time(text: object) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
