"""Evaluators: figures, tables and galleries about a set of parameters, one file each."""

import inspect
from collections.abc import Callable, Mapping

from vlp_jax.evals.base import EvalContext, Evaluator
from vlp_jax.evals.captioning import Captioning
from vlp_jax.evals.cloze import Cloze
from vlp_jax.evals.compressed import Compressed
from vlp_jax.evals.explain import Explain
from vlp_jax.evals.few_shot import FewShot
from vlp_jax.evals.heldout import Heldout
from vlp_jax.evals.linear_probe import LinearProbe
from vlp_jax.evals.neighbours import Neighbours
from vlp_jax.evals.reconstruction import Reconstruction
from vlp_jax.evals.retrieval import Retrieval
from vlp_jax.evals.task import Task
from vlp_jax.evals.text_task import TextTask
from vlp_jax.infra.errors import ConfigError, section_arguments

EVALUATORS: Mapping[str, Callable[..., Evaluator]] = {
    "captioning": Captioning,
    "cloze": Cloze,
    "compressed": Compressed,
    "explain": Explain,
    "few_shot": FewShot,
    "heldout": Heldout,
    "linear_probe": LinearProbe,
    "neighbours": Neighbours,
    "reconstruction": Reconstruction,
    "retrieval": Retrieval,
    "task": Task,
    "text_task": TextTask,
}
# Keys of a section that are read by the train loop and not by the evaluator.
_RESERVED = ("type", "on", "every_steps", "every_examples", "every_epochs", "every_percent")


def build_evaluators(context: EvalContext) -> dict[str, Evaluator]:
    """The evaluators of ``config.evals`` by name, in the order of their names.

    Args:
        context: of the run; ``config.evals`` maps name -> section, in which ``type`` is the name
            where absent, and ``every_*`` belongs to the train loop.

    Raises:
        ConfigError: an unknown evaluator or key, or one that is missing.
        ValueError: from a source, naming the key or the file.
    """
    built: dict[str, Evaluator] = {}
    for name, section in sorted(context.config.evals.items()):
        kind = section.get("type", name)
        if kind not in EVALUATORS:
            raise ConfigError(
                f"evals.{name}",
                f"{kind!r} is no evaluator",
                f"Use one of {sorted(EVALUATORS)}, or give `type`",
            )
        parameters = dict(inspect.signature(EVALUATORS[kind]).parameters)
        del parameters["context"], parameters["name"]
        arguments = section_arguments(section, f"evals.{name}", parameters, _RESERVED)
        for key, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and key not in arguments:
                raise ConfigError(f"evals.{name}.{key}", "missing", "Add it")
        built[name] = EVALUATORS[kind](context=context, name=name, **arguments)
    return built
