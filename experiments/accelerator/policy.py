"""A causal language model that samples ragged groups in one batch and learns from them.

Prompts that begin alike, such as few-shot prompts, share their first tokens: these pass through the model once, and
their keys and values are repeated for all rows. So are those of a prompt for all of its rollouts. Rows without an
advantage have no gradient and are left out of the update.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CLIP = 1.0
"""Largest norm of a step's gradient."""

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
"""How far a token's probability may have moved from that at sampling before it loses its gradient."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Completions of a batch of prompts.

    Attributes:
        tokens: (R, T) sampled tokens; what follows the end of an answer is padding.
        lengths: (R,) tokens of each answer, with the one that ends it.
    """

    tokens: Tensor
    lengths: Tensor

    @property
    def sampled(self) -> Tensor:
        """(R, T) whether a token belongs to the answer."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def rows(self, chosen: Tensor) -> Rollouts:
        """Some rows, without columns that hold padding alone.

        Args:
            chosen: which rows, by position; at least one.
        """
        lengths = self.lengths[chosen]
        return Rollouts(self.tokens[chosen, : int(lengths.max())], lengths)


@dataclass(frozen=True, eq=False)
class _Context:
    """What stands before the completions: a cache of all tokens but the last one, padded on the left.

    Attributes:
        cache: keys and values of the R rows.
        tokens: (R, 1) last token of each prompt.
        mask: (R, P) which of the P tokens are no padding, the last one included.
        positions: (R, 1) of the last token.
    """

    cache: Any
    tokens: Tensor
    mask: Tensor
    positions: Tensor


class Policy:
    """The model, its optimizer, and the tokens that all prompts share.

    Weights in a short format are copies of float32 ones, on which the optimizer works, so that small updates are not
    rounded away.

    Args:
        model: causal language model of transformers, on its device and in the format of its passes.
        prompts: token ids of every prompt that will be used.
        ends: (vocabulary,) whether a token ends an answer.
        max_tokens: longest answer.
        learning_rate: of AdamW, constant.
        seed: of the sampling.
        share_prefix: pass the tokens that all prompts share through the model once.
        skip_rows: leave rows without an advantage out of the update.
        rows_per_pass: most rows of the update in memory at a time.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        ends: Sequence[bool],
        *,
        max_tokens: int,
        learning_rate: float,
        seed: int = 0,
        share_prefix: bool = True,
        skip_rows: bool = True,
        rows_per_pass: int = 256,
    ) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.max_tokens, self.skip_rows, self.rows_per_pass = max_tokens, skip_rows, rows_per_pass
        # transformers 5.24 renames the argument.
        self._cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        # The last token of a prompt is never shared: its logits start the answer.
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False) if share_prefix else []
        shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        self.shared = torch.tensor([shared], dtype=torch.long, device=self.device)
        self.ends = torch.tensor(ends, device=self.device)
        self.padding = int(self.ends.nonzero()[0])
        self._random = torch.Generator(self.device).manual_seed(seed)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._master = [weight.detach().float().clone().requires_grad_() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._master, lr=learning_rate, weight_decay=0.0, fused=self.device.type == "cuda"
        )

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], temperature: Sequence[float] | float = 1.0) -> Rollouts:
        """Sample one completion per row.

        Args:
            prompts: (R,) token ids of each row's prompt.
            temperature: of the rows, or one per row; 0 takes the most probable token.
        """
        self.model.eval()
        context = self._context(prompts)
        heat = torch.as_tensor(temperature, dtype=torch.float32, device=self.device).expand(len(prompts))[:, None]
        lengths = torch.full((len(prompts),), self.max_tokens, device=self.device)
        found = torch.full((len(prompts), self.max_tokens), self.padding, device=self.device)
        running = torch.arange(len(prompts), device=self.device)
        tokens, mask, positions = context.tokens, context.mask, context.positions
        for at in range(self.max_tokens):
            logits = self._logits(context.cache, tokens, mask, positions, last=1)[:, 0]
            # The largest of logits with Gumbel noise is a sample of their softmax.
            noise = -torch.empty_like(logits).exponential_(generator=self._random).log()
            chosen = (logits + heat * noise).argmax(-1)
            found[running, at] = chosen
            goes_on = (~self.ends[chosen]).nonzero()[:, 0]
            lengths[running[self.ends[chosen]]] = at + 1
            if not goes_on.numel():
                break
            if goes_on.numel() < running.numel():  # rows that ended leave the batch
                context.cache.batch_select_indices(goes_on)
                running, chosen, heat = running[goes_on], chosen[goes_on], heat[goes_on]
                mask, positions = mask[goes_on], positions[goes_on]
            tokens, positions = chosen[:, None], positions + 1
            mask = functional.pad(mask, (0, 1), value=1)
        return Rollouts(found[:, : int(lengths.max())], lengths)

    def log_probabilities(self, prompts: Sequence[list[int]], rollouts: Rollouts) -> Tensor:
        """Return the (R, T) log-probability of every sampled token; after the end of an answer they mean nothing."""
        context = self._context(prompts)
        width = rollouts.tokens.shape[1]
        tokens = torch.cat([context.tokens, rollouts.tokens[:, :-1]], dim=1)
        mask = functional.pad(context.mask, (0, width - 1), value=1)
        positions = context.positions + torch.arange(width, device=self.device)
        logits = self._logits(context.cache, tokens, mask, positions, last=width)
        return -functional.cross_entropy(logits.transpose(1, 2), rollouts.tokens, reduction="none")

    def update(self, prompts: Sequence[list[int]], rollouts: Rollouts, advantages: Tensor, iterations: int = 1) -> int:
        """Make one step along :meth:`gradient`, or several from the same rollouts, if there is one.

        Args:
            prompts: as of :meth:`gradient`.
            rollouts: sampled from this model as it is.
            advantages: (R,) float32.
            iterations: steps, TRL's ``num_iterations``.

        Returns:
            Rows that passed through the model in all steps; 0 if no row has an advantage.
        """
        passed, sampled_with = 0, None
        for _ in range(iterations):
            rows, now = self.gradient(prompts, rollouts, advantages, sampled_with)
            if rows:
                self.step()
            sampled_with = now if sampled_with is None else sampled_with
            passed += rows
        return passed

    def gradient(
        self,
        prompts: Sequence[list[int]],
        rollouts: Rollouts,
        advantages: Tensor,
        sampled_with: Tensor | None = None,
    ) -> tuple[int, Tensor]:
        """Add a policy gradient to :attr:`gradients`: that of TRL's clipped loss, as a mean over all sampled tokens.

        It is of minus advantage x r, where r is a token's probability over that at sampling; a token whose r has
        moved out of [1 - ``CLIP_LOW``, 1 + ``CLIP_HIGH``] the way its advantage pushes it has none. For a model that
        has not changed since sampling that is the gradient of minus advantage x log p.

        Args:
            prompts: (R,) token ids of each row's prompt.
            rollouts: sampled from this model as it is, or as it was.
            advantages: (R,) float32.
            sampled_with: (R, T) log-probabilities of the tokens when they were sampled, at least of the rows that pass;
                None for those they have now.

        Returns:
            Rows that passed through the model, 0 if no row has an advantage; and (R, T) log-probabilities of their
            tokens as they are now, 0 elsewhere.
        """
        advantages, passed = advantages.to(self.device), 0
        now = torch.zeros(rollouts.tokens.shape, device=self.device)
        self.model.train()
        for rows, kept in self._passes(rollouts, advantages):
            gain = advantages[rows, None]
            logp = self.log_probabilities([prompts[row] for row in rows.tolist()], kept)
            now[rows, : logp.shape[1]] = logp.detach()
            before = (now if sampled_with is None else sampled_with)[rows, : logp.shape[1]]
            ratio = ((logp - before) * kept.sampled).exp()
            clipped = torch.minimum(gain * ratio, gain * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
            loss = -(clipped * kept.sampled).sum() / rollouts.lengths.sum()
            loss.backward()
            self._collect()
            passed += rows.numel()
        return passed, now

    def _passes(self, rollouts: Rollouts, advantages: Tensor) -> Iterator[tuple[Tensor, Rollouts]]:
        """Rows of the update by position, and their rollouts, as many at a time as may be in memory.

        Rows of like length go together, since a pass is as wide as its longest. Nothing if no row has an advantage.
        """
        if bool((advantages != 0).any()):
            chosen = (advantages if self.skip_rows else torch.ones_like(advantages)).nonzero()[:, 0].to(self.device)
            by_length = chosen[rollouts.lengths[chosen].argsort(stable=True)]
            for rows in by_length.split(self.rows_per_pass):
                yield rows, rollouts.rows(rows)

    @property
    def gradients(self) -> list[Tensor | None]:
        """What :meth:`gradient` added up since the last step, by weight in the order of the model's parameters."""
        return [master.grad for master in self._master]

    def step(self) -> None:
        """Clip the gradients to a norm of ``CLIP``, let AdamW change the weights, and forget the gradients."""
        torch.nn.utils.clip_grad_norm_(self._master, CLIP)
        self._optimizer.step()
        self.forget()
        with torch.no_grad():
            for master, weight in zip(self._master, self._weights, strict=True):
                weight.copy_(master)

    def forget(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad()

    def _collect(self) -> None:
        """Add the gradients of a pass to those of the float32 weights."""
        for master, weight in zip(self._master, self._weights, strict=True):
            if weight.grad is not None:
                more = weight.grad.float()
                master.grad = more if master.grad is None else master.grad.add_(more)
                weight.grad = None

    def _context(self, prompts: Sequence[list[int]]) -> _Context:
        from transformers import DynamicCache

        cache, shared = DynamicCache(), self.shared.shape[1]
        number: dict[tuple[int, ...], int] = {}
        row_of = torch.tensor([number.setdefault(tuple(prompt), len(number)) for prompt in prompts], device=self.device)
        rest = [prompt[shared:-1] for prompt in number]
        width = max(map(len, rest))
        mask = torch.tensor([[1] * shared + [0] * (width - len(row)) + [1] * len(row) for row in rest])
        mask = mask.to(device=self.device, dtype=torch.long)
        if shared:
            self.model(self.shared, use_cache=True, logits_to_keep=1, **{self._cache: cache})
            cache.batch_repeat_interleave(len(rest))
        if width:
            tokens = torch.tensor([[self.padding] * (width - len(row)) + [*row] for row in rest], device=self.device)
            self._logits(cache, tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, shared:], last=1)
        if shared or width:
            cache.batch_select_indices(row_of)
        last = torch.tensor([[prompt[-1]] for prompt in prompts], device=self.device)
        mask = functional.pad(mask[row_of], (0, 1), value=1)
        return _Context(cache, last, mask, mask.sum(1, keepdim=True) - 1)

    def _logits(self, cache: Any, tokens: Tensor, mask: Tensor, positions: Tensor, last: int) -> Tensor:
        found = self.model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=last,
            **{self._cache: cache},
        )
        return found.logits.float()
