"""A method of one's own, outside the package: a FedAvg whose clients send only the sign of what they learned.

`python -m ficpd run ... --set method.name=examples.method`, from the folder above, finds it by its dotted name; here it is
handed to the engine directly.
"""

from ficpd.evaluation.evaluate import evaluate
from ficpd.experiments.build import build_world
from ficpd.experiments.config import parse
from ficpd.federation import simulation
from ficpd.federation.rounds import Schedule, federate
from ficpd.methods.fedavg import Config, FedAvg
from ficpd.optimizers import Training
from ficpd.types import ClientUpdate, Setup

RECIPE = """
backbone = { name = "tiny" }
task = { name = "classification", labels = { negative = "bad", positive = "good" } }
data = { source = "ratings", columns = { text = "text", target = "polarity" }, max_records = 300 }
partition = { kind = "iid", num_clients = 5 }
"""


class SignAvg(FedAvg):
    name = "sign_avg"

    def train(self, client, order):
        update = yield from super().train(client, order)
        return ClientUpdate(client.id, {"delta": update.arrays["delta"].sign() * 0.01}, update.weight)


def build(config: Config, training: Training) -> SignAvg:
    return SignAvg(training, config.robust)


if __name__ == "__main__":
    world = build_world(parse(RECIPE, "example"))
    method, clients = build(Config(), world.experiment.training), world.clients()
    engine = simulation.build(simulation.Config(), method, clients, world.model)
    state = method.init(Setup(world.start, engine.clients(), num_rounds=3, cohort=5, seed=0))
    schedule = Schedule(num_rounds=3, cohort=5, seed=0)
    for after, done in federate(method, engine, world.model, state, schedule, world.compression):
        state = after
        print(f"round {done.round}: {done.updates} updates, {done.bytes_up} bytes up")
    print(evaluate(method, state, clients, world.model, 4).everyone)
