"""Times a decoder's irreversible twin in PyTorch, as its users would train it; prints JSON lines.

    python scripts/pytorch_decoder.py --config=configs/lm_124m.py --batch=16,64

Compare it with `scripts/benchmark.py --suite=gpu --models=lm_124m`, which has the same sizes, tied
embedding, loss and clipping. The PyTorch step uses torch.compile, flash attention, mixed precision
(autocast to bfloat16, float32 parameters) and fused AdamW. Needs PyTorch, which this package does
not install.
"""

import json
import re
import sys
import time

from absl import flags

from revnet_jax.config import cli, language_model
from revnet_jax.errors import UserError

# Settings of a model for which the twin in PyTorch has the default only.
MUST_BE_USUAL = (
    *("head_size", "norm", "norm_eps", "qk_norm", "bias", "activation"),
    *("learned_positions", "rotary_scaling"),
)

CONFIG = cli.define_config_flag()
BATCH = flags.DEFINE_list("batch", ["16"], "Sequences of a step; a row for each.")
STEPS = flags.DEFINE_integer(
    "steps", 15, "Steps that are timed, after four that are not.", lower_bound=1
)


def main(argv):
    del argv
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{error}: install PyTorch to compare with it") from error
    if not all(re.fullmatch("[0-9]{1,9}", text) and int(text) for text in BATCH.value):
        raise UserError(f"got --batch={','.join(BATCH.value)}, expected numbers from 1")
    model, optimizer = CONFIG.value.model, CONFIG.value.optimizer
    more = model.experts or model.dropout or model.window or model.separate_documents
    usual = language_model().model
    more = more or any(model[name] != usual[name] for name in MUST_BE_USUAL)
    # Refused rather than ignored: the two would be different models.
    plain = model.kv_heads == model.heads and model.tied and not more
    if not plain or optimizer.name != "adamw":
        raise UserError(
            "got a config with grouped heads, an untied embedding, experts, dropout, a window, "
            "separate documents, settings of pretrained decoders or another optimizer, expected "
            "none of these and adamw: the twin in PyTorch has no other"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # TensorFloat-32 for float32 products, as JAX computes them on GPUs by default.
    torch.set_float32_matmul_precision("high")
    for batch in map(int, BATCH.value):
        torch.manual_seed(0)
        # Forget compiled code: for a second batch size it would compile for dynamic shapes.
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
            # The peak is then of this batch size alone.
            torch.cuda.reset_peak_memory_stats()
        row = measure(torch, CONFIG.value, batch, device)
        row["command"] = " ".join(["scripts/pytorch_decoder.py", *sys.argv[1:]])
        print(json.dumps(row), flush=True)


def measure(torch, config, batch, device):
    """A row of results: milliseconds per step, tokens/s, and peak bytes of the device."""
    twin = decoder(torch, config).to(device)
    optimizer = torch.optim.AdamW(
        twin.parameters(),
        lr=config.schedule.learning_rate,
        betas=(config.optimizer.b1, config.optimizer.b2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    compiled = torch.compile(twin)
    context, vocab_size = config.data.context, config.data.vocab_size
    token = torch.randint(0, vocab_size, (batch, context), device=device)
    # Each token's target is the next; the last one's is the first, which costs the same.
    target = token.roll(-1, 1)

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(token, target)
        loss.backward()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    on_gpu = device == "cuda"
    # Kernels run asynchronously: without waiting, only their launches would be timed.
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    # These compile, and are not timed.
    for _ in range(4):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(STEPS.value):
        loss = step()
    wait()
    seconds = (time.perf_counter() - started) / STEPS.value
    return {
        "model": "PyTorch",
        "parameters": sum(p.numel() for p in twin.parameters()),
        "batch": batch,
        "step_ms": 1e3 * seconds,
        "examples_per_second": batch * context / seconds,
        "unit": "tokens",
        "device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "loss": float(loss.detach()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def decoder(torch, config):
    """Our decoder: RMSNorm, causal attention with rotary positions, SwiGLU feed-forward."""
    nn, functional = torch.nn, torch.nn.functional
    width, heads, hidden = config.model.width, config.model.heads, config.model.hidden
    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)  # [B, heads, T, head size / 2] each
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
            self.qkv, self.out = linear(width, 3 * width), linear(width, width)
            self.gate, self.up = linear(width, hidden), linear(width, hidden)
            self.down = linear(hidden, width)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            # [B, T, 3, heads, head size], then each of the three as [B, heads, T, head size].
            qkv = self.qkv(self.norms[0](x)).view(B, T, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(B, T, width))
            h = self.norms[1](x)
            return x + self.down(functional.silu(self.gate(h)) * self.up(h))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(config.data.vocab_size, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.layers = nn.ModuleList(Layer() for _ in range(config.model.layers))
            self.norm = nn.RMSNorm(width)
            half = width // heads // 2
            frequency = config.model.rotary_base ** (-torch.arange(half) / half)
            angles = torch.arange(config.data.context)[:, None] * frequency
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, token, target):
            x = self.embedding(token)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            # Tied: the output layer is the embedding, transposed.
            logits = functional.linear(self.norm(x), self.embedding.weight)
            # All tokens at once, in float32: 12 GiB for 64 sequences of lm_124m.
            logits = logits.view(-1, logits.shape[-1]).float()
            return functional.cross_entropy(logits, target.reshape(-1))

    return Decoder()


if __name__ == "__main__":
    cli.run(main, required=("config",))
