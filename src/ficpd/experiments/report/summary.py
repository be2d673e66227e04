"""The verdict and the table of a run, as the screen and the page show them."""

from collections.abc import Mapping, Sequence

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.results import PrivacyReport, RunResult

NONE = "–"
PERCENT = Metric("share", 100, 1)
RIVALS = {"local": "alone", "linear_probe": "a linear probe at home", "zero_shot": "no prompt"}
"""Methods that a client needs nobody for, in the verdict's words."""
AT_HOME = ("local", "linear_probe")


def verdict(results: Sequence[RunResult]) -> tuple[str, ...]:
    """Returns whether joining pays, in a few sentences: the last result against what a client has without the others.

    Scores are of the mean client's own test records. A client is worse off if it is below the better of `local` and
    `linear_probe` by more than one standard error of its own score.
    """
    own, main = results[-1], results[-1].main
    sign, clients = -1 if main.less_is_better else 1, len(own.scores.per_client)
    by_method = {r.method: r for r in results[:-1] if r.method != own.method}
    rivals = {words: by_method[method] for method, words in RIVALS.items() if method in by_method}
    federated = own.method not in (*RIVALS, "centralized")

    def mean(result: RunResult) -> float:
        return result.scores.per_client_mean[main.name]

    figures = {"together" if federated else own.label: own, **rivals}
    whose = f"mean of {clients} clients' own tests" if clients > 1 else "the client's own test"
    percent = main.unit.strip() == "%"
    said = ", ".join(f"{name} {main.shown(mean(result))}" for name, result in figures.items())
    said += f" ({main.name}{' in %' if percent else main.unit}, {whose})."
    sentences = [said]
    if federated and rivals:
        name, best = max(rivals.items(), key=lambda item: sign * mean(item[1]))
        gap, points = sign * (mean(own) - mean(best)), " points" if percent else ""
        paid = f"Joining pays {main.shown(gap)}{points} over {name}" if gap > 0 else "Joining does not pay"
        sentences = [f"{paid if float(main.shown(gap)) else 'Joining changes nothing'}: {said}"]
    if federated and (at_home := [by_method[n].scores.per_client for n in AT_HOME if n in by_method]):
        worse = len(worse_off(own, at_home))
        are = "is" if worse == 1 else "are"
        sentences.append(f"{worse} of {clients} clients {are} worse off than at home, beyond a standard error.")
    private = own.privacy.epsilon is not None and own.privacy.noise is not None
    if (
        federated
        and private
        and RIVALS["zero_shot"] in rivals
        and sign * mean(own) < sign * mean(by_method["zero_shot"])
    ):
        sentences.append(
            "That is below no prompt: the noise hides what the records say. More clients or records, all of them in every "
            "step (training.batch_size), fewer numbers (compression.name = 'subspace') or a larger ε help."
        )
    privacy, left = own.privacy, format_bytes(own.bytes.up_total / own.num_clients)
    guarantee = privacy.guarantee if privacy.epsilon is not None else "no privacy"
    nothing = privacy.noise is None and privacy.epsilon == 0
    sentences.append("Nothing leaves a client." if nothing else f"{left} left each client, {guarantee}.")
    return tuple(sentences)


def worse_off(own: RunResult, at_home: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Returns the clients below their best score in `at_home` by more than one standard error (accuracy; 0 for others)."""
    main, scores, worse = own.main, own.scores, []
    sign = -1 if main.less_is_better else 1
    for client, score in scores.per_client.items():
        rivals = [sign * home[client][main.name] for home in at_home if main.name in home.get(client, {})]
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


def results_table(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Returns headings and cells of the results.

    Accuracy of a single task with a chance level has its 95 % interval.
    """
    main, first = results[0].main, results[0].scores.zero_shot or {}
    guessed = "chance" in first and ":" not in results[0].task
    chance = f" [95 %], chance {main.shown(first['chance'])}" if guessed else ""

    def everyone(score: Mapping[str, float] | None) -> str:
        ends = [score[f"{main.name}_{end}"] for end in ("low", "high")] if guessed and score else None
        return format_score(score, main) + format_interval(ends, main)

    heads = ["method", "privacy", f"everyone's test {main.name}{main.unit}{chance}", f"own test, mean client{main.unit}",
             f"worst client{main.unit}", "bytes up / client / round", "seconds"]  # fmt: skip
    cells = [
        [
            r.label,
            r.privacy.guarantee,
            everyone(r.scores.global_prompt),
            format_score(r.scores.per_client_mean, main),
            format_score(r.scores.per_client_worst, main),
            f"{r.bytes.up_per_client_round:,.0f}",
            f"{r.seconds.total:.0f}",
        ]
        for r in results
    ]
    return heads, cells


def narrow_table(results: Sequence[RunResult]) -> tuple[list[str], list[list[str]], str]:
    """Returns headings, cells and caption of the results for a terminal of 80 columns: one line a method."""
    main = results[0].main
    heads = ["method", "ε", "everyone", "own", "worst", "bytes up"]
    cells = [
        [
            r.label,
            NONE if r.privacy.epsilon is None or r.privacy.noise is None else f"{r.privacy.epsilon:.2f}",
            *(
                format_score(score, main)
                for score in (r.scores.global_prompt, r.scores.per_client_mean, r.scores.per_client_worst)
            ),
            f"{r.bytes.up_per_client_round:,.0f}",
        ]
        for r in results
    ]
    caption = (
        f"{main.name}{main.unit}: one prompt on everyone's test; each prompt on its client's own test, mean and worst "
        "client. bytes up: of a client and round"
    )
    return heads, cells, caption


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
    """Formats the range of the members' noise multipliers."""
    least, most = privacy.noise_multiplier or (None, None)
    if least is None or most is None:
        return NONE
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
