"""A finished run, or any model, on benchmarks: reads their files, asks the model, prints and writes the table."""

from __future__ import annotations

from llava_pdrop.config.schema import Config
from llava_pdrop.eval import scores as table
from llava_pdrop.eval.evaluate import DROPPING, VANILLA, finished, respondent_in
from llava_pdrop.eval.measure import Score, columns_of, load_benchmarks, measure
from llava_pdrop.eval.respondent import is_ours
from llava_pdrop.eval.team import team_of


def measure_config(config: Config) -> list[Score]:
    """Measures ``eval.benchmarks`` of the finished run of ``config``, with its schedule and those that
    ``eval.training_free`` names. The processes that a launcher has started share the questions; the first one prints
    and writes ``benchmarks/scores.md``.

    Returns:
        the scores; nothing on all but the first process.

    Raises:
        ConfigError: files of a benchmark are missing or wrong, or there is no finished run.
    """
    directory = finished(config)
    loaded = load_benchmarks(config, is_ours(directory))
    own = DROPPING if config.schedule.layers else VANILLA
    with team_of(config, directory) as team:
        respondent = respondent_in(directory, config)
        layers = respondent.hf.config.get_text_config().num_hidden_layers
        columns = columns_of(config, own, layers)
        paper = {own: config.paper.scores} if config.paper else {}
        found = measure(config, respondent, loaded, columns, directory, team, paper)
    if team.first:
        file = table.write(found, directory, f"{config.name}: benchmarks")
        table.show(found, f"{config.name}: benchmarks")
        print(f"table: {file}")
    return found
