"""`thinwire train --plan auto`: the plan of a run for the ranks that there are, of what can be launched on them.

Rank 0 plans and the others are told, since coding is timed where it runs. The batch stays as given; a plan whose exchanges cost
tokens trains as many more (`plan.penalties`).
"""

import tomllib
from dataclasses import replace
from pathlib import Path

import tomli_w
from torch.distributed import TCPStore

from thinwire.config.run import RunConfig
from thinwire.environment import Environment
from thinwire.errors import UserError
from thinwire.plan.explain import explain, family, limit, slower, waterfall
from thinwire.plan.problem import planned_run, problem_of
from thinwire.plan.search import search
from thinwire.tomlfile import validate
from thinwire.train.outline import outline
from thinwire.train.runtime import share_text
from thinwire.units import show

REFUSED = "!"


def auto(run: Path | None, changes: list[str], cluster: str) -> tuple[RunConfig, list[str]]:
    """The planned run, and three lines: what was chosen, why, what plain DDP would take. cluster: "" for that of the run."""
    problem = replace(problem_of(run, changes, cluster, "", outline), times=(1,))
    if problem.rates is None:
        raise UserError(
            f"--plan auto prices what can be launched, by compute rates, and {problem.cluster.name} has none for its "
            f"{problem.cluster.world_size} ranks; measure it (thinwire probe), and name the file in cluster.file"
        )
    explained = explain(problem, search(problem), asks=False)
    best, plain = explained.best, explained.plain
    config = planned_run(best, problem, cluster or problem.config.cluster.file)
    others = [one for one in explained.found.ranking if family(one) != family(best)]
    behind = f"; next {others[0].candidate}, {slower(others[0], best)}" if others else ""
    lines = [
        f"plan: {best.candidate}, {config.train.steps} steps of {waterfall(best)}, predicted",
        f"  because: limited by {limit(best)}{behind}",
    ]
    if plain is None:
        lines.append("  plain DDP would not fit")
    elif family(plain) == family(best):
        lines.append("  that is what plain DDP does")
    else:
        lines.append(f"  plain DDP would take {show(plain.step_s, 's')} a step, {slower(plain, best)}, predicted")
    return config, lines


def auto_of_ranks(run: Path | None, changes: list[str], environment: Environment, store: TCPStore) -> RunConfig:
    """The same, of ranks that a launcher has started: rank 0 plans for all. Collective."""
    place, text = environment.place, ""
    assert place is not None, "a launcher has started this process"
    if place.rank == 0:
        try:
            config, lines = auto(run, changes, str(environment.lab.cluster) if environment.lab else "")
            print("\n".join(lines), flush=True)
            text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
        except UserError as error:
            text = REFUSED + str(error)
    text = share_text(place, store, "plan", text)
    if text.startswith(REFUSED):
        raise UserError(text.removeprefix(REFUSED))
    return validate(RunConfig, tomllib.loads(text), "the plan")
