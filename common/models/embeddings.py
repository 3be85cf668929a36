"""The conditioning of a model's prompts: embedded once, kept on the CPU, at hand where it is asked
for."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from common.prompts import caption_of

KEPT = 2**30  # bytes of embeddings that stay: 256 prompts of FLUX or Wan, a run visits thousands


class Embeddings:
    """The part of a Family that encodes prompts, in `embedded`; `unwanted` is what guidance leads
    away from."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], ahead: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """b prompts -> {name: [b, ...]}; a prompt that was embedded before is looked up, while
        there is room: what was used last stays. ahead: prompts that will be asked for soon;
        encoders that had to come from the CPU embed them, too, as far as there is room."""
        asked = list(dict.fromkeys(prompts))
        new = [prompt for prompt in asked if prompt not in self.embedded]
        with self._encoders_at_hand() if new else contextlib.nullcontext(), self._no_autocast():
            for prompt in new:  # one by one: an embedding must not depend on its neighbours
                self.embedded[prompt] = self._kept(self.embed(prompt))
            if self.negative and not self.unwanted:
                self.unwanted = self._at_hand(self.text(""))
            room = max(
                len(asked), KEPT // sum(value.nbytes for value in self.embedded[asked[0]].values())
            )
            for prompt in ahead[: room - len(asked)] if new and self.offload_encoders else ():
                self.embedded[prompt] = self.embedded.pop(prompt, None) or self._kept(
                    self.embed(prompt)
                )
        for prompt in asked:
            self.embedded[prompt] = self.embedded.pop(prompt)  # to the end of the line
        for prompt in list(self.embedded)[:-room]:
            del self.embedded[prompt]
        rows = {prompt: self._at_hand(self.embedded[prompt]) for prompt in asked}
        return {
            name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in rows[asked[0]]
        }

    def embed(self, prompt: str) -> dict[str, torch.Tensor]:
        """What the velocity is conditioned on: {name: [...]} without the batch dimension."""
        return self.text(caption_of(prompt))

    def _kept(self, embedding: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Where it waits: on the CPU, as 50,000 prompts would fill any GPU, and pinned, for the GPU
        to fetch it."""
        pinned = self.device.type == "cuda"
        return {
            name: value.cpu().pin_memory() if pinned else value.cpu()
            for name, value in embedding.items()
        }

    def _at_hand(self, embedding: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in embedding.items()}

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast("cuda" if self.device.type == "cuda" else "cpu", enabled=False)

    @contextlib.contextmanager
    def _encoders_at_hand(self) -> Iterator[None]:
        modules = [getattr(self.pipe, name) for name in self.encoders if self.offload_encoders]
        modules = [module for module in modules if module is not None]
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")
