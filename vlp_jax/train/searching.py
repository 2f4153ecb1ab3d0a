"""Comparing choices of units between the updates of a run, and choosing.

A comparison is one program whatever is skipped: the loss of the run's objectives on one batch,
without gradient, of several choices one after the other (under ``vmap`` all of them would be held
at once). What was drawn, and by which key, is common to all. What is learned goes into the state,
and the best choice so far into the switches of the parameters.

``search.json`` of the workdir has the last choice, what each unit costs and does, and what the
choices of 0, 1, ... units lose.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.data.build import build_plan, open_loader
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.loader import JointLoader
from vlp_jax.data.source import Source
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.evals.fixed_set import check_clean
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.infra.mesh import replicated
from vlp_jax.models.similarity import cosines
from vlp_jax.objectives.base import Params
from vlp_jax.train.program import Program
from vlp_jax.train.search import Search
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import Batches
from vlp_jax.transfer.search import Regression
from vlp_jax.transfer.units import with_kept

SEARCH_FILE = "search.json"
_COMPARED, _CANDIDATES = 0x5C2, 0x5C3  # folded into keys
_MANY = 2**31  # batches: there is no last one


@dataclasses.dataclass(frozen=True)
class Compared:
    """Choices on batches.

    Attributes:
        losses: float64 [batches, choices].
        metrics: of the objectives, float64 [batches, choices] each.
    """

    losses: np.ndarray
    metrics: dict[str, np.ndarray]


class Searcher:
    """Compares choices, and keeps the best in the state.

    Attributes:
        seconds: that comparisons have taken, compiling left out.
        compile_seconds: that their program took to compile.
    """

    def __init__(self, program: Program, search: Search, plan: JointPlan, workdir: pathlib.Path):
        """Compiles nothing yet.

        Args:
            program: of the run.
            search: of the run.
            plan: of batches in one bucket, which choices are compared on; of any number of rows.
            workdir: of the run.
        """
        self._program, self._search, self._plan = program, search, plan
        self._workdir = workdir
        [self._bucket] = plan.buckets()
        self._loader: JointLoader | None = None
        self._held: tuple[int, Batches] | None = None  # the batches read last, and their number
        self._losses: Any = None
        self._cosines: Any = None
        self.seconds = self.compile_seconds = 0.0

    def compile(self) -> None:
        """Compile what comparisons need, ahead of the first."""
        begun = time.perf_counter()
        program, search = self._program, self._search
        everywhere = replicated(program.mesh)
        shape = (search.candidates, len(search.choice.units))
        skipped = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=everywhere)
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        jitted = jax.jit(self._compare, out_shardings=everywhere)
        rows = {name: plan.batch_size for name, plan in self._plan.plans.items()}
        batches = program.batch_specs(self._bucket, rows)
        with jax.set_mesh(program.mesh):
            seen = _seen(program.state_spec)
            lowered = jitted.lower(seen, batches, skipped, number)
            self._losses = lowered.compile()
            if search.measures_similarity:
                cosines = jax.jit(self._compared_tokens, out_shardings=everywhere)
                self._cosines = cosines.lower(seen, batches).compile()
        if search.learner is not None:  # small programs, that the first comparison would wait for
            rng = jax.device_put(jax.random.key(0), program.state_spec.rng.sharding)
            self._drawn(rng, 0, jax.device_get(search.init()))
        self.compile_seconds = time.perf_counter() - begun

    def over(self, plan: JointPlan) -> "Searcher":
        """The same comparisons on other batches, by the program that this one has compiled.

        Args:
            plan: of batches of the same sizes.

        Raises:
            ValueError: sizes differ.
        """
        other = Searcher(self._program, self._search, plan, self._workdir)
        ours, theirs = (
            (one._bucket, {name: each.batch_size for name, each in one._plan.plans.items()})
            for one in (self, other)
        )
        if ours != theirs:
            raise ValueError(f"batches of sizes {theirs} cannot be compared in place of {ours}")
        other._losses = self._losses
        return other

    def read(self, step: int) -> int:
        """How many batches the whole search of so many updates has read, the first ones."""
        return self._fresh(step)[-1] + 1

    def is_due(self, step: int) -> bool:
        """Whether choices are compared before this update."""
        search = self._search
        after = step - search.warmup
        return search.learner is not None and after > 0 and after % search.every == 0

    def decide(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """Compare choices, learn, and switch to the best.

        Args:
            state: before the update.
            step: its number.

        Returns:
            The state that has learned, and figures to log.
        """
        begun = time.perf_counter()
        search, learner = self._search, self._search.learner
        assert learner is not None
        learned = jax.device_get(state.extras["search"])
        if search.prior and isinstance(learner, Regression) and not learned["compared"]:
            expected = search.prior * self._dissimilarity(state, [self._number(step)])
            learned = learner.expecting(learned, expected)
        drawn = self._drawn(state.rng, step, learned)
        compared = self.on(state, drawn, [self._number(step)])
        learned = learner.learn(learned, drawn, compared.losses[0])
        specs = self._program.state_spec.extras["search"]
        put = {name: jax.device_put(x, specs[name].sharding) for name, x in learned.items()}
        state = state.replace(extras={**state.extras, "search": put})
        harm = learner.harm(learned)
        chosen = search.choice.best(harm)
        state = self._switched(state, chosen)
        taken = time.perf_counter() - begun
        self.seconds += taken
        values = {"search/seconds": taken, "search/loss": float(compared.losses.mean())}
        for index, unit in enumerate(search.choice.units):
            values[f"search/preference/{unit}"] = float(learned["preference"][index])
            values[f"search/harm/{unit}"] = float(harm[index])
        return state, values

    def conclude(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """Choose for good, and write ``search.json``.

        Args:
            state: after the last update.
            step: updates made.

        Returns:
            The state with the choice in it, and figures to log.
        """
        begun = time.perf_counter()
        search, choice = self._search, self._search.choice
        told = {}
        if search.learner is not None:
            learned = jax.device_get(state.extras["search"])
            harm = search.learner.harm(learned)
            if isinstance(search.learner, Regression):
                told["error"] = search.learner.error(learned).tolist()
                told["expected"] = learned["expected"].tolist()
        else:
            harm = self._harm(state)
        chosen = choice.best(harm)
        rounds = self._fresh(step)
        curve = np.stack(list(choice.orders(harm)))
        compared = self.on(state, np.concatenate([chosen[None], curve]), rounds)
        state = self._switched(state, chosen)
        skipped = choice.names(chosen)
        losses = compared.losses.mean(axis=0)
        found = {
            "method": search.method,
            "reward": "paper" if search.paper else "held_out",
            "split": search.split,
            "step": step,
            "units": list(choice.units),
            "costs": list(choice.costs),
            "harm": harm.tolist(),
            **told,
            "skipped": list(skipped),
            "flops_saved": float(choice.saved[chosen].sum()),
            "loss": float(losses[0]),
            "metrics": {name: float(x.mean(axis=0)[0]) for name, x in compared.metrics.items()},
            "by_count": [
                {
                    "skipped": list(choice.names(some)),
                    "flops_saved": float(choice.saved[some].sum()),
                    "loss": float(loss),
                    **{k: float(x.mean(axis=0)[1 + n]) for k, x in compared.metrics.items()},
                }
                for n, (some, loss) in enumerate(zip(curve, losses[1:], strict=True))
            ],
        }
        if jax.process_index() == 0:
            write_text(self._workdir / SEARCH_FILE, json.dumps(found, indent=1) + "\n")
            print(
                f"skips {', '.join(skipped)}: {found['flops_saved']:.1%} of the FLOPs", flush=True
            )
        self.seconds += time.perf_counter() - begun
        return state, {"search/flops_saved": found["flops_saved"], "search/loss": found["loss"]}

    def on(self, state: TrainState, choices: np.ndarray, numbers: Sequence[int]) -> Compared:
        """Compare choices, all on the same batches, once compiled.

        Args:
            state: of the run.
            choices: bool [choices, n], True for what is skipped; any number of them.
            numbers: of the batches, in the plan.
        """
        size, everywhere = self._search.candidates, replicated(self._program.mesh)
        spare = -len(choices) % size  # so that there is one program
        filled = np.concatenate([choices, np.repeat(choices[-1:], spare, axis=0)])
        seen = _seen(state)
        losses, metrics = [], []
        for number in numbers:
            batches = self._batches(number)
            found = [
                self._losses(seen, batches, *jax.device_put((part, np.int32(number)), everywhere))
                for part in np.split(filled, len(filled) // size)
            ]
            loss, told = jax.tree.map(
                lambda *parts: np.concatenate(parts)[: len(choices)].astype(np.float64),
                *jax.device_get(found),
            )
            losses.append(loss)
            metrics.append(told)
        return Compared(np.stack(losses), jax.tree.map(lambda *parts: np.stack(parts), *metrics))

    def close(self) -> None:
        """Close the loader."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _drawn(self, rng: jax.Array, step: int, learned: Mapping[str, Any]) -> np.ndarray:
        """The choices that are compared before an update: bool [candidates, n]."""
        key = jax.random.fold_in(jax.random.fold_in(rng, step), _CANDIDATES)
        choice, weights = self._search.choice, self._search.log_weights(learned)
        return choice.draws(key, weights, self._search.candidates)

    def _harm(self, state: TrainState) -> np.ndarray:
        """Of the methods that learn nothing as the run goes."""
        search, units = self._search, self._search.choice.units
        if search.method == "random":
            seed = self._program.config.seed
            return np.random.default_rng((seed, len(units))).permutation(len(units)).astype(float)
        if search.method == "similarity":
            return self._dissimilarity(state, self._fresh(self._program.longest))
        return self._alone(state)

    def _alone(self, state: TrainState) -> np.ndarray:
        """The loss that each unit adds when it alone goes: float64 [n]."""
        count = len(self._search.choice.units)
        tried = np.concatenate([np.zeros((1, count), bool), np.eye(count, dtype=bool)])
        losses = self.on(state, tried, self._fresh(self._program.longest)).losses.mean(axis=0)
        return losses[1:] - losses[0]

    def _dissimilarity(self, state: TrainState, numbers: Sequence[int]) -> np.ndarray:
        """1 less the mean cosine of what enters and what leaves each unit: float64 [n].

        Args:
            state: of the run.
            numbers: of the batches, in the plan.
        """
        seen = _seen(state)
        found = [self._cosines(seen, self._batches(number)) for number in numbers]
        return 1.0 - np.mean(np.asarray(jax.device_get(found), np.float64), axis=0)

    def _fresh(self, step: int) -> Sequence[int]:
        """Numbers of the batches that choices are compared on after the last update."""
        if self._search.paper:
            return (0,)
        first = self._number(step) + 1
        return range(first, first + self._search.final_batches)

    def _number(self, step: int) -> int:
        """Of the batch of the comparison before an update."""
        return max(0, step - self._search.warmup) // self._search.every

    def _compare(
        self, state: TrainState, batches: Batches, skipped: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics of each choice: bool [m, n] -> float32 [m] each."""
        units = self._search.choice.units
        key = jax.random.fold_in(jax.random.fold_in(state.rng, number), _COMPARED)

        def one(gone: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            kept = {unit: ~gone[index] for index, unit in enumerate(units)}
            return self._loss(with_kept(state.params, kept), state, batches, key)

        found: tuple[jax.Array, dict[str, jax.Array]] = jax.lax.map(one, skipped)
        return found

    def _loss(
        self, params: Params, state: TrainState, batches: Batches, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        extras, train = state.extras["objectives"], self._search.paper
        return self._program.loss(params, extras, batches, self._bucket, key, train)

    def _compared_tokens(self, state: TrainState, batches: Batches) -> jax.Array:
        """Mean cosines of the tokens before and after each unit, nothing skipped: float32 [n]."""
        units = self._search.choice.units
        params = with_kept(state.params, dict.fromkeys(units, 1.0))
        key = jax.random.fold_in(state.rng, _COMPARED)
        found = cosines(units, lambda: self._loss(params, state, batches, key))
        return jnp.stack([found[unit] for unit in units])

    def _batches(self, number: int) -> Batches:
        """The batches of a comparison, on the devices."""
        number = 0 if self._search.paper else number
        if self._held is not None and self._held[0] == number:
            return self._held[1]
        if self._loader is None or self._loader.step != number:
            self.close()
            steps = range(number, number + _MANY)
            self._loader = open_loader(
                self._program.config, self._plan, steps, self._program.fields
            )
        self._held = number, self._program.batches(next(self._loader))
        return self._held[1]

    def _switched(self, state: TrainState, skipped: np.ndarray) -> TrainState:
        """The state with the switches of its parameters as chosen."""
        units = self._search.choice.units
        kept = {unit: float(not gone) for unit, gone in zip(units, skipped, strict=True)}
        switched = with_kept(state.params, kept)

        def placed(new: jax.Array, old: jax.Array, spec: jax.ShapeDtypeStruct) -> jax.Array:
            return old if new is old else jax.device_put(new, spec.sharding)

        specs = self._program.state_spec.params
        return state.replace(params=jax.tree.map(placed, switched, state.params, specs))


def _seen(state: TrainState) -> TrainState:
    """What a comparison reads of a state: its time is the host's, who hands over every array."""
    return state.replace(opt_state=())


def build_searcher(
    config: ConfigDict,
    program: Program,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    workdir: pathlib.Path,
) -> Searcher:
    """What compares choices in a run, on batches of their own.

    Args:
        config: of the run.
        program: of the run, with a search.
        sources: that it trains on, by name.
        tokenizer: of the run.
        workdir: of the run.

    Raises:
        ConfigError: the split it compares on is tested, or shares pictures with one that is, or
            with what is trained on; or the run has stages.
        ValueError: from a source, naming the key or the file.
    """
    assert program.search is not None
    split, key = program.search.split, "search.split"
    if program.stages is not None:
        raise ConfigError(
            "search.method",
            "in a run of stages, whose units would be compared on batches that a stage lacks",
            "Search in a run of one stage",
        )
    tested = {
        (section.source, section.split)
        for section in config.evals.values()
        if "split" in section and (section.get("on", "last") == "best" or section.split == "test")
    }
    if split == "test" or split in {other for _, other in tested}:
        raise ConfigError(
            key,
            f"{split!r} is what the run is tested on, so that the choice would have seen it",
            "Use a split that is neither trained on nor tested, such as 'val'",
        )
    compared = {name: build_source(config, name, split=split) for name in sources}
    for name, source in compared.items():
        if not program.search.paper:
            check_clean(key, sources[name], source)
        for other in sorted(other for of, other in tested if of == name):
            tests = build_source(config, name, split=other)
            check_clean(key, tests, source, f"split {other!r}, which is tested,")
    own = ConfigDict(config.to_dict())
    own.data.num_edges, own.data.text_edges = 1, ()
    for section in own.data.batches.values():
        section.update(num_edges=1, text_edges=())
    return Searcher(program, program.search, build_plan(own, compared, tokenizer), workdir)
