"""A method of one's own, outside the package: a FedAvg whose clients send only the sign of what they learned.

`python -m ficpd run ... --set method.name=examples.method`, from the folder above, finds it by its dotted name; here it is
handed to the engine directly.
"""

from ficpd.evaluation.evaluate import evaluate
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse
from ficpd.federation import simulation
from ficpd.federation.rounds import RoundSchedule, run_rounds
from ficpd.methods.fedavg import Config, FedAvg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import ClientUpdate, FederationInfo

RECIPE = """
backbone = { name = "tiny" }
task = { name = "classification", labels = { negative = "bad", positive = "good" } }
data = { source = "ratings", columns = { text = "text", target = "polarity" }, max_records = 300 }
partition = { kind = "iid", num_clients = 5 }
"""


class SignAvg(FedAvg):
    name = "sign_avg"

    def local_update(self, client, order):
        update = yield from super().local_update(client, order)
        return ClientUpdate(client.id, {"delta": update.arrays["delta"].sign() * 0.01}, update.weight)


def build(config: Config, training: LocalTrainingConfig) -> SignAvg:
    return SignAvg(training, config.robust)


if __name__ == "__main__":
    context = build_context(parse(RECIPE, "example"))
    method, clients = build(Config(), context.experiment.training), context.clients()
    engine = simulation.build(simulation.Config(), method, clients, context.model)
    state = method.init(FederationInfo(context.start, engine.clients(), num_rounds=3, cohort=5, seed=0))
    schedule = RoundSchedule(num_rounds=3, cohort=5, seed=0)
    for after, done in run_rounds(method, engine, context.model, state, schedule, context.compression):
        state = after
        print(f"round {done.round}: {done.updates} updates, {done.bytes_up} bytes up")
    print(evaluate(method, state, clients, context.model, 4).everyone)
