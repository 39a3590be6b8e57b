"""A small GPT over bytes: the decoder of GPT-2 (Radford et al. 2019) without dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # a byte each: no tokenizer, and no text that cannot be read
INIT_STD = 0.02


class Block(nn.Module):
    """Attention, then a layer of 4 × ``width`` neurons; each reads a normalised copy of what it adds to ("pre-norm")."""

    def __init__(self, width: int, heads: int) -> None:
        """``width`` numbers per position, ``heads`` of which each sees ``width / heads``."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and the result: (n, positions, width)."""
        n, positions, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, positions, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (n, heads, positions, width / heads) each
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(n, positions, width))
        thought: Tensor = self.narrow(F.gelu(self.wide(self.norm2(x)), approximate="tanh"))
        return x + thought


class GPT(nn.Module):
    """Predicts each byte from those before it.

    The matrix that reads bytes also writes them (Press and Wolf 2017, arXiv:1608.05859).
    """

    def __init__(self, layers: int = 4, heads: int = 4, width: int = 128, context: int = 128) -> None:
        """``layers`` blocks of ``width`` numbers per position, of which there are ``context`` at most."""
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)
        for name, weight in self.named_parameters():  # each block adds twice to what it reads: the sum is to keep its size
            if name.endswith(("project.weight", "narrow.weight")):
                nn.init.normal_(weight, std=INIT_STD / (2 * layers) ** 0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """``x`` int64 (n, positions), ``labels`` likewise → logits (n, positions, 256) and, with labels, the mean cross-entropy."""
        here = torch.arange(x.shape[1], device=x.device)
        hidden = self.bytes(x) + self.positions(here)
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.norm(hidden), self.bytes.weight)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    @torch.no_grad()
    def write(self, prompt: bytes, length: int, temperature: float, generator: torch.Generator) -> bytes:
        """``length`` bytes that go on after ``prompt`` (at least one byte).

        Args:
            prompt: what is there; of a long one the last ``context`` bytes count.
            length: bytes to write.
            temperature: 0: always the likeliest byte; 1: as likely as the model thinks.
            generator: makes the choice; on the CPU.
        """
        text = list(prompt)
        for _ in range(length):
            x = torch.tensor([text[-self.context :]], device=self.bytes.weight.device)
            logits = self(x)["logits"][0, -1].float().cpu()
            if temperature:
                choice = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
            else:
                choice = logits.argmax(0, keepdim=True)
            text.append(int(choice))
        return bytes(text[len(prompt) :])


def _initialise(module: nn.Module) -> None:
    """GPT-2's: normal with deviation 0.02, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def flops_per_token(model: GPT) -> float:
    """Floating-point operations of forward and backward for one position, as PaLM counts them (arXiv:2204.02311, appendix B).

    Six for each weight that is multiplied, and 12 × layers × width × context for attention, as if it looked at all of the context.
    """
    weights = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
    width = model.bytes.weight.shape[1]
    return 6.0 * weights + 12.0 * len(model.blocks) * width * model.context
