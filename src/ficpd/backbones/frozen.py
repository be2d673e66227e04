"""Runs a frozen transformers text model by its own forward, with vectors that enter at any layer.

At layer 0 the vectors are `inputs_embeds`; at higher layers they join the states of a block (`guards`). Rows are padded on
the right.

Guarantees (checked when a model is loaded; tests/backbones/test_frozen.py):
- embeddings give the states that token ids give;
- a row's states do not depend on longer rows of its batch;
- a row's gradient is zero for all other rows;
- states that are captured at a block and put back give the model's own states; else prompts enter only at layer 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ficpd.backbones.devices import copy_to
from ficpd.backbones.guards import (
    BODY,
    FAILURES,
    HEAD,
    Guarded,
    ReachedError,
    difference,
    find_blocks,
    parameters,
    watch,
)
from ficpd.errors import BackboneError
from ficpd.types import HiddenStates

LONG, SHORT = 9, 5
"""The numbers of tokens in the two rows of the check."""


class FrozenModel(Guarded):
    """A frozen text model, with or without a language head. `causal`: no position sees a later one.

    width: the width of a token embedding.
    most: the maximum number of positions of a padded row.
    sample_TD: the last states of a short text, for comparisons.
    """

    def __init__(self, model: Any, name: str, causal: bool, identity: str | None = None):
        """Checks the model. identity: names the weights, so that slow checks run once; None: they always run."""
        super().__init__(model, name)
        self.identity, self.most = identity, LONG
        self.causal, self.table = causal, model.get_input_embeddings()
        self.width = self.table.weight.shape[1]
        try:
            self._prepare()
        except FAILURES as error:
            raise BackboneError(
                f"backbone.name = {name!r}: a {type(model).__name__} cannot be run on embeddings ({type(error).__name__}: "
                f"{str(error)[:200]}). Use another model."
            ) from error

    # ------------------------------------------------------------ forward passes

    def embed(self, ids: Tensor) -> Tensor:
        """Embeds token ids, [...] to [..., E]."""
        return self.table(copy_to(ids, self.device))

    @torch.no_grad()
    def encode(self, rows: Sequence[Tensor], layer: int) -> list[Tensor]:
        """Returns the input of a block, [T, D] without padding, for each row of embeddings [T, E]."""
        self.check(layer)
        if layer == 0:
            return list(rows)
        text = HiddenStates.of(rows, most=self.most)
        states_STD = self.lower(layer, text.states_STD, self._mask(text.mask_ST, _is_full(text, rows)))
        return [states_TD[: len(row)].clone() for states_TD, row in zip(states_STD, rows, strict=True)]

    def run(self, prompts_SPD: Tensor, hidden: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """Returns the last states [S, P+T, D] of prompts and hidden states, and the hidden states' mask [S, T]."""
        self.check(layer)
        text = HiddenStates.of(hidden, most=self.most - prompts_SPD.shape[1])
        states, mask = text.joined(prompts_SPD.to(self.device))
        return self.upper(layer, states, self._mask(mask, _is_full(text, hidden))), text.mask_ST

    def lower(self, layer: int, states_STE: Tensor, given: dict[str, Any]) -> Tensor:
        """Returns the input of a block for embeddings [S, T, E]."""
        return self.until(layer, lambda: self._run_body(states_STE, given)) if layer else states_STE

    def upper(self, layer: int, states_STD: Tensor, given: dict[str, Any]) -> Tensor:
        """Returns the body's last states for the input [S, T, D] of a block."""
        if layer == 0:
            return self._run_body(states_STD, given).last_hidden_state.to(self.device)
        instead = states_STD.new_zeros(*states_STD.shape[:2], self.width)
        cache = given.get("past_key_values")
        output = self.entering(layer, states_STD, lambda: self._run_body(instead, given), cache)
        return output.last_hidden_state.to(self.device)

    def logits(self, states_ND: Tensor) -> Tensor:
        """Returns the logits [N, V] of the model's language head, with caps, scales and biases."""
        return self._run_head(states_ND).logits[:, 0].to(self.device)

    def head_input(self, states_ND: Tensor) -> Tensor:
        """Returns the input [N, E] of the output embedding, after the head's transformations."""
        try:
            self._run_head(states_ND, stops=True)
        except ReachedError as reached:
            return reached.states[:, 0].to(self.device)
        raise BackboneError(f"{self.name} never came to its output embedding")

    def last_norm(self, states_ND: Tensor) -> nn.LayerNorm | None:
        """Returns the layer norm whose output is the input of the output embedding, if there is one."""
        with torch.no_grad():
            expected = self.head_input(states_ND)
        _, calls = watch(self.model, lambda: self._run_head(states_ND))
        norms = [(part, output[:, 0]) for part, _, output in calls if isinstance(part, nn.LayerNorm)]
        return next((part for part, output in norms[::-1] if torch.equal(output, expected)), None)

    def _run_head(self, states_ND: Tensor, stops: bool = False) -> Any:
        """Runs the model with these states instead of its body's output. `stops`: raises `ReachedError` at the head."""
        head_N1D, kind = states_ND[:, None], self._kind

        def answer(place: int, own: Any, args: Any, kwargs: Any) -> Any:
            if place == HEAD and stops:
                raise ReachedError(args[0])
            return kind(last_hidden_state=head_N1D) if place == BODY else own(*args, **kwargs)

        with self.acting(answer):
            return self.model(inputs_embeds=head_N1D, **self._options(self.model))

    def _run_body(self, states_STE: Tensor, given: dict[str, Any]) -> Any:
        return self.body(inputs_embeds=states_STE, **{**self._options(self.body), **given})

    def _mask(self, mask_ST: Tensor, full: bool = False) -> dict[str, Any]:
        """Returns a mask, except for causal models and `full` rows: some fused kernels accept no mask."""
        return {} if self.causal or full else {"attention_mask": mask_ST.long()}

    def _options(self, module: Any) -> dict[str, Any]:
        return {"use_cache": False} if self.causal and "use_cache" in parameters(type(module)) else {}

    # ------------------------------------------------------------ checks

    def sample_ids(self) -> list[Tensor]:
        """Returns two fixed short rows of token ids."""
        padding = getattr(self.model.config, "pad_token_id", None)
        ids = [i for i in range(5, min(len(self.table.weight), 500)) if i != padding] or [0]
        drawn = torch.randint(len(ids), (2, LONG), generator=torch.Generator().manual_seed(0)).tolist()
        long, short = ([ids[i] for i in row] for row in drawn)
        return [torch.tensor(row, device=self.device) for row in (long, short[:SHORT])]

    def _prepare(self) -> None:
        """Finds body and blocks in one forward, and checks the guarantees on two short rows."""
        rows = self.sample_ids()
        _, calls = watch(self.model, lambda: self.model(input_ids=rows[0][None], **self._options(self.model)))
        self.body, _, last = [c for c in calls if torch.is_tensor(getattr(c[2], "last_hidden_state", None))][-1]
        self._kind, self.sample_TD = type(last), last.last_hidden_state[0].to(self.device)
        if self.body is not self.model:
            self.guard(self.body, BODY)
            if outputs := self.model.get_output_embeddings():
                self.guard(outputs, HEAD)
        self.guard_blocks(*find_blocks(self.body, calls, self.width))
        self.closed = self.remembered("rows and layers", self.identity, lambda: self._check_all(rows))
        self.depth = 1 if self.closed else self.depth

    def _check_all(self, rows: Sequence[Tensor]) -> str:
        """Raises `BackboneError` if a guarantee fails. Returns why the middle layers are closed ("": they are open)."""
        with torch.no_grad():
            other_TD = (
                self.body(input_ids=rows[1][None], **self._options(self.body)).last_hidden_state[0].to(self.device)
            )
        self._compare_rows([self.embed(row) for row in rows], [self.sample_TD, other_TD])
        return self.why_closed()

    @torch.enable_grad()
    def _compare_rows(self, embedded: Sequence[Tensor], alone: Sequence[Tensor]) -> None:
        """Compares a padded batch of embeddings with each row's ids alone, and checks its gradients."""
        text = HiddenStates.of(embedded, most=LONG)
        leaf = text.states_STD.detach().requires_grad_(True)
        states_STD = self._run_body(leaf, self._mask(text.mask_ST)).last_hidden_state.to(self.device)
        weight_D = torch.linspace(-1, 1, states_STD.shape[-1], device=self.device)  # a norm's plain sum is constant
        for row, expected in enumerate(alone):
            differs = difference(states_STD[row, : len(expected)], expected)
            self.require(
                differs, "a row's embeddings in a batch with another row's give other states than its ids alone"
            )
            self.require_own_gradient(states_STD[row, len(expected) - 1].float() @ weight_D, leaf, row)

    @torch.no_grad()
    def differs(self, layer: int) -> str:
        embedded = self.embed(self.sample_ids()[0])[None]
        given = self._mask(torch.ones(1, LONG, dtype=torch.bool, device=self.device))
        return self.why_not(
            layer,
            lambda: difference(self.upper(layer, self.lower(layer, embedded, given), given)[0], self.sample_TD),
        )


def _is_full(text: HiddenStates, rows: Sequence[Tensor]) -> bool:
    """Tells whether no row is padded, without reading the mask, which may be on a GPU."""
    return all(len(row) == text.states_STD.shape[1] for row in rows)
