"""How far a client's sum moves with one record less, for methods that send losses or slopes of losses."""

import torch

import small
from contracts.test_mechanism import Silent
from ficpd.federation.client import Client
from ficpd.federation.method import Method
from ficpd.privacy import clipping, record_gaussian
from ficpd.privacy.clipping import clipped_sum
from ficpd.types import ClientWorkload

CLIP, NUMBER = 0.02, 7


def farthest(of: Method, array: str, model, monkeypatch) -> float:
    """The largest change of the summed array in one step of all `NUMBER` records."""
    monkeypatch.setattr(Client, "noise_source", lambda *_: Silent())
    records, found = small.records(NUMBER, 4), []
    config = record_gaussian.Config(noise_multiplier=1.0, clip_norm=CLIP, delta=1e-3)
    mechanism = record_gaussian.build(config, ClientWorkload(NUMBER, 1.0, 1, 1, 1, 1.0, 1))
    for left_out in (None, *range(NUMBER)):
        client = small.clients(model, of, 1, mechanism=mechanism)["site-0"]
        client.train = [record for place, record in enumerate(records) if place != left_out]
        sent = small.update(of, client, small.first_state(of, {"site-0": client}), model)
        found.append(sent.arrays[array].double() * len(client.train))
    return max(float((found[0] - other).norm()) for other in found[1:])


def clip_each_number(monkeypatch) -> None:
    """Clips each number of a row by itself, in the place of the whole row."""

    def each(rows_BN, clip_norm):
        return torch.cat([clipped_sum(rows_BN[:, k : k + 1], clip_norm) for k in range(rows_BN.shape[1])])

    monkeypatch.setattr(clipping, "clipped_sum", each)
