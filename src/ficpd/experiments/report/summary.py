"""Makes the verdict and the table of a run, for the screen and the page."""

from collections.abc import Mapping, Sequence

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.report.blocks import Block, Table, Text
from ficpd.experiments.results import PrivacyReport, RunResult

NONE = "–"
PERCENT = Metric("share", 100, 1)
RIVALS = {"local": "alone", "linear_probe": "a local linear probe", "zero_shot": "no prompt"}
"""The methods that a client can run alone, to their names in the verdict."""
ALONE, TOGETHER = ("local", "linear_probe"), "together"


def verdict(results: Sequence[RunResult]) -> tuple[str, ...]:
    """Returns the sentences of the verdict: the last result against the methods that a client can run alone.

    Scores are means over the clients' own test records. A client is worse off if its score is more than one standard
    error below the better of `local` and `linear_probe`.
    """
    own, main = results[-1], results[-1].main
    sign, clients = -1 if main.less_is_better else 1, len(own.scores.per_client)
    figures = standing(results)
    rivals, federated = dict(list(figures.items())[1:]), TOGETHER in figures
    by_method = {result.method: result for result in rivals.values()}

    def mean(result: RunResult) -> float:
        return result.scores.per_client_mean[main.name]

    whose = f"mean of {clients} clients' own tests" if clients > 1 else "the client's own test"
    percent = main.unit.strip() == "%"
    said = ", ".join(f"{name} {main.shown(mean(result))}" for name, result in figures.items())
    said += f" ({main.name}{' in %' if percent else main.unit}, {whose})."
    sentences = [said]
    if federated and rivals:
        name, best = max(rivals.items(), key=lambda item: sign * mean(item[1]))
        gap = sign * (float(main.shown(mean(own))) - float(main.shown(mean(best))))
        points = " points" if percent else ""
        paid = f"Joining pays {gap:.{main.digits}f}{points} over {name}" if gap > 0 else "Joining does not pay"
        sentences = [f"{paid if gap else 'Joining changes nothing'}: {said}"]
        if not any(RIVALS[name] in rivals for name in ALONE):
            sentences = [f"Whether joining pays is unknown, because no client was tuned alone: {said}"]
    if federated and (alone := [by_method[n].scores.per_client for n in ALONE if n in by_method]):
        worse = len(worse_off(own, alone))
        are = "is" if worse == 1 else "are"
        sentences.append(f"{worse} of {clients} clients {are} worse off than alone, beyond a standard error.")
    private = own.privacy.epsilon is not None and own.privacy.noise is not None
    if (
        federated
        and private
        and RIVALS["zero_shot"] in rivals
        and sign * mean(own) < sign * mean(by_method["zero_shot"])
    ):
        sentences.append(
            "That is below no prompt: the noise is larger than the signal. More clients or records, all of them in every "
            "step (training.batch_size), fewer numbers (compression.name = 'subspace') or a larger ε help."
        )
    privacy, left = own.privacy, format_bytes(own.bytes.up_total / own.num_clients)
    guarantee = privacy.guarantee if privacy.epsilon is not None else "no privacy"
    nothing = privacy.noise is None and privacy.epsilon == 0
    sentences.append("Nothing leaves a client." if nothing else f"{left} left each client, {guarantee}.")
    return tuple(sentences)


def stopped_early(result: RunResult) -> list[Block]:
    """Returns the reason why a run ended before its last round; [] if it did not."""
    return [Text(f"Stopped early. {result.stopped}", alarm=True)] if result.stopped else []


def standing(results: Sequence[RunResult]) -> dict[str, RunResult]:
    """Returns the last result and those of methods that a client can run alone, by their names in the verdict."""
    own = results[-1]
    by_method = {r.method: r for r in results[:-1] if r.method != own.method}
    federated = own.method not in (*RIVALS, "centralized")
    rivals = {words: by_method[method] for method, words in RIVALS.items() if method in by_method}
    return {TOGETHER if federated else own.label: own, **rivals}


def worse_off(own: RunResult, alone: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Returns the clients that are more than one standard error below their best score in `alone`.

    Only accuracy has a standard error; it is 0 for other metrics.
    """
    main, scores, worse = own.main, own.scores, []
    sign = -1 if main.less_is_better else 1
    for client, score in scores.per_client.items():
        rivals = [sign * scored[client][main.name] for scored in alone if main.name in scored.get(client, {})]
        value, number = score[main.name], scores.test_records.get(client, 0)
        error = (value * (1 - value) / number) ** 0.5 if main.name == "accuracy" and number else 0.0
        if rivals and sign * value < max(rivals) - error:
            worse.append(client)
    return worse


def format_bytes(count: float | None) -> str:
    """
    >>> format_bytes(0), format_bytes(950), format_bytes(12_345), format_bytes(3_400_000), format_bytes(None)
    ('0 B', '950 B', '12.3 kB', '3.40 MB', '–')
    """
    if count is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count >= 10 * size else f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def results_table(results: Sequence[RunResult]) -> Table:
    """Makes the table of a run: a row for each method, with the run's method last.

    The accuracy of a single task with a chance level has its 95 % interval.
    """
    main, first, own = results[0].main, results[0].scores.zero_shot or {}, results[-1].privacy
    guessed = "chance" in first and ":" not in results[0].task

    def everyone(score: Mapping[str, float] | None) -> str:
        ends = [score[f"{main.name}_{end}"] for end in ("low", "high")] if guessed and score else None
        return format_score(score, main) + format_interval(ends, main)

    heads = ["method", f"own test{main.unit}", f"worst client{main.unit}",
             f"everyone's test{main.unit}" + " [95 %]" * guessed, "ε", "up", "down", "seconds"]  # fmt: skip
    cells = [
        [
            r.label,
            format_score(r.scores.per_client_mean, main),
            format_score(r.scores.per_client_worst, main),
            everyone(r.scores.global_prompt),
            format_epsilon(r.privacy),
            format_bytes(r.bytes.up_per_client_round),
            format_bytes(r.bytes.down_per_client_round),
            f"{r.seconds.total:,.0f}",
        ]
        for r in results
    ]
    note = (
        f"{main.name.capitalize()}{'; chance ' + main.shown(first['chance']) if guessed else ''}. Own test: each client's "
        "model on its own test records, the mean over clients. Everyone's test: one prompt on all test records. "
        f"ε{' per ' + own.unit if own.epsilon else ''}: 0 if nothing of the records is sent. Up, down: of a client in a "
        "round, also of messages without values."
    )
    return Table("Every method on the same clients and records", heads, cells, frozenset({len(cells) - 1}), note)


def format_epsilon(privacy: PrivacyReport) -> str:
    """Formats a run's cost for a table: "0" if nothing is sent, "none" without a guarantee."""
    if privacy.epsilon is None:
        return "none"
    return "0" if privacy.noise is None else f"{privacy.epsilon:.2f}"


def format_score(score: Mapping[str, float] | None, metric: Metric) -> str:
    return format_number(score[metric.name] if score else None, metric)


def format_number(value: float | None, metric: Metric, interval: Sequence[float] | None = None) -> str:
    """
    >>> format_number(0.5, PERCENT, [0.25, 0.75]), format_number(None, PERCENT)
    ('50.0 [25.0, 75.0]', '–')
    """
    return NONE if value is None else metric.shown(value) + format_interval(interval, metric)


def format_interval(interval: Sequence[float] | None, metric: Metric) -> str:
    return f" [{', '.join(map(metric.shown, interval))}]" if interval else ""


def format_noise_multipliers(privacy: PrivacyReport) -> str:
    """Formats the range of the clients' noise multipliers."""
    least, most = privacy.noise_multiplier or (None, None)
    if least is None or most is None:
        return NONE
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
