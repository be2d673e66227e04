"""A method of your own: FedAvg whose clients send only the signs of their update.

`ficpd run ... --set method.name=examples.method` finds this module by its dotted name, from the folder above.
"""

import tempfile
from pathlib import Path

import ficpd
from ficpd.methods.fedavg import Config, FedAvg
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import ClientUpdate

RECIPE = """
method = { name = "examples.method" }
backbone = { name = "tiny" }
task = { name = "classification", labels = { negative = "bad", positive = "good" } }
data = { source = "ratings", columns = { text = "text", target = "polarity" }, max_records = 300 }
partition = { kind = "iid", num_clients = 5 }
federation = { num_rounds = 3 }
"""


class SignAvg(FedAvg):
    name = "sign_avg"

    def local_update(self, client, assignment):
        update = yield from super().local_update(client, assignment)
        return ClientUpdate(client.id, {"delta": update.arrays["delta"].sign() * 0.01}, update.weight)


def build(config: Config, training: LocalTrainingConfig) -> SignAvg:
    return SignAvg(training, config.robust)


if __name__ == "__main__":
    recipe = Path(tempfile.mkdtemp()) / "recipe.toml"
    recipe.write_text(RECIPE)
    print(ficpd.run(recipe, recipe.with_name("run")).to_frame().T)
